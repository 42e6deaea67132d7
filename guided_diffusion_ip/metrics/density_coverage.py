"""Density and coverage of samples (Naeem et al. 2020), which outliers of the reference change much
less than precision.

Every point of the reference carries a ball that reaches to its k-th nearest neighbour in the
reference. Density is the mean number of balls that a sample lies in, divided by k: 1 on average
where both sets have one distribution, and not bounded by 1. Coverage is the share of balls with a
sample in them; where both sets have one distribution, it is 1 - prod_j (N - j) / (N + M - j), j = 1
to k, on average: compare only values of as many images.
"""

from __future__ import annotations

import torch

from ..ieee_float32 import ieee_float32
from .entry import REFERENCE_ROWS, ROWS, Metric, MetricOptions, SetFeatures, Value
from .feature_rows import FeatureArray
from .neighbours import Distances, ball_radii, largest_over_ranks, progress_bar, two_sets

K = 5  # the paper's


def density_coverage(
    ref_features: FeatureArray,
    sample_features: FeatureArray,
    k: int = K,
    *,
    arithmetic: str = "float32",
    device: torch.device | str | None = None,
    block_mb: float = 64,
    progress: bool = False,
) -> tuple[float, float]:
    """Density and coverage of samples [M, D] against a reference [N, D].

    Neighbours, edges of balls, ranks, memory, arguments and errors are those of
    `manifold.precision_recall`.
    """
    with ieee_float32(), progress_bar("density and coverage", progress) as bar:
        ref, sample = two_sets(ref_features, sample_features, k, arithmetic, device, block_mb)
        own, across = Distances(ref, ref, block_mb), Distances(ref, sample, block_mb)
        bar.reset(own.tiles + across.tiles)
        radii = ball_radii(own, k, bar)
        inside = torch.zeros(len(ref.x), dtype=torch.int64, device=ref.x.device)  # samples in balls
        for rows in across.rows:
            for columns in across.columns:
                inside[rows] += (across.tile(rows, columns) <= radii[rows, None]).sum(dim=1)
                bar.update()
        inside = largest_over_ranks(inside)
    return float(inside.sum()) / (k * len(sample.x)), float((inside > 0).double().mean())


def _compute(
    reference: SetFeatures, samples: SetFeatures, options: MetricOptions
) -> dict[str, Value]:
    """Both from one pass over the distances."""
    density, coverage = density_coverage(
        reference.rows, samples.rows, arithmetic=options.pr_arithmetic, device=options.device
    )
    return {
        name: Value(value, detail=options.pr_arithmetic)
        for name, value in (("density", density), ("coverage", coverage))
    }


METRICS = tuple(
    Metric(
        title.lower(),
        title,
        frozenset({ROWS, REFERENCE_ROWS}),
        larger_is_better=True,
        compute=_compute,
        short=title.lower(),
        progress="density and coverage: {samples} samples, {reference} reference images",
        least=K + 1,
        least_for="density and coverage need",
    )
    for title in ("Density", "Coverage")
)
