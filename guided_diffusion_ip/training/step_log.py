"""The log lines of a training run."""

from __future__ import annotations

import math
import time
from typing import Any

from .. import logger

_TOLERABLE_WAIT = 0.2  # of the time; beyond it the loader is too slow


class StepLog:
    """What happened since the last line: losses, speed, time spent waiting for images.

    Args:
        step: where the run starts.
    """

    def __init__(self, step: int) -> None:
        self.waited = 0.0  # seconds, for images
        self._last = (step, time.perf_counter())
        self._wait_told = False

    def write(self, loop: Any) -> None:
        """One line: losses since the last line, by quartile of t too, speed, share of time spent
        waiting for data, ETA.

        Args:
            loop: the TrainLoop.
        """
        step, now = loop.step, time.perf_counter()
        since, then = self._last
        seconds = now - then
        # The last line of a run that may be continued must not break the means of the next one.
        keep = step == loop.last_step and step % loop.log_interval != 0
        losses, others = loop.statistics.reduce(keep), logger.get_current().state_dict()
        logger.logkv("step", step)
        logger.logkv("loss", losses.pop("loss", math.nan))
        if loop.grad_norm is not None:
            logger.logkv("grad_norm", loop.grad_norm)
        logger.logkv("images/s", (step - since) * loop.global_batch / seconds)
        logger.logkv("data_wait_%", 100 * self.waited / seconds)
        if loop.last_step is not None and step > since:
            logger.logkv("eta", duration((loop.last_step - step) * seconds / (step - since)))
        logger.logkv("samples", step * loop.global_batch)
        logger.logkv("lr", loop.opt.param_groups[0]["lr"])
        if loop.precision.mode == "fp16":
            logger.logkv("loss_scale", loop.precision.scaler.get_scale())
        if loop.skipped:
            logger.logkv("skipped", loop.skipped)
        logger.logkvs(losses)
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
