"""Inception's features as a feature space: the network, its weights and its number format."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ieee_float32 import ieee_float32
from . import inception, inception_weights
from .space import Features, as_rgb, image_tensor


class InceptionSpace:
    """The features of FID, sFID, Inception Score and their kin."""

    name, dim, has_spatial, has_logits = "inception", inception.POOL_DIM, True, True

    def __init__(
        self,
        weights: str,
        device: torch.device,
        precision: str,
        allow_download: bool,
        log: Callable[[str], object],
    ) -> None:
        inception.layer_library()  # what is missing is said before anything is downloaded
        path = inception_weights.resolve(weights, allow_download=allow_download, log=log)
        loaded = inception_weights.load(path)
        self._device, self._precision = device, precision
        self._network = inception.build(loaded.state, device)
        self._about = {
            "name": self.name,
            "file": os.path.basename(path),
            "sha256": loaded.sha256,
            "published": loaded.published,
            "weights": loaded.status,
            "precision": precision,
            "versions": {"torch": torch.__version__, "torch-fidelity": inception.library_version()},
        }
        self.warnings = []
        if not loaded.published:
            self.warnings.append(
                f"Inception weights {path}: {loaded.status} (sha256 {loaded.sha256}); compare "
                "scores only among runs with this file"
            )
        if precision == "bf16":
            self.warnings.append(
                "Inception in bfloat16: compare scores only among runs with bf16; publish those "
                "of fp32"
            )

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def __call__(self, images: np.ndarray | Tensor) -> Features:
        images = as_rgb(image_tensor(images).to(self._device))
        with torch.inference_mode(), ieee_float32():
            found = self._network(images, bf16=self._precision == "bf16")
        # Copied outside of inference mode: tensors that may be changed in place.
        return Features(*(value.clone() for value in found))
