"""Parts of EDM's UNets: filtered resampling, and one residual block for both of them.

Shapes: N images, C channels, H x W pixels, T = H * W tokens, E embedding channels. Source: Karras
et al. 2022 (EDM, arXiv 2206.00364), App. F.1, Table 7; filtered resampling as in NCSN++ (Song et
al. 2021, arXiv 2011.13456, App. H).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend, split_qkv
from .blocks import TimestepBlock
from .layers import Dropout, GroupNorm32, checkpoint, timestep_embedding

Direction = Literal["up", "down"]
CHANNELS_PER_GROUP = 4  # at least so many, in at most 32 groups
MAX_POSITION = 10000


def group_norm(channels: int, eps: float) -> GroupNorm32:
    """Group normalisation in min(32, channels // 4) groups.

    Raises:
        ValueError: these groups would not be of one size.
    """
    groups = min(32, channels // CHANNELS_PER_GROUP)
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{channels} channels cannot be normalised in {max(groups, 1)} groups of "
            f"{CHANNELS_PER_GROUP} or more: choose model_channels and channel_mult so that every "
            "product is a multiple of 32 (below 128: of 4)"
        )
    return GroupNorm32(groups, channels, eps)


def positional_waves(noise_labels: Tensor, dim: int) -> Tensor:
    """Sinusoids of noise_labels [N], sines first, [N, dim]; frequencies from 1 down to 1 / 10000,
    both included.
    """
    half = dim // 2
    # timestep_embedding stops one step short of 1 / max_period, and begins with the cosines.
    return timestep_embedding(noise_labels, dim, MAX_POSITION ** (half / max(half - 1, 1))).roll(
        half, dims=1
    )


class FourierEmbedding(nn.Module):
    """Sinusoids of noise_labels [N] at random frequencies, drawn once: sines first, [N, dim]
    (Tancik et al. 2020).
    """

    freqs: Tensor

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", scale * torch.randn(dim // 2))

    def forward(self, noise_labels: Tensor) -> Tensor:
        angles = noise_labels[:, None] * (2 * math.pi * self.freqs).to(noise_labels.dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def filter_kernel(taps: Sequence[float]) -> Tensor:
    """The separable filter [1, 1, K, K] with these taps along both axes, summing to 1."""
    line = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(line, line) / line.sum() ** 2)[None, None]


class Resampler:
    """Doubles or halves height and width, with a filter that each channel passes by itself; outside
    the image there are zeros.

    Raises:
        ValueError: the taps cannot serve: an odd number of them shifts the image by half a pixel,
            and a sum of 0 loses it.
    """

    def __init__(self, direction: Direction, taps: Sequence[float]) -> None:
        if len(taps) == 0 or len(taps) % 2 or not sum(taps):
            raise ValueError(
                f"resample_filter is {list(taps)}: give an even number of taps that do not sum to "
                "0; [1, 1] (DDPM++) and [1, 3, 3, 1] (NCSN++) are published"
            )
        self.up = direction == "up"
        # Means and repetition say the same as this filter, and need no convolution.
        self.box = len(taps) == 2 and taps[0] == taps[1]
        self.margin = len(taps) // 2 - 1  # padding with which 2 H -> H and H -> 2 H come out even

    def __call__(self, x: Tensor, kernel: Tensor, margin: int | None = None) -> Tensor:
        """x [N, C, H, W] filtered by kernel [1, 1, K, K]; `margin` zeros around x when halving,
        self.margin unless given.
        """
        if self.box:
            return (
                F.interpolate(x, scale_factor=2.0, mode="nearest")
                if self.up
                else F.avg_pool2d(x, 2)
            )
        channels = x.shape[1]
        each = kernel.to(x.dtype).expand(channels, -1, -1, -1)
        if self.up:  # three of four pixels that the filter meets are new and empty
            return F.conv_transpose2d(x, 4 * each, stride=2, padding=self.margin, groups=channels)
        return F.conv2d(
            x, each, stride=2, padding=self.margin if margin is None else margin, groups=channels
        )


class Resample(nn.Module):
    """A Resampler and its filter, nothing learned: [N, C, H, W] -> [N, C, 2 H, 2 W] or
    [N, C, H / 2, W / 2].
    """

    resample_filter: Tensor

    def __init__(self, direction: Direction, taps: Sequence[float]) -> None:
        super().__init__()
        self.resampler = Resampler(direction, taps)
        self.register_buffer("resample_filter", filter_kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        return self.resampler(x, self.resample_filter)


class ResamplingConv2d(nn.Conv2d):
    """Resampling, then a convolution, [N, in_channels, H, W] -> [N, out_channels, 2 H, 2 W] or
    [N, out_channels, H / 2, W / 2].

    Args:
        convolve_first: (halving only) the convolution works on the fine grid, before the filter,
            which meets what it gives on a margin around the image, too.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        direction: Direction,
        taps: Sequence[float],
        convolve_first: bool = False,
    ) -> None:
        assert not (convolve_first and direction == "up"), "only halving knows convolve_first"
        self.resampler = Resampler(direction, taps)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            padding=kernel // 2 + convolve_first * self.resampler.margin,
        )
        self.convolve_first = convolve_first
        self.register_buffer("resample_filter", filter_kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        if self.convolve_first:
            return self.resampler(super().forward(x), self.resample_filter, margin=0)
        return super().forward(self.resampler(x, self.resample_filter))


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of one network have in common.

    Args:
        eps: of the norms.
        skip_scale: what each sum of a branch and its skip path is multiplied by; sqrt(1/2) keeps
            its variance.
        adaptive_scale: the embedding gives scale and shift after the second norm, not an offset
            before it.
        channels_per_head: 0 for one head of all channels.
        resample_filter: taps of the filter.
        resample_proj: a 1x1 convolution on the skip path of blocks that resample.
        use_checkpoint: recompute blocks in the backward pass to save memory.
    """

    emb_channels: int
    dropout: float
    eps: float
    skip_scale: float
    adaptive_scale: bool
    channels_per_head: int
    resample_filter: Sequence[float]
    resample_proj: bool
    use_checkpoint: bool

    def heads(self, channels: int) -> int:
        """How many heads attend over so many channels; 0 (no attention, as published) below the
        width of one.

        Raises:
            ValueError: the channels cannot be shared out evenly.
        """
        heads = channels // self.channels_per_head if self.channels_per_head else 1
        if heads and channels % heads:
            raise ValueError(
                f"attention over {channels} channels, one head per {self.channels_per_head}, "
                f"cannot share them out over {heads} heads: choose model_channels and channel_mult "
                "so that it can, such as a multiple of 64"
            )
        return heads


class UNetBlock(TimestepBlock):
    """skip(x) + conv(act(norm(conv(act(norm(x)))))), told the embedding between the convolutions;
    then, perhaps, attention.

    [N, in_channels, H, W], [N, E] -> [N, out_channels, H', W']; `resample` ("up", "down" or None)
    says what H' is. Parameter names, their order and shapes are those of EDM's checkpoints; how
    they start is the network's business.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        resample: Direction | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.style = style
        taps = style.resample_filter
        self.norm0 = group_norm(in_channels, style.eps)
        self.conv0 = (
            ResamplingConv2d(in_channels, out_channels, 3, resample, taps)
            if resample
            else nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.affine = nn.Linear(
            style.emb_channels, (2 if style.adaptive_scale else 1) * out_channels
        )
        self.norm1 = group_norm(out_channels, style.eps)
        self.dropout = Dropout(style.dropout)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        projected = style.resample_proj or in_channels != out_channels
        self.skip: nn.Module
        if resample:
            self.skip = (
                ResamplingConv2d(in_channels, out_channels, 1, resample, taps)
                if projected
                else Resample(resample, taps)
            )
        else:
            self.skip = (
                nn.Conv2d(in_channels, out_channels, 1)
                if in_channels != out_channels
                else nn.Identity()
            )
        self.num_heads = style.heads(out_channels) if attention else 0
        if self.num_heads:
            self.norm2 = group_norm(out_channels, style.eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._compute, (x, emb), self.parameters(), self.style.use_checkpoint)

    def _compute(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        message = self.affine(emb).to(h.dtype)[:, :, None, None]  # [N, C or 2 C, 1, 1]
        if self.style.adaptive_scale:
            scale, shift = message.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + message)
        h = (self.skip(x) + self.conv1(self.dropout(F.silu(h)))) * self.style.skip_scale
        return self._attend(h) if self.num_heads else h

    def _attend(self, x: Tensor) -> Tensor:
        tokens = self.norm2(x).flatten(2).transpose(1, 2)  # [N, T, C]
        # Rows of the published weight are ordered (head, channel, q | k | v). Reordering them,
        # rather than what they give, leaves queries, keys and values dense, which fast attention
        # needs.
        rows = (self.num_heads, -1, 3, x.shape[1])
        weight = self.qkv.weight.view(rows).permute(2, 0, 1, 3).reshape(-1, x.shape[1])
        assert self.qkv.bias is not None, "qkv is made with a bias"
        bias = self.qkv.bias.view(rows[:3]).permute(2, 0, 1).flatten()
        q, k, v = split_qkv(F.linear(tokens, weight, bias), self.num_heads, new_order=True)
        update = F.linear(attend(q, k, v), self.proj.weight.flatten(1), self.proj.bias)  # [N, T, C]
        return (x + update.transpose(1, 2).view(x.shape)) * self.style.skip_scale
