"""Numbers from features of images: pure functions of arrays (numpy or torch), with no network and
no files.

registry      METRICS: all metrics by name
entry         what a metric is, and what it may need of two sets of images
feature_rows  what counts as feature rows
statistics    rows, a batch at a time -> mean and covariance
neighbours    distances between the rows of two sets, and k-nearest-neighbour balls

and a file for each computation, such as `frechet` (FID and sFID) or `kernel` (KID), which
`registry` lists.
"""

from .frechet import frechet_distance
from .kernel import kernel_distance
from .manifold import precision_recall
from .registry import METRIC_NAMES, METRICS
from .score import InceptionScore, inception_score
from .statistics import FeatureStatistics

__all__ = [
    "METRICS",
    "METRIC_NAMES",
    "FeatureStatistics",
    "InceptionScore",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
