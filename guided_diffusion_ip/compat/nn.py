"""guided_diffusion.nn: the primitives of the networks, and two that live with the losses and the
averages here.
"""

from ..diffusion.losses import mean_flat
from ..networks.layers import (
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
from ..training.ema import update_ema

__all__ = [
    "GroupNorm32",
    "SiLU",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "linear",
    "mean_flat",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "update_ema",
    "zero_module",
]
