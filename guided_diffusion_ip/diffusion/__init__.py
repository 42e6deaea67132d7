"""The mathematics of diffusion. Meets networks only through the call model(x, t, **cond).

T steps:
    process, kinds             what a process must have; what a network predicts
    noise_schedule, respace    betas, q(x_t | x_0); fewer steps
    gaussian_diffusion         what a network's output says about x_0 and x_{t-1}
    losses, likelihood, guidance    its verbs
    input_perturbation, epsilon_scaling, loss_weighting    the remedies, one paper each
    dynamic_threshold          a clip of x_0_hat that keeps contrast
Noise levels sigma:
    denoiser, process_denoiser    any model as D(x, sigma)
    edm_schedules, edm_losses, edm_augmentation, edm_sampling    EDM's, the last in its signatures
Both:
    solvers                    from noise to images
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
