"""guided_diffusion.nn: the primitives of the networks, and two that live with the losses and the
averages here. math, th and nn are part of what `import *` brings.
"""

# ruff: noqa: F401
import math

import torch as th
import torch.nn as nn

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
