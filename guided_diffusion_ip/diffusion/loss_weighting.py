"""The weight of each timestep in the loss: a rule SNR -> weight.

A rule takes the process's own (unperturbed) SNR, float64 [T], and says what the epsilon-MSE is multiplied by.
Rules are registered by name in LOSS_WEIGHTS; `loss_weight_table` makes the table that `training_losses` reads.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np


def uniform(snr: np.ndarray) -> np.ndarray:
    """1 at every t: the plain loss of Ho et al. 2020, Eq. 14."""
    return np.ones_like(snr)


LOSS_WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"uniform": uniform}


def loss_weight_table(name: str, snr: np.ndarray) -> np.ndarray:
    """Weights, float64 [T].

    Raises:
        ValueError: unknown name.
    """
    if name not in LOSS_WEIGHTS:
        raise ValueError(f"unknown loss_weight {name!r}: use one of {', '.join(LOSS_WEIGHTS)}")
    return LOSS_WEIGHTS[name](snr)
