"""The Frechet distance between two Gaussians (Dowson & Landau 1982), the number inside FID and sFID
(Heusel et al. 2017).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .entry import MOMENTS, SPATIAL_MOMENTS, Metric, MetricOptions, SetFeatures, Value
from .feature_rows import as_tensor
from .statistics import FeatureStatistics

_EPS = float(np.finfo(np.float64).eps)
_ASYMMETRY = 1e-6  # of the largest entry: above what storing as float32 does
_INDEFINITE = 1e-6  # of the largest eigenvalue, likewise


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64, never negative.

    With sigma1 = A A^T and sigma2 = B B^T the trace of the root is the sum of the singular values
    of A^T B. Roots of eigenvalues of the product would be roots of rounding noise in the null space
    of singular covariances (fewer images than features: an error of 1e-4); singular values have
    no such step. No imaginary parts arise, and nothing is added to a diagonal.

    Args:
        mu1, mu2: means [D].
        sigma1, sigma2: covariances [D, D]; any rank, also zero.

    Warns:
        UserWarning: a covariance with an eigenvalue below -1e-6 of its largest. Negative ones count
            as 0 in any case.

    Raises:
        ValueError: shapes that do not fit together, non-finite numbers, covariances that are not
            symmetric.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2))
    d = mu1.size
    if (
        d == 0
        or mu1.shape != (d,)
        or mu2.shape != (d,)
        or sigma1.shape != (d, d)
        or sigma2.shape != (d, d)
    ):
        raise ValueError(
            f"means must be [D] and covariances [D, D] with one D, got {mu1.shape}, "
            f"{sigma1.shape}, {mu2.shape}, {sigma2.shape}: were both made with the same features?"
        )
    if not (np.isfinite(mu1).all() and np.isfinite(mu2).all()):
        raise ValueError("a mean of features holds NaN or infinity: look for it in the features")
    first, second = _Factor.of(sigma1), _Factor.of(sigma2)
    root = float(torch.linalg.svdvals(first.a.T @ second.a).sum())
    difference = mu1 - mu2
    # The rest is a squared length: below 0 by rounding only.
    return float(difference @ difference) + max(first.trace + second.trace - 2 * root, 0.0)


def covariance_rank(sigma: np.ndarray) -> int:
    """Numerical rank of a covariance [D, D]: eigenvalues above D eps times the largest.

    n images give at most n - 1, and a distance from a covariance of less than full rank is biased
    upward.

    Raises:
        ValueError: not square, not finite or not symmetric.
    """
    return _Factor.of(np.asarray(sigma, dtype=np.float64)).a.shape[1]


@dataclass(frozen=True)
class _Factor:
    """sigma = a a^T."""

    a: Tensor  # [D, rank] float64
    trace: float  # of sigma, without eigenvalues that are negative beyond rounding

    @classmethod
    def of(cls, sigma: np.ndarray) -> _Factor:
        """By Cholesky where the matrix is safely positive definite, else by its eigenvectors."""
        s = _checked(sigma)
        d, trace = len(s), float(s.trace())
        a, info = torch.linalg.cholesky_ex(s)
        # Where rounding noise happens to be positive, Cholesky succeeds on a singular matrix; the
        # smallest pivot tells. (The trace is at least the largest eigenvalue.)
        if info == 0 and float(a.diagonal().min()) ** 2 > d * _EPS * trace:
            return cls(a, trace)
        values, vectors = torch.linalg.eigh(s)  # ascending
        largest = float(values[-1].clamp(min=0))
        cut = d * _EPS * largest
        if float(values[0]) < -_INDEFINITE * largest or (largest == 0 and float(values[0]) < 0):
            warnings.warn(
                f"a covariance of features has the negative eigenvalue {float(values[0]):.3g} "
                f"(largest {largest:.3g}): it was not computed or not stored in full precision; "
                "negative ones count as 0",
                stacklevel=3,
            )
        kept = values > cut
        return cls(
            vectors[:, kept] * values[kept].sqrt(), trace - float(values[values < -cut].sum())
        )


def _checked(sigma: np.ndarray) -> Tensor:
    """The symmetric part of a covariance."""
    if sigma.ndim != 2 or sigma.shape[0] != sigma.shape[1] or sigma.size == 0:
        raise ValueError(f"a covariance must be [D, D], got {sigma.shape}")
    s = as_tensor(sigma)
    scale = float(s.abs().max())
    if not np.isfinite(scale):
        raise ValueError(
            "a covariance of features holds NaN or infinity: look for it in the features, of two "
            "images or more"
        )
    gap = float((s - s.T).abs().max())
    if gap > _ASYMMETRY * scale:
        raise ValueError(
            "a covariance must be symmetric: entries differ from their mirror images by up to "
            f"{gap:.3g}, the largest is {scale:.3g}; is it a covariance of features?"
        )
    return (s + s.T) / 2


def _fid(reference: SetFeatures, samples: SetFeatures, options: MetricOptions) -> dict[str, Value]:
    return {"fid": _between(reference.pool, samples.pool)}


def _sfid(reference: SetFeatures, samples: SetFeatures, options: MetricOptions) -> dict[str, Value]:
    return {"sfid": _between(reference.spatial, samples.spatial)}


def _between(reference: FeatureStatistics, samples: FeatureStatistics) -> Value:
    """With a warning where a covariance comes from no more images than it has dimensions."""
    distance = frechet_distance(reference.mean, reference.cov, samples.mean, samples.cov)
    n = samples.n or 0
    few = min(n, reference.n or n) <= len(samples.mean)
    return Value(distance, few="biased upwards" if few else "")


_PROGRESS = "Frechet distance between covariances of {dim} dimensions"
METRICS = (
    Metric(
        "fid",
        "FID",
        frozenset({MOMENTS}),
        larger_is_better=False,
        compute=_fid,
        progress=_PROGRESS,
        least=2,
        least_for="a covariance needs",
    ),
    Metric(
        "sfid",
        "sFID",
        frozenset({SPATIAL_MOMENTS}),
        larger_is_better=False,
        compute=_sfid,
        progress=_PROGRESS,
        least=2,
        least_for="a covariance needs",
    ),
)
