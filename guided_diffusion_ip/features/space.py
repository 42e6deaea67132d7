"""What a feature space is: images -> feature vectors that metrics compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass
class Features:
    """Of n images, float32, on the device that made them.

    pool: feature vectors [n, D].
    spatial: [n, 2023], the 17x17x7 map of sFID in the order height, width, channel; None where a
        space has none.
    logits: [n, 1008], before the softmax and without bias; None where a space has none.
    """

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureSpace(Protocol):
    """Images uint8 [n, H, W, C], C = 1 or 3, as an array or a tensor -> Features; what n is changes
    nothing but rounding.

    dim: length of a feature vector; 0 as long as that depends on images which are yet to come.
    warnings: what a reader of the scores must know.
    """

    name: str
    dim: int
    has_spatial: bool
    has_logits: bool
    warnings: list[str]

    def describe(self) -> dict[str, Any]:
        """What it takes to have the same features again, as plain values."""

    def __call__(self, images: np.ndarray | Tensor) -> Features:
        """Raises ValueError for images of another type, shape or size than this space takes."""


def image_tensor(images: np.ndarray | Tensor) -> Tensor:
    """The images as a tensor uint8 [n, H, W, C], C = 1 or 3; an array is copied, since it may be a
    view of a file.

    Raises:
        ValueError: another type or shape.
    """
    shape, kind = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    if kind != "uint8" or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:]:
        hint = ""
        if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
            hint = "; this looks like [n, C, H, W]: move the channels to the end"
        elif len(shape) == 4 and shape[3] == 4:
            hint = "; leave out the fourth channel (opacity)"
        raise ValueError(
            f"images must be uint8 [n, H, W, C] with 1 or 3 channels, got {kind} "
            f"{list(shape)}{hint}"
        )
    return images if isinstance(images, Tensor) else torch.from_numpy(np.array(images, order="C"))


def as_rgb(images: Tensor) -> Tensor:
    """Grey images as three equal channels: [n, H, W, C] -> [n, H, W, 3]."""
    return images.expand(-1, -1, -1, 3)


def size_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
