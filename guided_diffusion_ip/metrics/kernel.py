"""The Kernel Inception Distance (Binkowski et al. 2018): squared maximum mean discrepancy with a
cubic kernel.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .entry import REFERENCE_ROWS, ROWS, Metric, MetricOptions, SetFeatures, Value
from .feature_rows import FeatureArray, as_tensor, feature_rows, finite_chunks

_CHECK_ROWS = 1024


def kernel_distance(
    ref_features: FeatureArray,
    sample_features: FeatureArray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the unbiased estimate of MMD^2, kernel
    (x.y / D + 1)^3, in float64.

    Unbiased for any number of images (the Frechet distance is not), so that near zero it may be
    negative. Subset i is drawn without replacement from `default_rng([seed, i])`: it does not
    depend on how many there are. Where a set has fewer than `subset_size` images, subsets are as
    large as the smaller set, which then is in each of them whole.

    Args:
        ref_features: [N, D].
        sample_features: [M, D].

    Returns:
        The mean, and the standard deviation of the subsets' values.

    Raises:
        ValueError: fewer than two rows, different D, non-finite features, no subsets.
    """
    ref, sample = (
        feature_rows(ref_features, "reference features"),
        feature_rows(sample_features, "sample features"),
    )
    d = ref.shape[1]
    if sample.shape[1] != d:
        raise ValueError(
            f"reference features have {d} entries a row, sample features {sample.shape[1]}: use "
            "the same network"
        )
    size = min(subset_size, len(ref), len(sample))
    if subsets < 1 or size < 2:
        raise ValueError(
            "a kernel distance needs at least one subset of two images a side, got "
            f"subsets={subsets}, subset_size={subset_size}, {len(ref)} reference and {len(sample)} "
            "sample images"
        )
    for rows, name in (ref, "reference features"), (sample, "sample features"):
        for _ in finite_chunks(rows, _CHECK_ROWS, name):
            pass
    values = []
    for i in range(subsets):
        rng = np.random.default_rng([seed, i])
        x, y = (
            as_tensor(rows[rng.choice(len(rows), size, replace=False)]).double()
            for rows in (ref, sample)
        )
        values.append(squared_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate (Gretton et al. 2012, Eq. 3) for x [n, D] and y [m, D]: pairs of a row
    with itself are left out.
    """
    n, m = len(x), len(y)
    within = sum(
        float(_kernel(z, z).fill_diagonal_(0).sum()) / (k * (k - 1)) for z, k in ((x, n), (y, m))
    )
    return within - 2 * float(_kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def _compute(
    reference: SetFeatures, samples: SetFeatures, options: MetricOptions
) -> dict[str, Value]:
    value, spread = kernel_distance(reference.rows, samples.rows, seed=options.seed)
    return {"kid": Value(value, spread)}


METRICS = (
    Metric(
        "kid",
        "KID",
        frozenset({ROWS, REFERENCE_ROWS}),
        larger_is_better=False,
        compute=_compute,
        progress="kernel distance: {samples} samples, {reference} reference images",
    ),
)
