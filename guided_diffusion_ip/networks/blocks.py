"""The building blocks of the UNets: residual blocks that hear the time embedding, and resampling.

Shapes: N images, C channels, H x W pixels, E embedding channels. With three spatial dimensions only
the last two are resampled; the first (frames, slices) keeps its length.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    Dropout,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    full_precision,
    linear,
    normalization,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module that takes the time embedding besides its input."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x [N, C, H, W] under the embedding emb [N, E]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, emb)")


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A chain in which those members that are TimestepBlocks also get the embedding."""

    # It is a Sequential for its parameter names only, and is called as a TimestepBlock.
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


def resampling_strides(dims: int) -> tuple[int, ...]:
    """The factor of 2 per spatial dimension, sparing the first of three."""
    return (1, 2, 2) if dims == 3 else (2,) * dims


class Upsample(nn.Module):
    """Repeat every pixel 2 x 2 times, then, with `use_conv`, a 3x3 convolution.

    [N, C, H, W] -> [N, out_channels, 2 H, 2 W].

    Raises:
        ValueError: `out_channels` differs from `channels`, but no convolution changes them.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ) -> None:
        super().__init__()
        self.factors = tuple(float(s) for s in resampling_strides(dims))
        out_channels = _resampled_channels(channels, out_channels, use_conv)
        self.conv = (
            conv_nd(dims, channels, out_channels, 3, padding=1) if use_conv else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.factors, mode="nearest"))


class Downsample(nn.Module):
    """Halve height and width: with `use_conv` a 3x3 convolution of stride 2, else 2 x 2 means.

    [N, C, H, W] -> [N, out_channels, H / 2, W / 2].

    Raises:
        ValueError: `out_channels` differs from `channels`, but no convolution changes them.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ) -> None:
        super().__init__()
        strides = resampling_strides(dims)
        out_channels = _resampled_channels(channels, out_channels, use_conv)
        self.op = (
            conv_nd(dims, channels, out_channels, 3, stride=strides, padding=1)
            if use_conv
            else avg_pool_nd(dims, strides)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def _resampled_channels(channels: int, out_channels: int | None, use_conv: bool) -> int:
    if not use_conv and out_channels not in (None, channels):
        raise ValueError(
            f"resampling without a convolution keeps its {channels} channels, but out_channels is "
            f"{out_channels}: set use_conv=True or leave out_channels out"
        )
    return out_channels or channels


class ResBlock(TimestepBlock):
    """skip(x) + conv(act(norm(conv(act(norm(x)))))), told the time between the convolutions.

    [N, channels, H, W], [N, emb_channels] -> [N, out_channels, H', W'], H' = H unless `up`, `down`.
    The embedding is added before the second norm or, with `use_scale_shift_norm`, becomes a scale
    and a shift after it (adaptive group normalisation: Dhariwal & Nichol 2021, Sec. 3). The last
    convolution starts at zero.

    Args:
        use_conv: where the channels change, a 3x3 instead of a 1x1 convolution on the skip path.
        up, down: resample both paths by 2, without parameters; on the residual path before the
            first convolution (the residual block of BigGAN: Brock et al. 2019, App. B).

    Raises:
        ValueError: channel counts not divisible by 32, or both `up` and `down`.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        if up and down:
            raise ValueError("got up=True and down=True: a block resamples one way, choose one")
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.resample = (
            Upsample(channels, False, dims)
            if up
            else Downsample(channels, False, dims)
            if down
            else nn.Identity()
        )
        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            SiLU(), linear(emb_channels, (2 if use_scale_shift_norm else 1) * out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            SiLU(),
            Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity()
            if out_channels == channels
            else conv_nd(dims, channels, out_channels, 3, padding=1)
            if use_conv
            else conv_nd(dims, channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._residual, (x, emb), self.parameters(), self.use_checkpoint)

    def _residual(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        norm, act, dropout, conv = self.out_layers
        h = conv(dropout(act(self._tell_time(norm, h, emb))))
        return self.skip_connection(self.resample(x)) + h

    def _tell_time(self, norm: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        with full_precision(emb):
            message = self.emb_layers(emb).to(h.dtype)
        message = message.view(*message.shape, *[1] * (h.ndim - 2))  # [N, C or 2 C, 1, 1]
        if not self.use_scale_shift_norm:
            return norm(h + message)
        scale, shift = message.chunk(2, dim=1)
        return norm(h) * (1 + scale) + shift
