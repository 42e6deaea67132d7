"""UNets and their parts: pure torch.nn, knowing nothing of diffusion or the rest of the package.

    protocol                      what a network must have, and may have
    unet                          ADM's U-Net, super-resolution U-Net, classifier
    trunk, blocks, attention, layers    their parts
    edm_unets, edm_layers         EDM's networks and their parts

A network is called as model(x, t, **cond): x [N, C, H, W], t [N], and according to its kind
y (labels, int64 [N]) and low_res [N, C, h, w].
"""

from .attention import AttentionBlock, AttentionPool2d
from .blocks import Downsample, ResBlock, TimestepBlock, TimestepEmbedSequential, Upsample
from .layers import (
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    scale_module,
    timestep_embedding,
    zero_module,
)
from .unet import (
    EncoderUNetModel,
    SuperResModel,
    UNetModel,
    attention_downsample_rates,
    default_channel_mult,
    parse_channel_mult,
)

__all__ = [
    "AttentionBlock",
    "AttentionPool2d",
    "Downsample",
    "EncoderUNetModel",
    "GroupNorm32",
    "ResBlock",
    "SiLU",
    "SuperResModel",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
    "attention_downsample_rates",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "default_channel_mult",
    "linear",
    "normalization",
    "parse_channel_mult",
    "scale_module",
    "timestep_embedding",
    "zero_module",
]
