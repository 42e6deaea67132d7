"""DDIM (Song et al. 2021), and its deterministic path run backwards.

Epsilon is divided by lambda(t) (`epsilon_scaling`), except in `ddim_reverse_sample` unless asked;
it is read back from the scaled and clipped x_0_hat, so that lambda acts on both terms of Eq. 12.
`randn_like`, a callable like torch.randn_like, is called once for the starting noise (unless
given), and, with eta > 0, once per step.
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
    eta: float = 0.0,
) -> Step[ProcessLevel]:
    """x_{t-1}, [N, C, H, W] (Eq. 12, 16). eta = 0: deterministic, no noise is drawn; 1: DDPM's
    variance.

    Raises:
        ValueError: a negative eta.
    """
    if eta < 0:
        raise ValueError(f"eta must be 0 (deterministic) or positive, got {eta}")
    p = path.predict(x, here)
    ab, ab_prev = here.alpha_bar, there.alpha_bar
    sigma = eta * torch.sqrt((1 - ab_prev) / (1 - ab)) * torch.sqrt(1 - ab / ab_prev)
    # For eta > 1 the direction term can be asked to have a negative variance: it then vanishes.
    sample = p.x_start * ab_prev.sqrt() + (1 - ab_prev - sigma**2).clamp(min=0).sqrt() * p.epsilon
    if eta:
        not_last = (here.t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        sample = sample + not_last * sigma * randn_like(x)
    return Step(sample, there, p)


SOLVER = Solver("ddim", "DDIM", "process", step, options=("eta",))


def ddim_sample(
    process: GaussianDiffusion,
    model: Network,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    eta: float = 0.0,
    randn_like: RandnLike | None = None,
) -> Output:
    """x_{t-1} by DDIM (Song et al. 2021, Eq. 12, 16). eta = 0: deterministic, no noise is drawn; 1:
    DDPM's variance.

    epsilon is read back from the scaled and clipped x_0_hat, so that lambda acts on both terms of
    Eq. 12.
    """
    path = ProcessPath(process, model, model_kwargs, clip_denoised, denoised_fn, cond_fn)
    out = step(path, x, path.at(t, x), path.at(t - 1, x), None, randn_like or torch.randn_like, eta)
    return {"sample": out.x, "pred_xstart": out.prediction.x_start}


def ddim_reverse_sample(
    process: GaussianDiffusion,
    model: Network,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    eta: float = 0.0,
    scale_epsilon: bool = False,
) -> Output:
    """x_{t+1} from x_t along the deterministic DDIM path run backwards (an image to its latent).

    Raises:
        ValueError: eta is not 0; only the deterministic path can be reversed.
    """
    if eta != 0:
        raise ValueError(
            f"ddim_reverse_sample follows the deterministic path: eta must be 0, got {eta}"
        )
    out = process.p_mean_variance(
        model, x, t, clip_denoised, denoised_fn, model_kwargs, scale_epsilon
    )
    x_start = out["pred_xstart"]
    eps = process.eps_from_xstart(x, t, x_start)
    ab_next = process.at("alphas_cumprod_next", t, x)
    return {"sample": x_start * ab_next.sqrt() + (1 - ab_next).sqrt() * eps, "pred_xstart": x_start}


def ddim_sample_loop(
    process: GaussianDiffusion,
    model: Network,
    shape: Sequence[int],
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Samples [N, C, H, W] by DDIM. Options: device, progress, randn_like, and those of
    `ddim_sample` (eta).
    """
    return last_of(process.ddim_sample_loop_progressive(model, shape, noise, **options))["sample"]


def ddim_sample_loop_progressive(
    process: GaussianDiffusion,
    model: Network,
    shape: Sequence[int],
    noise: Tensor | None = None,
    **options: Any,
) -> Iterator[Output]:
    """Yields each step of DDIM. Options: device, progress, randn_like, and those of `ddim_sample`
    (eta).
    """
    return chain_of_verbs(process, process.ddim_sample, model, shape, noise, **options)
