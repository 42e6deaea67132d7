"""Bits per dimension: the whole variational bound of given images. Never sees lambda or gamma."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .losses import mean_flat, normal_kl
from .process import Network, RandnLike

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion


def prior_bpd(process: GaussianDiffusion, x_start: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, [N]: what the schedule leaves of the image
    at the noisy end.
    """
    t = torch.full((x_start.shape[0],), process.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = process.q_mean_variance(x_start, t)
    zero = torch.zeros_like(mean)
    return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)


def calc_bpd_loop(
    process: GaussianDiffusion,
    model: Network,
    x_start: Tensor,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    randn_like: RandnLike | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The variational bound of images [N, C, H, W], term by term (Ho et al. 2020, Eq. 5), with
    fresh noise at each t.

    Args:
        randn_like: called once per step, from t = T-1 to 0.

    Returns:
        `total_bpd` [N] and `prior_bpd` [N]; `vb` (bits per dimension), `xstart_mse` and `mse` (of
        epsilon), each [N, T], in the order of computation: column 0 is t = T-1 (as published).
    """
    steps: Iterable[int] = range(process.num_timesteps - 1, -1, -1)
    if progress:
        from tqdm.auto import tqdm

        steps = tqdm(steps, desc="likelihood", unit="step", leave=False)
    columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
    for index in steps:
        t = torch.full((x_start.shape[0],), index, device=x_start.device)
        noise = (randn_like or torch.randn_like)(x_start)
        x_t = process.q_sample(x_start, t, noise)
        with torch.no_grad():
            output = process.call_model(model, x_t, t, model_kwargs)
            term = process.variational_bound(output, x_start, x_t, t, clip_denoised)
        columns["vb"].append(term["output"])
        columns["xstart_mse"].append(mean_flat((term["pred_xstart"] - x_start) ** 2))
        eps = process.eps_from_xstart(x_t, t, term["pred_xstart"])
        columns["mse"].append(mean_flat((eps - noise) ** 2))
    by_step = {name: torch.stack(terms, dim=1) for name, terms in columns.items()}
    prior = prior_bpd(process, x_start)
    return {"total_bpd": by_step["vb"].sum(dim=1) + prior, "prior_bpd": prior, **by_step}
