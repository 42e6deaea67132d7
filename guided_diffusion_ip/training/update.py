"""What follows the gradients of a step: are they finite on all ranks? Then AdamW, and averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import dist_util, logger
from .ema import EMA
from .guards import Diverged
from .loss_statistics import LossStatistics
from .precision import Precision
from .protocols import Losses
from .settings import TrainSettings
from .stopping import Wishes
from .timestep_samplers import ScheduleSampler


@dataclass
class Progress:
    """How far a run is.

    Args:
        step: steps completed, those that were left out included.
        skipped: steps left out, because their gradients were not finite.
        skipped_in_a_row: of them, those since the last update.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the numbers from a state that may hold more."""
        self.step = state["step"]
        self.skipped = state.get("skipped", 0)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)


@dataclass
class Update:
    """Weights, averages, statistics and timestep sampler move on by a step's gradients and losses;
    or all of them stay as they were, if these are not finite on whichever rank.
    """

    model: nn.Module
    opt: torch.optim.Optimizer
    emas: Sequence[EMA]
    schedule_sampler: ScheduleSampler
    statistics: LossStatistics
    precision: Precision
    progress: Progress
    settings: TrainSettings
    grad_norm: Tensor | None = None  # of the last step, before clipping

    def __call__(
        self,
        t: Tensor,
        losses: Losses,
        weights: Tensor,
        wishes: Callable[[], Wishes],
        diagnose: Callable[[], str],
    ) -> Wishes:
        """Finish a step whose gradients are there. A collective.

        Args:
            t, losses, weights: [N] each, see Gradients.
            wishes: this rank's, asked once its device has come to the end of the step.
            diagnose: says what is not finite; a collective.

        Returns: the wishes, the same on all ranks.

        Raises:
            Diverged: a loss is not finite (other than in fp16), or max_skipped updates in a row
                were left out.
        """
        self.precision.unscale(self.opt)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        # The one place in a step where the host waits for what the device has been given to do in
        # it.
        good_loss, good_gradient = torch.stack(
            [torch.isfinite(losses["loss"]).all(), torch.isfinite(norm)]
        ).tolist()
        bad_loss, bad_gradient, *agreed = dist_util.any_rank(
            not good_loss, not good_gradient, *wishes()
        )
        if bad_loss or bad_gradient:
            self._leave_out(bad_loss, diagnose)
        else:
            self._take(t, losses, weights, norm)
        self.progress.step += 1
        return Wishes(*agreed)

    def _take(self, t: Tensor, losses: Losses, weights: Tensor, norm: Tensor) -> None:
        self.progress.skipped_in_a_row = 0
        self.statistics.add(t, losses, weights)
        self.schedule_sampler.update(t, losses["loss"])
        if self.settings.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.settings.grad_clip, norm
            )
        self.precision.step(self.opt)
        for ema in self.emas:
            ema.update(self.model)

    def _leave_out(self, bad_loss: bool, diagnose: Callable[[], str]) -> None:
        """Go on without this update, or give up if there is no hope."""
        progress, most = self.progress, self.settings.max_skipped
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        step = progress.step + 1
        if bad_loss and self.precision.mode != "fp16":
            raise Diverged(f"the loss is not finite at step {step}: {diagnose()}")
        if progress.skipped_in_a_row >= most:
            raise Diverged(
                f"no finite gradient in {progress.skipped_in_a_row} steps in a row, the last of "
                f"them step {step}: {diagnose()}"
            )
        logger.log(
            f"step {step} left out: its gradients are not finite. "
            + (self.precision.skip() or f"{most} in a row would end the run")
        )
