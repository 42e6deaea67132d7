"""AdamW at the run's learning rate, and its state across checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .settings import TrainSettings


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Fused AdamW for all parameters."""
    return torch.optim.AdamW(
        model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )


def set_learning_rate(opt: torch.optim.Optimizer, settings: TrainSettings, step: int) -> None:
    """The rate of the update after `step` completed ones: risen so far by the warm-up, fallen so
    far by the annealing. A constant rate is left as it is.
    """
    warmup, anneal = settings.lr_warmup_steps, settings.lr_anneal_steps
    if not (warmup or anneal):
        return
    share = 1.0
    if anneal:
        share = max(0.0, 1 - step / anneal)
    if step < warmup:
        share *= (step + 1) / warmup
    for group in opt.param_groups:
        group["lr"] = settings.lr * share


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer as a checkpoint sees it: the moments are the checkpoint's, lr and weight decay
    those that are asked for now.
    """

    opt: torch.optim.Optimizer
    settings: TrainSettings

    def state_dict(self) -> dict[str, Any]:
        return self.opt.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        ValueError: it is of other parameters.
        """
        restore_optimizer(self.opt, state)
        for group in self.opt.param_groups:
            group["lr"], group["weight_decay"] = self.settings.lr, self.settings.weight_decay


def restore_optimizer(opt: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take over a state_dict, also one of guided-diffusion's or of weights in another layout.

    Raises:
        ValueError: it is of other parameters.
    """
    # How it is computed is this program's business, not the checkpoint's.
    for group in saved["param_groups"]:
        group.update(fused=opt.defaults["fused"], foreach=opt.defaults["foreach"])
    opt.load_state_dict(saved)
    _take_layout_of_parameters(opt)


def _take_layout_of_parameters(opt: torch.optim.Optimizer) -> None:
    """Moments in the strides of their parameters, whatever those of the run that saved them were.

    Fused AdamW walks through memory: on a CPU it silently mixes elements up where strides differ
    (seen in PyTorch 2.13).
    """
    for p, state in opt.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != p.shape:
                continue
            if value.stride() != p.stride():
                like_p = torch.empty_like(p, dtype=value.dtype, requires_grad=False)
                state[name] = like_p.copy_(value)
