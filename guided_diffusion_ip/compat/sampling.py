"""Sampling by guided-diffusion's methods: the library's steps, through the process's hooks.

Options stand in guided-diffusion's order and may be given by position. `randn_like`, which its
methods do not have, is passed on only where it was given. DDIM draws noise at eta = 0 too, and
throws it away, so that what a seeded script draws next is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diffusion.guidance import CondFn
from ..diffusion.noise_schedule import NoiseSchedule
from ..diffusion.process import DenoisedFn, Network, RandnLike
from ..diffusion.solvers import ddim, ddpm
from ..diffusion.solvers.loop import Output, chain_of_verbs, last_of
from ..diffusion.solvers.paths import Prediction, ProcessLevel, ProcessPath

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion

# Whether p_mean_variance divides epsilon by lambda(t). Its published parameters have no room for
# that: the sampling methods say so here, for as long as they ask.
scaling: ContextVar[bool] = ContextVar("scaling", default=False)


@contextmanager
def _epsilon_scaled(scaled: bool = True) -> Iterator[None]:
    before = scaling.set(scaled)
    try:
        yield
    finally:
        scaling.reset(before)


@dataclass(frozen=True)
class _HookedPath(ProcessPath):
    """Asks p_mean_variance by its published parameters, and hands it the network itself.

    Args:
        asked: called after the network and before the guidance.
    """

    asked: Callable[[], None] = lambda: None

    def predict(self, x: Tensor, level: ProcessLevel) -> Prediction[ProcessLevel]:
        with _epsilon_scaled():
            read = self.process.p_mean_variance(
                self.model,
                x,
                level.t,
                clip_denoised=self.clip_denoised,
                denoised_fn=self.denoised_fn,
                model_kwargs=self.model_kwargs,
            )
        self.asked()
        process, guidance, options = self.process, self.cond_fn, {"model_kwargs": self.model_kwargs}
        x_start = read["pred_xstart"]  # also in place of the output, which nothing here reads again
        if not self.guide_score:
            mean = read["mean"]
            if guidance is not None:
                mean = process.condition_mean(guidance, read, x, level.t, **options)
            reverse = mean, read["log_variance"]
            return Prediction(self, x, level, x_start, x_start, reverse=reverse)
        if guidance is not None:
            moved = process.condition_score(guidance, read, x, level.t, **options)
            x_start = moved["pred_xstart"]
        epsilon = process.eps_from_xstart(x, level.t, x_start)
        return Prediction(self, x, level, x_start, x_start, epsilon)


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
    """x_{t-1} by DDPM; see `ddpm.p_sample`. The noise is drawn before cond_fn is called."""
    drawn: list[Tensor] = []
    path = _HookedPath(
        process,
        model,
        model_kwargs,
        clip_denoised,
        denoised_fn,
        cond_fn,
        guide_score=False,
        asked=lambda: drawn.append((randn_like or torch.randn_like)(x)),
    )
    out = ddpm.step(path, x, path.at(t, x), path.at(t - 1, x), None, lambda _: drawn.pop())
    return {"sample": out.x, "pred_xstart": out.prediction.x_start}


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
    """x_{t-1} by DDIM; see `ddim.ddim_sample`."""
    draw = randn_like or torch.randn_like
    path = _HookedPath(process, model, model_kwargs, clip_denoised, denoised_fn, cond_fn)
    out = ddim.step(path, x, path.at(t, x), path.at(t - 1, x), None, draw, eta)
    if not eta:
        draw(x)
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
    """x_{t+1} from x_t; see `ddim.ddim_reverse_sample`."""
    if eta != 0:
        raise ValueError(
            f"ddim_reverse_sample follows the deterministic path: eta must be 0, got {eta}"
        )
    with _epsilon_scaled(scale_epsilon):
        read = process.p_mean_variance(
            model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )
    x_start = read["pred_xstart"]
    # guided-diffusion did not call _predict_eps_from_xstart here.
    eps = NoiseSchedule.eps_from_xstart(process, x, t, x_start)
    ab_next = process.at("alphas_cumprod_next", t, x)
    return {"sample": x_start * ab_next.sqrt() + (1 - ab_next).sqrt() * eps, "pred_xstart": x_start}


def p_sample_loop(
    process: GaussianDiffusion,
    model: Network,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    randn_like: RandnLike | None = None,
) -> Tensor:
    """Samples [N, C, H, W] by DDPM."""
    steps = process.p_sample_loop_progressive(
        model,
        shape,
        noise=noise,
        clip_denoised=clip_denoised,
        denoised_fn=denoised_fn,
        cond_fn=cond_fn,
        model_kwargs=model_kwargs,
        device=device,
        progress=progress,
        **_given(randn_like),
    )
    return last_of(steps)["sample"]


def p_sample_loop_progressive(
    process: GaussianDiffusion,
    model: Network,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    randn_like: RandnLike | None = None,
) -> Iterator[Output]:
    """Yields each step of DDPM."""
    return _chain(
        process,
        "p_sample",
        model,
        shape,
        noise,
        device,
        progress,
        randn_like,
        clip_denoised=clip_denoised,
        denoised_fn=denoised_fn,
        cond_fn=cond_fn,
        model_kwargs=model_kwargs,
    )


def ddim_sample_loop(
    process: GaussianDiffusion,
    model: Network,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    randn_like: RandnLike | None = None,
) -> Tensor:
    """Samples [N, C, H, W] by DDIM."""
    steps = process.ddim_sample_loop_progressive(
        model,
        shape,
        noise=noise,
        clip_denoised=clip_denoised,
        denoised_fn=denoised_fn,
        cond_fn=cond_fn,
        model_kwargs=model_kwargs,
        device=device,
        progress=progress,
        eta=eta,
        **_given(randn_like),
    )
    return last_of(steps)["sample"]


def ddim_sample_loop_progressive(
    process: GaussianDiffusion,
    model: Network,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    randn_like: RandnLike | None = None,
) -> Iterator[Output]:
    """Yields each step of DDIM."""
    return _chain(
        process,
        "ddim_sample",
        model,
        shape,
        noise,
        device,
        progress,
        randn_like,
        clip_denoised=clip_denoised,
        denoised_fn=denoised_fn,
        cond_fn=cond_fn,
        model_kwargs=model_kwargs,
        eta=eta,
    )


def _given(randn_like: RandnLike | None) -> dict[str, Any]:
    return {} if randn_like is None else {"randn_like": randn_like}


def _chain(
    process: GaussianDiffusion,
    method: str,
    model: Network,
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None,
    progress: bool,
    randn_like: RandnLike | None,
    **options: Any,
) -> Iterator[Output]:
    """The library's loop with the process's method of this name. `noise` says the shape of the
    images, `shape` how many there are.
    """

    def step(
        model: Network, x: Tensor, t: Tensor, randn_like: RandnLike | None, **options: Any
    ) -> Output:
        # A method of somebody's own may ask p_mean_variance by itself.
        with _epsilon_scaled():
            return getattr(process, method)(model, x, t, **options, **_given(randn_like))

    if noise is not None:
        shape = (shape[0], *noise.shape[1:])
    return chain_of_verbs(
        process, step, model, shape, noise, device, progress, randn_like, **options
    )
