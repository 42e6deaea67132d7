"""What is called every so many steps: previews, validation, evaluation, functions of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import logger
from .precision import Precision
from .protocols import Network


@dataclass(frozen=True)
class Hook:
    """`call(network, step)` after every `every` steps, on every rank, without gradients.

    Args:
        every: steps between calls.
        call: what it returns, {name: number}, joins the next log line (as means if several came
            before it), just before which hooks are called.
        averaged: the network has the first average's weights; otherwise the present ones.

    Raises:
        ValueError: `every` is below 1.
    """

    every: int
    call: Callable[[Network, int], Mapping[str, float]]
    averaged: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"a hook is called every 1 or more steps, not every {self.every}")


def run_hooks(
    hooks: Sequence[Hook],
    model: nn.Module,
    averages: dict[str, Tensor],
    precision: Precision,
    step: int,
) -> None:
    """Call those that are due after `step` steps, and log their numbers.

    Args:
        averages: weights of the network by name; {}: its present ones.
    """
    for hook in hooks:
        if step % hook.every == 0:
            found = _run(hook, model, averages if hook.averaged else {}, precision, step)
            for name, value in found.items():
                logger.logkv_mean(name, value)


def _run(
    hook: Hook, model: nn.Module, weights: dict[str, Tensor], precision: Precision, step: int
) -> Mapping[str, float]:
    """Call a hook with the network in evaluation mode.

    Each call of the network has the run's precision; what the hook does with samples has float32,
    since distances and scores of images in half precision are others.
    """

    def network(*inputs: Tensor | None, **cond: Tensor) -> Tensor:
        with precision.autocast():
            return torch.func.functional_call(model, weights, inputs, cond)

    model.eval()
    with torch.no_grad():
        found = hook.call(network, step)
    model.train()
    return found
