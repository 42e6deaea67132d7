"""The forward process q: betas by name, float64 tables, q(x_t | x_0) and its posterior.

Notation of Ho et al. 2020: alpha_t = 1 - beta_t, alpha_bar_t = prod_{s <= t} alpha_s,
    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                        (Eq. 4)
Images are [N, C, H, W] (any [N, ...] works); t is int64 [N] in 0 .. T-1, 0 being the clean end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Betas [T] whose cumulative product follows `alpha_bar(u)`, u in [0, 1] (Nichol & Dhariwal
    2021, Eq. 17).

    Each beta is capped at `max_beta`, which keeps the last step from being singular.
    """
    u = [i / num_diffusion_timesteps for i in range(num_diffusion_timesteps + 1)]
    levels = [alpha_bar(v) for v in u]
    return np.array(
        [min(1 - after / before, max_beta) for before, after in zip(levels, levels[1:])]
    )


def _linear(steps: int) -> np.ndarray:
    # 1e-4 .. 0.02 was chosen for T = 1000 (Ho et al. 2020); other T keep the total amount of noise.
    scale = 1000 / steps
    if scale * 0.02 >= 1:  # a beta of 1 leaves nothing of x_0, and no x_0_hat to compute
        raise ValueError(
            f"the linear noise schedule needs at least 21 diffusion steps, got {steps} (a beta "
            "would reach 1): keep --diffusion_steps 1000 and use --timestep_respacing for fewer "
            "sampling steps"
        )
    return np.linspace(scale * 0.0001, scale * 0.02, steps, dtype=np.float64)


def _cosine(steps: int) -> np.ndarray:
    # Nichol & Dhariwal 2021, Eq. 17, with s = 0.008.
    return betas_for_alpha_bar(steps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


BETA_SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {"linear": _linear, "cosine": _cosine}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Betas, float64 [T].

    Raises:
        ValueError: unknown name, fewer than 1 step, or `linear` with fewer than 21 steps.
    """
    if num_diffusion_timesteps < 1:
        raise ValueError(f"diffusion_steps must be at least 1, got {num_diffusion_timesteps}")
    if schedule_name not in BETA_SCHEDULES:
        raise ValueError(
            f"unknown noise schedule {schedule_name!r}: use one of {', '.join(BETA_SCHEDULES)}"
        )
    return BETA_SCHEDULES[schedule_name](num_diffusion_timesteps)


class HasDimensions(Protocol):
    """Images [N, C, H, W] (ndim 4), or what stands for them."""

    @property
    def ndim(self) -> int: ...


class NoiseSchedule:
    """The tables that follow from the betas, and the forward process q that they define.

    Tables are float64 numpy arrays [T] under the names of the papers; `at` reads one of them for a
    batch of t.
    """

    def __init__(self, betas: Sequence[float] | np.ndarray) -> None:
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                "betas must be a non-empty one-dimensional sequence of numbers in (0, 1], "
                f"got shape {betas.shape}"
                + (f", range {betas.min()} to {betas.max()}" if betas.size else "")
            )
        self.betas = betas
        self.num_timesteps = len(betas)
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = np.concatenate([[1.0], self.alphas_cumprod[:-1]])
        self.alphas_cumprod_next = np.concatenate([self.alphas_cumprod[1:], [0.0]])

        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.one_minus_alphas_cumprod = 1.0 - self.alphas_cumprod
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        # beta = 1 leaves nothing of x_0: infinities are the true values.
        with np.errstate(divide="ignore"):
            self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0), Ho et al. 2020, Eq. 6 and 7.
        noise_left = (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_variance = betas * noise_left
        # It is 0 at t = 0: the logarithm borrows the value of t = 1, or beta if T = 1.
        floor = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(floor, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = (
            betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        )
        self.posterior_mean_coef2 = noise_left * np.sqrt(1.0 - betas)
        # FIXED_LARGE takes beta, but at t = 0 the true posterior, which gives a better decoder
        # likelihood.
        self.fixed_large_log_variance = np.log(np.append(floor, betas[1:]))
        self.log_betas = np.log(betas)

        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def at(self, table: str, t: Tensor, like: HasDimensions) -> Tensor:
        """`table`[t] as float32 [N, 1, 1, ...], ready to broadcast against `like` [N, ...].

        The table goes to each device once: no host copy, and no host sync, in a sampling or
        training step.
        """
        key = (table, t.device)
        if key not in self._on_device:
            values = np.asarray(getattr(self, table), dtype=np.float64)
            self._on_device[key] = torch.from_numpy(values).to(dtype=torch.float32).to(t.device)
        return self._on_device[key][t].view(-1, *[1] * (like.ndim - 1))

    def __getstate__(self) -> dict:
        # Device copies are a cache: not pickled, not deep-copied.
        return {**self.__dict__, "_on_device": {}}

    @property
    def snr(self) -> np.ndarray:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), float64 [T]."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), each broadcastable to x_start."""
        mean = self.at("sqrt_alphas_cumprod", t, x_start) * x_start
        return (
            mean,
            self.at("one_minus_alphas_cumprod", t, x_start),
            self.at("log_one_minus_alphas_cumprod", t, x_start),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al.
        2020, Eq. 4).
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, the images {tuple(x_start.shape)}: they "
                "must agree"
            )
        return (
            self.at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq.
        6-7).
        """
        mean = (
            self.at("posterior_mean_coef1", t, x_t) * x_start
            + self.at("posterior_mean_coef2", t, x_t) * x_t
        )
        return (
            mean,
            self.at("posterior_variance", t, x_t),
            self.at("posterior_log_variance_clipped", t, x_t),
        )

    def xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 such that q_sample(x_0, t, eps) = x_t."""
        return (
            self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self.at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The noise such that q_sample(x_start, t, noise) = x_t."""
        return (self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - x_start) / self.at(
            "sqrt_recipm1_alphas_cumprod", t, x_t
        )

    def xstart_from_xprev(self, x_t: Tensor, t: Tensor, x_prev: Tensor) -> Tensor:
        """x_0 such that the mean of q(x_{t-1} | x_t, x_0) is x_prev."""
        return (x_prev - self.at("posterior_mean_coef2", t, x_t) * x_t) / self.at(
            "posterior_mean_coef1", t, x_t
        )
