"""The trunk that all ADM UNets share: embeddings, encoder and middle block, built from one recipe.

Shapes: N images, C channels, H x W pixels, E = 4 model_channels embedding channels. Level l of
0 .. L-1 works at downsample rate ds = 2**l, on feature maps of H / ds x W / ds.
Parameter names, their order and shapes are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sizes import parse_size
from .attention import AttentionBlock
from .blocks import Downsample, ResBlock, TimestepEmbedSequential, Upsample
from .layers import (
    CONVOLUTIONS,
    SiLU,
    conv_nd,
    dtype_of,
    full_precision,
    linear,
    timestep_embedding,
)


def require_divisible(sides: Sequence[int], levels: int) -> None:
    """Check that every side can be halved levels - 1 times.

    Raises:
        ValueError: a side cannot; names the nearest that can.
    """
    step = 2 ** (levels - 1)
    for side in sides:
        if side % step:
            below, above = side - side % step, side - side % step + step
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"an image side of {side} does not fit a UNet of {levels} levels, which needs "
                f"multiples of {step}: resize or pad it to {nearest}, or give a channel_mult with "
                "fewer levels"
            )


@dataclass(frozen=True)
class Recipe:
    """What all blocks of one UNet have in common, and how each kind of block is made from it."""

    emb_channels: int
    dropout: float
    dims: int
    conv_resample: bool
    resblock_updown: bool
    use_scale_shift_norm: bool
    use_checkpoint: bool
    num_head_channels: int
    use_new_attention_order: bool

    def res_block(self, channels: int, out_channels: int, **resample: bool) -> ResBlock:
        """A residual block; `resample` may be up=True or down=True."""
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
        """An attention block; `num_heads` counts only where no width of a head is set."""
        return AttentionBlock(
            channels,
            num_heads,
            self.num_head_channels,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )

    def down(self, channels: int) -> nn.Module:
        """The step to the next lower resolution."""
        if self.resblock_updown:
            return self.res_block(channels, channels, down=True)
        return Downsample(channels, self.conv_resample, self.dims)

    def up(self, channels: int) -> nn.Module:
        """The step to the next higher resolution."""
        if self.resblock_updown:
            return self.res_block(channels, channels, up=True)
        return Upsample(channels, self.conv_resample, self.dims)


class UNetTrunk(nn.Module):
    """Embeddings, encoder and middle block. Subclasses add a decoder, or a head.

    `state_channels` lists the channels of every encoder state, the first convolution's included.
    """

    def __init__(
        self,
        recipe: Recipe,
        image_size: int | Sequence[int],
        in_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        channel_mult: Sequence[float],
        num_heads: int,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        if isinstance(attention_resolutions, str):
            raise ValueError(
                f"attention_resolutions is the text {attention_resolutions!r}, but a network takes "
                "downsample rates such as (2, 4): attention_downsample_rates converts"
            )
        self.image_size = parse_size(image_size)
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.dims = recipe.dims
        self.widths = tuple(int(mult * model_channels) for mult in channel_mult)

        self.time_embed = nn.Sequential(
            linear(model_channels, recipe.emb_channels),
            SiLU(),
            linear(recipe.emb_channels, recipe.emb_channels),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, recipe.emb_channels)
        self._build_encoder(recipe, num_res_blocks, attention_resolutions, num_heads)
        width = self.widths[-1]
        self.middle_block = TimestepEmbedSequential(
            recipe.res_block(width, width),
            recipe.attention(width, num_heads),
            recipe.res_block(width, width),
        )

    def _build_encoder(
        self,
        recipe: Recipe,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        num_heads: int,
    ) -> None:
        width = self.widths[0]
        stem = conv_nd(self.dims, self.in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(stem)])
        self.state_channels = [width]
        for level, out_width in enumerate(self.widths):
            if level:
                self.input_blocks.append(TimestepEmbedSequential(recipe.down(width)))
                self.state_channels.append(width)
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [recipe.res_block(width, out_width)]
                width = out_width
                if 2**level in attention_resolutions:
                    layers.append(recipe.attention(width, num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self.state_channels.append(width)

    @property
    def dtype(self) -> torch.dtype:
        """In which feature maps are computed: that of the convolutions, encoder to decoder."""
        stem = self.input_blocks[0]
        assert isinstance(stem, TimestepEmbedSequential), "the encoder begins with a convolution"
        return dtype_of(stem[0])

    @property
    def outer_dtype(self) -> torch.dtype:
        """In which embeddings and output are computed; convert_to_fp16 leaves it alone."""
        return dtype_of(self.time_embed[0])

    def convert_to_fp16(self) -> None:
        """Convolutions of encoder, middle and decoder to float16; no other weight changes."""
        self._cast_convolutions(torch.float16)

    def convert_to_bf16(self) -> None:
        """The same to bfloat16, for calling only."""
        self._cast_convolutions(torch.bfloat16)

    def convert_to_fp32(self) -> None:
        """Undo convert_to_fp16 or _bf16 (the digits that it cut off do not return)."""
        self._cast_convolutions(torch.float32)

    def _cast_convolutions(self, dtype: torch.dtype) -> None:
        for name in ("input_blocks", "middle_block", "output_blocks"):
            part: nn.Module | None = getattr(self, name, None)  # a classifier has no output_blocks
            for module in part.modules() if part is not None else ():
                if isinstance(module, tuple(CONVOLUTIONS.values())):
                    module.to(dtype)

    def embed(self, timesteps: Tensor, y: Tensor | None, batch: int) -> Tensor:
        """The embedding [N, E] of timesteps [N] (or [1], for all images) and of labels y [N].

        Raises:
            ValueError: wrong shapes; labels missing, not asked for, or (CPU only) out of range.
        """
        if timesteps.shape not in ((batch,), (1,)):
            raise ValueError(
                f"timesteps have shape {tuple(timesteps.shape)} for a batch of {batch}: give one "
                f"per image, shape ({batch},)"
            )
        self._check_labels(y, batch)
        waves = timestep_embedding(timesteps, self.model_channels)
        with full_precision(waves):
            emb = self.time_embed(waves.to(self.outer_dtype))
        return emb if y is None else emb + self.label_emb(y)

    def _check_labels(self, y: Tensor | None, batch: int) -> None:
        if self.num_classes is None:
            if y is not None:
                raise ValueError(
                    "got labels y, but this model is unconditional: leave y out, or "
                    "build the model with num_classes (--class_cond True)"
                )
            return
        wanted = f"pass y, int64 [{batch}] with values 0 to {self.num_classes - 1}"
        if y is None:
            raise ValueError(f"got no labels, but this model is class-conditional: {wanted}")
        if y.shape != (batch,):
            raise ValueError(f"labels have shape {tuple(y.shape)} for a batch of {batch}: {wanted}")
        # Reading labels on an accelerator would make the host wait for it at every call.
        if batch and y.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"labels range from {low} to {high}: {wanted}")

    def encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The middle block's output and the state after every input block, all of self.dtype.

        Raises:
            ValueError: wrong number of channels, or a side that cannot be halved often enough.
        """
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"got an input of shape {tuple(x.shape)}, but this model takes {self.in_channels} "
                f"channels in {self.dims} spatial dimensions: convert the images, or build the "
                "model with their in_channels"
            )
        # Of three spatial dimensions the first is never resampled.
        require_divisible(x.shape[-min(self.dims, 2) :], len(self.widths))
        h = x.to(self.dtype)
        states: list[Tensor] = []
        for block in self.input_blocks:
            h = block(h, emb)
            states.append(h)
        return self.middle_block(h, emb), states
