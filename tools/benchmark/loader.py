"""How fast training images come, against the published way: one loader process that decodes PNGs.

Nothing else runs meanwhile: a rate here is what a training step could take at most. The ways take
turns, so that what disturbs one disturbs all; only their ratios carry over to another machine.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from guided_diffusion_ip.data.image_datasets import ImageStream, load_data
from guided_diffusion_ip.data.image_io import center_crop_arr
from guided_diffusion_ip.data.image_set import ImageSet
from guided_diffusion_ip.data.sources import open_source
from guided_diffusion_ip.preparation.writers import pack_images

PUBLISHED = "published way: one worker process decodes PNGs"
FOLDER = "folder, decoded by worker processes"
CACHED = "folder, decoded once into memory"
MAPPED = "npz, memory-mapped"
_BATCHES_AHEAD = 40  # what worker processes may have ready before the clock starts


@dataclass(frozen=True)
class LoaderRow:
    """One way of loading.

    Args:
        setup_s: seconds before the first batch is asked for: listing, decoding into memory; for the
            mapped form also making it.
        rates: images/s of each repeat.
    """

    what: str
    setup_s: float
    rates: tuple[float, ...]

    @property
    def images_per_s(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.rates)


def measure_loader(
    folder: str | os.PathLike,
    batch_size: int = 128,
    image_size: int = 32,
    seconds: float = 1.0,
    repeats: int = 5,
    num_workers: int | None = None,
) -> list[LoaderRow]:
    """Rates of PUBLISHED, FOLDER, CACHED and MAPPED on one folder of images, RGB, mirrored at
    random, in random order.

    Args:
        seconds: of each repeat. num_workers: processes of FOLDER; None: as load_data chooses.

    Raises:
        ValueError: no images there.
    """
    settings: dict[str, Any] = dict(batch_size=batch_size, image_size=image_size)
    with tempfile.TemporaryDirectory() as place:
        packed = os.path.join(place, "packed.npz")
        start = time.perf_counter()
        plain = open_source(folder, class_cond=False)
        pack_images(packed, ImageSet(plain, (image_size, image_size), 3))
        setup = {MAPPED: time.perf_counter() - start}
        streams: dict[str, Iterator] = {}
        for what, make in (
            (PUBLISHED, lambda: published_batches(folder, batch_size, image_size)),
            (
                FOLDER,
                lambda: load_data(data_dir=folder, cache_mb=0, num_workers=num_workers, **settings),
            ),
            (CACHED, lambda: load_data(data_dir=folder, cache_mb=2**20, **settings)),
            (MAPPED, lambda: load_data(data_dir=packed, **settings)),
        ):
            start = time.perf_counter()
            streams[what] = make()
            setup[what] = setup.get(what, 0.0) + time.perf_counter() - start
        rates: dict[str, list[float]] = {what: [] for what in streams}
        for _ in range(repeats):
            for what, stream in streams.items():
                rates[what].append(_rate(stream, seconds))
                time.sleep(
                    _BATCHES_AHEAD * batch_size / rates[what][-1]
                )  # its workers go on until they are so far ahead
        for stream in streams.values():
            if isinstance(stream, ImageStream):
                stream.close()
    return [LoaderRow(what, setup[what], tuple(rates[what])) for what in streams]


def table(rows: list[LoaderRow]) -> str:
    """A Markdown table, with each way's ratio to the first."""
    lines = [
        "| what | images/s: median (lowest to highest) | ratio | s before the first batch |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.what} | {row.images_per_s:,.0f} ({min(row.rates):,.0f} to "
            f"{max(row.rates):,.0f}) | {row.images_per_s / rows[0].images_per_s:.1f} | "
            f"{row.setup_s:.2f} |"
        )
    return "\n".join(lines)


def published_batches(folder: str | os.PathLike, batch_size: int, image_size: int) -> Iterator:
    """Batches float32 [b, 3, H, W] in [-1, 1] from one worker process that opens, decodes, crops
    and mirrors file after file.

    One thing is kinder than published: the worker is not started again for every epoch.
    """
    files = _DecodedFiles(os.fspath(folder), image_size)
    return iter(
        torch.utils.data.DataLoader(
            files, batch_size, sampler=_Shuffled(len(files)), num_workers=1, drop_last=True
        )
    )


class _DecodedFiles(torch.utils.data.Dataset):
    """One file, one image: decoded anew whenever it is asked for."""

    def __init__(self, folder: str, image_size: int) -> None:
        self._paths = [
            os.path.join(folder, name) for name in open_source(folder, class_cond=False).names
        ]
        self._size = image_size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> np.ndarray:
        with open(self._paths[i], "rb") as file, Image.open(file) as image:
            pixels = center_crop_arr(image.convert("RGB"), self._size)
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        return (pixels.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)


class _Shuffled(torch.utils.data.Sampler[int]):
    """All numbers below n in random order, again and again."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self._n).tolist()


def _rate(stream: Iterator, seconds: float) -> float:
    """Images/s of the stream, once it has nothing ready from before."""
    for _ in range(_BATCHES_AHEAD):
        next(stream)
    images, start = 0, time.perf_counter()
    while True:
        batch = next(stream)
        images += len(batch[0] if isinstance(batch, tuple) else batch)
        if (past := time.perf_counter() - start) >= seconds:
            return images / past
