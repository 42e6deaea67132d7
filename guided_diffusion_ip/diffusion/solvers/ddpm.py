"""DDPM: ancestral sampling of p(x_{t-1} | x_t) (Ho et al. 2020, Algorithm 2).

Epsilon is divided by lambda(t) (`epsilon_scaling`). `randn_like`, a callable like
torch.randn_like, is called once for the starting noise (unless given) and once per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..process import DenoisedFn, Network, RandnLike
from .loop import Output, chain_of_verbs, last_of
from .paths import ProcessLevel, ProcessPath, Step
from .solver import Solver

if TYPE_CHECKING:
    from ..gaussian_diffusion import GaussianDiffusion
    from ..guidance import CondFn


def step(
    path: ProcessPath,
    x: Tensor,
    here: ProcessLevel,
    there: ProcessLevel,
    previous: Step[ProcessLevel] | None,
    randn_like: RandnLike,
) -> Step[ProcessLevel]:
    """Draw x_{t-1}, [N, C, H, W]; the last step returns its mean, without noise."""
    p = path.predict(x, here)
    not_last = (here.t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    noise = randn_like(x)
    mean, log_variance = p.mean_and_log_variance
    return Step(mean + not_last * torch.exp(0.5 * log_variance) * noise, there, p)


SOLVER = Solver("ddpm", "DDPM", "process", step, guide_score=False)


def p_sample(
    process: GaussianDiffusion,
    model: Network,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    randn_like: RandnLike | None = None,
) -> Output:
    """Draw x_{t-1} ~ p(x_{t-1} | x_t) (Ho et al. 2020, Algorithm 2).

    x: [N, C, H, W]; t: int64 [N].
    """
    path = ProcessPath(
        process, model, model_kwargs, clip_denoised, denoised_fn, cond_fn, guide_score=False
    )
    out = step(path, x, path.at(t, x), path.at(t - 1, x), None, randn_like or torch.randn_like)
    return {"sample": out.x, "pred_xstart": out.prediction.x_start}


def p_sample_loop(
    process: GaussianDiffusion,
    model: Network,
    shape: Sequence[int],
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Samples [N, C, H, W] by DDPM. Options: device, progress, randn_like, those of `p_sample`."""
    return last_of(process.p_sample_loop_progressive(model, shape, noise, **options))["sample"]


def p_sample_loop_progressive(
    process: GaussianDiffusion,
    model: Network,
    shape: Sequence[int],
    noise: Tensor | None = None,
    **options: Any,
) -> Iterator[Output]:
    """Yields each step of DDPM. Options: device, progress, randn_like, and those of `p_sample`."""
    return chain_of_verbs(process, process.p_sample, model, shape, noise, **options)
