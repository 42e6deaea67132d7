"""The parts of the library's training loop, driven by the hooks of guided-diffusion's TrainLoop."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import dist_util
from ..diffusion.process import Network, Process
from ..training import train_loop
from ..training.hooks import Hook
from ..training.precision import Precision
from ..training.protocols import Cond, Losses, Objective, Stateful
from ..training.stopping import Wishes
from ..training.update import Update
from . import logger
from .fp16_util import MixedPrecisionTrainer, single_groups

HookCall = Callable[[Network, int], Any]


class Hooks(Protocol):
    """What the library's loop calls of a TrainLoop of guided-diffusion's."""

    mp_trainer: MixedPrecisionTrainer

    def run_step(self, batch: Tensor, cond: Cond) -> None: ...

    def save(self) -> None: ...


@dataclass(frozen=True)
class Computed:
    """What our forward and backward pass found, see Gradients; `diagnose` says what of it is not
    finite.
    """

    t: Tensor
    losses: Losses
    weights: Tensor
    diagnose: Callable[[], str]


class OwnLoop(train_loop.TrainLoop):
    """The library's loop, whose steps and checkpoints are the hooks'.

    Attributes:
        opt: any optimizer.
        running: run_loop() is under way; it counts the steps then.
        computed: of this step, for its update; None if the hooks compute gradients by themselves.
    """

    opt: Any

    def __init__(self, hooks_of: Hooks, *args: Any, **kwargs: Any) -> None:
        self.hooks_of, self.running = hooks_of, False
        self.computed: Computed | None = None
        self._agreed_in_step: Wishes | None = None
        self._logs_by_itself = False
        self._drawn = -1
        super().__init__(*args, **kwargs)
        # The averages are a hook's affair.
        self.update = _UpdateOfWeights(**{**vars(self.update), "emas": ()})
        self.gradients.precision = _Backward(self)  # type: ignore[assignment]

    def begin(self, resumed: list[str], continued: bool) -> None:
        """Start at the present step, whatever has been loaded after construction."""
        dist_util.check_in_sync(self.model.state_dict())
        self.resumed = resumed
        self.log.restart_clock(self.step)
        self._saved_step = self.step if continued else -1

    def run_loop(self) -> None:
        self.running = True
        try:
            super().run_loop()
        finally:
            self.running = False

    def run_step(self, batch: Tensor, cond: Cond) -> None:
        """The hook's step. Whatever it does, it counts as one, and ranks agree on their wishes."""
        step, self._agreed_in_step, self._logs_by_itself = self.step, None, True
        self.hooks_of.run_step(batch, cond)
        if self._agreed_in_step is None:
            self._agreed_in_step = Wishes(*dist_util.any_rank(*self._interruptions.wishes()))
        self._agreed = self._agreed_in_step
        self.note_losses()
        self.step = step + 1

    def replace_in_checkpoints(self, name: str, part: Stateful) -> None:
        """Save this object under the name of another from now on."""
        if name in self.state.parts:
            self.state = replace(self.state, parts={**self.state.parts, name: part})
        else:
            self.state = replace(self.state, entries={**self.state.entries, name: part})

    def address(self) -> int:
        """The step by which a batch's noise is drawn: that of the run, or a later one if nobody
        counts, since no two batches may have the same noise.
        """
        self._drawn = max(self.step, self._drawn + 1)
        return self._drawn

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """AdamW and all that belongs to it, but for averages and counting; False if this step is
        left out. A collective.
        """
        step, skipped, found = self.step, self.progress.skipped, self.computed
        self.computed, self._logs_by_itself = None, found is None
        if found is None:
            nothing = torch.zeros(0, device=self.device)
            found = Computed(nothing, {"loss": nothing}, nothing, lambda: "in its gradients")
        self.update.opt = opt
        self._agreed_in_step = self.update(
            found.t, found.losses, found.weights, self._interruptions.wishes, found.diagnose
        )
        self.step = step
        if not self.running and self.update.grad_norm is not None:  # else log_step has it
            logger.logkv_mean("grad_norm", self.update.grad_norm)
        return self.progress.skipped == skipped

    def note_losses(self) -> None:
        """Log and learn from losses whose update was made by a trainer of somebody else's."""
        if (found := self.computed) is not None:
            self.statistics.add(found.t, found.losses, found.weights)
            self.schedule_sampler.update(found.t, found.losses["loss"])
            self.computed, self._logs_by_itself = None, False

    def log_step(self) -> None:
        """The line that is due; of a loop that computes by itself, what it has logged."""
        if not self._logs_by_itself:
            super().log_step()
            return
        if self.update.grad_norm is not None:
            logger.logkv("grad_norm", self.update.grad_norm)
        logger.logkvs(
            {
                "step": self.step,
                "samples": self.step * self.global_batch,
                "lr": self.opt.param_groups[0]["lr"],
            }
        )
        logger.dumpkvs()

    def save(self) -> None:
        self.hooks_of.save()
        self.saved()

    def saved(self) -> None:
        """The checkpoint of this step has been written."""
        self._saved_step = self.step
        self._interruptions.saved()


class _UpdateOfWeights(Update):
    """Without losses if there are none: gradients may be somebody else's work."""

    def _take(self, t: Tensor, losses: Losses, weights: Tensor, norm: Tensor) -> None:
        if len(t):
            super()._take(t, losses, weights, norm)
            return
        self.progress.skipped_in_a_row = 0
        if self.settings.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.settings.grad_clip, norm)
        self.precision.step(self.opt)


class _Backward:
    """The precision of a forward and backward pass whose second half is the trainer's."""

    def __init__(self, loop: OwnLoop) -> None:
        self._loop, self.autocast = loop, loop.precision.autocast

    def backward(self, loss: Tensor) -> None:
        self._loop.hooks_of.mp_trainer.backward(loss)


class LoopTrainer(MixedPrecisionTrainer):
    """guided-diffusion's trainer over our number formats: weights are float32 and their own
    masters; fp16 is a matter of autocast and of a factor on the loss.
    """

    def __init__(self, loop: OwnLoop, use_fp16: bool, fp16_scale_growth: float) -> None:
        super().__init__(model=loop.model, fp16_scale_growth=fp16_scale_growth)
        self.use_fp16, self._loop = use_fp16, loop
        if use_fp16:
            self.param_groups_and_shapes = single_groups(loop.model)

    @property
    def lg_loss_scale(self) -> float:
        """log2 of the factor on the loss; 0 outside fp16."""
        return math.log2(self._precision.scaler.get_scale()) if self.use_fp16 else 0.0

    @lg_loss_scale.setter
    def lg_loss_scale(self, value: float) -> None:
        if self.use_fp16:
            scaler = self._precision.scaler
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**value})

    @property
    def _precision(self) -> Precision:
        return self._loop.precision

    def backward(self, loss: Tensor) -> None:
        self._precision.backward(loss)

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """See OwnLoop.optimize."""
        return self._loop.optimize(opt)

    def state_dict_to_master_params(self, state_dict: Any) -> list[Tensor]:
        return [value.float() for value in super().state_dict_to_master_params(state_dict)]


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


def hooks(interval: int, validate: HookCall | None, evaluate: HookCall | None) -> list[Hook]:
    calls = [(validate, False), (evaluate, True)] if interval else []
    return [Hook(interval, call, averaged) for call, averaged in calls if call]


def previews(interval: int, preview: HookCall | None) -> list[Hook]:
    if not interval or preview is None:
        return []

    def call(network: Network, step: int) -> dict[str, float]:
        if path := preview(network, step):
            logger.log(f"step {step}: samples in {path}")
        return {}

    return [Hook(interval, call)]
