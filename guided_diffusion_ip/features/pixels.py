"""The pixels themselves as features."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .space import Features, image_tensor, size_text

# A Frechet distance takes D^3 operations: 18 s at 3072 (32x32x3) and 45 s at 4096 on one busy core,
# so 20 minutes at 12288 (64x64x3).
MAX_PIXEL_DIM = 64 * 64


class PixelSpace:
    """The pixels in [0, 1], row by row: for small images, where every difference counts alike."""

    name, has_spatial, has_logits = "pixels", False, False

    def __init__(self) -> None:
        self.dim = 0
        self.warnings: list[str] = []
        self._shape: tuple[int, ...] = ()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "precision": "fp32", "versions": {"torch": torch.__version__}}

    def __call__(self, images: np.ndarray | Tensor) -> Features:
        images = image_tensor(images)
        shape = tuple(images.shape[1:])
        self._shape = self._shape or shape
        if shape != self._shape:
            raise ValueError(
                f"pixels compare images of one size, and there are {size_text(self._shape)} and "
                f"{size_text(shape)} ones; resize one of the sets, or use inception"
            )
        dim = math.prod(shape)
        if dim > MAX_PIXEL_DIM:
            raise ValueError(
                f"images of {size_text(shape)} have {dim} pixel values, and a Frechet distance "
                f"between so many would take very long; {MAX_PIXEL_DIM} (36x36x3, 64x64x1) "
                "are the most: use inception or an ONNX model as features, or smaller images "
                "(evaluations: --image_size 32)"
            )
        self.dim = dim
        return Features(images.flatten(1).float() / 255)
