"""Precision and recall of samples from k-nearest-neighbour balls (Kynkaanniemi et al. 2019), as
ADM's evaluator takes them.

Every point of a set carries a ball that reaches to its k-th nearest neighbour in the same set.
Precision is the share of samples in any ball of the reference, recall the share of the reference in
any ball of the samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ieee_float32 import ieee_float32
from .entry import REFERENCE_ROWS, ROWS, Metric, MetricOptions, SetFeatures, Value
from .feature_rows import FeatureArray
from .neighbours import (
    ARITHMETIC,
    Bar,
    Distances,
    ball_radii,
    largest_over_ranks,
    progress_bar,
    two_sets,
)

__all__ = ["ARITHMETIC", "METRICS", "precision_recall"]


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
        arithmetic: of the distances, one of ARITHMETIC (`neighbours` describes "half").
        device: where to compute; None: this process's GPU if there is one.
        block_mb: MB of a tile of distances.
        progress: show a bar (on one rank).

    Raises:
        ValueError: fewer than k + 1 points in a set, different D, non-finite features, unknown
            arithmetic.
    """
    with ieee_float32(), progress_bar("precision and recall", progress) as bar:
        ref, sample = two_sets(ref_features, sample_features, k, arithmetic, device, block_mb)
        own_ref = Distances(ref, ref, block_mb)
        own_sample = Distances(sample, sample, block_mb)
        across = Distances(ref, sample, block_mb)
        bar.reset(sum(d.tiles for d in (own_ref, own_sample, across)))
        radii = ball_radii(own_ref, k, bar), ball_radii(own_sample, k, bar)
        in_sample_balls, in_ref_balls = _inside(across, *radii, bar)
    return float(in_ref_balls.double().mean()), float(in_sample_balls.double().mean())


def _inside(
    distances: Distances, radii_u: Tensor, radii_v: Tensor, bar: Bar
) -> tuple[Tensor, Tensor]:
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
    return largest_over_ranks(u_inside), largest_over_ranks(v_inside)


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
