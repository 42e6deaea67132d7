"""The log lines of a training run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import logger
from .loss_statistics import LossStatistics

_TOLERABLE_WAIT = 0.2  # of the time; beyond it the loader is too slow


class StepLog:
    """What happened since the last line: losses, speed, time spent waiting for images.

    Its state is the logger's: numbers that had been logged, but not written, at a checkpoint.

    Args:
        global_batch: images per step, over all processes.
        last_step: where the run stops, if it does.
    """

    def __init__(self, global_batch: int, last_step: int | None) -> None:
        self.waited = 0.0  # seconds, for images
        self._global_batch, self._last_step = global_batch, last_step
        self._last = (0, time.perf_counter())
        self._wait_told = False
        self._pending: dict[str, Any] = {}

    def start(self, step: int) -> None:
        """Begin at `step`, with the numbers that a checkpoint brought along."""
        logger.get_current().load_state_dict(self._pending)
        self.restart_clock(step)

    def restart_clock(self, step: int) -> None:
        """Count steps and seconds from here."""
        self._last, self.waited = (step, time.perf_counter()), 0.0

    def state_dict(self) -> dict[str, Any]:
        return logger.get_current().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending = state  # the logger of the run may not be open yet

    def write(
        self,
        step: int,
        statistics: LossStatistics,
        grad_norm: Tensor | None,
        more: Mapping[str, float],
        keep: bool = False,
    ) -> None:
        """One line: losses since the last line, by quartile of t too, speed, share of time spent
        waiting for data, ETA, and `more`. A collective.

        Args:
            keep: this line comes between two regular ones, at the end of a run that may be
                continued: it must not break the means of the next.
        """
        now = time.perf_counter()
        since, then = self._last
        seconds = now - then
        losses, others = statistics.reduce(keep), logger.get_current().state_dict()
        logger.logkv("step", step)
        logger.logkv("loss", losses.pop("loss", math.nan))
        if grad_norm is not None:
            logger.logkv("grad_norm", grad_norm)
        logger.logkv("images/s", (step - since) * self._global_batch / seconds)
        logger.logkv("data_wait_%", 100 * self.waited / seconds)
        if self._last_step is not None and step > since:
            logger.logkv("eta", duration((self._last_step - step) * seconds / (step - since)))
        logger.logkv("samples", step * self._global_batch)
        logger.logkvs({**more, **losses})
        logger.dumpkvs()
        if keep:
            logger.get_current().load_state_dict(others)
        if step > since + 1 and self.waited > _TOLERABLE_WAIT * seconds and not self._wait_told:
            self._wait_told = True
            logger.log(
                f"note: {self.waited / seconds:.0%} of the time is spent waiting for images: raise "
                "--num_workers or --cache_mb, or pass an npz that is not compressed instead of a "
                "folder"
            )
        self._last, self.waited = (step, now), 0.0


def duration(seconds: float) -> str:
    """1d02h, 3h05m, 4m10s, 12s."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"
