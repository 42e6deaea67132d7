"""The primitives of the UNets: norms, convolution by dimension, time embedding, recomputation.

Shapes: N images, C channels, H x W pixels. Functions work for one, two and three spatial
dimensions; two are written out in the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ResultT = TypeVar("ResultT")

NUM_GROUPS = 32
_LARGE_MAP = 1024  # pixels
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class SiLU(nn.Module):
    """x * sigmoid(x), elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Dropout(nn.Dropout):
    """nn.Dropout, with masks that a CPU draws some five times faster: 16 random bits for each
    element.

    There p is rounded to a multiple of 2**-16, and what is kept is scaled by the rounded p, so that
    the mean stays exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        kept = round((1 - self.p) * 65536)  # of 65536 equally likely numbers
        if (
            not self.training
            or kept in (0, 65536)
            or x.device.type != "cpu"
            or not x.is_floating_point()
            or torch.compiler.is_compiling()
        ):
            return super().forward(x)
        # Bernoulli draws of PyTorch cost more than a convolution here; one 64-bit word serves four
        # elements.
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.int16)[: x.numel()] < kept - 32768
        mask = torch.empty_like(x, requires_grad=False)  # dense, in the memory format of x
        torch.mul(keep.as_strided(mask.shape, mask.stride()), 65536 / kept, out=mask)
        return x * mask


class GroupNorm32(nn.GroupNorm):
    """Group normalisation whose statistics are taken in float32, or float64 for float64 input.

    The result has the dtype and the memory format of the input [N, C, H, W].
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        if (
            x.dtype is torch.bfloat16
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and x.numel() >= _LARGE_MAP * x.shape[0] * x.shape[1]
        ):
            # This kernel computes in float32 by itself: the same numbers, without a wide copy. Its
            # backward pass is slower than with the copy, and on smaller maps PyTorch takes another
            # kernel, four times slower.
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)
        y = F.group_norm(x.to(wide), self.num_groups, weight, bias, self.eps)
        # The CUDA kernel answers contiguously whatever it was given, and all that follows would
        # then leave the model's layout as well. Where nothing has to move, this costs nothing.
        return y.to(dtype=x.dtype, memory_format=memory_format_of(x))


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The layout in which `x` is stored: channels_last (4-d), channels_last_3d (5-d) or contiguous.

    A tensor that is stored densely in both senses (one channel, or one pixel) counts as contiguous.
    """
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if channels_last is None or x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format


def normalization(channels: int) -> GroupNorm32:
    """Group normalisation with 32 groups.

    Raises:
        ValueError: `channels` is not a positive multiple of 32.
    """
    if channels < 1 or channels % NUM_GROUPS:
        raise ValueError(
            f"{channels} channels cannot be normalised in {NUM_GROUPS} groups: choose base "
            f"channels and channel_mult so that every product is a multiple of {NUM_GROUPS}"
        )
    return GroupNorm32(NUM_GROUPS, channels)


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """nn.Conv1d, nn.Conv2d or nn.Conv3d, by the number of spatial dimensions.

    Raises:
        ValueError: `dims` is not 1, 2 or 3.
    """
    return _by_dims(CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """nn.AvgPool1d, nn.AvgPool2d or nn.AvgPool3d, by the number of spatial dimensions.

    Raises:
        ValueError: `dims` is not 1, 2 or 3.
    """
    return _by_dims(AVERAGE_POOLS, dims)(*args, **kwargs)


def _by_dims(table: dict[int, type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in table:
        raise ValueError(f"dims is {dims}: use {', '.join(map(str, table))}; images have 2")
    return table[dims]


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context that autocast does not reach, on x's device: for parts of a network that
    convert_to_fp16 leaves alone, too.

    The embedding tells neighbouring timesteps apart by little, and the rounding of an output would
    be a part of the loss.
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # "meta" knows no autocast
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def dtype_of(module: nn.Module) -> torch.dtype:
    """In which `module` keeps its weight."""
    weight = module.weight
    assert isinstance(weight, Tensor), f"{type(module).__name__} has no weight"
    return weight.dtype


def linear(*args, **kwargs) -> nn.Linear:
    """nn.Linear, under the name that existing code imports."""
    return nn.Linear(*args, **kwargs)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoids of the timesteps (Vaswani et al. 2017, Sec. 3.5), float32 [N, dim], cosines first.

    With half = dim // 2 the angular frequencies fall geometrically from 1 towards 1 / max_period:
    w_i = max_period ** (-i / half). An odd `dim` ends with a column of zeros.

    Args:
        timesteps: [N], integer or fractional.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(index * (-math.log(max_period) / max(half, 1)))
    angles = torch.outer(timesteps.float(), frequencies)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(waves, (0, dim - 2 * half))


@torch.no_grad()
def scale_module(module: ModuleT, scale: float) -> ModuleT:
    """Multiply every parameter of `module` by `scale`, in place, and return the module."""
    for p in module.parameters():
        p.mul_(scale)
    return module


@torch.no_grad()
def zero_module(module: ModuleT) -> ModuleT:
    """Zero every parameter of `module`, in place, and return it: a branch starting as nothing."""
    for p in module.parameters():
        p.zero_()
    return module


def checkpoint(
    func: Callable[..., ResultT], inputs: Sequence[Tensor], params: Iterable[Tensor], flag: bool
) -> ResultT:
    """func(*inputs); with `flag`, activations are recomputed in the backward pass, not stored.

    Gradients are the same (Chen et al. 2016), dropout included: its random numbers are replayed.
    `params` is unused, for autograd finds the parameters by itself; existing callers pass it.
    """
    if not flag or not torch.is_grad_enabled():
        return func(*inputs)
    return torch_checkpoint(func, *inputs, use_reentrant=False)
