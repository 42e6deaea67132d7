"""EDM's noise levels as a path: x(t) = s(t) (y + sigma(t) n) (Karras et al. 2022, Eq. 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..edm_schedules import NoiseLevels, Path, default_range, make_path
from ..epsilon_scaling import UNSCALED, EpsilonScaling, divide
from ..process import Network, RandnLike
from .paths import Prediction

if TYPE_CHECKING:
    from ..denoiser import Denoiser


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


@dataclass(frozen=True)
class SigmaLevel:
    """Time `time` (a float64 number) of a path; `index` says which lambda belongs to it."""

    index: int
    time: Tensor
    path: Path

    @property
    def ratio(self) -> Tensor:
        """sigma(t), the noise level that the denoiser is asked at."""
        return self.path.schedule.sigma(self.time)

    @property
    def alpha(self) -> Tensor:
        return self.path.s(self.time)

    @property
    def sigma(self) -> Tensor:
        return self.alpha * self.ratio

    def slope(self, x: Tensor, epsilon: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE (Eq. 4) at x [N, C, H, W]."""
        path, t = self.path, self.time
        return path.log_s_deriv(t) * x + path.s(t) * path.schedule.sigma_deriv(t) * epsilon


@dataclass(frozen=True)
class SigmaGrid:
    """Where the noise levels lie, and along which path; the defaults are EDM's.

    Args:
        num_steps, discretization, rho, epsilon_s, C_1, C_2, M: see `NoiseLevels`.
        sigma_min, sigma_max: by default those of the discretisation; limited to what the denoiser
            knows.
        schedule: sigma(t): linear, ve or vp. scaling: s(t): none or vp.
    """

    num_steps: int = 18
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    discretization: str = "edm"
    schedule: str = "linear"
    scaling: str = "none"
    epsilon_s: float = 1e-3
    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    def levels(self, denoiser: Denoiser) -> NoiseLevels:
        """The levels within the denoiser's range.

        Raises:
            ValueError: an argument out of range.
        """
        low, high = default_range(self.discretization, self.epsilon_s)
        return NoiseLevels(
            self.num_steps,
            max(low if self.sigma_min is None else self.sigma_min, denoiser.sigma_min),
            min(high if self.sigma_max is None else self.sigma_max, denoiser.sigma_max),
            self.discretization,
            self.rho,
            self.epsilon_s,
            self.C_1,
            self.C_2,
            self.M,
        )


class SigmaPath:
    """The noise levels of a grid, with a denoiser. States are float64.

    Args:
        denoiser: D(x, sigma, labels). labels: as it takes them.
        scaling: lambda(t); index 0 is the clean end.
        clip_denoised: clamp the estimate of y that follows from the scaled epsilon to [-1, 1], and
            go on with the epsilon that follows from that. EDM does not; networks that predict
            epsilon are poor at large sigma without it.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        labels: Tensor | None = None,
        grid: SigmaGrid = SigmaGrid(),
        scaling: EpsilonScaling = UNSCALED,
        churn: Churn = Churn(),
        clip_denoised: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.denoiser, self.labels, self.churn = denoiser, labels, churn
        self.clip_denoised = clip_denoised
        levels = grid.levels(denoiser)
        self.path = make_path(grid.schedule, grid.scaling, levels)
        self.num_steps = grid.num_steps
        self.lambdas = scaling.lambdas(grid.num_steps)

        def rounded(sigmas: Tensor) -> Tensor:
            return denoiser.round_sigma(sigmas.to(device)).to("cpu", torch.float64)

        # From the clean end, as `level` counts; the clean image is at time 0.
        self._sigmas = rounded(levels.sigmas()).flip(0)
        self._times = self.path.schedule.sigma_inv(self._sigmas)
        raised = rounded(churn.raised(self._sigmas.flip(0))).flip(0) if churn.S_churn else None
        self._raised = self._times if raised is None else self.path.schedule.sigma_inv(raised)
        self._end = torch.zeros((), dtype=torch.float64)

    @cached_property
    def alphas(self) -> np.ndarray:
        """alpha of the levels 0 .. num_steps - 1, float64 [num_steps]; sigmas likewise."""
        return self.path.s(self._times).numpy()

    @cached_property
    def sigmas(self) -> np.ndarray:
        return (self.path.s(self._times) * self._sigmas).numpy()

    def level(self, index: int, x: Tensor | None = None) -> SigmaLevel:
        """Level `index`."""
        return SigmaLevel(index, self._times[index] if index >= 0 else self._end, self.path)

    def start(self, noise: Tensor) -> Tensor:
        """x at the noisiest level from standard normal noise [N, C, H, W]."""
        return noise.to(torch.float64) * (self.path.s(self._times[-1]) * self._sigmas[-1])

    def finished(self, x: Tensor) -> Tensor:
        """The images, float32, from x at level -1."""
        return x.float()

    def noised(self, x_start: Tensor, index: int, noise: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at level `index`, [N, C, H, W]."""
        level = self.level(index)
        return level.alpha * x_start.double() + level.sigma * noise.double()

    def raised(
        self, x: Tensor, level: SigmaLevel, randn_like: RandnLike
    ) -> tuple[Tensor, SigmaLevel]:
        """x brought up by fresh noise, and its new level; both as they are without churn."""
        if not self.churn.S_churn:
            return x, level
        path, t, t_hat = self.path, level.time, self._raised[level.index]
        noise = self.churn.S_noise * randn_like(x)
        sigma, sigma_hat = path.schedule.sigma(t), path.schedule.sigma(t_hat)
        added = (sigma_hat**2 - sigma**2).clamp(min=0).sqrt()
        x = path.s(t_hat) / path.s(t) * x + path.s(t_hat) * added * noise
        return x, replace(level, time=t_hat)

    def call(self, x: Tensor, level: SigmaLevel) -> Tensor:
        """D at x [N, C, H, W], in x's dtype."""
        sigma = x.new_full((), float(level.ratio))
        return self.denoiser(x / level.alpha, sigma, self.labels).to(x.dtype)

    def read(self, output: Tensor, x: Tensor, level: SigmaLevel) -> Prediction[SigmaLevel]:
        """What D says: epsilon scaled by lambda, clipped."""
        return self._read(output, x, level, float(self.lambdas[level.index]))

    def _read(
        self, output: Tensor, x: Tensor, level: SigmaLevel, lam: float
    ) -> Prediction[SigmaLevel]:
        unscaled, sigma = x / level.alpha, level.ratio
        epsilon = divide((unscaled - output) / sigma, lam)
        x_start = unscaled - sigma * epsilon
        if self.clip_denoised:
            x_start = x_start.clamp(-1, 1)
            epsilon = (unscaled - x_start) / sigma
        return Prediction(self, x, level, output, x_start, epsilon)

    def predict(self, x: Tensor, level: SigmaLevel) -> Prediction[SigmaLevel]:
        """call and read."""
        return self.read(self.call(x, level), x, level)

    def raw_epsilon(self, output: Tensor, x: Tensor, level: SigmaLevel) -> Tensor:
        """(x / s - D) / sigma, not divided by lambda, [N, C, H, W]."""
        return (x / level.alpha - output) / level.ratio

    def raw_x_start(self, output: Tensor, x: Tensor, level: SigmaLevel) -> Tensor:
        """The estimate of y without lambda; clipped if the path clips."""
        return self._read(output, x, level, 1.0).x_start


@dataclass(frozen=True)
class AlongSigma:
    """A SigmaPath before there is a network: what a sampler is made with.

    Args:
        as_denoiser: as_denoiser(network, model_kwargs) -> D; see `denoiser`.
    """

    as_denoiser: Callable[[Network, dict[str, Any]], Denoiser]
    grid: SigmaGrid = field(default_factory=SigmaGrid)
    scaling: EpsilonScaling = UNSCALED
    churn: Churn = field(default_factory=Churn)
    clip_denoised: bool = False

    kind = "sigma"

    @property
    def num_steps(self) -> int:
        return self.grid.num_steps

    def bind(
        self,
        model: Network,
        model_kwargs: dict[str, Any],
        guide_score: bool = True,
        device: torch.device | str = "cpu",
    ) -> SigmaPath:
        """The path for this network, on `device`, and what it is given with each call (y: the
        labels).
        """
        kwargs = dict(model_kwargs)
        labels = kwargs.pop("y", None)
        return SigmaPath(
            self.as_denoiser(model, kwargs),
            labels,
            self.grid,
            self.scaling,
            self.churn,
            self.clip_denoised,
            device,
        )

    def finer(self) -> AlongSigma:
        """With a noise level more between any two.

        Raises:
            ValueError: the levels of this discretisation are not among those of a finer one.
        """
        if self.grid.discretization == "iddpm":
            raise ValueError(
                "iDDPM's noise levels for more steps do not contain those for fewer: use another "
                "--discretization"
            )
        steps = 2 * self.num_steps - 1
        grid = replace(self.grid, num_steps=steps)
        return replace(self, grid=grid, scaling=self.scaling.finer(self.num_steps))

    def with_scaling(self, scaling: EpsilonScaling) -> AlongSigma:
        """The same with another lambda(t)."""
        return replace(self, scaling=scaling)
