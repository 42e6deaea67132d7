"""Feature rows: what all measures take, an array or tensor [n, D] with one row per image."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .. import dist_util

FeatureArray = np.ndarray | Tensor


def feature_rows(x: FeatureArray, name: str = "features") -> np.ndarray:
    """[n, D] in the type it came in (bfloat16 as float32), in host memory; a copy only where one is
    needed.

    Raises:
        ValueError: not two-dimensional, D = 0, or not real numbers.
    """
    if isinstance(x, Tensor):
        x = x.detach()
        x = (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()
    x = np.asarray(x)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(
            f"{name} must be [n, D], one row per image, got shape {x.shape}: flatten what each "
            "image has"
        )
    if x.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be real numbers, got {x.dtype}: convert them to float32")
    return x


def as_tensor(x: np.ndarray) -> Tensor:
    """The same memory as a tensor, to be read only."""
    with warnings.catch_warnings():  # torch warns of arrays that may not be written (mapped files)
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(x))


def finite_chunks(
    x: np.ndarray, rows: int, name: str = "features", first_row: int = 0
) -> Iterator[np.ndarray]:
    """Consecutive pieces of at most `rows` rows, each found finite.

    Raises:
        ValueError: NaN or infinity; names the row, counted from `first_row`.
    """
    for start in range(0, len(x), rows):
        chunk = x[start : start + rows]
        check_finite_rows(np.isfinite(chunk).all(axis=1), name, first_row + start)
        yield chunk


def check_finite_rows(finite: np.ndarray, name: str, first_row: int = 0) -> None:
    """`finite` bool [n]: is row first_row + i in order?

    Raises:
        ValueError: one is not; names the first.
    """
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise ValueError(
            f"row {row} of the {name} holds NaN, infinity or too large numbers: look at image "
            f"{row}, and at what computed its features"
        )


def gather_ranks(x: np.ndarray) -> np.ndarray:
    """[1, ...] of one shape on each rank -> [world, ...] on every rank. A collective."""
    return dist_util.all_gather_tensor(torch.from_numpy(x)).cpu().numpy()
