"""What a solver is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .paths import Step


def once_per_step(num_steps: int) -> int:
    return num_steps


@dataclass(frozen=True)
class Solver:
    """A way from noise to images along a path.

    Args:
        name: as --solver takes it; title: for people.
        along: "process" (the steps of a process), "sigma" (EDM's noise levels), or "either".
        step: step(path, x, here, there, previous, randn_like, **options) -> Step, for x
            [N, C, H, W] at level `here`: x at level `there`. `previous` is the Step that led to
            x, None at the start (and where measures take a step by itself).
        options: the keyword arguments of `step` that have flags of these names.
        calls: how often a chain of so many steps calls the network.
        guide_score: classifier guidance moves the score; False: the mean of p(x_{t-1} | x_t).
        churn: steps begin with the path's fresh noise (S_churn).
    """

    name: str
    title: str
    along: str
    step: Callable[..., Step]
    options: tuple[str, ...] = ()
    calls: Callable[[int], int] = once_per_step
    guide_score: bool = True
    churn: bool = False

    def goes_along_sigma(self, edm: bool) -> bool:
        """Whether a chain takes noise levels rather than the steps of a process, for EDM's models
        or for others.
        """
        return self.along == "sigma" or self.along == "either" and edm
