"""TrainLoop: step, log, save, stop.

The published loop's constructor and methods, for existing scripts; the parts are elsewhere in this
package. A step is

    images -> t from the timestep sampler -> objective under autocast -> gradients, averaged over
    ranks -> all ranks agree that they are finite, and whether to stop -> AdamW -> EMA

The objective is the process's training_losses, unless another is given (a classifier's cross
entropy).

Randomness: t, epsilon and xi of an image depend on (seed, step, its position in the global batch),
dropout on (seed, step, rank, microbatch); so the same global batch gives the same training for any
number of processes and microbatches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from .. import dist_util, logger, noise
from ..allocator import keep_freed_memory
from ..noise import Stream
from . import checkpoint, run_state
from .checkpoint import SavePolicy
from .ema import EMA, parse_rates
from .guards import Diverged, check_batch, diagnose, is_out_of_memory, memory_advice, range_note
from .loss_statistics import LossStatistics
from .precision import Precision
from .precision import resolve as precision_mode
from .step_log import StepLog
from .stopping import Clock, Limits, Signals
from .timestep_samplers import ScheduleSampler, UniformSampler

Losses = dict[str, Tensor]
# objective(model, images [N, C, H, W], t [N], cond, epsilon [N, C, H, W], xi) -> {"loss": [N], more
# to be logged: [N]}; xi(x) draws the input perturbation's noise, shaped like x.
Objective = Callable[
    [Callable[..., Tensor], Tensor, Tensor, dict[str, Tensor], Tensor, Callable[[Tensor], Tensor]],
    Losses,
]

# Whether DDP sends buffers from rank 0 before each forward pass; from PyTorch 2.13 on the older
# name is deprecated.
_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


class TrainLoop:
    """Trains a network on an endless iterator of (images [N, C, H, W] in [-1, 1], {"y": labels [N]}
    or {}).

    Args:
        batch_size: images per process and step.
        microbatch: images per forward pass; -1: all. The gradient is that of the whole batch.
        ema_rate: a number, or several separated by commas.
        save_interval: steps between checkpoints; `saving` says more, and replaces it.
        resume_checkpoint: a modelNNNNNN.pt, or these weights under another name; their ema, opt and
            state files must lie beside them.
        compile: call the network through torch.compile.
        grad_clip: if > 0, gradients whose norm is larger are scaled down to it.
        lr_warmup_steps: if > 0, lr rises linearly over so many steps.
        lr_anneal_steps: if > 0, lr falls linearly to 0 and training stops there.
        limits: when to stop; max_steps alone may be given instead.
        precision: fp32, fp16 or bf16; use_fp16 is the published way to say fp16.
        seed: of t, epsilon, xi and dropout.
        ema_warmup: let the averages forget their start: rate min(rate, (1 + n) / (10 + n)) in
            update n.
        max_skipped: so many steps in a row without finite gradients end the run.
        preview: called as preview(network, step) every sample_interval updates, with the first
            EMA's weights; what it returns, the path of a picture, is logged.
        objective: what is minimised, see Objective; by default the process's training_losses.
        validate: called as validate(network, step) every eval_interval updates, without gradients,
            on every rank; its {name: number} join the next log line, as means if several came
            before it.
        evaluate: the same with the first EMA's weights, just before log lines (eval_interval serves
            both).
        settings: the run's merged settings by section; saved, and compared on resume.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: Any,
        data: Iterator[tuple[Tensor, dict[str, Tensor]]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        max_steps: int = 0,
        seed: int = 0,
        sample_interval: int = 0,
        preview: Callable[[Callable[..., Tensor], int], Any] | None = None,
        objective: Objective | None = None,
        eval_interval: int = 0,
        validate: Callable[[Callable[..., Tensor], int], dict[str, float]] | None = None,
        evaluate: Callable[[Callable[..., Tensor], int], dict[str, float]] | None = None,
        precision: str = "",
        limits: Limits | None = None,
        saving: SavePolicy | None = None,
        ema_warmup: bool = False,
        max_skipped: int = 25,
        settings: dict[str, dict[str, Any]] | None = None,
        lr_warmup_steps: int = 0,
        grad_clip: float = 0.0,
        compile: bool = False,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.log_interval = log_interval
        self.saving = saving or SavePolicy(save_interval)
        self.grad_clip = grad_clip
        self.lr_warmup_steps = lr_warmup_steps
        self.lr_anneal_steps = lr_anneal_steps
        self.limits = limits or Limits(max_steps)
        self.seed = seed
        self.sample_interval = sample_interval
        self.preview = preview
        self.objective = objective
        self.eval_interval = eval_interval
        self.validate = validate
        self.evaluate = evaluate
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.max_skipped = max_skipped
        self.settings = settings or {}
        self.step = 0  # steps completed, those without a finite gradient included
        self.skipped = 0  # of them
        self.skipped_in_a_row = 0
        self.resumed: list[str] = []  # what to say about it when the loop starts
        self.pending: dict[
            str, Any
        ] = {}  # the logger's state: numbers that had been logged, but not written, at the checkpoint

        self.rank, self.world = dist_util.get_rank(), dist_util.get_world_size()
        self.device = next(model.parameters()).device
        keep_freed_memory(self.device)
        self.precision = Precision(
            precision_mode(precision, use_fp16), self.device, fp16_scale_growth
        )
        dist_util.sync_params(model.parameters())
        self.emas = [EMA(model, rate, ema_warmup) for rate in parse_rates(ema_rate)]
        self.opt = torch.optim.AdamW(
            model.parameters(), lr=lr, weight_decay=weight_decay, fused=True
        )
        self.statistics = LossStatistics(diffusion.num_timesteps)
        if resume_checkpoint:
            self.resumed = self._resume(resume_checkpoint)
        dist_util.check_in_sync(model.state_dict())
        # DDP averages gradients over ranks while the backward pass is still running; after it, if
        # that is compiled, for then it is one node of the graph. (Compiling DDP itself would split
        # it, which older PyTorch refuses under use_checkpoint.)
        self.ddp_model = torch.compile(model) if compile else model
        if self.world > 1:
            self.ddp_model = DistributedDataParallel(
                self.ddp_model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                **{_BUFFERS: False},
            )
        self._clock = Clock(self.limits.max_hours, self.saving.minutes)
        self._signals = Signals()
        self._told = [
            False
        ] * 3  # on all ranks alike: some rank has been told to stop, is out of time, should save
        self.grad_norm: Tensor | None = None
        self._log = StepLog(self.step)
        self._saved_step = self.step if resume_checkpoint else -1

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world

    @property
    def save_interval(self) -> int:
        """Steps between checkpoints."""
        return self.saving.interval

    @save_interval.setter
    def save_interval(self, steps: int) -> None:
        self.saving = dataclasses.replace(self.saving, interval=steps)

    @property
    def last_step(self) -> int | None:
        """Where training stops by itself; None if it does not."""
        limits = [
            limit
            for limit in (self.lr_anneal_steps, self.limits.last_step(self.global_batch))
            if limit
        ]
        return min(limits) if limits else None

    # ---- the loop ----

    def run_loop(self) -> None:
        """Train until a limit is reached or a signal says to stop; logs, saves and previews on the
        way.

        Raises:
            Diverged: losses or gradients are not finite; nothing of them has reached weights or
                files.
            ValueError: the data are not what the network is for, or memory has ended.
        """
        self.model.train()
        for line in self.resumed:
            logger.log(line)
        logger.get_current().load_state_dict(self.pending)
        if self.last_step is None and not self.limits.max_hours:
            logger.log(
                "note: nothing ends this run but a signal (Ctrl-C, SIGTERM, SIGUSR1: each saves "
                "first): --max_steps, --max_images and --max_hours set limits"
            )
        self._log = StepLog(self.step)
        bar = tqdm(
            total=self.last_step,
            initial=self.step,
            unit="step",
            desc="training",
            disable=None if dist_util.is_main() else True,
        )
        try:
            with bar, Signals() as self._signals:
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
        finally:
            # Loader processes that end by garbage collection, without being told, take torch 5 s
            # each, or for ever.
            if hasattr(self.data, "seek"):
                self.data.close()

    def _run_until_told(self, bar: tqdm) -> str:
        """Steps until the end; returns what ended it before a limit, '' otherwise."""
        first = True
        if self.step != self.last_step and dist_util.any_rank(bool(self._signals.received))[0]:
            return self._stopped()  # while the script started
        while self.last_step is None or self.step < self.last_step:
            batch, cond = self._next_batch()
            if first:
                check_batch(batch, cond, self.model, self.batch_size)
                if note := range_note(batch):
                    logger.log(note)
                first = False
            try:
                self.run_step(batch, cond)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise ValueError(
                    memory_advice(
                        self.microbatch,
                        self.batch_size,
                        self.precision.mode,
                        bool(getattr(self.model, "use_checkpoint", False)),
                        self.device,
                    )
                ) from error
            bar.update()
            stop, over, save_due = self._told
            ended = self._after_step(save_due)
            if stop:
                return self._stopped()
            if over:
                return f"--max_hours {self.limits.max_hours:g} are over: stopped"
            if ended:
                return ""
        return ""

    def _stopped(self) -> str:
        return f"{self._signals.received or 'another process was told to stop'}: stopped"

    def _after_step(self, save_due: bool) -> bool:
        """Whatever is due after an update; True if the loop is to end."""
        if self.eval_interval and self.step % self.eval_interval == 0:
            self._evaluate()  # before the log line, which shows its numbers
        if self.step % self.log_interval == 0 or self.step in (1, self.last_step):
            self.log_step()
        if self.sample_interval and self.preview and self.step % self.sample_interval == 0:
            if path := self._with_averages(self.preview):
                logger.log(f"step {self.step}: samples in {path}")
        if save_due or self.step % self.saving.interval == 0:
            self.save()
            if os.environ.get("DIFFUSION_TRAINING_TEST"):
                return True  # what tests of existing scripts set to end after the first save
        return False

    def _next_batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        start = time.perf_counter()
        batch = next(self.data)
        self._log.waited += time.perf_counter() - start
        return batch

    # ---- one step ----

    def run_step(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """One update from this rank's images [N, C, H, W] and their conditions.

        An update whose losses or gradients are not finite, on whichever rank, is left out on all:
        weights, averages, optimizer and timestep sampler stay as they were.

        Raises:
            Diverged: a loss is not finite (other than in fp16), or max_skipped updates in a row
                were left out.
        """
        self._set_lr()
        t, losses, weights = self.forward_backward(batch, cond)
        self.precision.unscale(self.opt)
        self.grad_norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters() if p.grad is not None]
        )
        # The one place in a step where the host waits for what the device has been given to do in
        # it.
        good_loss, good_gradient = torch.stack(
            [torch.isfinite(losses["loss"]).all(), torch.isfinite(self.grad_norm)]
        ).tolist()
        flags = dist_util.any_rank(
            not good_loss,
            not good_gradient,
            bool(self._signals.received),
            self._clock.over,
            self._clock.save_due,
        )
        self._told = flags[2:]
        if any(flags[:2]):
            self._skip(flags[0], batch, cond, t)
        else:
            self.skipped_in_a_row = 0
            self.statistics.add(t, losses, weights)
            self.schedule_sampler.update(t, losses["loss"])
            if self.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(
                    self.model.parameters(), self.grad_clip, self.grad_norm
                )
            self.precision.step(self.opt)
            for ema in self.emas:
                ema.update(self.model)
        self.step += 1

    def forward_backward(
        self, batch: Tensor, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Losses, Tensor]:
        """Gradients of the mean loss over the global batch, from microbatches.

        Returns: t [N], the losses [N] each, and the weights [N] that the timestep sampler gives
            them.
        """
        self.opt.zero_grad(set_to_none=True)
        n = batch.shape[0]
        t, weights = self._draw_t(n)
        parts: list[Losses] = []
        for number, part in enumerate(self.microbatches(n)):
            # Forward and backward: DDP decides in the former whether the latter is to average over
            # ranks.
            with (
                contextlib.nullcontext()
                if part.stop >= n or self.world == 1
                else self.ddp_model.no_sync()
            ):
                losses = self.microbatch_losses(batch, cond, t, part, number)
                self.precision.backward((losses["loss"] * weights[part]).sum() / n)
            parts.append({name: values.detach() for name, values in losses.items()})
        return (
            t,
            {name: torch.cat([losses[name] for losses in parts]) for name in parts[0]},
            weights,
        )

    def _draw_t(self, n: int) -> tuple[Tensor, Tensor]:
        uniforms = noise.uniform(
            self.seed, Stream.TIMESTEP, self._positions(n), self.step, device=self.device
        )
        self.schedule_sampler.settle()
        return self.schedule_sampler.sample(n, self.device, uniforms)

    def _positions(self, n: int) -> range:
        """Of this rank's images in the global batch."""
        return range(self.rank * n, (self.rank + 1) * n)

    def microbatches(self, n: int) -> list[slice]:
        return [slice(start, start + self.microbatch) for start in range(0, n, self.microbatch)]

    def _skip(self, bad_loss: bool, batch: Tensor, cond: dict[str, Tensor], t: Tensor) -> None:
        """Leave this update out, or give up if there is no hope."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if bad_loss and self.precision.mode != "fp16":
            raise Diverged(
                f"the loss is not finite at step {self.step + 1}: {diagnose(self, batch, cond, t)}"
            )
        if self.skipped_in_a_row >= self.max_skipped:
            raise Diverged(
                f"no finite gradient in {self.skipped_in_a_row} steps in a row, the last of them "
                f"step {self.step + 1}: {diagnose(self, batch, cond, t)}"
            )
        logger.log(
            f"step {self.step + 1} left out: its gradients are not finite. "
            + (self.precision.skip() or f"{self.max_skipped} in a row would end the run")
        )

    def microbatch_losses(
        self,
        batch: Tensor,
        cond: dict[str, Tensor],
        t: Tensor,
        part: slice,
        number: int,
        model: nn.Module | None = None,
    ) -> Losses:
        """The losses of the images `part`, with a graph for gradients; `model` instead of the one
        that averages over ranks.
        """
        images = batch[part].to(self.device, non_blocking=True)
        cond = {k: v[part].to(self.device, non_blocking=True) for k, v in cond.items()}
        position = self._positions(len(batch))[part]
        epsilon = noise.normal(
            self.seed, Stream.EPSILON, position, self.step, images.shape[1:], self.device
        )
        xi = functools.partial(self._xi, position)
        if count := getattr(self.diffusion, "augment_uniforms", 0):
            cond["augment_uniforms"] = noise.uniform(
                self.seed, Stream.AUGMENT, position, self.step, (count,), self.device
            )
        torch.manual_seed(self._dropout_seed(number))
        with self.precision.autocast():
            return (self.objective or self._training_losses)(
                model or self.ddp_model, images, t[part], cond, epsilon, xi
            )

    def _training_losses(
        self,
        model: Callable[..., Tensor],
        images: Tensor,
        t: Tensor,
        cond: dict[str, Tensor],
        epsilon: Tensor,
        xi: Callable[[Tensor], Tensor],
    ) -> Losses:
        """The default objective."""
        return self.diffusion.training_losses(
            model, images, t, model_kwargs=cond, noise=epsilon, randn_like=xi
        )

    def _xi(self, position: range, x: Tensor) -> Tensor:
        """The input perturbation's noise, from a stream of its own: gamma does not change what else
        is drawn.
        """
        return noise.normal(self.seed, Stream.XI, position, self.step, x.shape[1:], x.device)

    def _dropout_seed(self, microbatch_number: int) -> int:
        words = np.random.SeedSequence(
            [self.seed, self.step, self.rank, microbatch_number]
        ).generate_state(2)
        return int(words[0]) << 31 ^ int(words[1])

    def _set_lr(self) -> None:
        share = 1.0
        if self.lr_anneal_steps > 0:
            share = max(0.0, 1 - self.step / self.lr_anneal_steps)
        if self.step < self.lr_warmup_steps:
            share *= (self.step + 1) / self.lr_warmup_steps
        if self.lr_anneal_steps > 0 or self.lr_warmup_steps > 0:
            for group in self.opt.param_groups:
                group["lr"] = self.lr * share

    # ---- telling ----

    def log_step(self) -> None:
        """One line about the steps since the last one."""
        self._log.write(self)

    def _evaluate(self) -> None:
        numbers: dict[str, float] = {}
        if self.validate:
            self.model.eval()
            with torch.no_grad():
                numbers |= self.validate(self._network({}), self.step)
            self.model.train()
        if self.evaluate:
            numbers |= self._with_averages(self.evaluate)
        for name, value in numbers.items():
            logger.logkv_mean(name, value)

    def _with_averages(self, use: Callable[[Callable[..., Tensor], int], Any]) -> Any:
        """Call use(network, step), the network having the first EMA's weights for the calls."""
        weights = self.emas[0].weights if self.emas else dict(self.model.named_parameters())
        self.model.eval()
        with torch.no_grad():
            result = use(self._network(weights), self.step)
        self.model.train()
        return result

    def _network(self, weights: dict[str, Tensor]) -> Callable[..., Tensor]:
        """The network with these weights in place of its own. Each call has the run's precision;
        what is done with samples has float32, since distances and scores of images in half
        precision are others.
        """

        def call(*inputs: Tensor | None, **cond: Tensor) -> Tensor:
            with self.precision.autocast():
                return torch.func.functional_call(self.model, weights, inputs, cond)

        return call

    # ---- keeping ----

    def save(self) -> None:
        """Write the checkpoint of this step, then remove what the policy does not keep; a
        collective.

        Raises:
            ValueError: it cannot be written; what was there before is untouched. Or it would hold a
                NaN.
        """
        statistics = self.statistics.state_dict()  # a collective
        complaint = None
        if dist_util.is_main():
            try:
                path = checkpoint.save_set(
                    logger.get_dir(), self.step, *run_state.gather(self, statistics)
                )
                removed = checkpoint.prune(logger.get_dir(), self.saving, self.step)
                logger.log(
                    f"step {self.step}: saved {path}"
                    + (f"; removed step {', '.join(map(str, removed))}" if removed else "")
                )
            except (OSError, ValueError) as error:
                last = checkpoint.newest(logger.get_dir())
                complaint = (
                    f"the checkpoint of step {self.step} could not be saved in {logger.get_dir()}: "
                    f"{error}. The last complete one is {last or 'none'}; with the cause removed, "
                    "the same command with --resume auto continues"
                )
        complaint = dist_util.broadcast_object(complaint)
        if complaint:
            raise ValueError(complaint)
        self._saved_step = self.step
        self._clock.saved()

    def _resume(self, path: str) -> list[str]:
        """Take over the whole set of a checkpoint; returns what to tell. (Drop-in loops accept
        less.)
        """
        return run_state.restore(self, path)
