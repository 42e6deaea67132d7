"""The weight of each timestep in the loss: a rule SNR -> weight, SNR = alpha_bar / (1 - alpha_bar).

A rule says what the epsilon-MSE is multiplied by. Since
|epsilon - eps_hat|^2 = SNR |x_0 - x_0_hat|^2, the same loss on the MSE of an x_0-predicting network
has the weight rule(SNR) * SNR:

    rule      on epsilon            on x_0                source
    debias    1 / sqrt(SNR)         sqrt(SNR)             Yu et al. 2024 (arXiv 2310.08442)
    p2        1 / (k + SNR)^gamma   SNR / (k + SNR)^gamma Choi et al. 2022 (arXiv 2204.00227), Eq. 8
    min_snr   min(SNR, gamma) / SNR min(SNR, gamma)       Hang et al. 2023 (arXiv 2303.09556)

`uniform` is no weighting at all: the plain MSE of whatever the network predicts (Ho et al. 2020,
Eq. 14), weight 1. Only the MSE is weighted, never the variational bound; and by the process's own
SNR, which input perturbation leaves alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .kinds import LossType, ModelMeanType

_ALARMING = 1000  # published runs stay below 160


@dataclass(frozen=True)
class LossWeighting:
    """Which rule, and its parameters; those of the other rules have no effect.

    Args:
        rule: a name in RULES.
        p2_k: k of p2, >= 0; published 1.
        p2_gamma: gamma of p2, >= 0; published 0.5 and 1; 0 is uniform on epsilon.
        min_snr_gamma: gamma of min_snr, > 0; published 5.
        clamp: the largest weight that the network's own MSE is given; 0: no limit. No effect on
            uniform.

    Raises:
        ValueError: an unknown rule, or a parameter out of range.
    """

    rule: str = "uniform"
    p2_k: float = 1.0
    p2_gamma: float = 1.0
    min_snr_gamma: float = 5.0
    clamp: float = 0.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown loss_weighting {self.rule!r}: use one of {', '.join(RULES)}")
        for name, value in (
            ("p2_k", self.p2_k),
            ("p2_gamma", self.p2_gamma),
            ("weight_clamp", self.clamp),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 0 or positive, got {value:g}")
        if not (math.isfinite(self.min_snr_gamma) and self.min_snr_gamma > 0):
            raise ValueError(
                f"min_snr_gamma must be positive, got {self.min_snr_gamma:g}: 5 is the published "
                "value"
            )


def _debias(snr: np.ndarray, weighting: LossWeighting) -> np.ndarray:
    return 1 / np.sqrt(snr)


def _p2(snr: np.ndarray, weighting: LossWeighting) -> np.ndarray:
    return (weighting.p2_k + snr) ** -weighting.p2_gamma


def _min_snr(snr: np.ndarray, weighting: LossWeighting) -> np.ndarray:
    return np.minimum(1, weighting.min_snr_gamma / snr)


def _uniform(snr: np.ndarray, weighting: LossWeighting) -> np.ndarray:
    return np.ones_like(snr)


# Weights on the epsilon-MSE, float64 [T], from the SNR, float64 [T].
RULES: dict[str, Callable[[np.ndarray, LossWeighting], np.ndarray]] = {
    "uniform": _uniform,
    "debias": _debias,
    "p2": _p2,
    "min_snr": _min_snr,
}
UNIFORM = LossWeighting()


def loss_weight_table(
    weighting: LossWeighting,
    snr: np.ndarray,
    mean_type: ModelMeanType,
    loss_type: LossType = LossType.MSE,
) -> np.ndarray:
    """What the MSE of the network's own prediction is multiplied by at each t, float64 [T].

    Args:
        snr: of the process, float64 [T], unperturbed.

    Raises:
        ValueError: a rule other than uniform with a loss that has no MSE of epsilon or x_0; an
            infinite weight without clamp.
    Warns: if a weight is larger than 1000: the steps that have it will dominate the gradient.
    """
    if weighting.rule == "uniform":
        return np.ones_like(snr)
    if loss_type.is_vb():
        raise ValueError(
            f"loss_weighting {weighting.rule} weighs the MSE, but the loss is the variational "
            "bound alone (--use_kl): use --use_kl False, or --loss_weighting uniform"
        )
    if mean_type is ModelMeanType.PREVIOUS_X:
        raise ValueError(
            f"loss_weighting {weighting.rule} is defined for networks that predict epsilon or x_0, "
            "but this one predicts x_{t-1} (PREVIOUS_X): use loss_weighting uniform"
        )
    # SNR 0 (nothing of x_0 is left) and infinity are approached instead of evaluated, because 0 *
    # inf is not a number.
    snr = np.clip(snr, 1e-300, 1e300)
    with np.errstate(over="ignore"):
        weights = RULES[weighting.rule](snr, weighting)
        if mean_type is ModelMeanType.START_X:
            weights = weights * snr
    if weighting.clamp:
        return np.minimum(weights, weighting.clamp)
    _check(weighting.rule, weights)
    return weights


def _check(rule: str, weights: np.ndarray) -> None:
    t = int(np.argmax(weights))
    if weights[t] > np.finfo(np.float32).max:  # in which they are applied
        raise ValueError(
            f"loss_weighting {rule} gives an infinite weight at t = {t} (SNR 0 or infinity): "
            "limit the weights by --weight_clamp, such as 1000"
        )
    if weights[t] > _ALARMING:
        warnings.warn(
            f"loss_weighting {rule}: the largest weight is {weights[t]:,.0f}, at t = {t}, and the "
            f"median {np.median(weights):.3g}, so few steps dominate the gradient; --weight_clamp "
            "limits the weights",
            stacklevel=4,
        )
