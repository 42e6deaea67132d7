"""guided_diffusion.train_util: the training loop, and the helpers that users call or replace."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import dist_util
from ..diffusion.process import HasTimesteps, Process
from ..files import exists
from ..training.checkpoint import (
    SavePolicy,
    checkpoint_name,
    find_ema_checkpoint,
    parse_resume_step_from_filename,
)
from ..training.ema import parse_rates, update_ema
from ..training.optimizer import restore_optimizer, set_learning_rate
from ..training.precision import resolve
from ..training.protocols import Batches, Cond, Objective, SeekableBatches
from ..training.settings import TrainSettings
from ..training.stopping import Limits
from . import logger
from .fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from .loop_attributes import LoopAttributes
from .own_loop import Computed, HookCall, LoopTrainer, OwnLoop, hooks, losses_of, previews
from .resample import Draws, LossAwareSampler, UniformSampler, for_the_loop

__all__ = [
    "INITIAL_LOG_LOSS_SCALE",
    "LossAwareSampler",
    "MixedPrecisionTrainer",
    "TrainLoop",
    "UniformSampler",
    "find_ema_checkpoint",
    "find_resume_checkpoint",
    "get_blob_logdir",
    "log_loss_dict",
    "parse_resume_step_from_filename",
    "update_ema",
]


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


_log_loss_dict = log_loss_dict


class TrainLoop(LoopAttributes):
    """guided-diffusion's loop, hook by hook, over the parts of the library's; and the arguments
    that came with this library later: TrainSettings has them in order, and says what each means.

    Whatever of run_loop, run_step, forward_backward, save, log_step and the hooks with an
    underscore is overridden, in a subclass or for one object, is called where guided-diffusion
    calls it. The rest works as the library's loop does: guards, signals, exact continuation.

    A network that has been converted to half precision comes back to float32, and use_fp16 means
    autocast; resume_checkpoint may also be the work of guided_diffusion, or weights alone (to
    fine-tune); the process may be one of their own, whose training_losses has guided-diffusion's
    parameters only; and so may the timestep sampler, see resample.Draws.

    Args:
        preview, validate, evaluate: called as f(network, step): preview every sample_interval
            steps, and what it returns, the path of a picture, is logged; the others every
            eval_interval steps, and their {name: number} are logged. validate's network has the
            present weights, the others' the first average's.
        limits, saving: say more than max_steps and save_interval, which they replace.
        settings: the run's flags by section.

    Attributes:
        resume_step: the step of the checkpoint that is continued. step: steps since then.
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
        schedule_sampler: Draws | None = None,
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
        self.model = model
        self.ema_rate = parse_rates(ema_rate)
        self.resume_checkpoint = resume_checkpoint
        self.use_fp16, self.fp16_scale_growth = use_fp16, fp16_scale_growth
        self.sync_cuda = torch.cuda.is_available()
        self._schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self._own_objective = objective
        self._resume_step, self._restored = 0, False
        self._continued = ""  # from where, if the weights were loaded here
        self._fresh: list[str] = []  # what had to start afresh
        self._notes: list[str] = []
        self._loop = OwnLoop(
            self,
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
                ema_rates=tuple(self.ema_rate),
                ema_warmup=ema_warmup,
                precision=resolve(precision, use_fp16),
                fp16_scale_growth=fp16_scale_growth,
                compile=compile,
                seed=seed,
                log_interval=log_interval,
                limits=limits or Limits(max_steps),
                saving=saving or SavePolicy(save_interval),
                record=settings or {},
            ),
            objective=objective or losses_of(diffusion),
            schedule_sampler=for_the_loop(self._schedule_sampler),
            hooks=hooks(eval_interval, validate, evaluate) + previews(sample_interval, preview),
        )
        self.mp_trainer: MixedPrecisionTrainer = LoopTrainer(
            self._loop, self._loop.precision.mode == "fp16", fp16_scale_growth
        )
        self._begin_where_hooks_lead()

    # ---- loading ----

    def _begin_where_hooks_lead(self) -> None:
        """Call the loading hooks, and begin where they lead."""
        loop = self._loop
        self._load_and_sync_parameters()
        continued = bool(self._continued or self.resume_step)
        if continued:
            self._load_optimizer_state()
        for rate, ema in zip(self.ema_rate, self._loop.emas):
            if continued:
                averaged = self._load_ema_parameters(rate)
            else:
                averaged = list(self.model.parameters())  # a hook may have loaded them
            for ours, theirs in zip(ema.weights.values(), averaged, strict=True):
                ours.copy_(theirs.detach())
            if not self._restored:
                ema.updates = loop.step
        if continued and not self._restored:
            if isinstance(self.data, SeekableBatches):
                self.data.seek(loop.step)
            parts = ", ".join(sorted(self._fresh, key="optimizer".__eq__))  # that one last
            fresh = f"; starting afresh: {parts}" if parts else ""
            path = self._continued or self.resume_checkpoint
            self._notes = [f"continuing from {path}: {loop.step} steps done{fresh}"]
        loop.begin(self._notes, continued)

    def _load_and_sync_parameters(self) -> None:
        """The weights of the checkpoint that is to be continued, if any, on all ranks; and all else
        of it, if it is a whole set of ours.
        """
        path = find_resume_checkpoint() or self.resume_checkpoint
        if path:
            self._continued = path
            step = parse_resume_step_from_filename(path)
            self._restored = self._is_ours(path, step)
            if self._restored:
                self._notes = self._loop._resume(path)
                self._resume_step = self._loop.progress.step
            else:
                self.model.load_state_dict(dist_util.load_state_dict_once(path, self._loop.device))
                self.resume_step = step
                learns = self._loop.schedule_sampler.state_dict()
                self._fresh += ["timestep sampler"] if learns else []
        dist_util.sync_params(self.model.parameters())

    def _is_ours(self, path: str, step: int) -> bool:
        state = os.path.join(os.path.dirname(path), checkpoint_name("state", step))
        return os.path.basename(path) == checkpoint_name("model", step) and dist_util.from_main(
            lambda: exists(state)
        )

    def _load_optimizer_state(self) -> None:
        """What the optimizer had learned, if it lies beside the weights and fits."""
        if self._restored:
            return
        step = self.resume_step
        path = os.path.join(os.path.dirname(self._path_continued()), checkpoint_name("opt", step))
        if not (dist_util.from_main(lambda: exists(path)) and self._adopt_optimizer(path)):
            self._fresh.append("optimizer")

    def _load_ema_parameters(self, rate: float) -> list[Tensor]:
        """The averages of this rate that lie beside the weights; else the weights."""
        ema = next(ema for ema in self._loop.emas if ema.rate == float(rate))
        if not self._restored:
            main, step = self._path_continued(), self.resume_step
            path = dist_util.broadcast_object(find_ema_checkpoint(main, step, rate))
            if path:
                ema.load_state_dict(dist_util.load_state_dict_once(path, self._loop.device))
            else:
                ema.load_state_dict(self.model.state_dict())
                self._fresh.append(f"average of rate {ema.rate}")
        return list(ema.weights.values())

    def _path_continued(self) -> str:
        return self._continued or find_resume_checkpoint() or self.resume_checkpoint

    def _adopt_optimizer(self, path: str) -> bool:
        saved = dist_util.load_state_dict_once(path, self._loop.device)
        try:
            restore_optimizer(self.opt, saved)
        except ValueError:  # guided_diffusion's fp16 training kept all weights in two long vectors
            return False
        return True

    # ---- the loop ----

    def run_loop(self) -> None:
        """See the library's loop, which calls run_step and save."""
        self._loop.run_loop()

    def run_step(self, batch: Tensor, cond: Cond) -> None:
        """One update from this rank's images [N, C, H, W] and their conditions.

        The one who loops counts it: run_loop, whether ours or overridden; without one, this does.
        """
        if not overridden(self, "_anneal_lr"):
            set_learning_rate(self.opt, self._loop.settings, self._loop.step)
        self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self._update_ema()
        self._anneal_lr()
        self.log_step()
        if not (self._loop.running or overridden(self, "run_loop")):
            self.step += 1

    def forward_backward(self, batch: Tensor, cond: Cond) -> None:
        """Gradients of the mean loss over the global batch, see Gradients."""
        self._loop.note_losses()  # of the step before, if nobody has
        address = self._loop.address()
        t, losses, weights = self._loop.gradients(batch, cond, address)
        diagnose = functools.partial(self._loop.gradients.diagnose, batch, cond, t, address)
        self._loop.computed = Computed(t, losses, weights, diagnose)
        looped_by_others = overridden(self, "run_loop") and not self._loop.running
        if looped_by_others or log_loss_dict is not _log_loss_dict:
            weighted = {name: values * weights for name, values in losses.items()}
            log_loss_dict(self.diffusion, t, weighted)

    def _update_ema(self) -> None:
        """The averages follow the weights."""
        for ema in self._loop.emas:
            ema.update(self.model)

    def _anneal_lr(self) -> None:
        """The learning rate at this step."""
        set_learning_rate(self.opt, self._loop.settings, self._loop.step)

    def log_step(self) -> None:
        """Log the step, and images seen; where our run_loop is under way, its lines have both."""
        if not self._loop.running:
            logger.logkv("step", self.step + self.resume_step)
            logger.logkv("samples", (self.step + self.resume_step + 1) * self._loop.global_batch)

    def save(self) -> None:
        """Write the checkpoint of this step to get_blob_logdir(). A collective."""
        self._loop.schedule_sampler.settle()
        self._loop.state.save(get_blob_logdir(), self._loop.settings.saving)
        self._loop.saved()


_OURS = dict(vars(TrainLoop))


def overridden(loop: TrainLoop, name: str) -> bool:
    """Is this hook somebody else's: of a subclass, of this one object, or put into TrainLoop?"""
    return getattr(getattr(loop, name), "__func__", None) is not _OURS[name]
