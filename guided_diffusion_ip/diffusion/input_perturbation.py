"""Input perturbation: train on slightly wrong inputs, so that sampling's own errors look familiar.

Ning et al., "Input Perturbation Reduces Exposure Bias in Diffusion Models", ICML 2023 (arXiv
2301.11706), Algorithm 3:
    y_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) (epsilon + gamma xi),   xi ~ N(0, I) drawn afresh,
and the network is trained to say epsilon, *not* epsilon + gamma xi. The variational bound, where
there is one, sees y_t as its x_t. Sampling is unchanged. Published gammas: 0.1, and 0.15 for the
released CIFAR-10 model.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from .kinds import ModelMeanType
from .process import RandnLike


def check_gamma(gamma: float, mean_type: ModelMeanType = ModelMeanType.EPSILON) -> float:
    """gamma as a float.

    Raises:
        ValueError: gamma is negative or not finite.
    Warns: if the network does not predict epsilon. Its target stays x_0 (as published), so that it
        merely learns to denoise noisier inputs: the mismatch between input and label, which is the
        remedy, is absent.
    """
    gamma = float(gamma)
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(
            f"input_perturbation (gamma) must be 0 or positive, got {gamma:g}: "
            "0 switches it off, published values are 0.1 and 0.15"
        )
    if gamma and mean_type is not ModelMeanType.EPSILON:
        warnings.warn(
            f"input perturbation is meant for epsilon-predicting networks; with {mean_type.name} "
            "targets gamma only adds noise and does not have the intended effect",
            stacklevel=3,
        )
    return gamma


def perturb(noise: Tensor, gamma: float, randn_like: RandnLike | None = None) -> Tensor:
    """epsilon + gamma xi, [N, ...]. xi is drawn only if gamma is not 0, so that gamma = 0 is the
    baseline bitwise.
    """
    if gamma == 0:
        return noise
    return noise + gamma * (randn_like or torch.randn_like)(noise)
