"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class EMA:
    """weights <- rate * weights + (1 - rate) * parameters, after every update. Kept in float32.

    Args:
        warmup: in update n (from 0) use min(rate, (1 + n) / (10 + n)), so that the random start is
            soon forgotten.

    Raises:
        ValueError: rate outside [0, 1).
    """

    def __init__(self, model: nn.Module, rate: float, warmup: bool = False) -> None:
        self.rate = check_rate(rate)
        self.warmup = warmup
        self.updates = 0
        self.weights = {name: p.detach().clone().float() for name, p in model.named_parameters()}
        self._model = (
            model  # for its buffers, and for the names of parameters that it uses more than once
        )

    @property
    def name(self) -> str:
        """The stem of its checkpoint files, ema_RATE."""
        return f"ema_{self.rate}"

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's present parameters."""
        rate = (
            min(self.rate, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.rate
        )
        torch._foreach_lerp_(
            list(self.weights.values()), [p.detach().float() for p in model.parameters()], 1 - rate
        )
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """A plain state_dict, as a network loads it; buffers are the model's present ones."""
        averages = {id(p): self.weights[name] for name, p in self._model.named_parameters()}
        return {
            name: averages.get(id(p), p.detach())
            for name, p in self._model.state_dict(keep_vars=True).items()
        }

    def load_state_dict(self, state: dict[str, Tensor], updates: int = 0) -> None:
        """Take over saved weights, the average of so many updates; names and shapes must agree."""
        self.updates = updates
        names = self._model.state_dict().keys()
        if state.keys() != names:
            odd = sorted(state.keys() ^ names)[0]
            raise ValueError(
                f"the averaged weights in the checkpoint are of another network: {odd} is in one "
                "of them only"
            )
        for name, weight in self.weights.items():
            weight.copy_(state[name])


def check_rate(rate: float) -> float:
    """The rate of an average.

    Raises:
        ValueError: it lies outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"ema_rate must be at least 0 and below 1, got {rate}: 0.9999 is usual")
    return float(rate)


def parse_rates(text: str | float) -> list[float]:
    """[0.99, 0.9999] from "0.99,0.9999" or a number."""
    try:
        return [float(part) for part in str(text).split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            "ema_rate must be numbers separated by commas, such as 0.9999 or 0.99,0.9999, got "
            f"{text!r}"
        ) from None


@dataclass(frozen=True)
class UpdateCounts:
    """How many updates each average has had: a checkpoint holds it beside their weights."""

    emas: Sequence[EMA]

    def state_dict(self) -> list[int]:
        return [ema.updates for ema in self.emas]

    def load_state_dict(self, state: Sequence[int]) -> None:
        for ema, updates in zip(self.emas, state):
            ema.updates = updates


def update_ema(
    target_params: list[Tensor], source_params: list[Tensor], rate: float = 0.99
) -> None:
    """target <- rate * target + (1 - rate) * source, in place."""
    with torch.no_grad():
        for target, source in zip(target_params, source_params):
            target.lerp_(source.detach().to(target.dtype), 1 - rate)
