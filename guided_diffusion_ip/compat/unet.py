"""guided_diffusion.unet: the networks and their blocks, with the primitives that scripts also take
from there.
"""

from ..networks.attention import AttentionBlock, AttentionPool2d
from ..networks.blocks import Downsample, ResBlock, TimestepBlock, TimestepEmbedSequential, Upsample
from ..networks.unet import EncoderUNetModel, SuperResModel, UNetModel
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

__all__ = [
    "AttentionBlock",
    "AttentionPool2d",
    "Downsample",
    "EncoderUNetModel",
    "ResBlock",
    "SuperResModel",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "convert_module_to_f16",
    "convert_module_to_f32",
    "linear",
    "normalization",
    "timestep_embedding",
    "zero_module",
]
