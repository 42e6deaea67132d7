"""Running sums of a measure: float64 arrays that add over batches and processes, and what they come
to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Sums = dict[str, np.ndarray]
Figures = dict[str, Any]  # arrays [T'] and numbers


def array_of(sums: Sums, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in sums:
        sums[name] = np.zeros(shape)
    return sums[name]


def add_moments(sums: Sums, name: str, rows: int, row: int, values: Tensor) -> None:
    """Add values [n, D] to row `row` of the sums name_1 and of the sums of squares name_2, both
    [rows, D].
    """
    values = values.double()
    both = torch.stack([values.sum(dim=0), values.square().sum(dim=0)]).cpu().numpy()
    for power, total in zip((1, 2), both):
        array_of(sums, f"{name}_{power}", (rows, values.shape[1]))[row] += total


def variance_of(sums: Sums, name: str, n: int) -> np.ndarray:
    """Variance over n images, [rows, D]."""
    first, second = sums[f"{name}_1"], sums[f"{name}_2"]
    return np.maximum(second - first**2 / n, 0) / (n - 1)


def mean_and_error(sums: Sums, name: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over n images and its standard error, each [rows], of one number per image."""
    return sums[f"{name}_1"][:, 0] / n, np.sqrt(variance_of(sums, name, n)[:, 0] / n)
