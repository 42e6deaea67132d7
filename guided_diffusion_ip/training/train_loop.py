"""TrainLoop: step, log, save, stop.

A step is

    images -> t from the timestep sampler -> objective under autocast -> gradients, averaged over
    ranks (gradients.py) -> all ranks agree that they are finite, and whether to stop -> AdamW ->
    averages (update.py)

The objective is the process's training_losses, unless another is given (a classifier's cross
entropy).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence

from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import dist_util, logger
from ..allocator import keep_freed_memory
from ..diffusion.process import Process
from ..ownership import owning
from .ema import EMA, UpdateCounts
from .gradients import Gradients, process_losses, trained_network
from .guards import check_batch, is_out_of_memory, memory_advice, range_note
from .hooks import Hook, run_hooks
from .loss_statistics import LossStatistics
from .optimizer import OptimizerState, make_optimizer, set_learning_rate
from .precision import Precision
from .protocols import Batches, Cond, Losses, Objective, SeekableBatches, Stateful
from .run_state import RunState, run_facts
from .settings import TrainSettings
from .step_log import StepLog
from .stopping import Interruptions, Wishes
from .timestep_samplers import ScheduleSampler, UniformSampler
from .update import Progress, Update


class TrainLoop:
    """Trains a network on endless batches of images.

    Args:
        model: its device is where training takes place.
        process: see diffusion/process.py for what one's own must have.
        data: see Batches for what one's own must have.
        settings: everything that is a number.
        objective: what is minimised, see Objective; by default the process's training_losses.
        schedule_sampler: how t is drawn; by default uniformly.
        hooks: called every so many steps, in this order, just before log lines.

    Attributes:
        opt, emas: AdamW, and the averages. step: steps completed. resumed: what the user should
            know about the checkpoint that is continued.

    Raises:
        ValueError: a checkpoint that cannot be continued, or a number format that the device does
            not have.
    """

    def __init__(
        self,
        model: nn.Module,
        process: Process,
        data: Batches,
        settings: TrainSettings,
        *,
        objective: Objective | None = None,
        schedule_sampler: ScheduleSampler | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.model, self.process, self.data = model, process, data
        self.settings, self.hooks = settings, tuple(hooks)
        self.schedule_sampler = schedule_sampler or UniformSampler(process)
        self.device = next(model.parameters()).device
        self.global_batch = settings.batch_size * dist_util.get_world_size()
        self.last_step = settings.last_step(dist_util.get_world_size())
        keep_freed_memory(self.device)
        self.precision = Precision(settings.precision, self.device, settings.fp16_scale_growth)
        dist_util.sync_params(model.parameters())
        self.progress = Progress()
        self.opt = make_optimizer(model, settings)
        self.emas = [EMA(model, rate, settings.ema_warmup) for rate in settings.ema_rates]
        self.statistics = LossStatistics(process.num_timesteps)
        self.log = StepLog(self.global_batch, self.last_step)
        self.state = self._run_state()
        self.resumed = self._resume(settings.resume) if settings.resume else []
        dist_util.check_in_sync(model.state_dict())
        self.gradients = Gradients(
            model,
            trained_network(model, settings.compile),
            process,
            objective or process_losses(process),
            self.schedule_sampler,
            self.precision,
            settings,
        )
        self.update = Update(
            model,
            self.opt,
            self.emas,
            self.schedule_sampler,
            self.statistics,
            self.precision,
            self.progress,
            settings,
        )
        self.log.restart_clock(self.step)
        self._interruptions = Interruptions(settings.limits.max_hours, settings.saving.minutes)
        self._agreed = Wishes()  # of the last step
        self._saved_step = self.step if settings.resume else -1

    @property
    def step(self) -> int:
        """Steps completed, those without a finite gradient included."""
        return self.progress.step

    @step.setter
    def step(self, step: int) -> None:
        self.progress.step = step

    # ---- the loop ----

    def run_loop(self) -> None:
        """Train until a limit is reached or a signal says to stop; logs, saves and calls hooks on
        the way.

        Raises:
            Diverged: losses or gradients are not finite; nothing of them has reached weights or
                files.
            ValueError: the data are not what the network is for, memory has ended, or another run
                is at work in the logger's folder.
        """
        self.model.train()
        for line in self.resumed:
            logger.log(line)
        if self.last_step is None and not self.settings.limits.max_hours:
            logger.log(
                "note: nothing ends this run but a signal (Ctrl-C, SIGTERM, SIGUSR1: each saves "
                "first): --max_steps, --max_images and --max_hours set limits"
            )
        self.log.start(self.step)
        bar = tqdm(
            total=self.last_step,
            initial=self.step,
            unit="step",
            desc="training",
            disable=None if dist_util.is_main() else True,
        )
        try:
            with owning(logger.get_dir()), bar, self._interruptions:
                why = self._run_until_told(bar)
                if why:
                    logger.log(
                        f"{why} after step {self.step}: saving; --resume {logger.get_dir()} alone "
                        "continues, or the same command with --resume auto --out_dir "
                        f"{logger.get_dir()}"
                    )
                # Within the block: Ctrl-C reaches ranks twice, from the terminal and from their
                # launcher.
                if self.step != self._saved_step:
                    self.save()
            if error := self._interruptions.failure:
                raise ValueError(
                    f"{error.filename} cannot be written ({error.strerror}); the checkpoint of "
                    f"step {self.step} is saved: make room, and the same command with --resume "
                    "auto continues"
                )
        finally:
            # Loader processes that end by garbage collection, without being told, take torch 5 s
            # each, or for ever.
            if isinstance(self.data, SeekableBatches):
                self.data.close()

    def _run_until_told(self, bar: tqdm) -> str:
        """Steps until the end; returns what ended it before a limit, '' otherwise."""
        first = True
        if self.step != self.last_step:  # a signal may have come while the script started
            stop = dist_util.any_rank(self._interruptions.wishes().stop)[0]
            if why := self._interruptions.why_ended(Wishes(stop)):
                return why
        while self.last_step is None or self.step < self.last_step:
            start = time.perf_counter()
            batch, cond = next(self.data)
            self.log.waited += time.perf_counter() - start
            if first:
                check_batch(batch, cond, self.model, self.settings.batch_size)
                if note := range_note(batch):
                    logger.log(note)
                first = False
            try:
                self.run_step(batch, cond)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise ValueError(memory_advice(self.settings, self.model)) from error
            bar.update()
            ended = self._after_step(self._agreed.save_due)
            if why := self._interruptions.why_ended(self._agreed):
                return why
            if ended:
                return ""
        return ""

    def _after_step(self, save_due: bool) -> bool:
        """Whatever is due after an update; True if the loop is to end."""
        averages = self.emas[0].weights if self.emas else {}
        run_hooks(self.hooks, self.model, averages, self.precision, self.step)
        if self.step % self.settings.log_interval == 0 or self.step in (1, self.last_step):
            self.log_step()
        if save_due or self.step % self.settings.saving.interval == 0:
            self.save()
            if os.environ.get("DIFFUSION_TRAINING_TEST"):
                return True  # what tests of existing scripts set to end after the first save
        return False

    # ---- one step ----

    def run_step(self, batch: Tensor, cond: Cond) -> None:
        """One update from this rank's images [N, C, H, W] and their conditions.

        An update whose losses or gradients are not finite, on whichever rank, is left out on all:
        weights, averages, optimizer and timestep sampler stay as they were.

        Raises:
            Diverged: a loss is not finite (other than in fp16), or max_skipped updates in a row
                were left out.
        """
        set_learning_rate(self.opt, self.settings, self.step)
        t, losses, weights = self.forward_backward(batch, cond)
        diagnose = functools.partial(self.gradients.diagnose, batch, cond, t, self.step)
        self._agreed = self.update(t, losses, weights, self._interruptions.wishes, diagnose)

    def forward_backward(self, batch: Tensor, cond: Cond) -> tuple[Tensor, Losses, Tensor]:
        """Gradients of the mean loss over the global batch; returns t, losses and their weights,
        see Gradients.
        """
        return self.gradients(batch, cond, self.step)

    # ---- telling, keeping ----

    def log_step(self) -> None:
        """One line about the steps since the last one."""
        more: dict[str, float] = {"lr": self.opt.param_groups[0]["lr"]}
        if self.precision.mode == "fp16":
            more["loss_scale"] = self.precision.scaler.get_scale()
        if self.progress.skipped:
            more["skipped"] = self.progress.skipped
        between = self.step == self.last_step and self.step % self.settings.log_interval != 0
        try:
            self.log.write(self.step, self.statistics, self.update.grad_norm, more, keep=between)
        except OSError as error:  # a full disk; what has been learned must not be lost with it
            self._interruptions.failed(error)

    def save(self) -> None:
        """Write the checkpoint of this step; see RunState.save. A collective."""
        self.schedule_sampler.settle()
        self.state.save(logger.get_dir(), self.settings.saving)
        self._saved_step = self.step
        self._interruptions.saved()

    def _run_state(self) -> RunState:
        """Everything that a checkpoint holds."""
        parts: dict[str, Stateful] = {"model": self.model}
        parts |= {ema.name: ema for ema in self.emas}
        parts["opt"] = OptimizerState(self.opt, self.settings)
        entries: dict[str, Stateful] = {
            "sampler": self.schedule_sampler,
            "scaler": self.precision,
            "statistics": self.statistics,
            "ema_updates": UpdateCounts(self.emas),
            "pending": self.log,
        }
        facts = run_facts(self.settings, self.data, self.schedule_sampler)
        return RunState(parts, entries, self.progress, facts)

    def _resume(self, path: str) -> list[str]:
        """Take over the whole set of a checkpoint; returns what the user should know. (Drop-in
        loops accept less.)
        """
        told = self.state.restore(path, self.device)
        if isinstance(self.data, SeekableBatches):
            self.data.seek(self.step)
        else:
            told.append(
                "note: the data iterator cannot be moved, so its images start again from the "
                "beginning"
            )
        return told
