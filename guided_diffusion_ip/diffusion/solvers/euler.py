"""Euler's method along the probability-flow ODE (Karras et al. 2022, Eq. 4): order 1."""

from __future__ import annotations

from torch import Tensor

from ..process import RandnLike
from .paths import Step
from .sigma_path import SigmaLevel, SigmaPath
from .solver import Solver


def step(
    path: SigmaPath,
    x: Tensor,
    here: SigmaLevel,
    there: SigmaLevel,
    previous: Step[SigmaLevel] | None,
    randn_like: RandnLike,
) -> Step[SigmaLevel]:
    """x [N, C, H, W] at level `there`, after fresh noise if the path has churn."""
    x, here = path.raised(x, here, randn_like)
    p = path.predict(x, here)
    return Step(x + (there.time - here.time) * here.slope(x, p.epsilon), there, p)


SOLVER = Solver("euler", "Euler", "sigma", step, churn=True)
