"""Distances between all rows of two sets, and balls that reach to k-th nearest neighbours.

Distances are squared, |u|^2 - 2 u.v + |v|^2, clipped at 0, and computed in tiles of a matrix that
is never in memory as a whole. Under several ranks each must hold all features: rows of tiles are
shared out, and every rank obtains what one process would.

`arithmetic="half"` imitates the published figures, which were taken with float16 distances: inputs,
squares, norms (a tree sum), products and both additions are rounded to half precision, in blocks of
10,000 x 10,000; a block in which anything overflows is taken in float32 instead. Sums were ordered
differently on different hardware, so that it lands near those figures (0.003 with 1,500 images,
0.0005 with 4,000), not on them. Half precision biases both upward, by 0.001 to 0.006.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import dist_util
from .feature_rows import FeatureArray, as_tensor, check_finite_rows, feature_rows

ARITHMETIC = ("float32", "float64", "half")
HALF_BLOCK = 10_000  # the published block, which is redone as a whole
_HALF_MAX = 65504.0
_NORM_ROWS = 2048


class Bar(Protocol):
    """A progress bar, as of tqdm."""

    def update(self) -> object: ...

    def reset(self, total: float | None = None) -> object: ...


@dataclass
class Points:
    """One set: features, and squared norms in the arithmetic of the distances."""

    x: Tensor  # [N, D] float32, or float64 where that is asked for and given
    arithmetic: str
    norms: Tensor  # [N] float32 or float64
    half_norms: Tensor  # [N] float16; [0] in other arithmetic

    @classmethod
    def of(
        cls, features: FeatureArray, name: str, k: int, arithmetic: str, device: torch.device
    ) -> Points:
        """Raises ValueError: not [N, D], fewer than k + 1 rows, not finite."""
        rows = feature_rows(features, name)
        if len(rows) < k + 1:
            raise ValueError(
                f"k = {k} nearest neighbours need at least {k + 1} images, the {name} have "
                f"{len(rows)}"
            )
        exact = arithmetic == "float64"
        x = as_tensor(rows).to(
            device, torch.float64 if exact and rows.dtype.itemsize > 4 else torch.float32
        )
        chunks = x.split(_NORM_ROWS)
        norms = torch.cat(
            [c.to(torch.float64 if exact else torch.float32).square().sum(1) for c in chunks]
        )
        check_finite_rows(norms.isfinite().cpu().numpy(), name)
        half_norms = torch.empty(0, dtype=torch.float16)
        if arithmetic == "half":
            half_norms = torch.cat([_half_norms(c) for c in chunks])
        return cls(x, arithmetic, norms, half_norms)


def two_sets(
    ref_features: FeatureArray,
    sample_features: FeatureArray,
    k: int,
    arithmetic: str,
    device: torch.device | str | None,
    block_mb: float,
) -> tuple[Points, Points]:
    """Reference and samples, checked.

    Args:
        arithmetic: of the distances, one of ARITHMETIC.
        device: where to compute; None: this process's GPU if there is one.
        block_mb: MB of a tile of distances.

    Raises:
        ValueError: fewer than k + 1 points in a set, different D, non-finite features, unknown
            arithmetic.
    """
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"arithmetic {arithmetic!r} is not among {', '.join(ARITHMETIC)}")
    if k < 1 or not block_mb > 0:
        raise ValueError(
            f"k is {k} and block_mb {block_mb}: k must be at least 1, block_mb positive"
        )
    where = torch.device(device) if device is not None else dist_util.dev()
    ref = Points.of(ref_features, "reference features", k, arithmetic, where)
    sample = Points.of(sample_features, "sample features", k, arithmetic, where)
    if ref.x.shape[1] != sample.x.shape[1]:
        raise ValueError(
            f"reference features have {ref.x.shape[1]} entries a row, sample features "
            f"{sample.x.shape[1]}: use the same network for both"
        )
    return ref, sample


class Distances:
    """Squared distances between the rows of two sets, tile by tile.

    The grid depends on sizes and `block_mb` only: ranks take whole rows of tiles, so that no
    product has another shape, and hence no number another rounding, than in one process.
    """

    def __init__(self, u: Points, v: Points, block_mb: float) -> None:
        self.u, self.v = u, v
        self.half = u.arithmetic == "half"
        # Four times as wide as high: rows of u are read once a tile, and few running minima are
        # merged.
        height = max(1, math.isqrt(int(block_mb * 2**20 / (4 * u.norms.element_size()))))
        all_rows, self.columns = (
            _pieces(len(u.x), height, self.half),
            _pieces(len(v.x), 4 * height, self.half),
        )
        self.rows = all_rows[dist_util.get_rank() :: dist_util.get_world_size()]
        self._safe = (
            self.half
            and (float(u.norms.max()) ** 0.5 + float(v.norms.max()) ** 0.5) ** 2 < 0.99 * _HALF_MAX
        )
        self._overflows = functools.cache(self._find_overflow)

    @property
    def tiles(self) -> int:
        """How many this rank computes."""
        return len(self.rows) * len(self.columns)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """[rows, columns], float32 or float64; in half arithmetic, float32 numbers that half can
        hold.
        """
        if self.half and not self._overflows(rows.start // HALF_BLOCK, columns.start // HALF_BLOCK):
            return self._half_tile(rows, columns).float()
        dtype = self.u.norms.dtype
        d = self.u.x[rows].to(dtype) @ self.v.x[columns].to(dtype).T
        return d.mul_(-2).add_(self.u.norms[rows, None]).add_(self.v.norms[columns]).clamp_(min=0)

    def _half_tile(self, rows: slice, columns: slice) -> Tensor:
        # A product of halves that is summed in float32 and rounded once is what the published
        # program did on CPUs and GPUs; torch's own half product is slow on CPUs.
        d = (self.u.x[rows].half().float() @ self.v.x[columns].half().float().T).half()
        return (
            d.mul_(-2)
            .add_(self.u.half_norms[rows, None])
            .add_(self.v.half_norms[columns])
            .clamp_(min=0)
        )

    def _find_overflow(self, i: int, j: int) -> bool:
        """Does anything in block (i, j) leave the range of half precision?

        No intermediate result exceeds (|u| + |v|)^2, which spares the search for all usual
        features.
        """
        if self._safe:
            return False
        rows, columns = (_pieces(len(p.x), 2048, True) for p in (self.u, self.v))
        return any(
            not bool(self._half_tile(r, c).isfinite().all())
            for r in rows
            if r.start // HALF_BLOCK == i
            for c in columns
            if c.start // HALF_BLOCK == j
        )


def ball_radii(distances: Distances, k: int, bar: Bar) -> Tensor:
    """Squared radius of the ball of each point of one set [N]: the (k + 1)-th smallest distance,
    itself included.
    """
    radii = torch.zeros_like(distances.u.norms)
    for rows in distances.rows:
        nearest = radii.new_empty((rows.stop - rows.start, 0))
        for columns in distances.columns:
            d = distances.tile(rows, columns)
            nearest = torch.cat(
                [nearest, d.topk(min(k + 1, d.shape[1]), largest=False, sorted=False).values], dim=1
            )
            found = nearest.topk(min(k + 1, nearest.shape[1]), largest=False, sorted=False)
            nearest = found.values  # [rows, <= k + 1]
            bar.update()
        radii[rows] = nearest.amax(dim=1)
    return largest_over_ranks(radii)


def _pieces(n: int, size: int, half: bool) -> list[slice]:
    """0..n in pieces of at most `size`, as equal as can be (no tiny last one), each within one
    block of half arithmetic.
    """
    pieces = []
    for start in range(0, n, HALF_BLOCK if half else n):
        length = min(HALF_BLOCK, n - start) if half else n
        count = -(-length // size)
        edges = [start + length * i // count for i in range(count + 1)]
        pieces += [slice(a, b) for a, b in itertools.pairwise(edges)]
    return pieces


def _half_norms(x: Tensor) -> Tensor:
    """Squared norms [n], squares and a tree sum rounded to half at each step."""
    squares = x.half().square()
    while squares.shape[1] > 1:
        if squares.shape[1] % 2:
            squares = torch.nn.functional.pad(squares, (0, 1))
        first, second = squares.chunk(2, dim=1)
        squares = first + second
    return squares[:, 0]


def largest_over_ranks(x: Tensor) -> Tensor:
    """Elementwise maximum; each element was computed by some ranks and is 0 on the others."""
    return dist_util.all_gather_tensor(x[None]).amax(dim=0)


@contextlib.contextmanager
def progress_bar(what: str, show: bool) -> Iterator[Bar]:
    """Of tiles; hidden unless `show`, and on all ranks but one."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="tile", disable=not (show and dist_util.is_main())) as bar:
        yield bar
