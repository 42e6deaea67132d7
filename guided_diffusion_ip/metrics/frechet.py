"""The Frechet distance between two Gaussians, the number inside FID (Heusel et al. 2017, Eq. 6; Dowson & Landau 1982)."""
from __future__ import annotations

import numpy as np


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64.

    The trace of the root is taken from the eigenvalues of sqrt(sigma1) sigma2 sqrt(sigma1), which is symmetric: singular
    covariances (fewer images than features) are as good as any, and no imaginary parts can arise.

    Args:
        mu1, mu2: means [D].
        sigma1, sigma2: covariances [D, D].

    Raises:
        ValueError: shapes that do not fit together.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2))
    d = mu1.size
    if mu1.shape != (d,) or mu2.shape != (d,) or sigma1.shape != (d, d) or sigma2.shape != (d, d):
        raise ValueError(f"means must be [D] and covariances [D, D] with one D, got {mu1.shape}, {sigma1.shape}, "
                         f"{mu2.shape}, {sigma2.shape}")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    between = np.linalg.eigvalsh(root @ sigma2 @ root)
    difference = mu1 - mu2
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2)
                 - 2 * np.sqrt(np.clip(between, 0, None)).sum())
