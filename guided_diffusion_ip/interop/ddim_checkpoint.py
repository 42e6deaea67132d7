"""Checkpoints of DDIM's official code (ermongroup/ddim, and pesser's converted DDPM weights) ->
diffusers' names, our flags.

    state, flags = convert_ddim_state(dist_util.load_state_dict("model-790000.ckpt"))
    model = ddpm_unet(**{k: v for k, v in flags["model"].items() if k != "framework"})
    model.load_state_dict(state)

The networks are the same; names differ, attention's 1 x 1 convolutions are linear layers there, and
the official decoder is numbered from the finest resolution, diffusers' from the coarsest.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

State = dict[str, Tensor]

_OUTSIDE = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
PAPER_ATTENTION = 16  # pixels: where every published network attends


def convert_ddim_state(
    content: Any, image_size: int | None = None, ema: bool = True
) -> tuple[State, dict[str, dict[str, Any]]]:
    """Weights in the names of `ddpm_unet` (UNet2DModel), and the flags that describe network and
    process.

    Args:
        content: what the file holds: a state_dict, or the list [state_dict, optimizer, epoch, step,
            averages] of a run; names may begin with "module.".
        image_size: of the images (the shorter side). It leaves no trace in the shapes: without it
            the network is taken to attend at 16 pixels, as all that were published do.
        ema: take the averages, where the file has them beside the plain weights.

    Returns:
        The state_dict, and {"model": ..., "diffusion": ...} as in our YAML files. Dropout leaves no
        trace and is not there; image_size and attention_resolutions neither, for a network without
        attention outside of its middle block, if image_size is not given.

    Raises:
        ValueError: not such a checkpoint, or a network that UNet2DModel cannot be.
    """
    state = _weights(content, ema)
    levels = _count(state, r"down\.(\d+)\.")
    converted = {}
    for name, value in state.items():
        new_name = _convert_name(name, value, levels)
        # Only attention's 1 x 1 convolutions become linear; those of shortcuts stay convolutions.
        converted[new_name] = (
            value[:, :, 0, 0] if ".attentions." in new_name and value.ndim == 4 else value
        )
    return converted, {
        "model": _network_flags(state, image_size),
        "diffusion": {"diffusion_steps": 1000, "noise_schedule": "linear"},
    }


def is_ddim_state(content: Any) -> bool:
    """Does this look like a checkpoint of DDIM's official code?"""
    return any("temb.dense.0.weight" in part for part in _parts(content))


def _parts(content: Any) -> list[State]:
    """The dictionaries of tensors in the file, without "module."."""
    candidates = content if isinstance(content, (list, tuple)) else [content]
    return [
        {name.removeprefix("module."): value for name, value in part.items()}
        for part in candidates
        if isinstance(part, dict)
        and part
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in part.items())
    ]


def _weights(content: Any, ema: bool) -> State:
    parts = [part for part in _parts(content) if "temb.dense.0.weight" in part]
    if not parts or "down.0.block.0.conv1.weight" not in parts[0]:
        raise ValueError(
            "not a checkpoint of DDIM's official code: it has no weights temb.dense.0 and "
            "down.0.block.0.conv1; give a model-NNNNNN.ckpt or ckpt.pth of ermongroup/ddim or "
            "pesser/pytorch_diffusion"
        )
    # A run saves its weights first and their averages last.
    return parts[-1] if ema else parts[0]


def _count(state: State, pattern: str) -> int:
    """How many different numbers the group of the pattern takes at the beginning of names."""
    return len({m[1] for name in state if (m := re.match(pattern, name))})


def _convert_name(name: str, value: Tensor, levels: int) -> str:
    module, _, kind = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}"
    if m := re.fullmatch(r"mid\.(block_1|attn_1|block_2)\.(\w+)", module):
        if part := (_ATTENTION if m[1] == "attn_1" else _RES_BLOCK).get(m[2]):
            return f"mid_block.{_MIDDLE[m[1]]}.{part}.{kind}"
    if m := re.fullmatch(r"(down|up)\.(\d+)\.(.+)", module):
        level = int(m[2]) if m[1] == "down" else levels - 1 - int(m[2])
        if part := _part_of_level(m[1], m[3]):
            return f"{m[1]}_blocks.{level}.{part}.{kind}"
    raise ValueError(
        f"{name} {list(value.shape)} has no counterpart in diffusers' UNet2DModel: this network "
        "differs from DDPM's (conv_shortcut, or resampling without convolutions?)"
    )


def _part_of_level(way: str, rest: str) -> str:
    """What follows down_blocks.N or up_blocks.N; "" if unknown."""
    if rest == f"{way}sample.conv":
        return f"{way}samplers.0.conv"
    if m := re.fullmatch(r"(block|attn)\.(\d+)\.(\w+)", rest):
        part = (_RES_BLOCK if m[1] == "block" else _ATTENTION).get(m[3])
        return f"{'resnets' if m[1] == 'block' else 'attentions'}.{m[2]}.{part}" if part else ""
    return ""


def _network_flags(state: State, image_size: int | None) -> dict[str, Any]:
    width, in_channels = state["conv_in.weight"].shape[:2]
    levels = _count(state, r"down\.(\d+)\.")
    mult = [state[f"down.{level}.block.0.conv1.weight"].shape[0] / width for level in range(levels)]
    if mult[0] != 1:
        raise ValueError(
            f"the first level has {mult[0]:g} times the channels of the first convolution "
            f"({width}); diffusers' UNet2DModel has equally many in both"
        )
    attending = [level for level in range(levels) if f"down.{level}.attn.0.q.weight" in state]
    if image_size is None and attending:
        image_size = PAPER_ATTENTION << attending[0]
    flags = {
        "framework": "ddpm",
        "in_channels": in_channels,
        "num_channels": width,
        "channel_mult": ",".join(f"{m:g}" for m in mult),
        "num_res_blocks": _count(state, r"down\.0\.block\.(\d+)\."),
        "learn_sigma": state["conv_out.weight"].shape[0] == 2 * in_channels,
    }
    if image_size is not None:
        flags |= {
            "image_size": image_size,
            "attention_resolutions": ",".join(str(image_size >> level) for level in attending),
        }
    return flags
