"""From batches of samples to one npz: shards on disk (ours) against everything in memory (the
published way).
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from guided_diffusion_ip.runs.shards import ShardFolder

from .baseline import gather_and_write
from .machine import PeakMemory

BYTES = 64_000_000  # of pixels in all, about; fewer where batches are small
MOST_BATCHES = 300


@dataclass(frozen=True)
class Gathering:
    """Args: seconds, baseline_seconds: ours and the published way, in turn; peaks: in bytes, of the
    first repeat of each.
    """

    images: int
    pixel_bytes: int
    seconds: tuple[float, ...]
    baseline_seconds: tuple[float, ...]
    peak_memory_bytes: int | None
    baseline_peak_memory_bytes: int | None

    def __str__(self) -> str:
        def way(seconds: tuple[float, ...], peak: int | None) -> str:
            memory = "memory not known" if peak is None else f"{peak / 1e6:.0f} MB at most"
            return f"{1000 * statistics.median(seconds):.4g} ms, {memory}"

        return (
            f"gathering {self.images} images ({self.pixel_bytes / 1e6:.0f} MB) into a file: "
            f"{way(self.seconds, self.peak_memory_bytes)}; published way: "
            f"{way(self.baseline_seconds, self.baseline_peak_memory_bytes)}"
        )


def measure_gathering(
    image_shape: tuple[int, int, int], batch_size: int, repeats: int = 3, total_bytes: int = BYTES
) -> Gathering:
    """Both ways on random images of image_shape (C, H, W), in a temporary folder; no network is
    called.
    """
    channels, height, width = image_shape
    images = min(
        MOST_BATCHES * batch_size, max(batch_size, total_bytes // (channels * height * width))
    )

    def batches() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for start in range(0, images, batch_size):
            yield rng.integers(
                0, 256, (min(batch_size, images - start), height, width, channels), dtype=np.uint8
            )

    def ours(folder: str) -> None:
        shards = ShardFolder(os.path.join(folder, "shards"), images)
        for number, batch in enumerate(batches()):
            shards.write(number * batch_size, {"arr_0": batch})
        shards.merge(os.path.join(folder, "samples.npz"))

    def published(folder: str) -> None:
        gather_and_write(os.path.join(folder, "samples.npz"), batches())

    seconds: tuple[list[float], list[float]] = ([], [])
    peaks: list[int | None] = []
    for _ in range(repeats):
        for way, found in zip((ours, published), seconds):
            took, peak = _run(way)
            found.append(took)
            peaks.append(peak)
    return Gathering(
        images, images * channels * height * width, tuple(seconds[0]), tuple(seconds[1]), *peaks[:2]
    )


def _run(way: Callable[[str], None]) -> tuple[float, int | None]:
    memory = PeakMemory(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        memory.start()
        start = time.perf_counter()
        way(folder)
        return time.perf_counter() - start, memory.growth()
