"""guided_diffusion.resample: the timestep samplers, and what makes one that has guided-diffusion's
methods only fit for the library's loop.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import Tensor, device

from ..training.timestep_samplers import (
    LossAwareSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)

__all__ = [
    "LossAwareSampler",
    "LossSecondMomentResampler",
    "ScheduleSampler",
    "UniformSampler",
    "create_named_schedule_sampler",
]


class Draws(Protocol):
    """All that guided-diffusion's loop needs of a timestep sampler. With update_with_local_losses(t
    [N], losses [N]) it learns from every step.
    """

    def sample(self, batch_size: int, device: device | str) -> tuple[Tensor, Tensor]:
        """t [N] and the weights [N] of their losses."""
        ...


class OwnSampler(ScheduleSampler):
    """A sampler of a script's own as the library's loop calls it. It draws by itself, not at the
    step's random numbers.
    """

    def __init__(self, theirs: Draws) -> None:
        self.theirs: Any = theirs

    def sample(
        self, batch_size: int, device: device | str, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        t, weights = self.theirs.sample(batch_size, device)
        return t.to(device), weights.to(device).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        learn = getattr(self.theirs, "update_with_local_losses", None)
        if learn is not None:
            learn(t, losses)

    def settle(self) -> None:
        if hasattr(self.theirs, "settle"):
            self.theirs.settle()

    def state_dict(self) -> dict[str, Any]:
        return self.theirs.state_dict() if hasattr(self.theirs, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if hasattr(self.theirs, "load_state_dict"):
            self.theirs.load_state_dict(state)


def for_the_loop(sampler: Draws) -> ScheduleSampler:
    """The sampler itself if the library's loop can call all that it does, else an OwnSampler."""
    if not isinstance(sampler, ScheduleSampler):
        return OwnSampler(sampler)
    takes_numbers = "uniforms" in inspect.signature(sampler.sample).parameters
    learn = getattr(sampler, "update_with_local_losses", None)
    learns_as_ours = learn is None or (
        getattr(learn, "__func__", None) is LossAwareSampler.update_with_local_losses
    )
    return sampler if takes_numbers and learns_as_ours else OwnSampler(sampler)
