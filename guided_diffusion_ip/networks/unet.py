"""The UNets of Dhariwal & Nichol 2021 (ADM): three networks grown from one trunk, and their sizes.

    UNetModel         x_t, t (, y)           -> epsilon (and variance) per pixel
    SuperResModel     x_t, t, low_res (, y)  -> the same, given a smaller image
    EncoderUNetModel  x_t, t                 -> logits, for classifier guidance

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sizes import parse_size
from .attention import AttentionPool2d
from .blocks import TimestepEmbedSequential
from .layers import SiLU, conv_nd, full_precision, linear, normalization, zero_module
from .trunk import Recipe, UNetTrunk, require_divisible

# (largest side that they serve, channel multipliers). The limits lie halfway between the published
# sizes 32, 64, 128, 256 and 512, whose multipliers these are; the first row is for thumbnails.
CHANNEL_MULTS: tuple[tuple[float, tuple[float, ...]], ...] = (
    (23, (1, 2, 2)),
    (48, (1, 2, 2, 2)),
    (96, (1, 2, 3, 4)),
    (192, (1, 1, 2, 3, 4)),
    (384, (1, 1, 2, 2, 4, 4)),
    (math.inf, (0.5, 1, 1, 2, 2, 4, 4)),
)
SUPER_RESOLUTION_LARGE = (1, 1, 2, 2, 4, 4)


def default_channel_mult(
    image_size: int | Sequence[int], *, super_resolution: bool = False
) -> tuple[float, ...]:
    """Channel multipliers for images of `image_size` (H = W, or (H, W)); the larger side decides.

    Published for 32, 64, 128, 256 and 512 pixels, derived for sizes in between.

    Raises:
        ValueError: a side that these levels cannot halve; names the nearest that work.
    """
    sides = parse_size(image_size)
    mult = next(mult for limit, mult in CHANNEL_MULTS if max(sides) <= limit)
    if super_resolution and len(mult) > len(SUPER_RESOLUTION_LARGE):
        mult = SUPER_RESOLUTION_LARGE
    require_divisible(sides, len(mult))
    return mult


def parse_channel_mult(text_or_sequence: str | Sequence[float]) -> tuple[float, ...]:
    """Channel multipliers from "1,2,2", "0.5,1" or a sequence of numbers; whole numbers become int.

    Raises:
        ValueError: empty, or not positive numbers.
    """
    given = text_or_sequence
    try:
        values = [float(v) for v in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        values = []
    if not values or not all(0 < v < math.inf for v in values):
        raise ValueError(
            f"channel_mult is {given!r}: give positive numbers separated by commas, "
            "one per level, for example 1,2,2,2 or 0.5,1,2"
        )
    return tuple(int(v) if v.is_integer() else v for v in values)


def attention_downsample_rates(
    image_size: int | Sequence[int], resolutions_text: str | Sequence[int]
) -> tuple[int, ...]:
    """Downsample rates at which to attend, from resolutions in pixels: (32, "16,8") -> (2, 4).

    rate = shorter side // resolution, as published. A rate that is no power of two belongs to no
    level, so nothing attends there: a warning says so. An empty text gives no rates.

    Raises:
        ValueError: not positive whole numbers.
    """
    given = resolutions_text
    shorter = min(parse_size(image_size))
    try:
        parts = [p for p in given.split(",") if p.strip()] if isinstance(given, str) else given
        resolutions = [int(p) for p in parts]
    except (TypeError, ValueError):
        resolutions = [0]
    if any(r < 1 for r in resolutions):
        raise ValueError(
            f"attention_resolutions is {given!r}: give whole numbers of pixels "
            "separated by commas, for example 16,8"
        )
    rates = tuple(shorter // r for r in resolutions)
    for resolution, rate in zip(resolutions, rates):
        if rate & (rate - 1):
            warnings.warn(
                f"attention resolution {resolution} has no effect: images of {shorter} pixels are "
                f"halved to {shorter // 2}, {shorter // 4} and so on; name one of these",
                stacklevel=2,
            )
    return rates


class UNetModel(UNetTrunk):
    """The denoiser: image, timestep (and class) -> one prediction per pixel.

    Args:
        image_size: H = W, or (H, W). Any size divisible by 2**(levels - 1) can be given at call.
        attention_resolutions: downsample rates at which to attend, e.g. (2, 4).
        channel_mult: channels of each level, in units of model_channels.
        conv_resample: resample with a convolution; without, by repeating and averaging pixels.
        num_classes: None for an unconditional model.
        use_checkpoint: recompute residual and attention blocks in the backward pass to save memory.
        use_fp16: accepted for existing callers. Weights are float32 until convert_to_fp16(), which
            may come after loading them; computation follows the weights.
        num_head_channels: width of each head; -1 takes num_heads instead.
        num_heads_upsample: heads in the decoder; -1 for num_heads.
        resblock_updown: resample inside residual blocks; conv_resample then has no meaning.
        use_new_attention_order: see `attention.split_qkv`.

    Raises:
        ValueError: channels of a level not divisible by 32 or by the heads; at call, a wrong shape,
            or labels missing, not asked for or out of range.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        recipe = Recipe(
            4 * model_channels,
            dropout,
            dims,
            conv_resample,
            resblock_updown,
            use_scale_shift_norm,
            use_checkpoint,
            num_head_channels,
            use_new_attention_order,
        )
        super().__init__(
            recipe,
            image_size,
            in_channels,
            model_channels,
            num_res_blocks,
            attention_resolutions,
            channel_mult,
            num_heads,
            num_classes,
        )
        self.out_channels = out_channels
        self.use_fp16 = use_fp16
        decoder_heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self._build_decoder(recipe, num_res_blocks, attention_resolutions, decoder_heads)
        self.out = nn.Sequential(
            normalization(self.widths[0]),
            SiLU(),
            zero_module(conv_nd(dims, self.widths[0], out_channels, 3, padding=1)),
        )

    def _build_decoder(
        self,
        recipe: Recipe,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        num_heads: int,
    ) -> None:
        self.output_blocks = nn.ModuleList()
        skips = list(self.state_channels)
        width = self.widths[-1]
        for level, out_width in reversed(list(enumerate(self.widths))):
            for remaining in reversed(range(num_res_blocks + 1)):
                layers: list[nn.Module] = [recipe.res_block(width + skips.pop(), out_width)]
                width = out_width
                if 2**level in attention_resolutions:
                    layers.append(recipe.attention(width, num_heads))
                if level and not remaining:
                    layers.append(recipe.up(width))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        assert not skips, "every encoder state must meet exactly one decoder block"

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict [N, out_channels, H, W], in x's dtype, from x [N, in_channels, H, W].

        Args:
            timesteps: [N], as the diffusion process scales them.
            y: labels, int64 [N]; for class-conditional models only.
        """
        emb = self.embed(timesteps, y, len(x))
        h, skips = self.encode(x, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        with full_precision(x):
            return self.out(h.to(self.outer_dtype)).to(x.dtype)


class SuperResModel(UNetModel):
    """A denoiser that is also shown a smaller image, enlarged bilinearly, in channels of its own.

    Takes the arguments of UNetModel; `in_channels` counts the channels of one image.
    """

    def __init__(self, image_size: int | Sequence[int], in_channels: int, *args, **kwargs) -> None:
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    # guided-diffusion's signature: low_res stands where UNetModel has y.
    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Tensor | None
    ) -> Tensor:
        """As UNetModel.forward, given low_res [N, C, h, w], of any h x w, beside x [N, C, H, W].

        Raises:
            ValueError: low_res missing, or unlike x in images or channels.
        """
        channels = self.in_channels // 2
        if low_res is None:
            raise ValueError(
                "got no low_res, but this is a super-resolution model: pass low_res, "
                f"[{len(x)}, {channels}, h, w]"
            )
        if low_res.shape[:2] != x.shape[:2] or x.shape[1] != channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)} and low_res {tuple(low_res.shape)}: give both the "
                f"same number of images, and {channels} channels"
            )
        enlarged = F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, enlarged], dim=1), timesteps, **kwargs)


class EncoderUNetModel(UNetTrunk):
    """The trunk with a pooling head: image and timestep -> [N, out_channels].

    Args are those of UNetModel where they have the same name; num_heads_upsample, the decoder's,
    has no meaning here. `pool` is one of

        adaptive    mean over the pixels, then a linear map
        attention   AttentionPool2d; takes images of `image_size` only
        spatial     the means of all encoder states and of the middle, then two linear layers
        spatial_v2  the same, normalised in between

    Raises:
        ValueError: as UNetModel; an unknown `pool`; pool "attention" without num_head_channels.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        if pool not in POOLS:
            raise ValueError(f"unknown pool {pool!r}: use one of {', '.join(POOLS)}")
        recipe = Recipe(
            4 * model_channels,
            dropout,
            dims,
            conv_resample,
            resblock_updown,
            use_scale_shift_norm,
            use_checkpoint,
            num_head_channels,
            use_new_attention_order,
        )
        super().__init__(
            recipe,
            image_size,
            in_channels,
            model_channels,
            num_res_blocks,
            attention_resolutions,
            channel_mult,
            num_heads,
            num_classes=None,
        )
        self.out_channels = out_channels
        self.use_fp16 = use_fp16
        self.pool = pool
        self.out = POOLS[pool](self, out_channels, num_head_channels)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits [N, out_channels], in x's dtype, from x [N, in_channels, H, W], timesteps [N]."""
        features, states = self.encode(x, self.embed(timesteps, None, len(x)))
        features = features.to(self.outer_dtype)
        if self.pool in SPATIAL_POOLS:
            maps = [*(state.to(self.outer_dtype) for state in states), features]
            features = torch.cat([m.flatten(2).mean(2) for m in maps], dim=1)
        with full_precision(x):
            return self.out(features).to(x.dtype)


def _adaptive_head(trunk: UNetTrunk, out_channels: int, num_head_channels: int) -> nn.Sequential:
    width = trunk.widths[-1]
    pools = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
    return nn.Sequential(
        normalization(width),
        SiLU(),
        pools[trunk.dims](1),
        zero_module(conv_nd(trunk.dims, width, out_channels, 1)),
        nn.Flatten(),
    )


def _attention_head(trunk: UNetTrunk, out_channels: int, num_head_channels: int) -> nn.Sequential:
    if num_head_channels == -1:
        raise ValueError(
            "pool 'attention' got num_head_channels -1: give the width of a head, for "
            "example 64, or choose another pool"
        )
    require_divisible(trunk.image_size, len(trunk.widths))
    width, rate = trunk.widths[-1], 2 ** (len(trunk.widths) - 1)
    size = tuple(side // rate for side in trunk.image_size)
    pool = AttentionPool2d(size, width, num_head_channels, out_channels)
    return nn.Sequential(normalization(width), SiLU(), pool)


def _spatial_head(trunk: UNetTrunk, out_channels: int, num_head_channels: int) -> nn.Sequential:
    first, last = _spatial_ends(trunk, out_channels)
    return nn.Sequential(first, nn.ReLU(), last)


def _spatial_v2_head(trunk: UNetTrunk, out_channels: int, num_head_channels: int) -> nn.Sequential:
    first, last = _spatial_ends(trunk, out_channels)
    return nn.Sequential(first, normalization(first.out_features), SiLU(), last)


def _spatial_ends(trunk: UNetTrunk, out_channels: int) -> tuple[nn.Linear, nn.Linear]:
    features, hidden = sum(trunk.state_channels) + trunk.widths[-1], 2048
    return linear(features, hidden), linear(hidden, out_channels)


SPATIAL_POOLS = ("spatial", "spatial_v2")
POOLS: dict[str, Callable[[UNetTrunk, int, int], nn.Sequential]] = {
    "adaptive": _adaptive_head,
    "attention": _attention_head,
    "spatial": _spatial_head,
    "spatial_v2": _spatial_v2_head,
}
