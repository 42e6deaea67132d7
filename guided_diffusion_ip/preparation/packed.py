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
from tqdm import tqdm

from ..data.batches import BatchMaker, Failure, Order, stop_workers, worker_batches
from ..data.image_set import ImageSet
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
    path: str | os.PathLike, images: ImageSet, count: int = 0, workers: int | None = None
) -> tuple[int, int, int, int]:
    """Write the images of a set, in its order; the file appears at the end.

    Training on the file gives the same batches as training on the source, bit for bit. Memory holds
    a few MB per worker.

    Args:
        images: labels and class names are written too if it has any.
        count: only the first `count` images; 0: all.
        workers: decoding processes; 0: this one; default one per core.

    Returns: [N, H, W, C] of what was written.

    Raises:
        ValueError: an image cannot be read, or is not as the set wants it; names it.
    """
    count = min(count or len(images), len(images))
    if workers is None:
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        workers = cores if count > _FEW and cores > 1 else 0
    decoded = tqdm(
        _decoded(images, count, workers), os.fspath(path), count, unit="img", disable=None
    )
    labels = None if images.labels is None else images.labels[:count]
    shape = (count, *images.shape)
    write_image_npz(path, decoded, shape, labels, images.preprocessing, images.classes)
    return shape


def _decoded(images: ImageSet, count: int, workers: int) -> Iterator[np.ndarray]:
    """Images uint8 [H, W, C], made by the training loader's own code."""
    chunks_wanted = -(-count // max(1, _CHUNK_BYTES // int(np.prod(images.shape))))
    # Evenly: what the last batch has beyond the end is decoded too, for nothing.
    rows = -(-count // chunks_wanted)
    order = Order(len(images), rows, rank=0, world=1, seed=0, deterministic=True)
    maker = BatchMaker(images, order, random_crop=False, random_flip=False)
    steps = range(-(-count // rows))
    chunks = worker_batches(maker, steps, workers) if workers else map(maker.__getitem__, steps)
    try:
        for step, chunk in zip(steps, chunks):
            if isinstance(chunk, Failure):
                raise ValueError(chunk.message)
            # The last batch begins again at the top.
            yield from chunk[0].numpy()[: count - step * rows]
    finally:
        if workers:
            stop_workers(chunks)
