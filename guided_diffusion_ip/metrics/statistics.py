"""Mean and covariance of features that come a batch at a time and never are in memory together."""

from __future__ import annotations

import numpy as np

from .. import dist_util
from .feature_rows import FeatureArray, feature_rows, finite_chunks, gather_ranks

# Rows per matrix product: enough for the product to run at full speed, and what waits is 8 KB x D.
_BLOCK_ROWS = 1024
_GATHER_BYTES = 64 << 20


class FeatureStatistics:
    """Streamed mean and covariance, in float64.

        statistics = FeatureStatistics()
        for batch in batches:
            statistics.update(batch)  # [n, D]
        distance = frechet_distance(statistics.mean, statistics.cov, mu, sigma)

    Rows are collected into blocks; a block is centred on its own mean and merged with what went
    before by the pairwise update of Chan, Golub & LeVeque (1979). No large numbers are subtracted,
    so that a mean far from zero costs no accuracy. Memory: about 24 D^2 + 16,000 D bytes (130 MB at
    D = 2048) however many rows there are.
    """

    def __init__(self) -> None:
        self._n = 0  # rows merged so far
        self._mean = np.zeros(0)  # [D] of those rows; D = 0: none seen yet
        self._scatter = np.zeros((0, 0))  # [D, D] sum of (x - mean)(x - mean)^T
        # [_BLOCK_ROWS + 1, D]; the last row is for the step between means.
        self._block = np.zeros((0, 0))
        self._waiting = 0  # rows in the block
        self._stored = False  # from a file, which may state the number of images
        self._stored_n: int | None = None

    @classmethod
    def from_moments(
        cls, mean: np.ndarray, cov: np.ndarray, n: int | None = None
    ) -> FeatureStatistics:
        """Statistics from a file: to be compared, not to be continued.

        Args:
            mean: [D].
            cov: [D, D], divided by n - 1.
            n: number of images; None where the file does not say.

        Raises:
            ValueError: shapes that do not fit together, or non-finite numbers.
        """
        mean, cov = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
        if mean.ndim != 1 or mean.size == 0 or cov.shape != (mean.size, mean.size):
            raise ValueError(
                f"stored statistics must be a mean [D] and a covariance [D, D], got {mean.shape} "
                f"and {cov.shape}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError(
                "stored statistics hold NaN or infinity: make them again from the images"
            )
        self = cls()
        self._mean, self._scatter, self._stored, self._stored_n = mean, cov, True, n
        return self

    @property
    def n(self) -> int | None:
        """Number of rows; None for stored moments of unknown origin."""
        return self._stored_n if self._stored else self._n + self._waiting

    @property
    def mean(self) -> np.ndarray:
        """[D].

        Raises:
            ValueError: no rows.
        """
        self._need(1, "a mean")
        return self._mean.copy()

    @property
    def cov(self) -> np.ndarray:
        """[D, D], divided by n - 1; symmetric to the last bit unless it came from a file.

        Raises:
            ValueError: fewer than two rows.
        """
        if self._stored:
            return self._scatter.copy()
        self._need(2, "a covariance")
        return self._scatter / (self._n - 1)

    def update(self, batch: FeatureArray) -> None:
        """Take in rows [n, D] of any float type on any device; n may be 0.

        Raises:
            ValueError: not [n, D], another D than before, NaN or infinity (it names the row), or
                stored statistics.
        """
        self._refuse_stored()
        rows = feature_rows(batch)
        self._open(rows.shape[1])
        for chunk in finite_chunks(rows, _BLOCK_ROWS, first_row=self._n + self._waiting):
            while len(chunk):
                taken = min(len(chunk), _BLOCK_ROWS - self._waiting)
                self._block[self._waiting : self._waiting + taken] = chunk[:taken]
                self._waiting += taken
                chunk = chunk[taken:]
                if self._waiting == _BLOCK_ROWS:
                    self._flush()

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Take in all rows of `other`, which stays as it is. Returns self.

        Raises:
            ValueError: another D, or stored statistics.
        """
        self._refuse_stored()
        other._refuse_stored()
        other._flush()
        if other._n:
            self._open(other._mean.size)
            self._flush()
            total, step = self._n + other._n, other._mean - self._mean
            self._scatter += other._scatter
            self._scatter += np.outer(step, step) * (self._n * other._n / total)
            self._mean += step * (other._n / total)
            self._n = total
        return self

    def all_reduce(self) -> None:
        """Merge over ranks: afterwards every rank has the rows of all, to the same bits. To be
        called on all ranks.

        Ranks may hold different numbers of rows, also none. Once, at the end: a second call would
        count every row per rank.

        Raises:
            ValueError: on every rank, where they differ in D; on a rank with stored statistics.
        """
        self._refuse_stored()
        self._flush()
        if dist_util.get_world_size() == 1:
            return
        table = gather_ranks(np.array([[self._n, self._mean.size]], dtype=np.int64))  # [world, 2]
        counts, sizes = table[:, 0], table[:, 1]
        if sizes.max() == 0:
            return
        if len(set(sizes[sizes > 0].tolist())) > 1:
            raise ValueError(
                f"ranks hold features of different sizes, in rank order: {sizes.tolist()}; use one "
                "network"
            )
        self._open(int(sizes.max()))
        means, total = gather_ranks(self._mean[None]), int(counts.sum())  # [world, D]
        if total == 0:
            return
        mean = counts / total @ means
        self._scatter += np.outer(self._mean - mean, self._mean - mean) * self._n
        self._mean, self._n = mean, total
        # In strips, because a gather holds as many copies as there are ranks.
        strip = max(1, _GATHER_BYTES // (8 * self._mean.size * len(counts)))
        for start in range(0, self._mean.size, strip):
            part = self._scatter[start : start + strip]  # [strip, D]
            part[:] = gather_ranks(part[None]).sum(axis=0)

    def _open(self, d: int) -> None:
        """Make room for rows of d features, or check that there is."""
        if self._mean.size == 0:
            self._mean, self._scatter = np.zeros(d), np.zeros((d, d))
        elif self._mean.size != d:
            raise ValueError(
                f"features have {d} entries a row, those before them {self._mean.size}: use one "
                "network"
            )
        if self._block.size == 0:
            self._block = np.empty((_BLOCK_ROWS + 1, d))

    def _flush(self) -> None:
        """Merge the waiting rows into mean and scatter."""
        m = self._waiting
        if m == 0:
            return
        rows = self._block[:m]
        # Centred twice: the first time on a number that is near, so that the second mean is one of
        # small numbers.
        near = self._mean if self._n else rows[0].copy()
        rows -= near
        step = rows.mean(axis=0)
        rows -= step
        total = self._n + m
        # One more row makes the product add the step between the means as well.
        self._block[m] = step * np.sqrt(self._n * m / total)
        rows = self._block[: m + 1]
        # numpy computes X^T X by the symmetric product, at half the cost.
        self._scatter += rows.T @ rows
        self._mean = near + step * (m / total)
        self._n, self._waiting = total, 0

    def _need(self, least: int, what: str) -> None:
        if self._stored:
            return
        self._flush()
        if self._n < least:
            raise ValueError(
                f"{what} of features needs at least {least} images, there are {self._n}"
            )

    def _refuse_stored(self) -> None:
        if self._stored:
            raise ValueError(
                "stored statistics cannot take in more images: compute them from all images instead"
            )
