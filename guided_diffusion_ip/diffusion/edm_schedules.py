"""Noise levels over time, in the notation of Karras et al. 2022 (arXiv 2206.00364), Table 1.

A path is x(t) = s(t) (y + sigma(t) n); a discretisation is the list of sigma at which a sampler
stands. Times and levels are float64 tensors of any shape; samplers keep them on the CPU, where
reading a number waits for no device.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearSchedule:
    """sigma(t) = t."""

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def sigma_deriv(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass(frozen=True)
class VESchedule:
    """sigma(t) = sqrt(t), as in variance-exploding SDEs (Song et al. 2021)."""

    def sigma(self, t: Tensor) -> Tensor:
        return t.sqrt()

    def sigma_deriv(self, t: Tensor) -> Tensor:
        return 0.5 / t.sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return sigma**2


@dataclass(frozen=True)
class VPSchedule:
    """sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, as in variance-preserving SDEs (Song et
    al. 2021).
    """

    beta_d: float = 19.9
    beta_min: float = 0.1

    def sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t).sqrt()

    def sigma_deriv(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return 0.5 * (self.beta_d * t + self.beta_min) * (sigma + 1 / sigma)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return (
            (self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt() - self.beta_min
        ) / self.beta_d

    @classmethod
    def through(cls, sigma_min: float, sigma_max: float, epsilon_s: float) -> VPSchedule:
        """The one with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max.

        Raises:
            ValueError: there is none that rises all the way.
        """
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (high - low / epsilon_s) / (1 - epsilon_s)
        beta_min = high - beta_d / 2
        if not beta_d + beta_min > 0:
            limit = math.sqrt(math.expm1(high * epsilon_s * (2 - epsilon_s)))
            raise ValueError(
                f"a vp schedule cannot rise from sigma_min={sigma_min:g} at t = "
                f"epsilon_s={epsilon_s:g} to sigma_max={sigma_max:g} at t = 1: lower sigma_min "
                f"below {limit:.3g}, or raise epsilon_s"
            )
        return cls(beta_d, beta_min)


@dataclass(frozen=True)
class Path:
    """A schedule sigma(t) with s(t) = 1, or, `scaled`, s = 1 / sqrt(1 + sigma^2), which keeps the
    variance.
    """

    schedule: LinearSchedule | VESchedule | VPSchedule
    scaled: bool = False

    def s(self, t: Tensor) -> Tensor:
        return (1 + self.schedule.sigma(t) ** 2).rsqrt() if self.scaled else torch.ones_like(t)

    def log_s_deriv(self, t: Tensor) -> Tensor:
        """s'(t) / s(t)."""
        if not self.scaled:
            return torch.zeros_like(t)
        return -self.schedule.sigma(t) * self.schedule.sigma_deriv(t) * self.s(t) ** 2


@dataclass(frozen=True)
class NoiseLevels:
    """Where a sampler's `num_steps` noise levels lie.

    Args:
        discretization: edm (spaced by rho, Eq. 5), vp (evenly in the time of a VPSchedule, down to
            epsilon_s), ve (evenly in log sigma), or iddpm (taken from the M levels of a cosine
            schedule whose alpha ratio is at least C_1).
        num_steps: >= 1; one step stands at sigma_max only.

    Raises:
        ValueError: an argument out of range.
    """

    num_steps: int
    sigma_min: float
    sigma_max: float
    discretization: str = "edm"
    rho: float = 7.0
    epsilon_s: float = 1e-3
    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    def __post_init__(self) -> None:
        check_choice("discretization", self.discretization, DISCRETIZATIONS)
        if self.num_steps != int(self.num_steps) or self.num_steps < 1:
            raise ValueError(
                f"num_steps must be a whole number from 1 up, got {self.num_steps}: 18 is usual "
                "for heun"
            )
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "noise levels must satisfy 0 < sigma_min < sigma_max, got "
                f"sigma_min={self.sigma_min:g} and sigma_max={self.sigma_max:g} within the model's "
                "range: 0.002 and 80 are usual"
            )
        for name, value in (("rho", self.rho), ("C_1", self.C_1), ("C_2", self.C_2)):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name} must be positive and finite, got {value:g}: published "
                    f"{getattr(NoiseLevels, name):g}"
                )
        if not 0 < self.epsilon_s < 1:
            raise ValueError(
                f"epsilon_s must lie between 0 and 1, got {self.epsilon_s:g}: published 0.001"
            )
        if self.M < 1:
            raise ValueError(f"M must be at least 1, got {self.M}: published 1000")

    def sigmas(self) -> Tensor:
        """The levels from sigma_max downwards, float64 [num_steps]; the final 0 is not
        among them.
        """
        share = torch.arange(self.num_steps, dtype=torch.float64) / max(self.num_steps - 1, 1)
        return DISCRETIZATIONS[self.discretization](self, share)


def _edm(levels: NoiseLevels, share: Tensor) -> Tensor:
    high, low = levels.sigma_max ** (1 / levels.rho), levels.sigma_min ** (1 / levels.rho)
    return (high + share * (low - high)) ** levels.rho


def _vp(levels: NoiseLevels, share: Tensor) -> Tensor:
    schedule = VPSchedule.through(levels.sigma_min, levels.sigma_max, levels.epsilon_s)
    return schedule.sigma(1 + share * (levels.epsilon_s - 1))


def _ve(levels: NoiseLevels, share: Tensor) -> Tensor:
    return levels.sigma_max * (levels.sigma_min / levels.sigma_max) ** share


def iddpm_levels(M: int, C_1: float, C_2: float) -> list[float]:
    """u_0 > ... > u_M = 0: the levels of improved DDPM's cosine schedule, the alpha ratio of
    neighbours kept at C_1 or more.
    """
    angle = 0.5 * math.pi / (M * (C_2 + 1))
    grid = [0.0]  # from the clean end
    for j in range(M, 0, -1):
        ratio = (math.sin(angle * (j - 1)) / math.sin(angle * j)) ** 2
        grid.append(math.sqrt((grid[-1] ** 2 + 1) / max(ratio, C_1) - 1))
    return grid[::-1]


def _iddpm(levels: NoiseLevels, share: Tensor) -> Tensor:
    kept = [
        u
        for u in iddpm_levels(levels.M, levels.C_1, levels.C_2)
        if levels.sigma_min <= u <= levels.sigma_max
    ]
    if not kept:
        raise ValueError(
            f"none of iddpm's {levels.M} noise levels lies between sigma_min={levels.sigma_min:g} "
            f"and sigma_max={levels.sigma_max:g}: widen the range, or raise M"
        )
    return torch.tensor(kept, dtype=torch.float64)[(share * (len(kept) - 1)).round().long()]


DISCRETIZATIONS = {"vp": _vp, "ve": _ve, "iddpm": _iddpm, "edm": _edm}
SCHEDULES = ("vp", "ve", "linear")
SCALINGS = ("vp", "none")


def make_path(schedule: str, scaling: str, levels: NoiseLevels) -> Path:
    """The path of these names; a vp schedule goes through the ends of `levels`.

    Raises:
        ValueError: an unknown name, or no vp schedule for these levels.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_choice("scaling", scaling, SCALINGS)
    if schedule == "vp":
        return Path(
            VPSchedule.through(levels.sigma_min, levels.sigma_max, levels.epsilon_s),
            scaling == "vp",
        )
    return Path(LinearSchedule() if schedule == "linear" else VESchedule(), scaling == "vp")


def default_range(discretization: str, epsilon_s: float) -> tuple[float, float]:
    """sigma_min and sigma_max as published for each discretisation.

    Raises:
        ValueError: an unknown name.
    """
    check_choice("discretization", discretization, DISCRETIZATIONS)
    if discretization == "vp":
        low, high = VPSchedule().sigma(torch.tensor([epsilon_s, 1.0], dtype=torch.float64)).tolist()
        return low, high
    return {"ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}[discretization]


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")
