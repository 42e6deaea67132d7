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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from .noise_schedule import NoiseSchedule


@dataclass(frozen=True)
class EpsilonScaling:
    """lambda(t) = k t + b, by which a sampler divides epsilon at step t; 1 everywhere is off.

    Args:
        b: the constant term, or one value per step (index 0 = last, clean step), to which k t is
            added.
        k: slope per respaced step.
    """

    b: float | tuple[float, ...] = 1.0
    k: float = 0.0

    @classmethod
    def of(
        cls, eps_scaler: float | Sequence[float] | np.ndarray, eps_scaler_k: float = 0.0
    ) -> EpsilonScaling:
        """From what the flags --eps_scaler and --eps_scaler_k hold: b may be a list or an array."""
        b = np.asarray(eps_scaler, dtype=np.float64)
        values = b.tolist() if b.ndim == 0 else tuple(b.flatten().tolist())
        return cls(values, float(eps_scaler_k))

    def lambdas(self, num_steps: int) -> np.ndarray:
        """lambda(t) for t = 0 .. num_steps - 1, float64 [num_steps].

        Raises:
            ValueError: a list of another length, or a lambda that is not positive and finite at
                some step.
        """
        values = np.asarray(self.b, dtype=np.float64)
        if values.ndim == 1 and len(values) != num_steps:
            raise ValueError(
                f"eps_scaler has {values.size} values, but sampling has {num_steps} steps: "
                "give one number, or one value per step (index 0 = last, clean step)"
            )
        values = values + self.k * np.arange(num_steps, dtype=np.float64)
        worst = int(np.argmin(np.where(np.isfinite(values), values, -np.inf)))
        if not (np.isfinite(values).all() and values[worst] > 0):
            b = list(self.b) if isinstance(self.b, tuple) else self.b
            raise ValueError(
                f"epsilon scaling needs lambda(t) > 0 at every step, but eps_scaler={b}, "
                f"eps_scaler_k={self.k} give lambda({worst}) = {values[worst]:g}: 1.0 switches it "
                "off, published values are 0.998 to 1.05"
            )
        return values

    def finer(self, num_steps: int) -> EpsilonScaling:
        """For 2 num_steps - 1 steps: step 2 t has lambda(t), others have the mean of their
        neighbours.
        """
        places = np.arange(2 * num_steps - 1) / 2
        lambdas = np.interp(places, np.arange(num_steps), self.lambdas(num_steps))
        return EpsilonScaling.of(lambdas)

    def __str__(self) -> str:
        """1.017, 1.017 + 0.001 t, or 0.98 to 1.01, one per step."""
        b = (
            f"{self.b:g}"
            if not isinstance(self.b, tuple)
            else (f"{min(self.b):g} to {max(self.b):g}, one per step")
        )
        return b + (f" + {self.k:g} t" if self.k else "")


UNSCALED = EpsilonScaling()


def divide(epsilon: Tensor, lam: Tensor | float) -> Tensor:
    """epsilon / lambda(t): the one place where it happens, whatever samples."""
    return epsilon / lam


def scale_xstart(
    schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_start: Tensor, lam: Tensor
) -> Tensor:
    """x_0_hat after its implied epsilon has been divided by lambda (for networks that do not
    predict epsilon).
    """
    return schedule.xstart_from_eps(x_t, t, divide(schedule.eps_from_xstart(x_t, t, x_start), lam))


def warn_if_unclipped(process: NoiseSchedule) -> None:
    """Warn where an error in epsilon is amplified by orders of magnitude and nothing clips it.

    At the first step x_0_hat = (x - sqrt(1 - ab) eps) / sqrt(ab): with few cosine steps
    sqrt(1/ab - 1) is in the thousands.
    """
    gain = float(process.sqrt_recipm1_alphas_cumprod[-1])
    if gain > 1000:
        warnings.warn(
            "epsilon scaling without clip_denoised: the first step multiplies any change of "
            f"epsilon by {gain:.0f} (alpha_bar is almost 0 there), so lambda != 1 will ruin the "
            "samples; use clip_denoised=True",
            stacklevel=3,
        )
