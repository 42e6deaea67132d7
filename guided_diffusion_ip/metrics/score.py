"""The Inception Score (Salimans et al. 2016): exp of the mean KL divergence of p(class | image)
from p(class).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .. import dist_util
from .entry import LOGITS, Metric, MetricOptions, SetFeatures, Value
from .feature_rows import FeatureArray, as_tensor, feature_rows, finite_chunks, gather_ranks

_CHUNK_ROWS = 1024


class InceptionScore:
    """The score of logits that come a batch at a time.

    Images are taken in consecutive splits by their number, the last of which may be short; `value`
    is the mean of the splits' scores. Of a split, the sums of p and of p log p are kept: 8 K bytes,
    whatever the batches. float64; never NaN.
    """

    def __init__(self, split_size: int = 5000) -> None:
        if split_size < 1:
            raise ValueError(f"split_size is {split_size}, must be at least 1 (5000 is customary)")
        self.split_size = split_size
        self._next = 0
        self._sums: dict[int, np.ndarray] = {}  # split -> [K + 2]: p summed, p log p summed, images

    @property
    def n(self) -> int:
        """Number of images so far."""
        return round(sum(sums[-1] for sums in self._sums.values()))

    def update(self, logits: FeatureArray, first_row: int | None = None) -> None:
        """Take in logits [n, K] of any float type on any device, of images first_row,
        first_row + 1, ...

        Args:
            first_row: None: the image after the last of the previous call (0 in the first).

        Raises:
            ValueError: not [n, K], another K than before, NaN or infinity (it names the row).
        """
        rows = feature_rows(logits, "logits")
        size = rows.shape[1] + 2
        if self._sums and size != (before := len(next(iter(self._sums.values())))):
            raise ValueError(
                f"logits have {size - 2} classes, those before them {before - 2}: use one network"
            )
        row = self._next if first_row is None else first_row
        for chunk in finite_chunks(rows, _CHUNK_ROWS, "logits", row):
            while len(chunk):  # a chunk may end one split and begin the next ones
                split, done = divmod(row, self.split_size)
                part, chunk = np.split(chunk, [self.split_size - done])
                sums = self._sums.setdefault(split, np.zeros(size))
                sums += _sums(part)
                row += len(part)
        self._next = row

    def all_reduce(self) -> None:
        """Merge over ranks, which have taken in different images: afterwards every rank has all. To
        be called on all ranks.

        Raises:
            ValueError: on every rank, where they differ in K.
        """
        if dist_util.get_world_size() == 1:
            return
        own = [
            max(self._sums, default=-1) + 1,
            max(map(len, self._sums.values()), default=0),
            self._next,
        ]
        splits, sizes, following = gather_ranks(np.array([own])).T  # [world] each
        if len(set(sizes[sizes > 0].tolist())) > 1:
            raise ValueError(
                f"ranks hold logits of different numbers of classes: {(sizes - 2).tolist()} in "
                "rank order"
            )
        table = np.zeros((1, splits.max(), sizes.max()))
        for split, sums in self._sums.items():
            table[0, split] = sums
        self._sums = {
            split: sums for split, sums in enumerate(gather_ranks(table).sum(axis=0)) if sums[-1]
        }
        self._next = int(following.max())

    @property
    def value(self) -> float:
        """The score of the images so far: between 1 and K.

        Raises:
            ValueError: there are none.
        """
        if not self._sums:
            raise ValueError("an Inception Score needs at least one image, there are none")
        return math.fsum(map(_score, self._sums.values())) / len(self._sums)


def inception_score(logits: FeatureArray, split_size: int = 5000) -> float:
    """The Inception Score of logits [N, K] in the order of the images: consecutive splits,
    unshuffled, the last may be short.

    Raises:
        ValueError: as `InceptionScore` does, or N = 0.
    """
    score = InceptionScore(split_size)
    score.update(logits)
    return score.value


def _sums(logits: np.ndarray) -> np.ndarray:
    """What a split keeps of some of its logits [n, K]: [K + 2]."""
    log_p = as_tensor(logits).double().log_softmax(dim=1)
    p = log_p.exp()
    # Finite: log p is at least minus the range of the logits, also where p underflows to 0.
    return torch.cat(
        [
            p.sum(dim=0),
            (p * log_p).sum()[None],
            torch.tensor([float(len(logits))], dtype=torch.float64),
        ]
    ).numpy()


def _score(sums: np.ndarray) -> float:
    """exp of the mean over images of sum_k p_k (log p_k - log q_k), where q is the mean of p."""
    *_, p_log_p, n = sums
    q = torch.from_numpy(sums[:-2] / n)
    entropy = float(torch.special.entr(q).sum())  # of -q log q, which is 0 at 0
    return math.exp(max(p_log_p / n + entropy, 0.0))


def _compute(
    reference: SetFeatures, samples: SetFeatures, options: MetricOptions
) -> dict[str, Value]:
    assert samples.score is not None, "logits are extracted for metrics that need them"
    return {"is": Value(samples.score.value)}


METRICS = (
    Metric(
        "is",
        "Inception Score",
        frozenset({LOGITS}),
        larger_is_better=True,
        compute=_compute,
        short="IS",
    ),
)
