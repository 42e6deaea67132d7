"""EDM's samplers: the probability-flow ODE in steps of Euler or Heun, with fresh noise in between
if asked.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022
(arXiv 2206.00364). A denoiser (`denoiser.Denoiser`) is called as D(x, sigma, labels), where x = y +
sigma n is [N, C, H, W]. With epsilon = (x / s - D(x / s, sigma)) / sigma the ODE (Eq. 4) along x =
s(t) (y + sigma(t) n) is
    dx/dt = (s' / s) x + s sigma' epsilon.

Epsilon scaling (`epsilon_scaling`) divides this epsilon by lambda at every evaluation of the
network, and nothing else: the predictor and the corrector of step i share lambda(num_steps - 1 -
i), index 0 being the clean end.

Randomness: latents [N, C, H, W] are standard normal; `randn_like` is called once per step, and
never if S_churn is 0, so that the noise of step i is the same whichever steps use theirs. States
are float64, whatever the latents are.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .edm_schedules import NoiseLevels, Path, check_choice, default_range, make_path
from .epsilon_scaling import lambda_schedule
from .sampling import warn_if_training

if TYPE_CHECKING:
    from .denoiser import Denoiser

SOLVERS = ("heun", "euler")


@dataclass(frozen=True)
class Churn:
    """Fresh noise before each step at levels within [S_min, S_max] (Algorithm 2).

    Raises:
        ValueError: an argument out of range.
    """

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("S_churn", self.S_churn), ("S_noise", self.S_noise)):
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"{name} must be 0 or positive and finite, got {value:g}: "
                    f"{getattr(Churn, name):g} is the deterministic sampler's"
                )
        if not self.S_min <= self.S_max:
            raise ValueError(
                f"S_min={self.S_min:g} to S_max={self.S_max:g} is no range of noise levels: S_min "
                "must not be larger"
            )

    def raised(self, sigmas: Tensor) -> Tensor:
        """The levels [n] that the states are brought up to: sigma (1 + gamma_i)."""
        gamma = min(self.S_churn / len(sigmas), math.sqrt(2) - 1)
        return torch.where(
            (sigmas >= self.S_min) & (sigmas <= self.S_max), sigmas * (1 + gamma), sigmas
        )


def edm_sample(
    denoiser: Denoiser, latents: Tensor, labels: Tensor | None = None, **options: Any
) -> Tensor:
    """Samples, float64 [N, C, H, W], by EDM's sampler (Algorithm 2). Options: those of
    `edm_sample_progressive`.
    """
    return _last(edm_sample_progressive(denoiser, latents, labels, **options))


def edm_sample_progressive(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None = None,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    eps_scaler: float | Sequence[float] = 1.0,
    eps_scaler_k: float = 0.0,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    solver: str = "heun",
    clip_denoised: bool = False,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields each step of EDM's sampler; arguments and errors as for
    `ablation_sample_progressive`.
    """
    return ablation_sample_progressive(
        denoiser,
        latents,
        labels,
        solver=solver,
        num_steps=num_steps,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        rho=rho,
        S_churn=S_churn,
        S_min=S_min,
        S_max=S_max,
        S_noise=S_noise,
        eps_scaler=eps_scaler,
        eps_scaler_k=eps_scaler_k,
        randn_like=randn_like,
        clip_denoised=clip_denoised,
        progress=progress,
    )


def ablation_sample(
    denoiser: Denoiser, latents: Tensor, labels: Tensor | None = None, **options: Any
) -> Tensor:
    """Samples, float64 [N, C, H, W], by the generalised sampler. Options: those of
    `ablation_sample_progressive`.
    """
    return _last(ablation_sample_progressive(denoiser, latents, labels, **options))


def ablation_sample_progressive(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None = None,
    *,
    solver: str = "heun",
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    eps_scaler: float | Sequence[float] = 1.0,
    eps_scaler_k: float = 0.0,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    clip_denoised: bool = False,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields each step of EDM's generalised sampler, of which Algorithm 2 is the default.

    Args:
        latents: standard normal, [N, C, H, W]; labels: as the denoiser takes them.
        solver: heun (2 num_steps - 1 calls of the network) or euler (num_steps calls).
        discretization, num_steps, rho, epsilon_s, C_1, C_2, M: see `NoiseLevels`.
        schedule: sigma(t): linear, ve or vp; a vp schedule goes through the first and the last
            noise level.
        scaling: s(t): none or vp.
        sigma_min, sigma_max: by default vp sigma(epsilon_s) .. sigma(1), ve 0.02 .. 100, iddpm
            0.002 .. 81, edm 0.002 .. 80; then limited to what the denoiser knows.
        alpha: where in a step Heun's second evaluation stands, in (0, 1]; 1 is Heun's, 1/2 the
            midpoint rule.
        S_churn, S_min, S_max, S_noise: see `Churn`.
        eps_scaler, eps_scaler_k: b (or num_steps values) and k of lambda(t) = k t + b.
        clip_denoised: clamp the estimate of y that follows from the scaled epsilon to [-1, 1], and
            go on with the epsilon that follows from that, as ADM's DDIM does. EDM does not;
            networks that predict epsilon are poor at large sigma without it.

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
    low, high = default_range(discretization, epsilon_s)
    levels = NoiseLevels(
        num_steps,
        max(low if sigma_min is None else sigma_min, denoiser.sigma_min),
        min(high if sigma_max is None else sigma_max, denoiser.sigma_max),
        discretization,
        rho,
        epsilon_s,
        C_1,
        C_2,
        M,
    )
    path = make_path(schedule, scaling, levels)
    churn = Churn(S_churn, S_min, S_max, S_noise)
    lambdas = lambda_schedule(eps_scaler, eps_scaler_k, num_steps)[::-1].tolist()

    def rounded(sigmas: Tensor) -> Tensor:
        return denoiser.round_sigma(sigmas.to(latents.device)).to("cpu", torch.float64)

    sigmas = rounded(levels.sigmas())
    times = path.schedule.sigma_inv(sigmas)
    raised = path.schedule.sigma_inv(rounded(churn.raised(sigmas))) if S_churn else times
    times = torch.cat([times, torch.zeros(1, dtype=torch.float64)])

    def slope(x: Tensor, t: Tensor, lam: float) -> tuple[Tensor, Tensor]:
        return _slope(denoiser, labels, path, x, t, lam, clip_denoised)

    def step(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        if S_churn:
            x = _churned(
                path, x, times[i], raised[i], S_noise * (randn_like or torch.randn_like)(x)
            )
        corrected = solver == "heun" and i < num_steps - 1  # D cannot be asked at sigma = 0
        return _step(slope, x, raised[i], times[i + 1], lambdas[i], alpha if corrected else 0.0)

    start = latents.to(torch.float64) * (path.s(times[0]) * sigmas[0])
    return _chain(step, start, [*sigmas[1:].tolist(), 0.0], progress)


def _slope(
    denoiser: Denoiser,
    labels: Tensor | None,
    path: Path,
    x: Tensor,
    t: Tensor,
    lam: float,
    clip: bool,
) -> tuple[Tensor, Tensor]:
    """dx/dt at (x, t) with epsilon divided by lam, here and nowhere else; and D's answer. Both [N,
    C, H, W].
    """
    sigma, s = path.schedule.sigma(t), path.s(t)
    unscaled = x / s
    denoised = denoiser(unscaled, x.new_full((), float(sigma)), labels).to(x.dtype)
    epsilon = (unscaled - denoised) / sigma / lam
    if clip:
        epsilon = (unscaled - (unscaled - sigma * epsilon).clamp(-1, 1)) / sigma
    return path.log_s_deriv(t) * x + s * path.schedule.sigma_deriv(t) * epsilon, denoised


def _step(
    slope: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    t: Tensor,
    t_next: Tensor,
    lam: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """From t to t_next: Euler, or, with alpha > 0, corrected by a second slope at t + alpha (t_next
    - t). -> x, D's answer.
    """
    h = t_next - t
    d, denoised = slope(x, t, lam)
    if alpha:
        d_prime, _ = slope(x + alpha * h * d, t + alpha * h, lam)
        d = (1 - 0.5 / alpha) * d + 0.5 / alpha * d_prime
    return x + h * d, denoised


def _churned(path: Path, x: Tensor, t: Tensor, t_hat: Tensor, noise: Tensor) -> Tensor:
    """x [N, C, H, W] brought from t up to the noise level of t_hat >= t."""
    sigma, sigma_hat = path.schedule.sigma(t), path.schedule.sigma(t_hat)
    added = (sigma_hat**2 - sigma**2).clamp(min=0).sqrt()
    return path.s(t_hat) / path.s(t) * x + path.s(t_hat) * added * noise


def _chain(
    step: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    x: Tensor,
    sigmas: Sequence[float],
    progress: bool,
) -> Iterator[dict[str, Any]]:
    """Apply step(x, i) for each i; sigmas are the levels after the steps."""
    numbers = range(len(sigmas))
    if progress:
        from tqdm.auto import tqdm  # only whoever wants a bar pays for it

        numbers = tqdm(numbers, desc="sampling", unit="step", leave=False)
    for i in numbers:
        with torch.no_grad():
            x, denoised = step(x, i)
        yield {"sample": x, "denoised": denoised, "sigma": sigmas[i]}


def _last(steps: Iterator[dict[str, Any]]) -> Tensor:
    *_, last = collections.deque(steps, maxlen=1)
    return last["sample"]
