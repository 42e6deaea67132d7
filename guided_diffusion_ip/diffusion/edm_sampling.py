"""EDM's samplers under their signatures: flat options in front of `solvers`.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022
(arXiv 2206.00364). A denoiser (`denoiser.Denoiser`) is called as D(x, sigma, labels), where
x = y + sigma n is [N, C, H, W]. With epsilon = (x / s - D(x / s, sigma)) / sigma the ODE (Eq. 4)
along x = s(t) (y + sigma(t) n) is
    dx/dt = (s' / s) x + s sigma' epsilon.

Epsilon scaling (`epsilon_scaling`) divides this epsilon by lambda at every evaluation of the
network, and nothing else: the predictor and the corrector of step i share
lambda(num_steps - 1 - i), index 0 being the clean end.

Randomness: latents [N, C, H, W] are standard normal; `randn_like` is called once per step, and
never if S_churn is 0, so that the noise of step i is the same whichever steps use theirs. States
are float64, whatever the latents are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .edm_schedules import check_choice
from .epsilon_scaling import EpsilonScaling
from .process import RandnLike
from .solvers import SOLVERS as ALL_SOLVERS
from .solvers.loop import last_of, run, warn_if_training
from .solvers.sigma_path import Churn, SigmaGrid, SigmaPath

if TYPE_CHECKING:
    from .denoiser import Denoiser

SOLVERS = ("heun", "euler")
_CHURN = ("S_churn", "S_min", "S_max", "S_noise")


def edm_sample(
    denoiser: Denoiser, latents: Tensor, labels: Tensor | None = None, **options: Any
) -> Tensor:
    """Samples, float64 [N, C, H, W], by EDM's sampler (Algorithm 2). Options: those of
    `edm_sample_progressive`.
    """
    return last_of(edm_sample_progressive(denoiser, latents, labels, **options))["sample"]


def edm_sample_progressive(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None = None,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yields each step of EDM's sampler; other options, results and errors as for
    `ablation_sample_progressive`, of which only rho, those of churn and of epsilon scaling,
    randn_like, solver, clip_denoised and progress have a meaning here.
    """
    for name in options:
        if name in ("discretization", "schedule", "scaling", "epsilon_s", "C_1", "C_2", "M"):
            raise TypeError(f"edm_sample has no option {name!r}: ablation_sample has")
    return ablation_sample_progressive(
        denoiser,
        latents,
        labels,
        num_steps=num_steps,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        **options,
    )


def ablation_sample(
    denoiser: Denoiser, latents: Tensor, labels: Tensor | None = None, **options: Any
) -> Tensor:
    """Samples, float64 [N, C, H, W], by the generalised sampler. Options: those of
    `ablation_sample_progressive`.
    """
    return last_of(ablation_sample_progressive(denoiser, latents, labels, **options))["sample"]


def ablation_sample_progressive(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None = None,
    *,
    solver: str = "heun",
    alpha: float = 1.0,
    eps_scaler: float | Sequence[float] = 1.0,
    eps_scaler_k: float = 0.0,
    randn_like: RandnLike | None = None,
    clip_denoised: bool = False,
    progress: bool = False,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yields each step of EDM's generalised sampler, of which Algorithm 2 is the default.

    Args:
        latents: standard normal, [N, C, H, W]; labels: as the denoiser takes them.
        solver: heun (2 num_steps - 1 calls of the network) or euler (num_steps calls).
        alpha: where in a step Heun's second evaluation stands, in (0, 1]; 1 is Heun's, 1/2 the
            midpoint rule.
        eps_scaler, eps_scaler_k: b (or num_steps values) and k of lambda(t) = k t + b.
        clip_denoised: see `SigmaPath`.
        options: num_steps, sigma_min, sigma_max, rho, discretization, schedule, scaling,
            epsilon_s, C_1, C_2, M (see `SigmaGrid`); S_churn, S_min, S_max, S_noise (see `Churn`).

    Yields:
        `sample` [N, C, H, W], after the step; `sigma`, its noise level; `denoised`, D's answer at
        the start of the step.

    Raises:
        ValueError: an argument out of range, before anything is computed.
    """
    warn_if_training(denoiser)
    check_choice("solver", solver, SOLVERS)
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be above 0 and at most 1, got {alpha:g}: 1 is Heun's method")
    churn = Churn(**{name: options.pop(name) for name in _CHURN if name in options})
    path = SigmaPath(
        denoiser,
        labels,
        SigmaGrid(**options),
        EpsilonScaling.of(eps_scaler, eps_scaler_k),
        churn,
        clip_denoised,
        latents.device,
    )
    more = {"alpha": alpha} if solver == "heun" else {}
    steps = run(
        ALL_SOLVERS[solver], path, latents, randn_like or torch.randn_like, progress, **more
    )
    return (
        {"sample": step.x, "denoised": step.prediction.output, "sigma": float(step.level.ratio)}
        for step in steps
    )
