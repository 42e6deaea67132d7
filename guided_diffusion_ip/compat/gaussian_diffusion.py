"""guided_diffusion.gaussian_diffusion: the process, what its network predicts, and the betas by
name.
"""

from ..diffusion.gaussian_diffusion import GaussianDiffusion
from ..diffusion.kinds import LossType, ModelMeanType, ModelVarType
from ..diffusion.losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from ..diffusion.noise_schedule import betas_for_alpha_bar, get_named_beta_schedule

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "mean_flat",
    "normal_kl",
]
