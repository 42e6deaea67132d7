"""Epsilon scaling: divide the predicted noise by lambda(t) while sampling; no retraining.

Ning et al., "Elucidating the Exposure Bias in Diffusion Models", ICLR 2024 (arXiv 2308.15321).
Along the sampling chain the norm of epsilon_theta grows beyond what it was on training inputs; the
remedy is
    epsilon <- epsilon / lambda(t),   lambda(t) = k t + b,
before x_0_hat is formed, where t is the index of the *respaced* step: 0 is the last (clean) step,
T'-1 the first. Only sampling verbs come here, once per step; training and likelihood never do.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from .noise_schedule import NoiseSchedule


def lambda_schedule(b: float | Sequence[float], k: float, num_timesteps: int) -> np.ndarray:
    """lambda(t) for t = 0 .. T'-1, float64 [T'].

    Args:
        b: the constant term, or a sequence of T' values (then k is added on top: b[t] + k t).
        k: slope per respaced step.

    Raises:
        ValueError: a sequence of the wrong length, or a lambda that is not positive and finite at
            some step.
    """
    values = np.asarray(b, dtype=np.float64)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != num_timesteps):
        raise ValueError(
            f"eps_scaler has {values.size} values, but sampling has {num_timesteps} steps: "
            "give one number, or one value per step (index 0 = last, clean step)"
        )
    values = values + float(k) * np.arange(num_timesteps, dtype=np.float64)
    worst = int(np.argmin(np.where(np.isfinite(values), values, -np.inf)))
    if not (np.isfinite(values).all() and values[worst] > 0):
        raise ValueError(
            f"epsilon scaling needs lambda(t) > 0 at every step, but eps_scaler={b}, "
            f"eps_scaler_k={k} give lambda({worst}) = {values[worst]:g}: 1.0 switches it off, "
            "published values are 0.998 to 1.05"
        )
    return values


def scale_xstart(
    schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_start: Tensor, lam: Tensor
) -> Tensor:
    """x_0_hat after its implied epsilon has been divided by lambda (for networks that do not
    predict epsilon).
    """
    return schedule.xstart_from_eps(x_t, t, schedule.eps_from_xstart(x_t, t, x_start) / lam)


def warn_if_unclipped(process: NoiseSchedule) -> None:
    """Warn where an error in epsilon is amplified by orders of magnitude and nothing clips it.

    At the first step x_0_hat = (x - sqrt(1 - ab) eps) / sqrt(ab): with few cosine steps sqrt(1/ab -
    1) is in the thousands.
    """
    gain = float(process.sqrt_recipm1_alphas_cumprod[-1])
    if gain > 1000:
        warnings.warn(
            "epsilon scaling without clip_denoised: the first step multiplies any change of "
            f"epsilon by {gain:.0f} (alpha_bar is almost 0 there), so lambda != 1 will ruin the "
            "samples; use clip_denoised=True",
            stacklevel=3,
        )
