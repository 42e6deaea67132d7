"""A set of images, over all processes -> what the metrics need of it: moments and, only where asked
for, the features.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from .. import dist_util
from ..data.image_set import Images
from ..features.space import FeatureSpace
from ..metrics import FeatureStatistics, InceptionScore
from ..metrics.entry import LOGITS, MOMENTS, ROWS, SPATIAL_MOMENTS, SetFeatures


def extract(
    images: Images,
    space: FeatureSpace,
    needs: Collection[str],
    *,
    batch_size: int,
    limit: int = 0,
    what: str = "images",
) -> SetFeatures:
    """Features of the first `limit` (0: all) images; a collective: each process takes a contiguous
    part.

    Memory does not grow with the number of images, but for 4 D bytes each if ROWS are needed (on
    every process).

    Args:
        needs: of `metrics.entry`: MOMENTS, SPATIAL_MOMENTS, LOGITS, ROWS; what the space does not
            have stays empty.

    Raises:
        ValueError: an image cannot be read, or features that are not finite.
    """
    n = min(limit or images.n, images.n)
    rank, world = dist_util.get_rank(), dist_util.get_world_size()
    start, stop = n * rank // world, n * (rank + 1) // world
    pool, spatial, rows = FeatureStatistics(), FeatureStatistics(), np.empty((0, 0), np.float32)
    with_spatial = SPATIAL_MOMENTS in needs and space.has_spatial
    score = InceptionScore() if LOGITS in needs and space.has_logits else None
    with tqdm(total=n, unit="img", desc=what, disable=None if dist_util.is_main() else True) as bar:
        first = start
        for batch in images.batches(start, stop, batch_size):
            features = space(batch)
            if MOMENTS in needs:
                pool.update(features.pool)
            if with_spatial:
                spatial.update(_promised(features.spatial, space, "spatial"))
            if score is not None:
                score.update(_promised(features.logits, space, "logits"), first)
            if ROWS in needs:
                if first == start:
                    rows = np.empty((stop - start, features.pool.shape[1]), np.float32)
                place = slice(first - start, first - start + len(batch))
                rows[place] = features.pool.float().cpu().numpy()
            first += len(batch)
            bar.update(min(len(batch) * world, n - bar.n))
    pool.all_reduce()
    spatial.all_reduce()
    if score is not None:
        score.all_reduce()
    if ROWS in needs:
        rows = dist_util.all_gather_rows(rows)
    return SetFeatures(n, pool, spatial, rows, score)


def _promised(features: Tensor | None, space: FeatureSpace, what: str) -> Tensor:
    if features is None:
        raise ValueError(
            f"the features {space.name} state has_{what}, but return {what} = None: return them, "
            f"or set has_{what} to False"
        )
    return features
