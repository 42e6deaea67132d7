"""ADM checkpoints: plain state_dicts. What architecture one needs, read off its names and shapes,
in the language of flags.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import dist_util
from ..allocator import keep_freed_memory
from ..networks.unet import CHANNEL_MULTS, default_channel_mult, parse_channel_mult
from ..sizes import parse_size
from .safetensors_file import read_safetensors

State = dict[str, Tensor]


def load_network(
    model: nn.Module, path: str, flags: Mapping[str, Any], given: Container[str] | None = None
) -> None:
    """Load the checkpoint at `path` into `model`, which was made from `flags`.

    Args:
        given: those of the flags that somebody has set, the others being defaults; None: all.

    Raises:
        ValueError: the file is missing, damaged or unsafe, or belongs to another architecture; then
            the flags that differ.
    """
    state = (
        read_safetensors(path)[0]
        if path.lower().endswith(".safetensors")
        else dist_util.load_state_dict(path)
    )
    require_fit(model, state, path, flags, given)
    model.load_state_dict(state)


def require_fit(
    model: nn.Module,
    state: Any,
    path: str,
    flags: Mapping[str, Any],
    given: Container[str] | None = None,
) -> None:
    """Is `state`, out of the file at `path`, one for `model`, which was made from `flags`?
    ValueError as load_network.
    """
    require_state_dict(state, path)
    want = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    have = {name: tuple(p.shape) for name, p in state.items()}
    if want != have:
        raise ValueError(
            f"{path} is of another architecture: "
            f"{explain_mismatch(state, flags, want, have, given)}"
        )


def require_state_dict(state: Any, path: str) -> None:
    """ValueError unless `state`, out of the file at `path`, is a dict of tensors."""
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(v, Tensor) for v in state.values())
        or not all(isinstance(name, str) for name in state)
    ):
        raise ValueError(
            f"{path} is not a state_dict of a network (an opt or state file?): give a model or ema "
            "file"
        )
    for name, v in state.items():
        if v.layout != torch.strided or v.is_nested or v.is_quantized or v.device.type == "meta":
            raise ValueError(
                f"{path}: {name[:200]} is a sparse, nested, quantized or empty (meta) tensor: save "
                "plain dense ones"
            )
        if v.is_complex():
            raise ValueError(f"{path}: {name[:200]} holds complex numbers, and weights are real")


def load_for_sampling(
    model: nn.Module,
    path: str,
    flags: Mapping[str, Any],
    precision: str = "fp32",
    given: Container[str] | None = None,
) -> None:
    """load_network, then everything that a network needs before it is only called: device, layout,
    fp32, fp16 or bf16, eval.
    """
    load_network(model, path, flags, given)
    # Its types leave the layout out.
    model.to(device=dist_util.dev(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    keep_freed_memory(dist_util.dev())
    if precision != "fp32":
        convert = getattr(model, f"convert_to_{precision}", None)
        if convert is None:
            raise ValueError(
                f"{type(model).__name__} has no method convert_to_{precision}, which --precision "
                f"{precision} calls: sample it with --precision fp32"
            )
        convert()
    model.eval().requires_grad_(False)


def explain_mismatch(
    state: State,
    flags: Mapping[str, Any],
    want: dict,
    have: dict,
    given: Container[str] | None = None,
) -> str:
    """'it needs --num_channels 64 --num_res_blocks 3 (now 128, 2)', to be copied; the first odd
    name if no flag explains it.

    Where nobody gave the size of the images, which no shape tells, the sizes that it may be are
    offered, each with the attention_resolutions that belong to it.
    """
    ours, theirs = flags.get("framework", "adm"), framework_of(state)
    if theirs not in ("", ours) and ":" not in ours:
        return f"it needs --framework {theirs} (now {ours})"
    if ours != "adm":
        odd = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))
        return (
            f"{len(odd)} tensors differ, such as {odd[0]}, which is {have.get(odd[0], 'absent')} "
            f"in the checkpoint and {want.get(odd[0], 'absent')} in the network: give the flags or "
            "the --config that it was trained with"
        )
    if is_classifier(state) != ("classifier_width" in flags):
        return (
            "it is a classifier, and a diffusion model is needed here"
            if is_classifier(state)
            else "it is not a classifier, which is needed here"
        ) + " (--model_path, --classifier_path)"
    found = (
        infer_classifier(state)
        if is_classifier(state)
        else infer_architecture(state, min(_sides(flags)))
    )
    if found.pop("super_resolution", "large_size" in flags) != ("large_size" in flags):
        return (
            "it is an image model, which sees no low-resolution image: use the image_ scripts"
            if "large_size" in flags
            else "it is a super-resolution model: use the super_res_ scripts"
        )
    if found.get("class_cond"):
        found |= _classes(found["num_classes"], flags)
    size = "large_size" if "large_size" in flags else "image_size"
    sizes = ""
    if given is not None and size not in given and found and not is_classifier(state):
        sizes = _possible_sizes(state, size, found)
        del found["attention_resolutions"]
    differing = {
        name: value
        for name, value in found.items()
        if name in flags and not _same(name, value, flags)
    }
    needed = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in differing.items())
    if needed:
        needed += f" (now {', '.join(str(flags[name]) or 'empty' for name in differing)})"
    if needed or sizes:
        return "it needs " + " and ".join(filter(None, [needed, sizes]))
    name = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))[0]
    return (
        f"{name} is {have.get(name, 'absent')} in the checkpoint and {want.get(name, 'absent')} in "
        "the network, which no single flag explains; is it a U-Net of this family "
        f"({'large_size' if 'large_size' in flags else 'image_size'}, attention_resolutions)?"
    )


def _possible_sizes(state: State, flag: str, found: dict[str, Any]) -> str:
    """'[--image_size 32 --attention_resolutions 16,8] or [...]': of the sizes that have enough
    levels and attend at 32 pixels at most, as published networks do.
    """
    levels = len(found["channel_mult"].split(","))
    options = []
    for size in (8, 16, 32, 64, 128, 256, 512):
        attention = infer_architecture(state, size)["attention_resolutions"]
        if size >> levels - 1 >= 4 and max(_numbers(attention), default=0) <= 32:
            options.append(f"[--{flag} {size} --attention_resolutions {shlex.quote(attention)}]")
    shape = infer_architecture(state, 1 << 20)["attention_resolutions"]
    shares = ",".join(f"S/{(1 << 20) // number}" for number in _numbers(shape)) or "none"
    small = " (and --small_size)" if flag == "large_size" else ""
    return (
        f"--{flag}{small}, which is not in the file, with the attention that goes with it: "
        f"{' or '.join(options)}, or any size S with {shares}"
    )


def _classes(rows: int, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What num_classes and null_class make so many labels: a row more or less than there are
    classes is the null class.
    """
    classes, null_class = flags["num_classes"], flags.get("null_class", False)
    if rows - classes in (0, 1):
        return {"num_classes": classes, "null_class": rows > classes}
    return {"num_classes": rows - null_class}


def _sides(flags: Mapping[str, Any]) -> tuple[int, int]:
    """Of the images that the network makes; large_size among the flags marks a super-resolution
    model.
    """
    return parse_size(flags.get("large_size") or flags["image_size"])


def _same(name: str, value: Any, flags: Mapping[str, Any]) -> bool:
    """Does the flag, as it is set now, mean the same as `value`?"""
    if name == "channel_mult":
        return _channel_mult(flags) == parse_channel_mult(value)
    if name.endswith(
        "attention_resolutions"
    ):  # sizes that the network does not have are allowed, and change nothing
        reached = {min(_sides(flags)) >> i for i in range(len(_channel_mult(flags)))}
        return reached & set(_numbers(flags[name])) == set(_numbers(value))
    return flags[name] == value


def _channel_mult(flags: Mapping[str, Any]) -> tuple[float, ...]:
    """Of the network that the flags describe; a classifier always has that of its image size."""
    if flags.get("channel_mult"):
        return parse_channel_mult(flags["channel_mult"])
    return default_channel_mult(_sides(flags), super_resolution="large_size" in flags)


def _numbers(text: Any) -> list[int]:
    return [int(part) for part in str(text).split(",") if part.strip()]


# What a checkpoint without the usual names, or with tensors of other shapes, leads to.
_UNLIKE_OURS = (LookupError, ZeroDivisionError, ValueError, OverflowError)


def infer_architecture(state: State, image_size: int | None = None) -> dict[str, Any]:
    """The flags that names and shapes give away, and whether it is a super_resolution model; {} if
    this is not an ADM U-Net.

    Heads, dropout and the order of q, k, v leave no trace in the shapes, and image_size neither;
    attention_resolutions can be told only with image_size (the shorter side). num_classes counts
    the null class, if there is one: it looks like the others.
    """
    try:
        return _architecture(state, image_size)
    except _UNLIKE_OURS:
        return {}


def _architecture(state: State, image_size: int | None) -> dict[str, Any]:
    if (
        "input_blocks.0.0.weight" not in state
        or "out.2.weight" not in state
        or is_classifier(state)
    ):
        return {}
    # Not the width of the first convolution: that is already multiplied by the first of
    # channel_mult.
    width, in_channels = (
        state["time_embed.0.weight"].shape[1],
        state["input_blocks.0.0.weight"].shape[1],
    )
    out_channels = state["out.2.weight"].shape[0]
    # Images have 1, 3 or 4 channels; a super-resolution model sees two at once.
    super_resolution = in_channels in (2, 6, 8)
    in_channels //= 1 + super_resolution
    flags: dict[str, Any] = {
        "super_resolution": super_resolution,
        "num_channels": width,
        "in_channels": in_channels,
        "learn_sigma": out_channels == 2 * in_channels,
        "class_cond": "label_emb.weight" in state,
    }
    if flags["class_cond"]:
        flags["num_classes"] = state["label_emb.weight"].shape[0]
    flags["use_scale_shift_norm"] = _has_scale_shift(state)
    levels = _levels(state)
    flags["num_res_blocks"] = len(levels[0])
    last = [state[f"input_blocks.{blocks[-1]}.0.out_layers.3.weight"].shape[0] for blocks in levels]
    flags["channel_mult"] = ",".join(f"{channels / width:g}" for channels in last)
    if len(levels) > 1:
        flags["resblock_updown"] = not _has_plain_downsampling(state)
    if image_size:
        attending = [
            i
            for i, blocks in enumerate(levels)
            if f"input_blocks.{blocks[0]}.1.qkv.weight" in state
        ]
        flags["attention_resolutions"] = ",".join(str(image_size >> i) for i in attending)
    return flags


def framework_of(state: State) -> str:
    """Whose names these are: adm, edm, ddpm (diffusers), or '' for none of them."""
    for framework, start in (
        ("adm", "input_blocks."),
        ("edm", "model.enc."),
        ("ddpm", "down_blocks."),
    ):
        if any(name.startswith(start) for name in state):
            return framework
    return ""


def is_classifier(state: State) -> bool:
    """An encoder with a head, instead of an encoder and a decoder?"""
    return "input_blocks.0.0.weight" in state and not any(
        name.startswith("output_blocks.") for name in state
    )


def infer_classifier(state: State) -> dict[str, Any]:
    """As infer_architecture, for a classifier.

    image_size shows only with attention pooling (of square images), and attention_resolutions only
    with image_size.
    """
    try:
        return _classifier_architecture(state)
    except _UNLIKE_OURS:
        return {}


def _classifier_architecture(state: State) -> dict[str, Any]:
    head = {
        name.removeprefix("out."): value for name, value in state.items() if name.startswith("out.")
    }
    pool, logits = (
        ("attention", "2.c_proj.weight")
        if "2.c_proj.weight" in head
        else next(
            (
                (pool, name)
                for pool, name, dims in (
                    ("spatial_v2", "3.weight", 2),
                    ("adaptive", "3.weight", 4),
                    ("spatial", "2.weight", 2),
                )
                if name in head and head[name].ndim == dims
            ),
            ("", ""),
        )
    )
    if not pool or "time_embed.0.weight" not in state:
        return {}
    width = state["time_embed.0.weight"].shape[1]
    flags: dict[str, Any] = {
        "classifier_width": width,
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "classifier_pool": pool,
        "num_classes": head[logits].shape[0],
        "classifier_use_scale_shift_norm": _has_scale_shift(state),
        "classifier_resblock_updown": not _has_plain_downsampling(state),
    }
    levels = _classifier_levels(state, width)
    if levels:
        flags["classifier_depth"] = len(levels[0])
    if levels and pool == "attention":
        side = round((head["2.positional_embedding"].shape[1] - 1) ** 0.5)
        if side * side + 1 == head["2.positional_embedding"].shape[1]:
            flags["image_size"] = side << len(levels) - 1
            flags["classifier_attention_resolutions"] = ",".join(
                str(flags["image_size"] >> i)
                for i, blocks in enumerate(levels)
                if f"input_blocks.{blocks[0]}.1.qkv.weight" in state
            )
    return flags


def _classifier_levels(state: State, width: int) -> list[list[int]]:
    """As _levels. There is no decoder to ask, but classifiers have the widths that go with an image
    size; [] if not.
    """
    blocks = len({m[1] for name in state if (m := re.match(r"input_blocks\.(\d+)\.", name))})
    for _, mult in CHANNEL_MULTS:
        if blocks % len(mult):
            continue
        step = blocks // len(
            mult
        )  # residual blocks of a level, and what stands before them: the stem, or the way down
        levels = [list(range(level * step + 1, (level + 1) * step)) for level in range(len(mult))]
        if all(
            _width_of(state, level) == [int(m * width)] * (step - 1)
            for level, m in zip(levels, mult)
        ):
            return levels
    return []


def _width_of(state: State, blocks: Sequence[int]) -> list[int]:
    """Output channels of residual blocks; 0 where there is none."""
    names = (f"input_blocks.{block}.0.out_layers.3.weight" for block in blocks)
    return [state[name].shape[0] if name in state else 0 for name in names]


def _has_scale_shift(state: State) -> bool:
    first = "input_blocks.1.0"
    return (
        state[f"{first}.emb_layers.1.weight"].shape[0]
        == 2 * state[f"{first}.out_layers.3.weight"].shape[0]
    )


def _has_plain_downsampling(state: State) -> bool:
    return any(re.match(r"input_blocks\.\d+\.0\.op\.", name) for name in state)


def _levels(state: State) -> list[list[int]]:
    """The numbers of the input_blocks that are residual blocks, by resolution, going down.

    After the stem, every resolution has equally many residual blocks and, but for the last one, a
    block that halves the size: a lone convolution (`op`), or a residual block that looks like the
    others. The decoder tells those apart.
    """
    numbers = sorted(
        {int(m[1]) for name in state if (m := re.match(r"input_blocks\.(\d+)\.", name))}
    )[1:]
    per_level = _blocks_per_level(state)
    return [numbers[start : start + per_level] for start in range(0, len(numbers), per_level + 1)]


def _blocks_per_level(state: State) -> int:
    """From the decoder: of the num_res_blocks + 1 blocks of a resolution the last one upsamples,
    which is one entry more.
    """

    def entries(n: int) -> int:
        return len(
            {m[1] for name in state if (m := re.match(rf"output_blocks\.{n}\.(\d+)\.", name))}
        )

    outs = len({m[1] for name in state if (m := re.match(r"output_blocks\.(\d+)\.", name))})
    return next((n for n in range(1, outs) if entries(n) > entries(0)), outs - 1)
