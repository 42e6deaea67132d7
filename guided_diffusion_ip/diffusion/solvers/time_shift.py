"""The Time-Shift sampler on DDIM (Li et al., ICLR 2024, arXiv 2305.15583).

What a step makes does not have the variance of the step that it is meant for. The network is told
the step whose variance is nearest to that of the image, within a window around the one meant; the
next step of DDIM starts there. Variances are compared with 1 - alpha_bar, which takes the image's
own share alpha_bar Var(x_0) for negligible: this holds at large t only, hence the cutoff.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..process import RandnLike
from .paths import ProcessLevel, ProcessPath, Step
from .solver import Solver


def step(
    path: ProcessPath,
    x: Tensor,
    here: ProcessLevel,
    there: ProcessLevel,
    previous: Step[ProcessLevel] | None,
    randn_like: RandnLike,
    time_shift_window: int = 40,
    time_shift_cutoff: int = 300,
) -> Step[ProcessLevel]:
    """x [N, C, H, W] after a deterministic step of DDIM, at the step of the *original* process that
    its variance fits, one per image.

    Args:
        time_shift_window: original steps to choose from, half of them on either side of the one
            meant. time_shift_cutoff: up to this original step nothing is shifted.
    """
    whole = path.whole
    if previous is None:
        here = whole.at(path.original(here.t), x)
    meant = path.original(there.t)
    p = whole.predict(x, here)
    target = whole.at(meant, x)
    x = target.alpha * p.x_start + target.sigma * p.epsilon
    shifted = nearest_in_variance(whole, x, meant, time_shift_window)
    t = torch.where(meant > time_shift_cutoff, shifted, meant)
    return Step(x, whole.at(t, x), p)


def nearest_in_variance(path: ProcessPath, x: Tensor, t: Tensor, window: int) -> Tensor:
    """The steps, int64 [N], within window / 2 of t [N] whose 1 - alpha_bar is nearest to the
    variance of x [N, C, H, W] over its numbers.
    """
    variance = x.flatten(1).float().var(dim=1)
    around = torch.arange(-(window // 2), window // 2 + 1, device=x.device)
    candidates = (t[:, None] + around).clamp(0, path.num_steps - 1)
    alpha_bar = path.process.at("alphas_cumprod", candidates.flatten(), x).view(candidates.shape)
    best = (variance[:, None] - (1 - alpha_bar)).square().argmin(dim=1)
    return candidates.gather(1, best[:, None])[:, 0]


SOLVER = Solver(
    "time_shift",
    "Time-Shift DDIM",
    "process",
    step,
    options=("time_shift_window", "time_shift_cutoff"),
)
