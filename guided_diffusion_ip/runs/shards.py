"""Results on disk: shards written as they are produced, gaps filled by the next run, joined into
one npz at the end.

A shard holds the images start .. stop-1 under a name that says so, and exists only when it is
whole. Because image i does not depend on who makes it, a run may be continued with another batch
size or number of processes.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from .. import dist_util
from ..data.npz_io import merge_npz, write_npz
from ..diffusion.process import Network
from ..files import remove_temporaries
from .folder import resumable
from .progress import ImageBar

Range = tuple[int, int]

# What other machines have written may be missing from a listing of a network file system for so
# long: NFS keeps its view of a folder for up to a minute (acdirmax).
LISTING_S = 75.0
_POLL_S = 0.5


def left_when_listed(missing: Callable[[], Sequence]) -> Sequence:
    """What `missing` still returns when it has been asked for LISTING_S seconds; empty as soon as
    it returns nothing.
    """
    deadline = time.monotonic() + LISTING_S
    while (left := missing()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return left


class ShardFolder:
    """The shards of one set of num_samples images."""

    def __init__(self, path: str, num_samples: int) -> None:
        self.path = path
        self.num_samples = num_samples
        os.makedirs(path, exist_ok=True)

    def present(self) -> list[Range]:
        """(start, stop) of the whole shards, in order."""
        matches = (re.fullmatch(r"shard-(\d+)-(\d+)\.npz", name) for name in os.listdir(self.path))
        return sorted((int(m[1]), int(m[2])) for m in matches if m)

    def gaps(self) -> list[Range]:
        """(start, stop) of what is to be made."""
        gaps: list[Range] = []
        end = 0
        for start, stop in [*self.present(), (self.num_samples, self.num_samples)]:
            if end < start:
                gaps.append((end, start))
            end = max(end, stop)
        return gaps

    @property
    def left(self) -> int:
        """How many images are to be made."""
        return sum(stop - start for start, stop in self.gaps())

    def write(self, start: int, arrays: dict[str, np.ndarray]) -> None:
        """Store what belongs to the images numbered from start: arrays of n rows each, such as
        arr_0 uint8 [n, H, W, C].
        """
        stop = start + len(next(iter(arrays.values())))
        write_npz(self._file((start, stop)), arrays)

    def merge(self, path: str) -> None:
        """Join all shards into `path`, whose images are in order, and remove them.

        Raises:
            ValueError: some are missing, or overlap.
        """
        merge_npz(path, self.files(), self.num_samples)
        self.remove()

    def files(self) -> list[str]:
        """The paths of all shards, in order, when all have been written; waits until this machine
        sees them.

        Raises:
            ValueError: some do not appear, or two hold the same image.
        """
        if gaps := left_when_listed(self.gaps):
            raise ValueError(
                f"{self.path} lacks the images {gaps[0][0]} to {gaps[0][1] - 1}, though all "
                "processes have written theirs: do they share this folder? The same command again "
                "makes what is missing"
            )
        ranges = self.present()
        for a, b in zip(ranges, ranges[1:]):
            if b[0] < a[1]:
                raise ValueError(
                    f"{self._file(a)} and {os.path.basename(self._file(b))} both hold image "
                    f"{b[0]}: two runs have written there at once; remove one of these files, and "
                    "the same command again makes what is missing"
                )
        if ranges and ranges[-1][1] > self.num_samples:
            raise ValueError(
                f"{self._file(ranges[-1])} holds images beyond the {self.num_samples} of this run: "
                "remove it, and give the same command again"
            )
        return [self._file(r) for r in ranges]

    def remove(self) -> None:
        """Delete the shards and their folder, and what killed processes have left there."""
        for r in self.present():
            os.remove(self._file(r))
        remove_temporaries(self.path)
        os.rmdir(self.path)

    def _file(self, r: Range) -> str:
        return os.path.join(self.path, f"shard-{r[0]:08d}-{r[1]:08d}.npz")


def in_batches(gaps: Iterable[Range], batch_size: int) -> Iterator[Range]:
    """(start, stop) of the gaps in pieces of at most batch_size images."""
    for start, stop in gaps:
        for a in range(start, stop, batch_size):
            yield a, min(a + batch_size, stop)


def fill_shards(
    folder: ShardFolder,
    make: Callable[[Network, range], dict[str, np.ndarray]],
    model: Network,
    batch_size: int,
    desc: str,
    calls: int,
) -> None:
    """Make what is missing, each process its share, under a bar of images.

    Args:
        make: the arrays of the images numbered [n], by a model that counts its calls for the bar.
        desc: of the bar; calls: of the network for one batch.
    """
    gaps = dist_util.broadcast_object(folder.gaps())
    rank, world = dist_util.get_rank(), dist_util.get_world_size()
    # One after the other: there may be more batches than fit into memory.
    mine = itertools.islice(in_batches(gaps, batch_size), rank, None, world)
    done = folder.num_samples - sum(stop - start for start, stop in gaps)
    with (
        resumable(folder.num_samples, lambda: folder.left),
        ImageBar(desc, folder.num_samples, done, calls) as bar,
    ):
        for start, stop in mine:
            with bar.batch(model, stop - start) as counted:
                arrays = make(counted, range(start, stop))
            folder.write(start, arrays)
