"""Walks: the ways in which a network gets to see noisy images. Measures look at what happens on
them.

    inputs      x_t = q_sample(x_0, t) at every t, as in training: T' calls
    chain       the sampler's chain from pure noise
    data        the sampler's chain from q(x_{K-1} | x_0), K steps
    noise_free  likewise, with every step's noise left out (DDPM: the posterior mean alone)

The noise of image i depends on (seed, i, t) alone, so results depend on neither batch size nor
number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.epsilon_scaling import lambda_schedule
from ..diffusion.kinds import ModelMeanType
from ..noise import NormalStream, Stream
from ..runs.sample_batch import Sampler

Model = Callable[..., Tensor]
INPUTS, CHAIN, DATA, NOISE_FREE = "inputs", "chain", "data", "noise_free"


@dataclass(frozen=True)
class Walk:
    """One of the kinds above, over the steps K-1 .. 0."""

    kind: str
    length: int


@dataclass(frozen=True)
class Batch:
    """Real images: their numbers [n], x_0 float32 [n, C, H, W], and what the network is told of
    them.
    """

    index: Sequence[int]
    x_start: Tensor
    model_kwargs: dict[str, Any]


@dataclass(frozen=True)
class Visit:
    """The network at x_t, and the step that the sampler takes from there; tensors are [n, C, H, W].

    Args:
        output: what the network returned, [n, C or 2C, H, W].
        sample: x_{t-1}; pred_xstart: x_0_hat, scaled by lambda, and clipped if `clip`, as the
            sampler does.
    """

    walk: Walk
    t: int
    batch: Batch
    x: Tensor
    output: Tensor
    sample: Tensor
    pred_xstart: Tensor
    clip: bool


def walk(path: Walk, sampler: Sampler, model: Model, batch: Batch) -> Iterator[Visit]:
    """The visits of one batch, from the noisy end to the clean end. `model` has its guidance
    already.
    """
    seen = _Recorder(model)
    x = None
    for t in range(path.length - 1, -1, -1):
        if path.kind == INPUTS or x is None:
            x = _start(path, sampler, batch, t)
        randn_like = (
            torch.zeros_like if path.kind == NOISE_FREE else step_noise(sampler, batch.index, t)
        )
        out = step(sampler, seen, x, t, batch.model_kwargs, randn_like)
        yield Visit(
            path, t, batch, x, seen.output, out["sample"], out["pred_xstart"], sampler.clip_denoised
        )
        x = out["sample"]


def _start(path: Walk, sampler: Sampler, batch: Batch, t: int) -> Tensor:
    if path.kind == CHAIN:
        return step_noise(sampler, batch.index, sampler.diffusion.num_timesteps)(batch.x_start)
    return noised(sampler, batch, t)


def noised(sampler: Sampler, batch: Batch, t: int) -> Tensor:
    """x_t ~ q(x_t | x_0) of each image."""
    noise = NormalStream(sampler.seed, Stream.MEASURE_INPUT, torch.as_tensor(batch.index))
    noise.step = t
    return sampler.diffusion.q_sample(batch.x_start, times(batch.x_start, t), noise(batch.x_start))


def step_noise(sampler: Sampler, index: Sequence[int], t: int) -> NormalStream:
    """The noise of the step from x_t; t = T' is the chain's start."""
    noise = NormalStream(sampler.seed, Stream.MEASURE_STEP, torch.as_tensor(index))
    noise.step = t
    return noise


def step(
    sampler: Sampler,
    model: Model,
    x: Tensor,
    t: int,
    model_kwargs: dict[str, Any],
    randn_like: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """One step of the sampler from x_t, as `p_sample` or `ddim_sample` returns it."""
    options = {
        "clip_denoised": sampler.clip_denoised,
        "cond_fn": sampler.cond_fn,
        "model_kwargs": model_kwargs,
        "randn_like": randn_like,
    }
    if sampler.use_ddim:
        return sampler.diffusion.ddim_sample(model, x, times(x, t), eta=sampler.eta, **options)
    return sampler.diffusion.p_sample(model, x, times(x, t), **options)


def times(x: Tensor, t: int) -> Tensor:
    """t for each image of x, int64 [n]."""
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)


def implied_epsilon(process: Any, output: Tensor, x: Tensor, t: int) -> Tensor:
    """The network's epsilon [n, C, H, W], not divided by lambda, whatever it predicts."""
    if process.model_mean_type is ModelMeanType.EPSILON:
        return output[:, : x.shape[1]]
    x_start = process.read_output(output, x, times(x, t), clip_denoised=False)["pred_xstart"]
    return process.eps_from_xstart(x, times(x, t), x_start)


def with_lambdas(process: Any, lambdas: Sequence[float] | np.ndarray) -> Any:
    """The same process with another lambda(t), T' values.

    Raises:
        ValueError: a wrong number of values, or one that is not positive.
    """
    other = copy.copy(process)  # its cache of tables on the device is not copied
    other.lambdas = lambda_schedule(lambdas, 0.0, process.num_timesteps)
    other.scales_epsilon = bool((other.lambdas != 1).any())
    return other


class _Recorder:
    """A model that remembers what it returned last."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.output: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.output = self._model(*args, **kwargs)
        return self.output
