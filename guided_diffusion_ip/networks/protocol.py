"""What a network must have to be trained and sampled here, and what it may have besides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Network(Protocol):
    """A torch.nn.Module that is called as model(x, t, **cond).

    x is float32 [N, C, H, W], t [N] (the process's index, or t * 1000 / T with rescale_timesteps,
    which may have a fraction); cond has y, int64 [N], if the model is class-conditional: labels
    below num_classes. The result is float32 [N, C, H, W], or [N, 2 C, H, W] if the variance is
    learned: the predicted noise (or x_0), then the variance.

    Optional, each used only where it is there:

        convert_to_fp16(), convert_to_bf16()   what --precision calls before sampling; both return
                                               None and let the network compute in that format,
                                               while x and the result stay float32
        in_channels                            C, compared with the first batch in training
        use_checkpoint                         bool, for the advice on running out of memory
        num_classes                            labels, compared with those that are asked for
    """

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]: ...
