"""Heun's method along the probability-flow ODE (Karras et al. 2022, Algorithm 2): order 2.

Predictor and corrector of a step share its lambda.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..process import RandnLike
from . import euler
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
    alpha: float = 1.0,
) -> Step[SigmaLevel]:
    """x [N, C, H, W] at level `there`, after fresh noise if the path has churn.

    Args:
        alpha: where in the step the second evaluation stands, in (0, 1]; 1 is Heun's method, 1/2
            the midpoint rule. The step to the clean image has none: D cannot be asked at sigma = 0.
    """
    if there.index < 0:
        return euler.step(path, x, here, there, previous, randn_like)
    x, here = path.raised(x, here, randn_like)
    p = path.predict(x, here)
    h, slope = there.time - here.time, here.slope(x, p.epsilon)
    middle = replace(here, time=here.time + alpha * h)
    x_middle = x + alpha * h * slope
    second = middle.slope(x_middle, path.predict(x_middle, middle).epsilon)
    slope = (1 - 0.5 / alpha) * slope + 0.5 / alpha * second
    return Step(x + h * slope, there, p)


SOLVER = Solver(
    "heun", "Heun", "sigma", step, churn=True, calls=lambda num_steps: 2 * num_steps - 1
)
