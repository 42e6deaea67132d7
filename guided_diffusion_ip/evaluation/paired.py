"""By how much two sets of samples that were drawn with equal noise differ, and how sure that is.

Image i of both sets comes from one noise, so that what the noise happens to be like cancels from
the difference of two distances: it is known several times better than either. The error is that of
a jackknife that leaves out one group of image numbers, in both sets, at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..data.image_set import Images
from ..features.space import FeatureSpace
from ..metrics import frechet_distance
from ..metrics.entry import MOMENTS, ROWS
from ..metrics.replicates import KERNELS, Distance, group_of
from .opening import FeatureChoice, check_sizes, choose_device, open_side
from .reference import has_images, has_statistics, read_statistics
from .set_features import extract

GROUPS = 20


@dataclass(frozen=True)
class Change:
    """Of one distance, from a baseline to other samples; negative is better.

    Args:
        before, after: the distances; error: standard error of after - before.
    """

    before: float
    after: float
    error: float

    @property
    def value(self) -> float:
        return self.after - self.before

    @property
    def text(self) -> str:
        share = f", {self.value / self.before:+.0%}" if self.before > 0 else ""
        return f"{self.before:.4g} -> {self.after:.4g}: {self.value:+.4g} ({self.error:.2g}){share}"


@dataclass(frozen=True)
class Against:
    """A reference to compare sets with.

    Args:
        mean [D], cov [D, D]: of its features. rows: features [m, D] of some of its images, for the
            kernel distance; empty: without.
    """

    mean: np.ndarray
    cov: np.ndarray
    rows: np.ndarray

    def replicates(self, rows: np.ndarray, groups: int = GROUPS) -> dict[str, np.ndarray]:
        """fid and kid of the samples with features [n, D]: of all, and without each group of image
        numbers, [1 + groups] each.
        """
        group = group_of(np.arange(len(rows)), groups)
        parts = [rows, *(rows[group != g] for g in range(groups))]
        found = {"fid": np.array([self._frechet(part) for part in parts])}
        if self._kernel is not None:
            found["kid"] = self._kernel.of_chains(torch.from_numpy(rows), groups)
        return found

    @cached_property
    def _kernel(self) -> Distance | None:
        if len(self.rows) < 4:
            return None
        return Distance(KERNELS["kid"], torch.from_numpy(self.rows), len(self.rows), 2)

    def _frechet(self, rows: np.ndarray) -> float:
        rows = rows.astype(np.float64)
        return frechet_distance(self.mean, self.cov, rows.mean(axis=0), np.cov(rows.T))


def changes(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, Change]:
    """From the replicates of a baseline to those of other samples, by distance.

    Raises:
        ValueError: different numbers of groups.
    """
    found = {}
    for name in before:
        if before[name].shape != after[name].shape:
            raise ValueError("the two sets were divided into different numbers of groups")
        difference = after[name][1:] - before[name][1:]
        error = float(np.sqrt((len(difference) - 1) * difference.var()))
        found[name] = Change(float(before[name][0]), float(after[name][0]), error)
    return found


@dataclass(frozen=True)
class ComparisonRequest:
    """Args:
    reference: a path, as of EvaluationRequest. samples: two paths or more, the baseline first.
    features, batch_size, image_size, device: as of EvaluationRequest.
    """

    reference: str
    samples: tuple[str, ...]
    features: FeatureChoice
    batch_size: int = 64
    image_size: tuple[int, int] | None = None
    device: str = "auto"


def replicates_of(
    request: ComparisonRequest, say: Callable[[str], object] = print
) -> list[dict[str, np.ndarray]]:
    """The replicates of each set of samples; a collective.

    Raises:
        ValueError: files that are no sets of images, or sets of different numbers of images.
    """
    space = request.features.open(choose_device(request.device), say)
    sets = [open_side(path, "samples", request.image_size) for path in request.samples]
    if len({images.n for images in sets}) > 1:
        counts = ", ".join(f"{images.path}: {images.n}" for images in sets)
        raise ValueError(f"samples to be compared one by one must be equally many; {counts}")
    require_groups(sets[0])
    against = open_reference(request, space, sets[0])
    return [
        against.replicates(_rows(images, space, request, f"features of {path}"))
        for path, images in zip(request.samples, sets)
    ]


def require_groups(images: Images) -> None:
    """Raises ValueError where there are too few images for an error from groups of them."""
    if images.n < 2 * GROUPS:
        raise ValueError(
            f"{images.path} holds {images.n} images: {2 * GROUPS} or more are needed, for an error "
            f"from {GROUPS} groups of them"
        )


def open_reference(request: ComparisonRequest, space: FeatureSpace, samples: Images) -> Against:
    """Statistics from the file where it has them, else from its images; rows from its images.

    Raises:
        ValueError: the two sides do not fit together.
    """
    path, stored, rows = request.reference, has_statistics(request.reference), np.empty((0, 0))
    if has_images(path):
        images = open_side(path, "reference", request.image_size)
        check_sizes(images, samples, stored)
        require_groups(images)
        rows = _rows(images, space, request, "features of the reference")
    if stored:
        pool = read_statistics(path, space, samples.shape).pool
        return Against(pool.mean, pool.cov, rows)
    return Against(rows.mean(axis=0, dtype=np.float64), np.cov(rows.T.astype(np.float64)), rows)


def _rows(images: Images, space: FeatureSpace, request: ComparisonRequest, what: str) -> np.ndarray:
    found = extract(images, space, {MOMENTS, ROWS}, batch_size=request.batch_size, what=what)
    return found.rows
