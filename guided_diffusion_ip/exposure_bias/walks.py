"""Walks: the ways in which a network gets to see noisy images. Measures look at what happens on
them.

    inputs      x_t = q_sample(x_0, t) at every t, as in training: T' calls
    chain       the sampler's chain from pure noise
    finer       the same with a step more between any two: 2 T' - 1 steps, level t of the sampler
                being level 2 t
    data        the sampler's chain from q(x_{K-1} | x_0), K steps
    noise_free  likewise, with every step's noise left out (DDPM: the posterior mean alone)

The noise of image i depends on (seed, i, t) alone, so results depend on neither batch size nor
number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.process import Network
from ..diffusion.solvers.paths import Prediction, SamplingPath
from ..noise import NormalStream, Stream
from ..runs.sample_batch import Sampler

INPUTS, CHAIN, FINER, DATA, NOISE_FREE = "inputs", "chain", "finer", "data", "noise_free"


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
    """The network at x, and the step that the solver takes from there; tensors are [n, C, H, W].

    Args:
        path: what the walk went along, with the network.
        t: the index of the level, 0 = the last, clean step.
        prediction: of the step's (first) network call; `prediction.x` is where it was made.
        sample: x after the step.
    """

    walk: Walk
    path: SamplingPath
    t: int
    batch: Batch
    prediction: Prediction
    sample: Tensor

    @property
    def x(self) -> Tensor:
        return self.prediction.x


def walk(kind: Walk, sampler: Sampler, model: Network, batch: Batch) -> Iterator[Visit]:
    """The visits of one batch, from the noisy end to the clean end."""
    if kind.kind == FINER:
        sampler = sampler.finer()
    path = sampler.bind(model, batch.model_kwargs, batch.x_start.device)
    previous = x = None
    for t in range(kind.length - 1, -1, -1):
        if kind.kind == INPUTS or x is None:
            x, previous = _start(kind, sampler, path, batch, t), None
        number = _as_coarse(t, path.num_steps) if kind.kind == FINER else t
        randn_like = (
            torch.zeros_like
            if kind.kind == NOISE_FREE
            else step_noise(sampler, batch.index, number)
        )
        previous = sampler.step(path, x, t, randn_like, previous)
        yield Visit(kind, path, t, batch, previous.prediction, previous.x)
        x = previous.x


def _as_coarse(t: int, finer_steps: int) -> int:
    """Which noise the finer chain takes at level t: at levels of the coarse one that of there, so
    that the two differ by little but their steps; at others one that is not yet taken.
    """
    return (finer_steps + 1) // 2 + 1 + t // 2 if t % 2 else t // 2


def _start(kind: Walk, sampler: Sampler, path: SamplingPath, batch: Batch, t: int) -> Tensor:
    if kind.kind in (CHAIN, FINER):
        steps = path.num_steps if kind.kind == CHAIN else (path.num_steps + 1) // 2
        return path.start(step_noise(sampler, batch.index, steps)(batch.x_start))
    return noised(sampler, path, batch, t)


def noised(sampler: Sampler, path: SamplingPath, batch: Batch, t: int) -> Tensor:
    """x at level t from each image, as in training."""
    noise = NormalStream(sampler.seed, Stream.MEASURE_INPUT, torch.as_tensor(batch.index))
    noise.step = t
    return path.noised(batch.x_start, t, noise(batch.x_start))


def step_noise(sampler: Sampler, index: Sequence[int], t: int) -> NormalStream:
    """The noise of the step from level t; t = the number of steps is the chain's start."""
    noise = NormalStream(sampler.seed, Stream.MEASURE_STEP, torch.as_tensor(index))
    noise.step = t
    return noise
