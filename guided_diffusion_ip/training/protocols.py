"""What the training loop asks of what it is given: batches, an objective, objects with a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Network = Callable[..., Tensor]
Losses = dict[str, Tensor]
Cond = dict[str, Tensor]

# objective(model, images [N, C, H, W], t [N], cond, epsilon [N, C, H, W], xi) -> {"loss": [N], more
# to be logged: [N]}; xi(x) draws the input perturbation's noise, shaped like x.
Objective = Callable[[Network, Tensor, Tensor, Cond, Tensor, Callable[[Tensor], Tensor]], Losses]


class Batches(Protocol):
    """Endless training batches. An iterator of one's own needs no more than `__next__`.

    It may also have, as ImageStream has,
        seek, close      see SeekableBatches: without them a continued run starts its images again
        num_images       images in the whole set          \\
        preprocessing    text: how they were prepared      > saved, and compared on resume
        classes          names; label k is classes[k]     /
        class_dropout, value_range                        for the summary before the first step
    """

    def __next__(self) -> tuple[Tensor, Cond]:
        """float [N, C, H, W] in [-1, 1], N being this process's batch size, and the network's
        conditions: {} or {"y": labels, int64 [N]}, and for super-resolution "low_res".
        """
        ...


@runtime_checkable
class SeekableBatches(Protocol):
    """Batches whose number `step` is a function of `step` alone, so that a run can be continued
    exactly.
    """

    def __next__(self) -> tuple[Tensor, Cond]: ...

    def seek(self, step: int) -> None:
        """Make batch number `step` the next one."""
        ...

    def close(self) -> None:
        """Stop worker processes and close files."""
        ...


class Stateful(Protocol):
    """Something whose state a checkpoint holds; made of dicts, lists, tensors, numbers, text."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


def facts_of(data: Batches) -> Mapping[str, Any]:
    """What the batches say about their images: those of num_images, preprocessing and classes that
    they have.
    """
    names = ("num_images", "preprocessing", "classes")
    return {name: getattr(data, name) for name in names if hasattr(data, name)}
