"""DPM-Solver++(2M): multistep, data prediction, order 2 (Lu et al. 2022, arXiv 2211.01095).

One departure: x_0_hat is extrapolated by half its last change at most. Steps that are evenly spread
in t grow towards the clean end when measured in log SNR, and the formula then overshoots: on
Gaussian data and 20 steps of a cosine schedule the standard deviation of the samples is off by 10 %
without the limit, by 0.04 % with it (DDIM: 8 %; docs/solvers.md). The order stays 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..process import RandnLike
from .paths import Level, LevelT, SamplingPath, Step
from .solver import Solver


def step(
    path: SamplingPath[LevelT],
    x: Tensor,
    here: LevelT,
    there: LevelT,
    previous: Step[LevelT] | None,
    randn_like: RandnLike,
    limit: float = 1.0,
) -> Step[LevelT]:
    """x [N, C, H, W] at level `there`; deterministic, one network call.

    With lambda = ln(alpha / sigma) (the half log-SNR, not epsilon scaling's), h the step in it and
    h' the one before, x_0_hat is extrapolated to
        D = x_0_hat + min(h / h', limit) / 2 (x_0_hat - x_0_hat'),
        x <- (sigma_next / sigma) x - alpha_next (exp(-h) - 1) D.
    The first step, and the last one to sigma = 0, take x_0_hat itself. limit = inf is the formula
    of the paper.
    """
    p = path.predict(x, here)
    alpha, sigma, alpha_next, sigma_next = (
        value.double() for value in (here.alpha, here.sigma, there.alpha, there.sigma)
    )
    data = p.x_start
    if previous is not None:
        before = previous.prediction
        start = _half_log_snr(before.level)
        now = torch.log(alpha / sigma)
        h_before, h = now - start, torch.log(alpha_next / sigma_next) - now
        # h is infinite at sigma_next = 0, where nothing may be extrapolated.
        share = torch.where(torch.isfinite(h), (h / h_before).clamp(max=limit) / 2, 0.0)
        data = data + share.to(x.dtype) * (data - before.x_start)
    kept = sigma_next / sigma  # alpha_next exp(-h) = alpha kept
    return Step(kept.to(x.dtype) * x + (alpha_next - alpha * kept).to(x.dtype) * data, there, p)


def _half_log_snr(level: Level) -> Tensor:
    return torch.log(level.alpha.double() / level.sigma.double())


SOLVER = Solver("dpmpp_2m", "DPM-Solver++(2M)", "either", step)
