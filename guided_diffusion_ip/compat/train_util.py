"""guided_diffusion.train_util: the training loop, and the helpers that users call or replace."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import dist_util, logger
from ..diffusion.process import HasTimesteps, Network, Process
from ..files import exists
from ..training import train_loop
from ..training.checkpoint import (
    SavePolicy,
    checkpoint_name,
    find_ema_checkpoint,
    parse_resume_step_from_filename,
)
from ..training.ema import parse_rates
from ..training.hooks import Hook
from ..training.optimizer import restore_optimizer
from ..training.precision import resolve
from ..training.protocols import Batches, Cond, Losses, Objective, SeekableBatches
from ..training.settings import TrainSettings
from ..training.stopping import Limits
from ..training.timestep_samplers import ScheduleSampler

__all__ = [
    "TrainLoop",
    "find_ema_checkpoint",
    "find_resume_checkpoint",
    "get_blob_logdir",
    "log_loss_dict",
    "parse_resume_step_from_filename",
]

HookCall = Callable[[Network, int], Any]


def get_blob_logdir() -> str:
    """Where checkpoints go: the logger's folder."""
    return logger.get_dir()


def find_resume_checkpoint() -> str | None:
    """None. Replace it to find the newest checkpoint by rules of your own; TrainLoop prefers what
    it says.
    """
    return None


def log_loss_dict(diffusion: HasTimesteps, ts: Tensor, losses: Mapping[str, Tensor]) -> None:
    """Add losses [N] at timesteps ts [N] to the row: means over all, and by quarter of the process
    (_q0 the clean one).
    """
    quarters = (4 * ts // diffusion.num_timesteps).tolist()
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean())
        for quarter, value in zip(quarters, values.detach().tolist()):
            logger.logkv_mean(f"{name}_q{quarter}", value)


def _setting(name: str) -> property:
    """A number of the settings as an attribute of the loop, which may also be set."""

    def get(loop: TrainLoop) -> Any:
        return getattr(loop.settings, name)

    def change(loop: TrainLoop, value: Any) -> None:
        loop.settings = dataclasses.replace(loop.settings, **{name: value})
        loop.gradients.settings = loop.update.settings = loop.settings

    return property(get, change)


class TrainLoop(train_loop.TrainLoop):
    """The library's loop under guided-diffusion's arguments, and under those that came with this
    library later; TrainSettings has them in order, and says what each means.

    A network that has been converted to half precision comes back to float32, and use_fp16 means
    autocast; resume_checkpoint may also be the work of guided_diffusion, or weights alone (to
    fine-tune); the process may be one of their own, whose training_losses has guided-diffusion's
    parameters only.

    Args:
        preview, validate, evaluate: called as f(network, step): preview every sample_interval
            steps, and what it returns, the path of a picture, is logged; the others every
            eval_interval steps, and their {name: number} are logged. validate's network has the
            present weights, the others' the first average's.
        limits, saving: say more than max_steps and save_interval, which they replace.
        settings: the run's flags by section.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: Process,
        data: Batches,
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
        preview: HookCall | None = None,
        objective: Objective | None = None,
        eval_interval: int = 0,
        validate: HookCall | None = None,
        evaluate: HookCall | None = None,
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
        if any(p.dtype == torch.float16 for p in model.parameters()):
            model.float()
        super().__init__(
            model,
            diffusion,
            data,
            TrainSettings(
                batch_size=batch_size,
                microbatch=microbatch if microbatch > 0 else batch_size,
                lr=lr,
                weight_decay=weight_decay,
                lr_warmup_steps=lr_warmup_steps,
                lr_anneal_steps=lr_anneal_steps,
                grad_clip=grad_clip,
                max_skipped=max_skipped,
                ema_rates=tuple(parse_rates(ema_rate)),
                ema_warmup=ema_warmup,
                precision=resolve(precision, use_fp16),
                fp16_scale_growth=fp16_scale_growth,
                compile=compile,
                seed=seed,
                log_interval=log_interval,
                limits=limits or Limits(max_steps),
                saving=saving or SavePolicy(save_interval),
                resume=find_resume_checkpoint() or resume_checkpoint,
                record=settings or {},
            ),
            objective=objective or losses_of(diffusion),
            schedule_sampler=schedule_sampler,
            hooks=_hooks(eval_interval, validate, evaluate) + _previews(sample_interval, preview),
        )

    # What subclasses of guided-diffusion's loop read, and may change.
    batch_size, microbatch = _setting("batch_size"), _setting("microbatch")
    lr, weight_decay = _setting("lr"), _setting("weight_decay")
    lr_anneal_steps, log_interval = _setting("lr_anneal_steps"), _setting("log_interval")

    @property
    def diffusion(self) -> Process:
        """The process."""
        return self.process

    @property
    def skipped(self) -> int:
        """Steps left out so far."""
        return self.progress.skipped

    @property
    def ddp_model(self) -> Network:
        """The network as training calls it."""
        return self.gradients.network

    @property
    def save_interval(self) -> int:
        """Steps between checkpoints."""
        return self.settings.saving.interval

    @save_interval.setter
    def save_interval(self, steps: int) -> None:
        saving = dataclasses.replace(self.settings.saving, interval=steps)
        self.settings = dataclasses.replace(self.settings, saving=saving)

    def _resume(self, path: str) -> list[str]:
        """Continue from a whole set of ours exactly; from other checkpoints, with as much as lies
        beside them (for rank 0).
        """
        step, folder = parse_resume_step_from_filename(path), os.path.dirname(path)
        beside = {
            part: os.path.join(folder, checkpoint_name(part, step)) for part in ("opt", "state")
        }
        there = dist_util.from_main(lambda: {part: exists(file) for part, file in beside.items()})
        if os.path.basename(path) == checkpoint_name("model", step) and there["state"]:
            return super()._resume(path)
        self.model.load_state_dict(dist_util.load_state_dict_once(path, self.device))
        fresh = ["timestep sampler"] if self.schedule_sampler.state_dict() else []
        for ema in self.emas:
            averaged = dist_util.broadcast_object(find_ema_checkpoint(path, step, ema.rate))
            weights = (
                dist_util.load_state_dict_once(averaged, self.device)
                if averaged
                else self.model.state_dict()
            )
            ema.load_state_dict(weights, step)
            fresh += [] if averaged else [f"average of rate {ema.rate}"]
        if not (there["opt"] and self._adopt_optimizer(beside["opt"])):
            fresh.append("optimizer")
        self.step = step
        if isinstance(self.data, SeekableBatches):
            self.data.seek(step)
        return [
            f"continuing from {path}: {step} steps done"
            + (f"; starting afresh: {', '.join(fresh)}" if fresh else "")
        ]

    def _adopt_optimizer(self, path: str) -> bool:
        saved = dist_util.load_state_dict_once(path, self.device)
        try:
            restore_optimizer(self.opt, saved)
        except ValueError:  # guided_diffusion's fp16 training kept all weights in two long vectors
            return False
        return True


def losses_of(process: Process) -> Objective:
    """The process's losses, given as much of the loop's noise as its training_losses takes."""

    def objective(
        model: Network,
        images: Tensor,
        t: Tensor,
        cond: Cond,
        epsilon: Tensor,
        xi: Callable[[Tensor], Tensor],
    ) -> Losses:
        known = inspect.signature(process.training_losses).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
        offered: dict[str, Any] = {"noise": epsilon, "randn_like": xi}
        noise = {name: value for name, value in offered.items() if anything or name in known}
        return process.training_losses(model, images, t, model_kwargs=cond, **noise)

    return objective


def _hooks(interval: int, validate: HookCall | None, evaluate: HookCall | None) -> list[Hook]:
    calls = [(validate, False), (evaluate, True)] if interval else []
    return [Hook(interval, call, averaged) for call, averaged in calls if call]


def _previews(interval: int, preview: HookCall | None) -> list[Hook]:
    if not interval or preview is None:
        return []

    def call(network: Network, step: int) -> dict[str, float]:
        if path := preview(network, step):
            logger.log(f"step {step}: samples in {path}")
        return {}

    return [Hook(interval, call)]
