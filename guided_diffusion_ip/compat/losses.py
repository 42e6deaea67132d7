"""guided_diffusion.losses: divergences and likelihoods."""

import numpy as np
import torch as th

from ..diffusion.losses import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)

__all__ = [  # what a star import brought: modules too
    "approx_standard_normal_cdf",
    "discretized_gaussian_log_likelihood",
    "normal_kl",
    "np",
    "th",
]
