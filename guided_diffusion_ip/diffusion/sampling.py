"""DDPM and DDIM: one step each, one shared loop.

A step is step(process, model, x, t, **options) -> {"sample": x_{t-1}, "pred_xstart": x_0_hat}; a
chain starts from noise and applies it from t = T-1 down to 0. The `*_progressive` generators yield
what each step returns; the plain loops return the last sample. Options of the loops that are not
listed with them go to the step unchanged.

All sampling verbs divide epsilon by lambda(t) (`epsilon_scaling`), except `ddim_reverse_sample`
unless asked.

Randomness: `randn_like` is a callable like torch.randn_like; it is called once for the starting
noise (unless given) and once per step that uses noise, in this order. `noise.NormalStream` gives
each image its own addressable noise.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .epsilon_scaling import warn_if_unclipped

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion

Model = Callable[..., Tensor]
Step = dict[str, Tensor]
RandnLike = Callable[[Tensor], Tensor]


def p_sample(
    process: GaussianDiffusion,
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    model_kwargs: dict[str, Any] | None = None,
    randn_like: RandnLike | None = None,
) -> Step:
    """Draw x_{t-1} ~ p(x_{t-1} | x_t) (Ho et al. 2020, Algorithm 2). x: [N, C, H, W];
    t: int64 [N].
    """
    out = process.p_mean_variance(
        model, x, t, clip_denoised, denoised_fn, model_kwargs, scale_epsilon=True
    )
    mean = out["mean"]
    if cond_fn is not None:
        mean = process.condition_mean(cond_fn, out, x, t, model_kwargs)
    noise = (randn_like or torch.randn_like)(x)
    sample = mean + _not_last(t, x) * torch.exp(0.5 * out["log_variance"]) * noise
    return {"sample": sample, "pred_xstart": out["pred_xstart"]}


def ddim_sample(
    process: GaussianDiffusion,
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    model_kwargs: dict[str, Any] | None = None,
    eta: float = 0.0,
    randn_like: RandnLike | None = None,
) -> Step:
    """x_{t-1} by DDIM (Song et al. 2021, Eq. 12, 16). eta = 0: deterministic, no noise is drawn; 1:
    DDPM's variance.

    epsilon is read back from the scaled and clipped x_0_hat, so that lambda acts on both terms of
    Eq. 12.
    """
    if eta < 0:
        raise ValueError(f"eta must be 0 (deterministic) or positive, got {eta}")
    out = process.p_mean_variance(
        model, x, t, clip_denoised, denoised_fn, model_kwargs, scale_epsilon=True
    )
    if cond_fn is not None:
        out = process.condition_score(cond_fn, out, x, t, model_kwargs)
    x_start = out["pred_xstart"]
    eps = process.eps_from_xstart(x, t, x_start)
    ab, ab_prev = process.at("alphas_cumprod", t, x), process.at("alphas_cumprod_prev", t, x)
    sigma = eta * torch.sqrt((1 - ab_prev) / (1 - ab)) * torch.sqrt(1 - ab / ab_prev)
    # For eta > 1 the direction term can be asked to have a negative variance: it then vanishes.
    sample = x_start * ab_prev.sqrt() + (1 - ab_prev - sigma**2).clamp(min=0).sqrt() * eps
    if eta:
        sample = sample + _not_last(t, x) * sigma * (randn_like or torch.randn_like)(x)
    return {"sample": sample, "pred_xstart": x_start}


def ddim_reverse_sample(
    process: GaussianDiffusion,
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    model_kwargs: dict[str, Any] | None = None,
    eta: float = 0.0,
    scale_epsilon: bool = False,
) -> Step:
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


def p_sample_loop(
    process: GaussianDiffusion,
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Samples [N, C, H, W] by DDPM. Options: device, progress, randn_like, and those
    of `p_sample`.
    """
    return _last(process.p_sample_loop_progressive(model, shape, noise, **options))


def p_sample_loop_progressive(
    process: GaussianDiffusion,
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Yields each step of DDPM. Options: device, progress, randn_like, and those of `p_sample`."""
    return _chain(process, process.p_sample, model, shape, noise, **options)


def ddim_sample_loop(
    process: GaussianDiffusion,
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Samples [N, C, H, W] by DDIM. Options: device, progress, randn_like, and those of
    `ddim_sample` (eta).
    """
    return _last(process.ddim_sample_loop_progressive(model, shape, noise, **options))


def ddim_sample_loop_progressive(
    process: GaussianDiffusion,
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Yields each step of DDIM. Options: device, progress, randn_like, and those of `ddim_sample`
    (eta).
    """
    return _chain(process, process.ddim_sample, model, shape, noise, **options)


def _chain(
    process: GaussianDiffusion,
    step: Callable[..., Step],
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None = None,
    progress: bool = False,
    randn_like: RandnLike | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Apply `step` from t = T-1 to 0, starting from `noise` [N, C, H, W] or a fresh draw of
    `shape`.
    """
    if noise is not None and tuple(noise.shape) != tuple(shape):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, but samples of shape {tuple(shape)} were asked "
            "for"
        )
    warn_if_training(model)
    if process.scales_epsilon and not options.get("clip_denoised", True):
        warn_if_unclipped(process)
    device = torch.device(device) if device is not None else _device_of(model)
    x = (
        noise
        if noise is not None
        else (randn_like or torch.randn_like)(torch.empty(*shape, device=device))
    )
    x = x.to(device)
    steps = range(process.num_timesteps - 1, -1, -1)
    if progress:
        from tqdm.auto import tqdm  # only whoever wants a bar pays for it

        steps = tqdm(steps, desc="sampling", unit="step", leave=False)
    for index in steps:
        t = torch.full((shape[0],), index, device=device, dtype=torch.int64)
        with torch.no_grad():
            out = step(model, x, t, randn_like=randn_like, **options)
        yield out
        x = out["sample"]


def warn_if_training(model: Any) -> None:
    """Warn of a network in training mode whose dropout is active: its samples are worse, and differ
    from call to call.

    Args:
        model: a module, or what holds one as `model` or `call` (denoisers, guidance); others cannot
            be looked into.
    """
    network = (
        model
        if isinstance(model, torch.nn.Module)
        else getattr(model, "model", getattr(model, "call", None))
    )
    if not isinstance(network, torch.nn.Module):
        return
    for part in network.modules():
        rate = (
            part.p
            if isinstance(part, torch.nn.modules.dropout._DropoutNd)
            else getattr(part, "label_dropout", 0)
        )
        if part.training and rate:
            warnings.warn(
                "sampling from a network in training mode, in which dropout is active: call "
                "model.eval() first",
                stacklevel=3,
            )
            return


def _last(steps: Iterator[Step]) -> Tensor:
    *_, last = collections.deque(steps, maxlen=1)
    return last["sample"]


def _not_last(t: Tensor, x: Tensor) -> Tensor:
    """1 where t > 0, else 0, broadcastable to x: the last step returns its mean, without noise."""
    return (t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _device_of(model: Model) -> torch.device:
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")
