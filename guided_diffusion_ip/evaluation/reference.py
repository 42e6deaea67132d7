"""Statistics of images stored in an npz: mu, sigma (features), mu_s, sigma_s (spatial features).

OpenAI's VIRTUAL reference files have these names, and arr_0 with some of the images. Ours
(evaluations/make_reference.py) add `n` (images behind the statistics), `features` (the space) and
`preprocessing` (how the images were made).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np

from ..data.npz_io import NpzReader
from ..data.preprocessing import recorded
from ..features.space import FeatureSpace
from ..metrics import FeatureStatistics
from ..metrics.entry import SetFeatures

NAMES = ("mu", "sigma", "mu_s", "sigma_s")
SPATIAL = 17 * 17 * 7  # spatial features of an image, for Inception


@dataclass(frozen=True)
class StoredStatistics:
    """What an npz says about the set behind it; `n` is None, and texts are '', where it does not
    tell.
    """

    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    n: int | None
    features: str
    preprocessing: str


def has_statistics(path: str | os.PathLike) -> bool:
    """Does the file hold feature statistics?"""
    if os.path.isdir(path) or not os.fspath(path).lower().endswith(".npz"):
        return False
    with NpzReader(path) as reader:
        return "mu" in reader.keys


def has_images(path: str | os.PathLike) -> bool:
    """Does it hold images (folders and zips do)?"""
    if os.path.isdir(path) or not os.fspath(path).lower().endswith(".npz"):
        return True
    with NpzReader(path) as reader:
        # Neither: let whoever opens the images complain.
        return "arr_0" in reader.keys or "mu" not in reader.keys


def read_statistics(
    path: str | os.PathLike, space: FeatureSpace, image_shape: tuple[int, ...]
) -> StoredStatistics:
    """The statistics in an npz, for use with features of `space` of images of this shape (H, W, C).

    Raises:
        ValueError: arrays missing, of the wrong size or not finite, or statistics of another
            feature space.
    """
    with NpzReader(path) as reader:
        needed = NAMES if space.has_spatial else NAMES[:2]
        missing = [name for name in needed if name not in reader.keys]
        if missing:
            raise ValueError(
                f"{path} holds mu but not {', '.join(missing)} (its arrays: {reader.keys}): make "
                "it again with evaluations/make_reference.py"
            )
        features = _text(reader, "features")
        if features and features.split()[:1] != [space.name]:
            raise ValueError(
                f"{path} holds statistics of the features {features[:80]!r}, but {space.name} "
                "are asked for: make a reference of these, or pass the --features that it was "
                "made with"
            )
        arrays = {name: _numbers(reader, name) for name in needed}
        n = _count(reader) if "n" in reader.keys else None
    dim = space.dim or math.prod(image_shape)  # pixels
    sizes = {"mu": (dim,), "sigma": (dim,) * 2, "mu_s": (SPATIAL,), "sigma_s": (SPATIAL,) * 2}
    for name in needed:
        if arrays[name].shape != sizes[name]:
            raise ValueError(
                f"{path}: {name} is {list(arrays[name].shape)}, expected {list(sizes[name])} for "
                f"the features {space.name}"
            )
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: {name} holds values that are not finite")
    return StoredStatistics(
        FeatureStatistics.from_moments(arrays["mu"], arrays["sigma"], n),
        FeatureStatistics.from_moments(arrays["mu_s"], arrays["sigma_s"], n)
        if space.has_spatial
        else None,
        n,
        features,
        recorded(path),
    )


def fingerprint(space: FeatureSpace) -> str:
    """The feature space and its weights, in a line: numbers compare only where it is the same on
    both sides.
    """
    return f"{space.name} {space.describe().get('sha256', '')[:16]}".strip()


def compare_features(stored: StoredStatistics | None, space: FeatureSpace) -> list[str]:
    """A note if the statistics were made with other weights than those of `space`."""
    if stored is None or not stored.features or stored.features == fingerprint(space):
        return []
    return [
        f"the reference statistics were made with {stored.features}, the samples are measured with "
        f"{fingerprint(space)}: not comparable unless the weights are the same in another file "
        "format"
    ]


def statistics_arrays(features: SetFeatures, space: FeatureSpace) -> dict[str, np.ndarray]:
    """The arrays to store, in the names that read_statistics and ADM's evaluator read."""
    arrays = {"mu": features.pool.mean, "sigma": features.pool.cov}
    if space.has_spatial:
        arrays |= {"mu_s": features.spatial.mean, "sigma_s": features.spatial.cov}
    return arrays | {
        "n": np.array([features.n], dtype=np.int64),
        "features": np.array([fingerprint(space)]),
    }


def _numbers(reader: NpzReader, name: str) -> np.ndarray:
    shape = reader.shape(name)
    if not shape or reader.dtype(name).kind not in "fiu":
        raise ValueError(
            f"{reader.path}: {name} is {reader.dtype(name)} {list(shape)}, expected numbers"
        )
    return reader.rows(name, 0, shape[0]).astype(np.float64)


def _count(reader: NpzReader) -> int:
    """How many images the statistics are of."""
    found = reader.whole("n", 1 << 20)
    number = float(found.reshape(-1)[0]) if found.size == 1 and found.dtype.kind in "fiu" else 0.0
    if not 1 <= number <= 2**53:
        raise ValueError(
            f"{reader.path}: n is {found.dtype} {list(found.shape)} {str(found)[:40]}, expected "
            "the number of images: make it again with evaluations/make_reference.py"
        )
    return int(number)


def _text(reader: NpzReader, name: str) -> str:
    if name not in reader.keys or reader.dtype(name).kind != "U" or reader.shape(name) != (1,):
        return ""
    return str(reader.rows(name, 0, 1)[0])
