"""The diffusion process: schedules, losses, sampling, likelihood, guidance. Meets networks only
through model(x, t).
"""

from .gaussian_diffusion import GaussianDiffusion
from .kinds import LossType, ModelMeanType, ModelVarType
from .noise_schedule import get_named_beta_schedule
from .respace import SpacedDiffusion, space_timesteps

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "get_named_beta_schedule",
    "space_timesteps",
]
