"""guided_diffusion.unet: our networks, built from blocks with guided-diffusion's hooks.

Of what people override, hook or replace there, these take effect: the blocks of this module (looked
up when a network is built), ResBlock._forward, AttentionBlock._forward and .attention, .qkv and
.proj_out as modules that are called; timestep_embedding and checkpoint, looked up at each call.
Parameter names, shapes, initial weights and outputs are those of our networks. Some imports are for
`import *` only.
"""

# ruff: noqa: F401
from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch as th
import torch.nn as nn
import torch.nn.functional as F

from ..networks import attention as _attention
from ..networks import blocks as _blocks
from ..networks import trunk as _trunk
from ..networks import unet as _unet
from ..networks.attention import AttentionPool2d
from ..networks.blocks import TimestepBlock, TimestepEmbedSequential
from ..networks.layers import full_precision
from .fp16_util import convert_module_to_f16, convert_module_to_f32
from .nn import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)


class Upsample(_blocks.Upsample):
    """Ours, which keeps its arguments as attributes."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ) -> None:
        super().__init__(channels, use_conv, dims, out_channels)
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims


class Downsample(_blocks.Downsample):
    """Ours, which keeps its arguments as attributes."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None
    ) -> None:
        super().__init__(channels, use_conv, dims, out_channels)
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims


class ResBlock(_blocks.ResBlock):
    """Ours, whose work is done by _forward(x, emb), under gradient checkpointing where asked for.

    h_upd and x_upd resample the two paths where updown is set; else they are identities.
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
        super().__init__(
            channels,
            emb_channels,
            dropout,
            out_channels,
            use_conv,
            use_scale_shift_norm,
            dims,
            use_checkpoint,
            up,
            down,
        )
        self.channels, self.emb_channels = channels, emb_channels
        self.out_channels, self.dropout = out_channels or channels, dropout
        self.use_conv, self.updown = use_conv, up or down
        self.h_upd = self.x_upd = self.resample

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        return self._residual(x, emb)


class _Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, as a module without parameters: [N, 3 C, T] -> [N, C, T].

    C channels are n_heads heads of d.
    """

    new_order: bool

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: th.Tensor) -> th.Tensor:
        if qkv.shape[1] % (3 * self.n_heads):
            raise ValueError(
                f"qkv has {qkv.shape[1]} channels: {self.n_heads} heads need a multiple of "
                f"{3 * self.n_heads}"
            )
        q, k, v = _attention.split_qkv(qkv.transpose(1, 2), self.n_heads, self.new_order)
        return _attention.attend(q, k, v).transpose(1, 2)

    @staticmethod
    def count_flops(model: nn.Module, _x: Any, y: Any) -> None:
        return count_flops_attn(model, _x, y)


class QKVAttentionLegacy(_Attention):
    """Attention over channels in the order (head, q | k | v, d)."""

    new_order = False


class QKVAttention(_Attention):
    """Attention over channels in the order (q | k | v, head, d)."""

    new_order = True


def count_flops_attn(model: Any, _x: Any, y: th.Tensor | Sequence[th.Tensor]) -> None:
    """Add the multiplications of one attention to model.total_ops, for the package thop.

    Args:
        y: what the attention returned, [N, C, T]: two products of T * T * C for each image.
    """
    result = y if isinstance(y, th.Tensor) else y[0]
    n, channels, *spatial = result.shape
    model.total_ops += th.DoubleTensor([2 * n * channels * math.prod(spatial) ** 2])


class _Pointwise(nn.Conv1d):
    """A convolution of kernel size 1, applied as our attention applies it: to [N, T, C]."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return _attention.project(x.transpose(1, 2), self).transpose(1, 2)


class AttentionBlock(_attention.AttentionBlock):
    """Ours, whose work is done by _forward(x), in modules: norm, qkv, attention, proj_out."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__(
            channels, num_heads, num_head_channels, use_checkpoint, use_new_attention_order
        )
        self.channels = channels
        kind = QKVAttention if use_new_attention_order else QKVAttentionLegacy
        self.attention = kind(self.num_heads)
        # The same modules with the same initial weights, called instead of read.
        self.qkv.__class__ = self.proj_out.__class__ = _Pointwise

    def forward(self, x: th.Tensor) -> th.Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: th.Tensor) -> th.Tensor:
        update = self.proj_out(self.attention(self.qkv(self.norm(x).flatten(2))))
        return x + update.reshape(x.shape)


class _Recipe(_trunk.Recipe):
    """A recipe that makes the blocks of this module, whichever they are at the time."""

    def res_block(self, channels: int, out_channels: int, **resample: bool) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=out_channels,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
            **resample,
        )

    def attention(self, channels: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(
            channels,
            use_checkpoint=self.use_checkpoint,
            num_heads=num_heads,
            num_head_channels=self.num_head_channels,
            use_new_attention_order=self.use_new_attention_order,
        )

    def down(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.res_block(channels, channels, down=True)
        return Downsample(channels, self.conv_resample, dims=self.dims, out_channels=channels)

    def up(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.res_block(channels, channels, up=True)
        return Upsample(channels, self.conv_resample, dims=self.dims, out_channels=channels)


def _of_this_module(recipe: _trunk.Recipe) -> _Recipe:
    return _Recipe(*(getattr(recipe, field.name) for field in fields(recipe)))


class _Trunk(_trunk.UNetTrunk):
    """The trunk of our networks, made of the blocks of this module; it stands between our classes
    and theirs in the order in which Python looks for methods.
    """

    def __init__(
        self,
        recipe: _trunk.Recipe,
        image_size: int | Sequence[int],
        in_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Any,
        channel_mult: Sequence[float],
        num_heads: int,
        num_classes: int | None,
    ) -> None:
        super().__init__(
            _of_this_module(recipe),
            image_size,
            in_channels,
            model_channels,
            num_res_blocks,
            attention_resolutions,
            channel_mult,
            num_heads,
            num_classes,
        )
        self.num_res_blocks, self.attention_resolutions = num_res_blocks, attention_resolutions
        self.channel_mult, self.num_heads = channel_mult, num_heads
        self.dropout, self.conv_resample = recipe.dropout, recipe.conv_resample
        self.use_checkpoint = recipe.use_checkpoint
        self.num_head_channels = recipe.num_head_channels

    def embed(self, timesteps: th.Tensor, y: th.Tensor | None, batch: int) -> th.Tensor:
        if timestep_embedding is _trunk.timestep_embedding:
            return super().embed(timesteps, y, batch)
        self._check_labels(y, batch)
        waves = timestep_embedding(timesteps, self.model_channels)
        with full_precision(waves):
            emb = self.time_embed(waves.to(self.outer_dtype))
        return emb if y is None else emb + self.label_emb(y)


class UNetModel(_unet.UNetModel, _Trunk):
    """Our U-Net from the blocks of this module."""

    def _build_decoder(
        self, recipe: _trunk.Recipe, num_res_blocks: int, attention_resolutions: Any, num_heads: int
    ) -> None:
        height, width = self.image_size
        # One number, as existing code expects, where it was one.
        self.image_size = height if height == width else (height, width)  # type: ignore[assignment]
        self.num_heads_upsample = num_heads
        super()._build_decoder(
            _of_this_module(recipe), num_res_blocks, attention_resolutions, num_heads
        )


class SuperResModel(_unet.SuperResModel, UNetModel):
    """Our super-resolution U-Net from the blocks of this module."""


class EncoderUNetModel(_unet.EncoderUNetModel, _Trunk):
    """Our classifier from the blocks of this module."""
