"""A folder or zip of images decoded once, into one file that all processes map.

The form is the npz that `load_data` reads anyway, not compressed: the pixels lie in it as in
memory, one image after another, so that it can be mapped where it is and the system keeps a single
copy for all processes; and labels (arr_1), class names (`classes`) and the line about the making
(`preprocessing`) travel with them, which a .npy could not hold. Samples, reference images and the
published sets have the same form, and numpy.load reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data.batches import BatchMaker, Failure, Order, stop_workers, worker_batches
from ..data.image_io import pil_mode
from ..data.preprocessing import of_loader
from ..data.sources import Source, open_source
from .writers import write_image_npz

_CHUNK_BYTES = 4 << 20  # of pixels, on their way from a worker; several wait in memory
_FEW = 1000  # images that are decoded sooner than workers start


def open_with_classes(path: str | os.PathLike) -> Source:
    """The images at `path`, with their classes if any are found.

    Raises:
        ValueError: nothing usable there.
    """
    plain = open_source(path, class_cond=False)
    try:
        return open_source(path, class_cond=True)
    except ValueError:
        return plain


def pack_images(
    path: str | os.PathLike,
    source: Source,
    size: tuple[int, int] | None,
    channels: int,
    count: int = 0,
    grey: bool = False,
    workers: int | None = None,
) -> tuple[int, int, int, int]:
    """Write the images of `source`, in its order, as a training run with these settings sees them;
    the file appears at the end.

    Training on the file gives the same batches as training on the source, bit for bit. Memory holds
    a few MB per worker.

    Args:
        source: labels and class names are written too if it has any.
        size: (H, W) to which images are scaled and cropped as for training; None: all must have the
            first one's size.
        channels: 1, 3 or 4. count: only the first so many images; 0: all.
        grey: refuse images with colours, which one channel would lose.
        workers: decoding processes; 0: this one; default one per core.

    Returns: [N, H, W, C] of what was written.

    Raises:
        ValueError: an image cannot be read, has another size, or colours that are not wanted; names
            it.
    """
    count = min(count or len(source), len(source))
    record = (
        source.preprocessing
        if size is None
        else of_loader(source.preprocessing, size, channels, stored_size=source.shape)
    )
    if size is None or grey:
        source = _Checked(source, size is None, grey)
    if size is None:
        first = source.image(0, channels)
        size = first.height, first.width
    if workers is None:
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        workers = cores if count > _FEW and cores > 1 else 0
    shape = (count, *size, channels)
    images = tqdm(
        _decoded(source, shape, workers), os.fspath(path), count, unit="img", disable=None
    )
    labels = None if source.labels is None else source.labels[:count]
    write_image_npz(path, images, shape, labels, record, source.classes)
    return shape


def _decoded(
    source: Source, shape: tuple[int, int, int, int], workers: int
) -> Iterator[np.ndarray]:
    """Images uint8 [H, W, C], made by the training loader's own code."""
    count, *image_shape = shape
    chunks_wanted = -(-count // max(1, _CHUNK_BYTES // int(np.prod(image_shape))))
    rows = -(
        -count // chunks_wanted
    )  # evenly: what the last batch has beyond the end is decoded too, for nothing
    order = Order(len(source), rows, rank=0, world=1, seed=0, deterministic=True)
    maker = BatchMaker(
        source, order, tuple(image_shape[:2]), image_shape[2], random_crop=False, random_flip=False
    )
    steps = range(-(-count // rows))
    chunks = worker_batches(maker, steps, workers) if workers else map(maker.__getitem__, steps)
    try:
        for step, chunk in zip(steps, chunks):
            if isinstance(chunk, Failure):
                raise ValueError(chunk.message)
            yield from chunk[0].numpy()[
                : count - step * rows
            ]  # the last batch begins again at the top
    finally:
        if workers:
            stop_workers(chunks)


class _Checked:
    """A source that refuses images of another size than its first, or with colours."""

    def __init__(self, source: Source, one_size: bool, grey: bool) -> None:
        self._source = source
        self._grey = grey
        self.labels, self.classes = source.labels, source.classes
        self._size = source.image(0, 3).size if one_size else None

    def __len__(self) -> int:
        return len(self._source)

    def image(self, i: int, channels: int) -> Image.Image:
        image = self._source.image(i, 3 if self._grey else channels)
        name = f"{self._source.path}: {self._source.names[i]}"
        if self._size is not None and image.size != self._size:
            raise ValueError(
                f"{name} is {image.height} x {image.width}, but {self._source.names[0]} is "
                f"{self._size[1]} x {self._size[0]}: give --image_size to scale and crop all"
            )
        if self._grey and np.ptp(np.asarray(image), axis=2).any():
            raise ValueError(
                f"{name} has colours, the first images have none: give --channels 3 (or 1, to lose "
                "them)"
            )
        return image.convert(pil_mode(channels))
