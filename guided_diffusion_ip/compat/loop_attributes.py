"""What subclasses of guided-diffusion's TrainLoop read and set, over the parts of the library's
loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .. import dist_util
from ..diffusion.process import Network, Process
from ..training.optimizer import OptimizerState
from ..training.protocols import Batches, Objective
from .own_loop import OwnLoop, losses_of
from .resample import Draws, for_the_loop


def _setting(name: str) -> property:
    """A number of the settings as an attribute of the loop, which may also be set."""

    def get(loop: LoopAttributes) -> Any:
        return getattr(loop._loop.settings, name)

    def change(loop: LoopAttributes, value: Any) -> None:
        ours = loop._loop
        ours.settings = dataclasses.replace(ours.settings, **{name: value})
        ours.gradients.settings = ours.update.settings = ours.settings
        if name == "lr_anneal_steps":
            ours.last_step = ours.settings.last_step(dist_util.get_world_size())

    return property(get, change)


class LoopAttributes:
    """Base of TrainLoop: its attributes; those that are properties are the library's loop's."""

    _loop: OwnLoop
    _own_objective: Objective | None
    _schedule_sampler: Draws
    _resume_step: int

    def __getattr__(self, name: str) -> Any:
        """All else that the library's loop has, to be read: a subclass may give these names to
        attributes of its own.
        """
        if "_loop" not in vars(self):
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}: call super().__init__(...), "
                "with all of its arguments, before anything else"
            )
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._loop, name)

    batch_size, microbatch = _setting("batch_size"), _setting("microbatch")
    lr, weight_decay = _setting("lr"), _setting("weight_decay")
    lr_anneal_steps, log_interval = _setting("lr_anneal_steps"), _setting("log_interval")

    @property
    def data(self) -> Batches:
        """Where batches come from."""
        return self._loop.data

    @data.setter
    def data(self, data: Batches) -> None:
        self._loop.data = data

    @property
    def step(self) -> int:
        """Steps completed since the checkpoint that is continued."""
        return self._loop.progress.step - self._resume_step

    @step.setter
    def step(self, step: int) -> None:
        self._loop.progress.step = step + self._resume_step

    @property
    def resume_step(self) -> int:
        """The step of the checkpoint that is continued."""
        return self._resume_step

    @resume_step.setter
    def resume_step(self, step: int) -> None:
        self._loop.progress.step += step - self._resume_step
        self._resume_step = step

    @property
    def diffusion(self) -> Process:
        """The process."""
        return self._loop.process

    @diffusion.setter
    def diffusion(self, process: Process) -> None:
        self._loop.process = self._loop.gradients.process = process
        self._loop.gradients.objective = self._own_objective or losses_of(process)

    @property
    def schedule_sampler(self) -> Draws:
        """How t is drawn."""
        return self._schedule_sampler

    @schedule_sampler.setter
    def schedule_sampler(self, sampler: Draws) -> None:
        self._schedule_sampler, ours = sampler, for_the_loop(sampler)
        self._loop.schedule_sampler = self._loop.gradients.schedule_sampler = ours
        self._loop.update.schedule_sampler = ours
        self._loop.replace_in_checkpoints("sampler", ours)

    @property
    def opt(self) -> torch.optim.Optimizer:
        """AdamW, or what has been put in its place."""
        return self._loop.opt

    @opt.setter
    def opt(self, opt: torch.optim.Optimizer) -> None:
        self._loop.opt = self._loop.update.opt = opt
        self._loop.replace_in_checkpoints("opt", OptimizerState(opt, self._loop.settings))

    @property
    def ema_params(self) -> list[list[Tensor]]:
        """The averages, for each rate a tensor per parameter. Values that are set are copied."""
        return [list(ema.weights.values()) for ema in self._loop.emas]

    @ema_params.setter
    def ema_params(self, averages: Sequence[Sequence[Tensor]]) -> None:
        for own, given in zip(self.ema_params, averages, strict=True):
            for ours, theirs in zip(own, given, strict=True):
                ours.copy_(theirs.detach())

    @property
    def skipped(self) -> int:
        """Steps left out so far."""
        return self._loop.progress.skipped

    @property
    def ddp_model(self) -> Network:
        """The network as training calls it."""
        return self._loop.gradients.network

    @ddp_model.setter
    def ddp_model(self, network: Network) -> None:
        self._loop.gradients.network = network

    @property
    def use_ddp(self) -> bool:
        """Does ddp_model average gradients over processes, and so have no_sync?"""
        return isinstance(self.ddp_model, DistributedDataParallel)

    @property
    def save_interval(self) -> int:
        """Steps between checkpoints."""
        return self._loop.settings.saving.interval

    @save_interval.setter
    def save_interval(self, steps: int) -> None:
        settings = self._loop.settings
        saving = dataclasses.replace(settings.saving, interval=steps)
        self._loop.settings = dataclasses.replace(settings, saving=saving)
