"""A convolutional network with random weights as a feature space: no download, no training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .space import Features, image_tensor

_WIDTHS = (64, 128, 256)
_SEED = 1


class RandomNetworkSpace:
    """Three stages of 3 x 3 convolutions with random weights, ReLU and halving; the means of each
    stage's channels over the image, and over its quarters at the last stage.
    """

    name, has_spatial, has_logits = "random", False, False

    def __init__(self, device: torch.device) -> None:
        self.dim = 0
        self.warnings: list[str] = []
        self.device = device
        self._stages: dict[int, nn.ModuleList] = {}

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seed": _SEED,
            "precision": "fp32",
            "versions": {"torch": torch.__version__},
        }

    @torch.no_grad()
    def __call__(self, images: np.ndarray | Tensor) -> Features:
        x = image_tensor(images).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        if x.shape[1] not in self._stages:
            self._stages[x.shape[1]] = _stages(x.shape[1]).to(self.device)
        found = []
        for stage in self._stages[x.shape[1]]:
            x = torch.relu(stage(x))
            found += [x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3)).sqrt()]
            if min(x.shape[2:]) >= 2:
                x = nn.functional.avg_pool2d(x, 2)
        found.append(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))
        rows = torch.cat(found, dim=1)
        self.dim = rows.shape[1]
        return Features(rows)


def _stages(channels: int) -> nn.ModuleList:
    """Convolutions that keep the variance of their inputs (He et al. 2015)."""
    generator = torch.Generator().manual_seed(_SEED)
    stages = nn.ModuleList()
    for width in _WIDTHS:
        stage = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        scale = (2 / (9 * channels)) ** 0.5
        stage.weight.data = scale * torch.randn(stage.weight.shape, generator=generator)
        stages.append(stage.requires_grad_(False))
        channels = width
    return stages
