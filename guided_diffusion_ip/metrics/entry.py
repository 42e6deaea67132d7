"""What a metric is: a name, what it needs of two sets of images, and the function that computes it.

A new metric is a file with a METRICS tuple, like `kernel.py`, and a line in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from .statistics import FeatureStatistics

if TYPE_CHECKING:
    from .score import InceptionScore

# What a metric may need. It decides what is extracted from images, and when a metric is left out.
MOMENTS = "moments"  # mean and covariance of the features, of both sets
SPATIAL_MOMENTS = "spatial moments"  # of the spatial features, of both sets
LOGITS = "logits"  # the sums behind the Inception Score, of the samples
ROWS = "rows"  # the feature vectors of all samples
REFERENCE_ROWS = "reference rows"  # those of the reference, so that statistics alone do not serve


@dataclass(frozen=True)
class SetFeatures:
    """What is known of one set of images, the same on every rank; what was not asked for is empty.

    Args:
        n: number of images that it was extracted from.
        pool, spatial: statistics of the two kinds of features; they know their own number of
            images, which is None in files that do not tell.
        rows: the pool features float32 [n, D] in the order of the images.
        score: the Inception Score's sums.
    """

    n: int = 0
    pool: FeatureStatistics = field(default_factory=FeatureStatistics)
    spatial: FeatureStatistics = field(default_factory=FeatureStatistics)
    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    score: InceptionScore | None = None


@dataclass(frozen=True)
class MetricOptions:
    """What changes numbers beside the images.

    Args:
        pr_arithmetic: of the distances of precision and recall; "half" imitates the published
            evaluator.
        seed: of random subsets.
        device: of the distances of precision and recall; None: this process's.
    """

    pr_arithmetic: str = "float32"
    seed: int = 0
    device: torch.device | None = None


DEFAULT_OPTIONS = MetricOptions()


@dataclass(frozen=True)
class Value:
    """One number.

    Args:
        spread: a standard deviation or error, for metrics that have one.
        few: what too few images for the features did to it, such as "biased upwards": it is then
            shown as "title@n", with a warning.
        detail: of the computation, shown in parentheses in tables.
    """

    value: float
    spread: float | None = None
    few: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Metric:
    """One line of METRICS.

    Args:
        name: in --metrics, JSON and file names.
        title: in tables and messages.
        needs: of MOMENTS, SPATIAL_MOMENTS, LOGITS, ROWS, REFERENCE_ROWS.
        compute: (reference, samples, options) -> {name: value}. Metrics that come from one
            computation share the function: it is called once, and returns a value for each.
        short: in narrow tables; default: the title.
        progress: a line for the user before the computation, which may take long; {samples},
            {reference} (numbers of images) and {dim} (of the features) are filled in.
        least: images that each set must have, and `least_for`, which begins the sentence about it.
    """

    name: str
    title: str
    needs: frozenset[str]
    larger_is_better: bool
    compute: Callable[[SetFeatures, SetFeatures, MetricOptions], Mapping[str, Value]]
    short: str = ""
    progress: str = ""
    least: int = 1
    least_for: str = "a metric needs"

    def title_for(self, features: str, label: str = "") -> str:
        """The title, or the label in place of it, with features of this name: only Inception's
        Frechet distance is called FID.
        """
        title = label or self.title
        return title if features == "inception" else title.replace("FID", "Frechet distance")
