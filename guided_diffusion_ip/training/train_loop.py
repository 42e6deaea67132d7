"""TrainLoop: step, log, save, stop.

The published loop's constructor and methods, for existing scripts; the parts are elsewhere in this package. A step is

    images -> t from the timestep sampler -> objective under autocast -> gradients, averaged over ranks -> AdamW -> EMA

The objective is the process's training_losses, unless another is given (a classifier's cross entropy).

Randomness: t, epsilon and xi of an image depend on (seed, step, its position in the global batch), dropout on (seed, step,
rank, microbatch); so the same global batch gives the same training for any number of processes and microbatches.
"""
from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from .. import dist_util, logger, noise
from ..noise import Stream
from . import checkpoint
from .ema import EMA, parse_rates
from .loss_statistics import LossStatistics
from .precision import Precision
from .timestep_samplers import ScheduleSampler, UniformSampler

Losses = dict[str, Tensor]
# objective(model, images [N, C, H, W], t [N], cond, epsilon [N, C, H, W], xi) -> {"loss": [N], more to be logged: [N]};
# xi(x) draws the input perturbation's noise, shaped like x.
Objective = Callable[[Callable[..., Tensor], Tensor, Tensor, dict[str, Tensor], Tensor, Callable[[Tensor], Tensor]], Losses]


class TrainLoop:
    """Trains a network on an endless iterator of (images [N, C, H, W] in [-1, 1], {"y": labels [N]} or {}).

    Args:
        batch_size: images per process and step.
        microbatch: images per forward pass; -1: all. The gradient is that of the whole batch.
        ema_rate: a number, or several separated by commas.
        resume_checkpoint: a modelNNNNNN.pt; its ema, opt and state files must lie beside it.
        lr_anneal_steps: if > 0, lr falls linearly to 0 and training stops there.
        max_steps: if > 0, stop after so many updates.
        seed: of t, epsilon, xi and dropout.
        preview: called as preview(network, step) every sample_interval updates, with the first EMA's weights.
        objective: what is minimised, see Objective; by default the process's training_losses.
        validate: called as validate(network, step) every eval_interval updates, without gradients, on every rank; its
            {name: number} join the next log line, as means if several came before it.
    """

    def __init__(
        self, *, model: nn.Module, diffusion: Any, data: Iterator[tuple[Tensor, dict[str, Tensor]]], batch_size: int,
        microbatch: int, lr: float, ema_rate: float | str, log_interval: int, save_interval: int, resume_checkpoint: str,
        use_fp16: bool = False, fp16_scale_growth: float = 1e-3, schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0, lr_anneal_steps: int = 0, max_steps: int = 0, seed: int = 0,
        sample_interval: int = 0, preview: Callable[[Callable[..., Tensor], int], Any] | None = None,
        objective: Objective | None = None,
        eval_interval: int = 0, validate: Callable[[Callable[..., Tensor], int], dict[str, float]] | None = None,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.lr_anneal_steps = lr_anneal_steps
        self.max_steps = max_steps
        self.seed = seed
        self.sample_interval = sample_interval
        self.preview = preview
        self.objective = objective or self._training_losses
        self.eval_interval = eval_interval
        self.validate = validate
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.step = 0  # updates completed
        self.resumed = ""  # what to say about it when the loop starts

        self.rank, self.world = dist_util.get_rank(), dist_util.get_world_size()
        self.device = next(model.parameters()).device
        self.precision = Precision("fp16" if use_fp16 else "fp32", self.device, fp16_scale_growth)
        dist_util.sync_params(model.parameters())
        self.emas = [EMA(model, rate) for rate in parse_rates(ema_rate)]
        self.opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        if resume_checkpoint:
            self._resume(resume_checkpoint)
        # DDP averages gradients over ranks while the backward pass is still running.
        self.ddp_model = model
        if self.world > 1:
            self.ddp_model = DistributedDataParallel(
                model, device_ids=[self.device] if self.device.type == "cuda" else None, broadcast_buffers=False)
        self.statistics = LossStatistics(diffusion.num_timesteps)
        self._grad_norm: Tensor | None = None
        self._waited = 0.0
        self._last_log = (self.step, time.perf_counter())
        self._saved_step = self.step if resume_checkpoint else -1

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world

    @property
    def last_step(self) -> int | None:
        """Where training stops by itself; None if it does not."""
        limits = [limit for limit in (self.lr_anneal_steps, self.max_steps) if limit > 0]
        return min(limits) if limits else None

    # ---- the loop ----

    def run_loop(self) -> None:
        """Train until a limit is reached or, in a single process, Ctrl-C; logs, saves and previews on the way."""
        self.model.train()
        if self.resumed:
            logger.log(self.resumed)
        self._last_log = (self.step, time.perf_counter())
        bar = tqdm(total=self.last_step, initial=self.step, unit="step", desc="training",
                   disable=None if dist_util.is_main() else True)
        # Ranks are interrupted at different steps: only a lone process can end by itself with a consistent checkpoint.
        with bar, _CtrlC(enabled=self.world == 1) as ctrl_c:
            while (self.last_step is None or self.step < self.last_step) and not ctrl_c.pressed:
                self.run_step(*self._next_batch())
                bar.update()
                if self._after_step():
                    return
        if ctrl_c.pressed:
            name = checkpoint.checkpoint_name("model", self.step)
            logger.log(f"interrupted after step {self.step}: saving (a second Ctrl-C gives up); to continue, add "
                       f"--resume_checkpoint {os.path.join(logger.get_dir(), name)}")
        if self.step != self._saved_step:
            self.save()

    def _log_due(self, step: int) -> bool:
        return step % self.log_interval == 0 or step in (1, self.last_step)

    def _after_step(self) -> bool:
        """Whatever is due after an update; True if the loop is to end."""
        if self.eval_interval and self.validate and self.step % self.eval_interval == 0:
            self._validate()  # before the log line, which shows its numbers
        if self._log_due(self.step):
            self.log_step()
        if self.sample_interval and self.preview and self.step % self.sample_interval == 0:
            self._draw_preview()
        if self.step % self.save_interval == 0:
            self.save()
            if os.environ.get("DIFFUSION_TRAINING_TEST"):
                return True  # what tests of existing scripts set to end after the first save
        return False

    def _next_batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        start = time.perf_counter()
        batch = next(self.data)
        self._waited += time.perf_counter() - start
        return batch

    # ---- one step ----

    def run_step(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """One update from this rank's images [N, C, H, W] and their conditions."""
        self._set_lr()
        self.forward_backward(batch, cond)
        self.precision.unscale(self.opt)
        if self._log_due(self.step + 1):
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(grads)
        self.precision.step(self.opt)
        for ema in self.emas:
            ema.update(self.model)
        self.step += 1

    def forward_backward(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """Gradients of the mean loss over the global batch, from microbatches; tells the timestep sampler the losses."""
        self.opt.zero_grad(set_to_none=True)
        n = batch.shape[0]
        position = torch.arange(self.rank * n, (self.rank + 1) * n)  # on the host: noise.py looks at its range
        uniforms = noise.uniform(self.seed, Stream.TIMESTEP, position, self.step, device=self.device)
        t, weights = self.schedule_sampler.sample(n, self.device, uniforms)
        seen: list[Tensor] = []
        for number, start in enumerate(range(0, n, self.microbatch)):
            part = slice(start, start + self.microbatch)
            last = start + self.microbatch >= n
            losses = self._microbatch_losses(batch[part], {k: v[part] for k, v in cond.items()}, t[part],
                                             position[part], number)
            loss = (losses["loss"] * weights[part]).sum() / n
            with contextlib.nullcontext() if last or self.world == 1 else self.ddp_model.no_sync():
                self.precision.backward(loss)
            self.statistics.add(t[part], losses, weights[part])
            seen.append(losses["loss"].detach())
        self.schedule_sampler.update(t, torch.cat(seen))

    def _microbatch_losses(
        self, images: Tensor, cond: dict[str, Tensor], t: Tensor, position: Tensor, number: int
    ) -> Losses:
        images = images.to(self.device, non_blocking=True)
        cond = {k: v.to(self.device, non_blocking=True) for k, v in cond.items()}
        epsilon = noise.normal(self.seed, Stream.EPSILON, position, self.step, images.shape[1:], self.device)
        xi = functools.partial(self._xi, position)
        torch.manual_seed(self._dropout_seed(number))
        with self.precision.autocast():
            return self.objective(self.ddp_model, images, t, cond, epsilon, xi)

    def _training_losses(
        self, model: Callable[..., Tensor], images: Tensor, t: Tensor, cond: dict[str, Tensor], epsilon: Tensor,
        xi: Callable[[Tensor], Tensor],
    ) -> Losses:
        """The default objective."""
        return self.diffusion.training_losses(model, images, t, model_kwargs=cond, noise=epsilon, randn_like=xi)

    def _xi(self, position: Tensor, x: Tensor) -> Tensor:
        """The input perturbation's noise, from a stream of its own: gamma does not change what else is drawn."""
        return noise.normal(self.seed, Stream.XI, position, self.step, x.shape[1:], x.device)

    def _dropout_seed(self, microbatch_number: int) -> int:
        words = np.random.SeedSequence([self.seed, self.step, self.rank, microbatch_number]).generate_state(2)
        return int(words[0]) << 31 ^ int(words[1])

    def _set_lr(self) -> None:
        if self.lr_anneal_steps > 0:
            share_left = max(0.0, 1 - self.step / self.lr_anneal_steps)
            for group in self.opt.param_groups:
                group["lr"] = self.lr * share_left

    # ---- telling ----

    def log_step(self) -> None:
        """One line: losses since the last line, by quartile of t too, speed, share of time spent waiting for data, ETA."""
        step, now = self.step, time.perf_counter()
        since, then = self._last_log
        seconds = now - then
        losses = self.statistics.reduce()
        logger.logkv("step", step)
        logger.logkv("loss", losses.pop("loss", math.nan))
        if self._grad_norm is not None:
            logger.logkv("grad_norm", self._grad_norm)
        logger.logkv("images/s", (step - since) * self.global_batch / seconds)
        logger.logkv("data_wait_%", 100 * self._waited / seconds)
        if self.last_step is not None and step > since:
            logger.logkv("eta", duration((self.last_step - step) * seconds / (step - since)))
        logger.logkv("samples", step * self.global_batch)
        logger.logkv("lr", self.opt.param_groups[0]["lr"])
        if self.precision.mode == "fp16":
            logger.logkv("loss_scale", self.precision.scaler.get_scale())
        logger.logkvs(losses)
        logger.dumpkvs()
        self._last_log, self._waited = (step, now), 0.0

    def _validate(self) -> None:
        self.model.eval()
        with torch.no_grad(), self.precision.autocast():
            numbers = self.validate(self.model, self.step)
        self.model.train()
        for name, value in numbers.items():
            logger.logkv_mean(name, value)

    def _draw_preview(self) -> None:
        """A picture from the first EMA's weights, which the network borrows for the calls."""
        weights = self.emas[0].weights if self.emas else dict(self.model.named_parameters())
        self.model.eval()
        with torch.no_grad(), self.precision.autocast():
            path = self.preview(functools.partial(_call_with, self.model, weights), self.step)
        self.model.train()
        logger.log(f"step {self.step}: samples in {path}")

    # ---- keeping ----

    def save(self) -> None:
        """Write the checkpoint of this step; a collective."""
        if dist_util.is_main():
            parts = {"model": self.model.state_dict(), **{ema.name: ema.state_dict() for ema in self.emas},
                     "opt": self.opt.state_dict()}
            state = {"step": self.step, "images_seen": self.step * self.global_batch, "seed": self.seed,
                     "world": self.world, "sampler": self.schedule_sampler.state_dict(),
                     "scaler": self.precision.state_dict()}
            path = checkpoint.save_set(logger.get_dir(), self.step, parts, state)
            logger.log(f"step {self.step}: saved {path}")
        self._saved_step = self.step
        dist_util.barrier()

    def _resume(self, path: str) -> None:
        """Continue where a checkpoint ended: weights, averages, optimizer, timestep sampler, data position."""
        parts, state = checkpoint.load_set(path, [ema.name for ema in self.emas])
        self.model.load_state_dict(parts["model"])
        for ema in self.emas:
            ema.load_state_dict(parts[ema.name])
        self.opt.load_state_dict(parts["opt"])
        self.schedule_sampler.load_state_dict(state["sampler"])
        self.precision.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.resumed = f"continuing from {path}: {self.step} updates done"
        if hasattr(self.data, "seek"):
            self.data.seek(self.step)
        else:
            self.resumed += "; the data iterator cannot be moved, so its images start again from the beginning"


class _CtrlC:
    """In its block, the first Ctrl-C sets `pressed` instead of breaking into the middle of an update; the second breaks."""

    def __init__(self, enabled: bool) -> None:
        self.pressed = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _CtrlC:
        if self._enabled:
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, *_: Any) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *_: Any) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, self._before)


def _call_with(model: nn.Module, weights: dict[str, Tensor], x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
    return torch.func.functional_call(model, weights, (x, t), cond)


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
