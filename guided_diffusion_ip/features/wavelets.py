"""How strong each detail of an image is: the mean absolute Haar coefficients.

For telling apart sets of images that differ in sharpness, contrast or leftover noise, without a
trained network; what the images show is not seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .space import Features, image_tensor, size_text

_BLOCKS = 2  # a mean for each of 2 x 2 parts of the image


class WaveletSpace:
    """The logarithm of the mean absolute Haar coefficient, by channel (and the differences of
    channels), orientation, scale, and quarter of the image; and the mean and spread of each
    channel.
    """

    name, has_spatial, has_logits = "wavelets", False, False

    def __init__(self) -> None:
        self.dim = 0
        self.warnings: list[str] = []

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "precision": "fp32", "versions": {"torch": torch.__version__}}

    def __call__(self, images: np.ndarray | Tensor) -> Features:
        pixels = image_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        if min(pixels.shape[2:]) < 4:
            raise ValueError(
                f"wavelets need images of 4 x 4 pixels at least, and these have "
                f"{size_text(tuple(pixels.shape[2:]))}: use pixels"
            )
        if pixels.shape[1] == 3:  # brightness and two differences of colours
            red, green, blue = pixels.unbind(1)
            pixels = torch.stack([(red + green + blue) / 3, red - green, green - blue], dim=1)
        found = [pixels.mean(dim=(2, 3)), pixels.std(dim=(2, 3))]
        while min(pixels.shape[2:]) >= 2:
            pixels, details = _haar(pixels)
            blocks = min(_BLOCKS, *pixels.shape[2:])
            strength = torch.nn.functional.adaptive_avg_pool2d(details.abs(), blocks)
            found.append((strength + 1e-3).log().flatten(1))
        rows = torch.cat(found, dim=1)
        self.dim = rows.shape[1]
        return Features(rows)


def _haar(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, C, H, W] at half the size, and its details [n, 3 C, H / 2, W / 2]; an odd last row or
    column is left out.
    """
    x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
    top = x[:, :, ::2, ::2], x[:, :, ::2, 1::2]
    bottom = x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2]
    across = top[0] - top[1] + bottom[0] - bottom[1]
    down = top[0] + top[1] - bottom[0] - bottom[1]
    diagonal = top[0] - top[1] - bottom[0] + bottom[1]
    means = (top[0] + top[1] + bottom[0] + bottom[1]) / 4
    return means, torch.cat([across, down, diagonal], dim=1) / 4
