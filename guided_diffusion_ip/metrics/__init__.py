"""Numbers from features of images: pure functions of arrays (numpy or torch), with no network and
no files.

feature_rows  what counts as feature rows
statistics    rows, a batch at a time -> mean and covariance
frechet       two Gaussians -> the distance inside FID and sFID
score         logits -> Inception Score
manifold      two sets of features -> precision and recall
kernel        two sets of features -> KID
"""

from .frechet import frechet_distance
from .kernel import kernel_distance
from .manifold import precision_recall
from .score import InceptionScore, inception_score
from .statistics import FeatureStatistics

__all__ = [
    "FeatureStatistics",
    "InceptionScore",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
