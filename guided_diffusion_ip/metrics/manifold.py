"""Precision and recall of samples from k-nearest-neighbour balls (Kynkaanniemi et al. 2019), as
ADM's evaluator takes them.

Every point of a set carries a ball that reaches to its k-th nearest neighbour in the same set.
Precision is the share of samples in any ball of the reference, recall the share of the reference in
any ball of the samples. Distances come in tiles of a matrix that is never whole: |u|^2 - 2 u.v +
|v|^2, clipped at 0.

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
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dist_util
from ..ieee_float32 import ieee_float32
from .entry import REFERENCE_ROWS, ROWS, Metric, MetricOptions, SetFeatures, Value
from .feature_rows import FeatureArray, as_tensor, check_finite_rows, feature_rows

ARITHMETIC = ("float32", "float64", "half")
_HALF_BLOCK = 10_000  # the published block, which is redone as a whole
_HALF_MAX = 65504.0
_NORM_ROWS = 2048


def precision_recall(
    ref_features: FeatureArray,
    sample_features: FeatureArray,
    k: int = 3,
    *,
    arithmetic: str = "float32",
    device: torch.device | str | None = None,
    block_mb: float = 64,
    progress: bool = False,
) -> tuple[float, float]:
    """Precision and recall of samples [M, D] against a reference [N, D].

    The point itself does not count among its k neighbours; a point on the edge of a ball is inside.
    Under several ranks each must hold all features: rows are shared out, and every rank returns
    what one process would. Memory beyond the features (which are used as they are if float32 on the
    CPU, else copied): about 3 `block_mb`, which changes nothing else.

    Args:
        arithmetic: of the distances, one of ARITHMETIC (see above for "half").
        device: where to compute; None: this process's GPU if there is one.
        block_mb: MB of a tile of distances.
        progress: show a bar (on one rank).

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
    with ieee_float32(), _progress_bar(progress) as bar:
        ref, sample = (
            _Points.of(x, name, k, arithmetic, where)
            for x, name in (
                (ref_features, "reference features"),
                (sample_features, "sample features"),
            )
        )
        if ref.x.shape[1] != sample.x.shape[1]:
            raise ValueError(
                f"reference features have {ref.x.shape[1]} entries a row, sample features "
                f"{sample.x.shape[1]}: use the same network for both"
            )
        own_ref, own_sample, across = (
            _Distances(u, v, block_mb) for u, v in ((ref, ref), (sample, sample), (ref, sample))
        )
        bar.reset(sum(d.tiles for d in (own_ref, own_sample, across)))
        radii = _radii(own_ref, k, bar), _radii(own_sample, k, bar)
        in_sample_balls, in_ref_balls = _inside(across, *radii, bar)
    return float(in_ref_balls.double().mean()), float(in_sample_balls.double().mean())


@dataclass
class _Points:
    """One set: features, and squared norms in the arithmetic of the distances."""

    x: Tensor  # [N, D] float32, or float64 where that is asked for and given
    arithmetic: str
    norms: Tensor  # [N] float32 or float64
    half_norms: Tensor  # [N] float16; [0] in other arithmetic

    @classmethod
    def of(
        cls, features: FeatureArray, name: str, k: int, arithmetic: str, device: torch.device
    ) -> _Points:
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


class _Distances:
    """Squared distances between the rows of two sets, tile by tile.

    The grid depends on sizes and `block_mb` only: ranks take whole rows of tiles, so that no
    product has another shape, and hence no number another rounding, than in one process.
    """

    def __init__(self, u: _Points, v: _Points, block_mb: float) -> None:
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
        if self.half and not self._overflows(
            rows.start // _HALF_BLOCK, columns.start // _HALF_BLOCK
        ):
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
            if r.start // _HALF_BLOCK == i
            for c in columns
            if c.start // _HALF_BLOCK == j
        )


def _radii(distances: _Distances, k: int, bar) -> Tensor:
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
            nearest = nearest.topk(
                min(k + 1, nearest.shape[1]), largest=False, sorted=False
            ).values  # [rows, <= k + 1]
            bar.update()
        radii[rows] = nearest.amax(dim=1)
    return _largest_over_ranks(radii)


def _inside(distances: _Distances, radii_u: Tensor, radii_v: Tensor, bar) -> tuple[Tensor, Tensor]:
    """Which points of u are in a ball of v, and which of v in one of u: uint8 [N], [M]."""
    u_inside, v_inside = (
        torch.zeros(len(p.x), dtype=torch.uint8, device=p.x.device)
        for p in (distances.u, distances.v)
    )
    for rows in distances.rows:
        for columns in distances.columns:
            d = distances.tile(rows, columns)
            u_inside[rows] |= (d <= radii_v[columns]).any(dim=1)
            v_inside[columns] |= (d <= radii_u[rows, None]).any(dim=0)
            bar.update()
    return _largest_over_ranks(u_inside), _largest_over_ranks(v_inside)


def _pieces(n: int, size: int, half: bool) -> list[slice]:
    """0..n in pieces of at most `size`, as equal as can be (no tiny last one), each within one
    block of half arithmetic.
    """
    pieces = []
    for start in range(0, n, _HALF_BLOCK if half else n):
        length = min(_HALF_BLOCK, n - start) if half else n
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


def _largest_over_ranks(x: Tensor) -> Tensor:
    """Elementwise maximum; each element was computed by some ranks and is 0 on the others."""
    return dist_util.all_gather_tensor(x[None]).amax(dim=0)


@contextlib.contextmanager
def _progress_bar(show: bool):
    from tqdm import tqdm

    with tqdm(
        desc="precision and recall", unit="tile", disable=not (show and dist_util.is_main())
    ) as bar:
        yield bar


def _compute(
    reference: SetFeatures, samples: SetFeatures, options: MetricOptions
) -> dict[str, Value]:
    """Both from one pass over the distances."""
    precision, recall = precision_recall(
        reference.rows, samples.rows, arithmetic=options.pr_arithmetic, device=options.device
    )
    return {
        name: Value(value, detail=options.pr_arithmetic)
        for name, value in (("prec", precision), ("recall", recall))
    }


METRICS = tuple(
    Metric(
        name,
        title,
        frozenset({ROWS, REFERENCE_ROWS}),
        larger_is_better=True,
        compute=_compute,
        short=title.lower(),
        progress="precision and recall: {samples} samples, {reference} reference images",
        least=4,
        least_for="precision and recall need",
    )
    for name, title in (("prec", "Precision"), ("recall", "Recall"))
)
