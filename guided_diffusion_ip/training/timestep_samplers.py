"""Which timesteps to train on: uniformly, or in proportion to the size of their losses.

A sampler has weights() [T]; an image's t is drawn by inverting their cumulative sum at a uniform
number, which training takes from noise.py, so that t depends on (seed, step, position in the global
batch) alone. The loss is weighted by 1 / (T p(t)), which keeps its expectation. Everything a
sampler learns is the same on all ranks, and in its state_dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import dist_util
from ..diffusion.process import HasTimesteps, is_continuous


class ScheduleSampler:
    """Base: draws t in proportion to `weights()`, float64 [T], positive."""

    _known: tuple[np.ndarray, torch.device, Tensor] | None = (
        None  # probabilities of the last draw, and its tables on the device
    )

    def weights(self) -> np.ndarray:
        raise NotImplementedError

    def sample(
        self, batch_size: int, device: torch.device | str, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """t, int64 [N], and the weights of their losses, float32 [N].

        Args:
            uniforms: numbers in [0, 1), [N], that decide t; drawn if absent.
        """
        edges, loss_weights = self._tables(torch.device(device))
        if uniforms is None:
            uniforms = torch.rand(batch_size, device=device)
        t = torch.searchsorted(edges, uniforms.to(device, torch.float64), right=True).clamp(
            max=len(edges) - 1
        )
        return t, loss_weights[t].float()

    def _tables(self, device: torch.device) -> Tensor:
        """Cumulative probabilities and weights of losses, float64 [2, T]; brought to the device
        when they have changed.
        """
        p = self.weights()
        p = p / p.sum()
        if self._known is None or self._known[1] != device or not np.array_equal(p, self._known[0]):
            tables = torch.from_numpy(np.stack([np.cumsum(p), 1 / (len(p) * p)]))
            if device.type == "cuda":
                tables = tables.pin_memory()  # without which the host would wait for the copy
            self._known = p, device, tables.to(device, non_blocking=True)
        return self._known[2]

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Receives the timesteps [N] and losses [N] of this rank's batch, once per step, on every
        rank. Nothing to learn here.

        What is learned may count from the next settle() on.
        """

    def settle(self) -> None:
        """Finish what update() began. The training loop calls it before it draws t and before it
        saves.
        """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class UniformSampler(ScheduleSampler):
    """Each t equally often."""

    def __init__(self, diffusion: HasTimesteps) -> None:
        self._weights = np.ones(diffusion.num_timesteps)

    def weights(self) -> np.ndarray:
        return self._weights


class ContinuousSampler(ScheduleSampler):
    """t anywhere in [0, T), float64, with weight 1: for processes whose noise levels are no list
    (EDM).
    """

    def __init__(self, diffusion: HasTimesteps) -> None:
        self.num_timesteps = diffusion.num_timesteps

    def sample(
        self, batch_size: int, device: torch.device | str, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """t = T u."""
        if uniforms is None:
            uniforms = torch.rand(batch_size, device=device)
        return uniforms.to(device, torch.float64) * self.num_timesteps, torch.ones(
            batch_size, device=device
        )


class LossAwareSampler(ScheduleSampler):
    """Base of samplers that look at the losses: gathers those of all ranks, in rank order, before
    learning from them.
    """

    _gathering: Callable[[], Tensor] | None = None

    def update(self, t: Tensor, losses: Tensor) -> None:
        # One collective and one copy to the host, which the update of the weights hides; float64
        # holds both without rounding.
        self.settle()
        self._gathering = dist_util.start_gather(torch.stack([t.double(), losses.double()], dim=1))

    def settle(self) -> None:
        if self._gathering is not None:
            ts, losses = self._gathering().unbind(1)
            self._gathering = None
            self.update_with_all_losses(ts.long().tolist(), losses.tolist())

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """A collective: every rank calls it with as many t [N] and losses [N] as the others. What
        is learned counts at once.
        """
        self.update(local_ts, local_losses)
        self.settle()

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        raise NotImplementedError


class LossSecondMomentResampler(LossAwareSampler):
    """p(t) ~ sqrt(E[loss_t^2]) over the last few losses of each t (Nichol & Dhariwal 2021, Eq. 18).

    Uniform until every t has been seen `history_per_term` times; afterwards a share `uniform_prob`
    stays uniform. Losses that are not finite are left out: one of them would poison the history for
    good.
    """

    def __init__(
        self, diffusion: HasTimesteps, history_per_term: int = 10, uniform_prob: float = 0.001
    ) -> None:
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._history = np.zeros((diffusion.num_timesteps, history_per_term))
        self._seen = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        self.settle()
        steps = len(self._seen)
        if (self._seen < self.history_per_term).any():
            return np.ones(steps)
        rms = np.sqrt(np.mean(self._history**2, axis=1))
        if not rms.sum() > 0:
            return np.ones(steps)
        return rms / rms.sum() * (1 - self.uniform_prob) + self.uniform_prob / steps

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        for t, loss in zip(ts, losses):
            if np.isfinite(loss):
                # A ring: the mean square does not care where the oldest stands.
                self._history[t, self._seen[t] % self.history_per_term] = loss
                self._seen[t] += 1

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {
            "history": torch.from_numpy(self._history.copy()),
            "seen": torch.from_numpy(self._seen.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if tuple(state["history"].shape) != self._history.shape:
            raise ValueError(
                "the checkpoint's timestep sampler has a history of "
                f"{tuple(state['history'].shape)}, this process needs {self._history.shape}"
            )
        self._history = state["history"].numpy().copy()
        self._seen = state["seen"].numpy().copy()


SCHEDULE_SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}


def create_named_schedule_sampler(name: str, diffusion: HasTimesteps) -> ScheduleSampler:
    """A sampler for the T of `diffusion`.

    Raises:
        ValueError: unknown name, or one that counts losses by t for a process whose t is
            continuous.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(
            f"unknown schedule_sampler {name!r}: use one of {', '.join(SCHEDULE_SAMPLERS)}"
        )
    if is_continuous(diffusion):
        if name != "uniform":
            raise ValueError(
                f"--schedule_sampler {name} keeps a history for each t, but EDM's noise levels are "
                "continuous: leave it out (--P_mean and --P_std say where training looks)"
            )
        return ContinuousSampler(diffusion)
    return SCHEDULE_SAMPLERS[name](diffusion)
