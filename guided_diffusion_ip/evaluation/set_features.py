"""A set of images, over all processes -> what the metrics need of it: moments and, only where asked
for, the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from .. import dist_util
from ..data.image_set import Images
from ..features.spaces import FeatureSpace
from ..metrics import FeatureStatistics
from ..metrics.score import InceptionScore


@dataclass
class SetFeatures:
    """What is known of one set; the same on every rank.

    Args:
        pool, spatial: statistics of the two kinds of features; spatial is None where the space has
            none.
        rows: the pool features float32 [n, D] in the order of the images, or None.
        score: the Inception Score's sums, or None.
    """

    n: int
    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    rows: np.ndarray | None
    score: InceptionScore | None


def extract(
    images: Images,
    space: FeatureSpace,
    *,
    batch_size: int,
    limit: int = 0,
    keep_rows: bool = False,
    score: bool = False,
    spatial: bool = True,
    what: str = "images",
) -> SetFeatures:
    """Features of the first `limit` (0: all) images; a collective: each process takes a contiguous
    part.

    Memory does not grow with the number of images, but for 4 D bytes each if `keep_rows` (on every
    process).

    Raises:
        ValueError: an image cannot be read, or features that are not finite.
    """
    n = min(limit or images.n, images.n)
    rank, world = dist_util.get_rank(), dist_util.get_world_size()
    start, stop = n * rank // world, n * (rank + 1) // world
    pool, rows = FeatureStatistics(), np.empty((0, 0), np.float32)
    spatial_statistics = FeatureStatistics() if spatial and space.has_spatial else None
    inception_score = InceptionScore() if score and space.has_logits else None
    with tqdm(total=n, unit="img", desc=what, disable=None if dist_util.is_main() else True) as bar:
        first = start
        for batch in images.batches(start, stop, batch_size):
            features = space(batch)
            pool.update(features.pool)
            if spatial_statistics is not None:
                spatial_statistics.update(features.spatial)
            if inception_score is not None:
                inception_score.update(features.logits, first)
            if keep_rows:
                if first == start:
                    rows = np.empty((stop - start, features.pool.shape[1]), np.float32)
                rows[first - start : first - start + len(batch)] = (
                    features.pool.float().cpu().numpy()
                )
            first += len(batch)
            bar.update(min(len(batch) * world, n - bar.n))
    for statistics in (pool, spatial_statistics, inception_score):
        if statistics is not None:
            statistics.all_reduce()
    return SetFeatures(
        n,
        pool,
        spatial_statistics,
        dist_util.all_gather_rows(rows) if keep_rows else None,
        inception_score,
    )
