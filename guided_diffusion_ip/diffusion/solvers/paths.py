"""What a solver moves along: noise levels, and how a network is asked at each of them.

A noisy image at a level is x = alpha x_0 + sigma epsilon. A path has the levels num_steps - 1 .. 0,
at which the network is called, and the level -1, the clean image; lambda(t) has the same index.
There are two kinds: the steps of a process (`ProcessPath`, alpha^2 + sigma^2 = 1), and EDM's noise
levels, which any denoiser D(x, sigma) has (`SigmaPath`, alpha = 1 unless the path is scaled).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..epsilon_scaling import EpsilonScaling
from ..kinds import ModelMeanType
from ..process import DenoisedFn, Network

if TYPE_CHECKING:
    from ..gaussian_diffusion import GaussianDiffusion
    from ..guidance import CondFn


class Level(Protocol):
    """A noise level; numbers are tensors that broadcast against images [N, C, H, W]."""

    @property
    def alpha(self) -> Tensor: ...

    @property
    def sigma(self) -> Tensor: ...


LevelT = TypeVar("LevelT", bound=Level)


@dataclass(frozen=True)
class Prediction(Generic[LevelT]):
    """What one call of the network says at x.

    Args:
        path: what the network was called through.
        x: where it was asked, [N, C, H, W]; level: the noise level of x.
        output: what the network returned (a denoiser: D).
        x_start: x_0_hat, after epsilon was divided by lambda, and clipped if the path clips.
        noise: see `epsilon`.
        reverse: mean and log variance of p(x_{t-1} | x_t), in place of the noise, for solvers that
            sample it (Solver.guide_score False).
    """

    path: SamplingPath[LevelT]
    x: Tensor
    level: LevelT
    output: Tensor
    x_start: Tensor
    noise: Tensor | None = None
    reverse: tuple[Tensor, Tensor] | None = None

    @property
    def epsilon(self) -> Tensor:
        """The noise that belongs to x_start."""
        assert self.noise is not None, "a path with guide_score=False predicts mean and variance"
        return self.noise

    @property
    def mean_and_log_variance(self) -> tuple[Tensor, Tensor]:
        """Of p(x_{t-1} | x_t)."""
        assert self.reverse is not None, "only a ProcessPath with guide_score=False predicts these"
        return self.reverse

    @property
    def raw_epsilon(self) -> Tensor:
        """The network's epsilon [N, C, H, W], not divided by lambda, whatever it predicts."""
        return self.path.raw_epsilon(self.output, self.x, self.level)

    @property
    def raw_x_start(self) -> Tensor:
        """x_0_hat without lambda, clipped if the path clips."""
        return self.path.raw_x_start(self.output, self.x, self.level)


@dataclass(frozen=True)
class Step(Generic[LevelT]):
    """What a solver's step returns: x at `level`, and the (first) prediction that made it."""

    x: Tensor
    level: LevelT
    prediction: Prediction[LevelT]


class SamplingPath(Protocol[LevelT]):
    """What solvers, samplers and measures need of a path; see ProcessPath.

    A path takes the levels that it has made: whoever handles both kinds writes SamplingPath alone.
    """

    @property
    def num_steps(self) -> int: ...

    @property
    def lambdas(self) -> np.ndarray: ...

    @property
    def alphas(self) -> np.ndarray: ...

    @property
    def sigmas(self) -> np.ndarray: ...

    def level(self, index: int, x: Tensor) -> LevelT: ...

    def start(self, noise: Tensor) -> Tensor: ...

    def finished(self, x: Tensor) -> Tensor: ...

    def noised(self, x_start: Tensor, index: int, noise: Tensor) -> Tensor: ...

    def call(self, x: Tensor, level: LevelT) -> Tensor: ...

    def read(self, output: Tensor, x: Tensor, level: LevelT) -> Prediction[LevelT]: ...

    def predict(self, x: Tensor, level: LevelT) -> Prediction[LevelT]: ...

    def raw_epsilon(self, output: Tensor, x: Tensor, level: LevelT) -> Tensor: ...

    def raw_x_start(self, output: Tensor, x: Tensor, level: LevelT) -> Tensor: ...


@dataclass(frozen=True)
class ProcessLevel:
    """Step t of a process, int64 [N] (which may differ between images); -1 is the clean image.

    Args:
        ndim: of the images, 4 for [N, C, H, W].
    """

    process: GaussianDiffusion
    t: Tensor
    ndim: int = 4

    @cached_property
    def alpha_bar(self) -> Tensor:
        """[N, 1, 1, 1], as alpha and sigma."""
        return self._read("alphas_cumprod", 1.0)

    @cached_property
    def alpha(self) -> Tensor:
        return self._read("sqrt_alphas_cumprod", 1.0)

    @cached_property
    def sigma(self) -> Tensor:
        return self._read("sqrt_one_minus_alphas_cumprod", 0.0)

    def _read(self, table: str, clean: float) -> Tensor:
        values = self.process.at(table, self.t.clamp(min=0), self)
        return torch.where((self.t < 0).view(values.shape), clean, values)


@dataclass(frozen=True)
class ProcessPath:
    """The steps of a process, whose own lambda(t) scales epsilon.

    Args:
        model: called as model(x, t, **model_kwargs).
        clip_denoised: clamp x_0_hat to [-1, 1].
        denoised_fn: applied to x_0_hat before the clamp.
        cond_fn: classifier guidance (`guidance`).
        guide_score: predict epsilon, and let guidance move the score; otherwise predict the mean
            of p(x_{t-1} | x_t), and let guidance move that.
    """

    process: GaussianDiffusion
    model: Network
    model_kwargs: dict[str, Any] | None = None
    clip_denoised: bool = True
    denoised_fn: DenoisedFn | None = None
    cond_fn: CondFn | None = None
    guide_score: bool = True

    @property
    def num_steps(self) -> int:
        return self.process.num_timesteps

    @property
    def lambdas(self) -> np.ndarray:
        """lambda(t), float64 [num_steps]."""
        return self.process.lambdas

    @property
    def alphas(self) -> np.ndarray:
        """alpha of the levels 0 .. num_steps - 1, float64 [num_steps]; sigmas likewise."""
        return self.process.sqrt_alphas_cumprod

    @property
    def sigmas(self) -> np.ndarray:
        return self.process.sqrt_one_minus_alphas_cumprod

    def level(self, index: int, x: Tensor) -> ProcessLevel:
        """Level `index` for the images x [N, C, H, W]."""
        return self.at(torch.full((len(x),), index, dtype=torch.int64, device=x.device), x)

    def at(self, t: Tensor, x: Tensor) -> ProcessLevel:
        """The levels t, int64 [N], of the images x; -1: the clean image."""
        return ProcessLevel(self.process, t, x.ndim)

    @cached_property
    def whole(self) -> ProcessPath:
        """The same network on all steps of the process that this one is a subset of."""
        return replace(self, process=self.process.whole())

    def original(self, t: Tensor) -> Tensor:
        """The steps of `whole` that the steps t of this path are, int64 [N]; -1 stays."""
        if self._steps.device != t.device:  # once per path: no transfer in a step
            self.__dict__["_steps"] = self._steps.to(t.device)
        return torch.where(t < 0, t, self._steps[t.clamp(min=0)])

    @cached_property
    def _steps(self) -> Tensor:
        return torch.tensor(list(getattr(self.process, "timestep_map", range(self.num_steps))))

    def start(self, noise: Tensor) -> Tensor:
        """x at the noisiest level from standard normal noise [N, C, H, W]."""
        return noise

    def finished(self, x: Tensor) -> Tensor:
        """The images, float32, from x at level -1."""
        return x

    def noised(self, x_start: Tensor, index: int, noise: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at level `index`, [N, C, H, W]."""
        return self.process.q_sample(x_start, self.level(index, x_start).t, noise)

    def call(self, x: Tensor, level: ProcessLevel) -> Tensor:
        """The network's output at x."""
        return self.process.call_model(self.model, x, level.t, self.model_kwargs)

    def read(self, output: Tensor, x: Tensor, level: ProcessLevel) -> Prediction[ProcessLevel]:
        """What an output says: scaled by lambda, clipped, guided."""
        read = self.process.read_output(
            output, x, level.t, self.clip_denoised, self.denoised_fn, scale_epsilon=True
        )
        return self._guided(read, output, x, level)

    def predict(self, x: Tensor, level: ProcessLevel) -> Prediction[ProcessLevel]:
        """call and read, through the process's p_mean_variance."""
        outputs: list[Tensor] = []

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            outputs.append(self.model(*args, **kwargs))
            return outputs[-1]

        read = self.process.p_mean_variance(
            recorded,
            x,
            level.t,
            self.clip_denoised,
            self.denoised_fn,
            self.model_kwargs,
            scale_epsilon=True,
        )
        return self._guided(read, outputs[-1] if outputs else read["mean"], x, level)

    def _guided(
        self, read: dict[str, Tensor], output: Tensor, x: Tensor, level: ProcessLevel
    ) -> Prediction[ProcessLevel]:
        process, guidance, kwargs = self.process, self.cond_fn, self.model_kwargs
        if not self.guide_score:
            mean = read["mean"]
            if guidance is not None:
                mean = process.condition_mean(guidance, read, x, level.t, kwargs)
            reverse = mean, read["log_variance"]
            return Prediction(self, x, level, output, read["pred_xstart"], reverse=reverse)
        if guidance is not None:
            read = process.condition_score(guidance, read, x, level.t, kwargs)
        epsilon = process.eps_from_xstart(x, level.t, read["pred_xstart"])
        return Prediction(self, x, level, output, read["pred_xstart"], epsilon)

    def raw_epsilon(self, output: Tensor, x: Tensor, level: ProcessLevel) -> Tensor:
        """The network's epsilon [N, C, H, W], not divided by lambda, whatever it predicts."""
        if self.process.model_mean_type is ModelMeanType.EPSILON:
            return output[:, : x.shape[1]]
        read = self.process.read_output(output, x, level.t, clip_denoised=False)
        return self.process.eps_from_xstart(x, level.t, read["pred_xstart"])

    def raw_x_start(self, output: Tensor, x: Tensor, level: ProcessLevel) -> Tensor:
        """x_0_hat without lambda; clipped if the path clips."""
        return self.process.read_output(output, x, level.t, self.clip_denoised)["pred_xstart"]


@dataclass(frozen=True)
class AlongProcess:
    """A ProcessPath before there is a network: what a sampler is made with."""

    process: GaussianDiffusion
    clip_denoised: bool = True
    denoised_fn: DenoisedFn | None = None
    cond_fn: CondFn | None = None

    kind = "process"

    @property
    def num_steps(self) -> int:
        return self.process.num_timesteps

    def bind(
        self,
        model: Network,
        model_kwargs: dict[str, Any],
        guide_score: bool = True,
        device: torch.device | str = "cpu",
    ) -> ProcessPath:
        """The path for this network and what it is given with each call."""
        return ProcessPath(
            self.process,
            model,
            model_kwargs,
            self.clip_denoised,
            self.denoised_fn,
            self.cond_fn,
            guide_score,
        )

    def finer(self) -> AlongProcess:
        """With a step more between any two.

        Raises:
            ValueError: there is no room for it.
        """
        if not hasattr(self.process, "finer"):
            raise ValueError(
                "a process on all its timesteps has none in between: take fewer steps "
                "(--timestep_respacing)"
            )
        return replace(self, process=self.process.finer())

    def with_scaling(self, scaling: EpsilonScaling) -> AlongProcess:
        """The same with another lambda(t)."""
        return replace(self, process=self.process.with_scaling(scaling))


def with_output(path: SamplingPath[LevelT], output: Tensor) -> SamplingPath[LevelT]:
    """The same path, whose network has answered already: predictions read `output`."""

    def predict(x: Tensor, level: LevelT) -> Prediction[LevelT]:
        return path.read(output, x, level)

    other = copy.copy(path)
    object.__setattr__(other, "predict", predict)
    return other
