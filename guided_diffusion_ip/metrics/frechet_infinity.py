"""FD-infinity (Chong & Forsyth 2020): the Frechet distance that infinitely many samples would have.

The distance of n samples is too large by about c / n, and c depends on the model, so that even
distances of equally many samples are unfair. Here the distances of nested random subsets are fitted
by a line in 1 / n, and its intercept is the result. The reference stays as it is: what its own
finite number of images adds remains.

The standard error. To first order, a distance differs from its limit by c / n and by the mean over
its images of an influence, the derivative of the distance in the direction of an image x:

    f(x) = 2 (mu - mu_r)^T (x - mu) + (x - mu)^T (I - A) (x - mu) + const,
    A = sigma^(-1/2) (sigma^(1/2) sigma_r sigma^(1/2))^(1/2) sigma^(-1/2),

where A is the linear part of the optimal map from the samples' Gaussian to the reference's (Olkin &
Pukelsheim 1982). The intercept is a weighted sum of distances, and hence of influences. This counts
the images that nested subsets share, which the residuals of the line do not show. Near a distance
of 0 the influence vanishes, higher orders dominate, and the error given is too small.
"""

from __future__ import annotations

import numpy as np
import torch

from .entry import MOMENTS, ROWS, Metric, MetricOptions, SetFeatures, Value
from .feature_rows import FeatureArray, as_tensor, feature_rows, finite_chunks
from .frechet import frechet_distance
from .statistics import FeatureStatistics

_LEAST = 20  # images
_CHUNK_ROWS = 1024


def frechet_distance_infinity(
    mu: np.ndarray,
    sigma: np.ndarray,
    sample_features: FeatureArray,
    *,
    subsets: int = 15,
    seed: int = 0,
) -> tuple[float, float]:
    """The distance from N(mu, sigma) extrapolated to infinitely many samples, and its standard
    error; float64.

    Subsets are the beginnings of one random order, drawn from `default_rng(seed)`, of
    `subset_sizes` images each. The result may be below 0 where the distance is next to 0. The line
    holds where all subsets have clearly more images than features have (effective) dimensions.

    Args:
        mu, sigma: of the reference, [D] and [D, D].
        sample_features: [N, D].

    Raises:
        ValueError: fewer than 20 images, fewer than 2 subsets, shapes that do not fit together,
            non-finite features.
    """
    rows = feature_rows(sample_features, "sample features")
    if len(rows) < _LEAST or subsets < 2:
        raise ValueError(
            f"FD-infinity needs at least {_LEAST} images and 2 subsets, got {len(rows)} and "
            f"{subsets}"
        )
    for _ in finite_chunks(rows, _CHUNK_ROWS, "sample features"):
        pass
    n, d = rows.shape
    sizes = subset_sizes(n, d, subsets)
    order = np.random.default_rng(seed).permutation(n)
    statistics, distances = FeatureStatistics(), []
    for start, stop in zip([0, *sizes[:-1]], sizes):
        statistics.update(rows[order[start:stop]])
        distances.append(frechet_distance(mu, sigma, statistics.mean, statistics.cov))
    line = np.stack([np.ones(len(sizes)), 1 / sizes], axis=1)  # distance = line @ (limit, c)
    weights = np.linalg.pinv(line)[0]  # of the distances, in the limit; their sum is 1
    # An image that the subsets from the i-th on contain has the weight share[i] in the limit.
    share = np.cumsum((weights / sizes)[::-1])[::-1]
    new = np.diff(sizes, prepend=0)
    error = _influence(mu, sigma, statistics, rows).std() * np.sqrt(new @ share**2)
    return float(weights @ distances), float(error)


def subset_sizes(n: int, d: int, subsets: int) -> np.ndarray:
    """Evenly spaced numbers of images up to n, int64, ascending.

    They begin at a tenth of n, as in the paper (5,000 of 50,000), but not below twice the number of
    dimensions d unless that is more than half of n: the line does not hold there.
    """
    smallest = max(n // 10, min(2 * d, n // 2))
    return np.unique(np.linspace(smallest, n, subsets).round().astype(np.int64))


def _influence(
    mu: np.ndarray, sigma: np.ndarray, samples: FeatureStatistics, rows: np.ndarray
) -> np.ndarray:
    """f of each sample [N], but for the constant."""
    mean, cov = torch.from_numpy(samples.mean), torch.from_numpy(samples.cov)
    values, vectors = torch.linalg.eigh(cov)
    kept = values > len(cov) * torch.finfo(torch.float64).eps * values[-1]
    scale, vectors = values[kept].sqrt(), vectors[:, kept]
    half = vectors * scale  # [D, rank]; cov = half half^T
    inner_values, inner = torch.linalg.eigh(half.T @ torch.from_numpy(sigma) @ half)
    back = (vectors / scale) @ inner  # [D, rank]
    a = (back * inner_values.clamp(min=0).sqrt()) @ back.T
    quadratic = torch.eye(len(cov), dtype=torch.float64) - a
    linear = 2 * (mean - torch.from_numpy(mu))
    parts = []
    for start in range(0, len(rows), _CHUNK_ROWS):
        x = as_tensor(rows[start : start + _CHUNK_ROWS]).double() - mean
        parts.append(x @ linear + ((x @ quadratic) * x).sum(dim=1))
    return torch.cat(parts).numpy()


def _compute(
    reference: SetFeatures, samples: SetFeatures, options: MetricOptions
) -> dict[str, Value]:
    pool, rows = reference.pool, samples.rows
    value, error = frechet_distance_infinity(pool.mean, pool.cov, rows, seed=options.seed)
    few = "" if len(rows) >= 4 * rows.shape[1] else "extrapolated from too few images"
    return {"fd_inf": Value(value, error, few=few)}


METRICS = (
    Metric(
        "fd_inf",
        "FD-infinity",
        frozenset({MOMENTS, ROWS}),
        larger_is_better=False,
        compute=_compute,
        progress="Frechet distances of subsets of {samples} samples, in {dim} dimensions",
        least=_LEAST,
        least_for="FD-infinity needs",
    ),
)
