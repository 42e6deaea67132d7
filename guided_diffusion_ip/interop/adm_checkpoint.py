"""ADM checkpoints: plain state_dicts. What architecture one needs, read off its names and shapes, in the language of flags."""
from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from .. import dist_util

State = dict[str, Tensor]


def load_network(model: nn.Module, path: str, flags: dict[str, Any]) -> None:
    """Load the checkpoint at `path` into `model`, which was made from `flags`.

    Raises:
        ValueError: the file is missing, damaged or unsafe, or belongs to another architecture; then the flags that differ.
    """
    state = dist_util.load_state_dict(path)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a state_dict of a network (an opt or state file?): give a model or ema file")
    want = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    have = {name: tuple(p.shape) for name, p in state.items()}
    if want != have:
        raise ValueError(f"{path} is of another architecture: {explain_mismatch(state, flags, want, have)}")
    model.load_state_dict(state)


def explain_mismatch(state: State, flags: dict[str, Any], want: dict, have: dict) -> str:
    """'the checkpoint needs --num_channels 64 (now 128), ...'; the first odd name if no flag explains it."""
    sides = [int(side) for side in str(flags["image_size"]).split("x")]
    found = infer_architecture(state, min(sides))
    differing = [f"--{name} {value} (now {flags[name]})" for name, value in found.items()
                 if name in flags and not _same(name, value, flags)]
    if differing:
        return "it needs " + ", ".join(differing)
    name = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))[0]
    return (f"{name} is {have.get(name, 'absent')} in the checkpoint and {want.get(name, 'absent')} in the network, which no "
            "single flag explains; is it a U-Net of this family (image_size, attention_resolutions)?")


def _same(name: str, value: Any, flags: dict[str, Any]) -> bool:
    if name == "channel_mult":
        from ..networks.unet import default_channel_mult, parse_channel_mult

        size = [int(side) for side in str(flags["image_size"]).split("x")]
        now = parse_channel_mult(flags[name]) if flags[name] else default_channel_mult((size[0], size[-1]))
        return tuple(now) == parse_channel_mult(value)
    if name == "attention_resolutions":  # sizes that the network does not have are allowed, and change nothing
        sides = [int(side) for side in str(flags["image_size"]).split("x")]
        reached = {min(sides) >> i for i in range(len(flags["channel_mult"].split(",")) if flags["channel_mult"] else 7)}
        return reached & set(_numbers(flags[name])) == set(_numbers(value))
    if name == "num_classes":
        return not flags.get("class_cond") or flags[name] == value
    return flags[name] == value


def _numbers(text: Any) -> list[int]:
    return [int(part) for part in str(text).split(",") if part.strip()]


def infer_architecture(state: State, image_size: int | None = None) -> dict[str, Any]:
    """The flags that names and shapes give away; {} if this is not an ADM U-Net.

    Heads, dropout and the order of q, k, v leave no trace in the shapes, and image_size neither; attention_resolutions can be
    told only with image_size (the shorter side).
    """
    if "input_blocks.0.0.weight" not in state or "out.2.weight" not in state:
        return {}
    width, in_channels = state["input_blocks.0.0.weight"].shape[:2]
    out_channels = state["out.2.weight"].shape[0]
    flags: dict[str, Any] = {
        "num_channels": width, "in_channels": in_channels, "learn_sigma": out_channels == 2 * in_channels,
        "class_cond": "label_emb.weight" in state}
    if flags["class_cond"]:
        flags["num_classes"] = state["label_emb.weight"].shape[0]
    first = "input_blocks.1.0"
    flags["use_scale_shift_norm"] = (state[f"{first}.emb_layers.1.weight"].shape[0]
                                     == 2 * state[f"{first}.out_layers.3.weight"].shape[0])
    levels = _levels(state)
    flags["num_res_blocks"] = len(levels[0])
    last = [state[f"input_blocks.{blocks[-1]}.0.out_layers.3.weight"].shape[0] for blocks in levels]
    flags["channel_mult"] = ",".join(f"{channels / width:g}" for channels in last)
    if len(levels) > 1:
        flags["resblock_updown"] = not any(re.match(r"input_blocks\.\d+\.0\.op\.", name) for name in state)
    if image_size:
        attending = [i for i, blocks in enumerate(levels) if f"input_blocks.{blocks[0]}.1.qkv.weight" in state]
        flags["attention_resolutions"] = ",".join(str(image_size >> i) for i in attending)
    return flags


def _levels(state: State) -> list[list[int]]:
    """The numbers of the input_blocks that are residual blocks, by resolution, going down.

    After the stem, every resolution has equally many residual blocks and, but for the last one, a block that halves the size:
    a lone convolution (`op`), or a residual block that looks like the others. The decoder tells those apart.
    """
    numbers = sorted({int(m[1]) for name in state if (m := re.match(r"input_blocks\.(\d+)\.", name))})[1:]
    per_level = _blocks_per_level(state)
    return [numbers[start: start + per_level] for start in range(0, len(numbers), per_level + 1)]


def _blocks_per_level(state: State) -> int:
    """From the decoder: of the num_res_blocks + 1 blocks of a resolution the last one upsamples, which is one entry more."""
    def entries(n: int) -> int:
        return len({m[1] for name in state if (m := re.match(rf"output_blocks\.{n}\.(\d+)\.", name))})

    outs = len({m[1] for name in state if (m := re.match(r"output_blocks\.(\d+)\.", name))})
    return next((n for n in range(1, outs) if entries(n) > entries(0)), outs - 1)
