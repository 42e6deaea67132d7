"""Turn images into a training set: a folder with class sub-folders, or an npz; and draw reference
images from it.

The scripts in datasets/ read their sources; the writing is done here, so that a set is either
complete under its final name or not there at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data import preprocessing as made
from ..data.batches import BatchMaker, Failure, Order, stop_workers, worker_batches
from ..data.image_io import save_png
from ..data.image_set import ImageSet
from ..data.image_source import Source
from ..data.npz_io import NpzReader, NpzWriter
from ..data.npz_source import CLASSES
from ..data.sources import FolderSource, open_source
from ..files import atomic_file
from ..noise import Stream, permutation
from ..ownership import owning_alone

TRAIN = "train.npz"
REFERENCE = "reference.npz"
_CHUNK_BYTES = 48 << 20  # of pixels that are rendered at a time
_WORKER_BYTES = 4 << 20  # of pixels, on their way from a worker; several wait in memory
_FEW = 1000  # images that are decoded sooner than workers start


@contextlib.contextmanager
def scratch(path: str | os.PathLike) -> Iterator[str]:
    """A temporary folder beside `path`, for what will be moved there once it is whole.

    What a killed process left of an earlier one is removed first.

    Raises:
        ValueError: another process is making the same.
    """
    folder, name = os.path.split(os.path.abspath(path))
    place = os.path.join(folder, f".{name}.making")
    with owning_alone(folder, f"{os.path.basename(place)}.lock", "choose another place"):
        shutil.rmtree(place, ignore_errors=True)
        os.makedirs(place)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def write_image_folder(
    out_dir: str | os.PathLike,
    items: Iterable[tuple[np.ndarray, str | None]],
    digits: int = 4,
    preprocessing: str = "",
) -> int:
    """Write PNGs OUT_DIR/CLASS/0000.png, numbered through the whole set; returns how many.

    The folder appears when it is complete.

    Args:
        items: pairs of uint8 [H, W, C] (1, 3 or 4 channels) and class name; without a name the file
            goes to OUT_DIR itself.
        digits: of the numbers, at least.
        preprocessing: how the images were made, written beside them.

    Raises:
        ValueError: out_dir has something in it, no items, or a class name that is no folder name.
    """
    out_dir = os.path.abspath(out_dir)
    if os.path.exists(out_dir) and not (os.path.isdir(out_dir) and not os.listdir(out_dir)):
        raise ValueError(f"{out_dir} is not empty: remove it or choose another folder")
    with scratch(out_dir) as place:
        inside, count = os.path.join(place, "set"), 0
        for image, name in items:
            if name is not None and (not name or name != os.path.basename(name) or name[0] == "."):
                raise ValueError(f"class name {name!r} cannot be the name of a folder")
            save_png(image, os.path.join(inside, name or "", f"{count:0{digits}d}.png"))
            count += 1
        if not count:
            raise ValueError(f"there are no images to write to {out_dir}")
        if preprocessing:
            with atomic_file(os.path.join(inside, made.FILE)) as file:
                file.write(f"{preprocessing}\n".encode())
        if os.path.isdir(out_dir):
            os.rmdir(out_dir)
        os.replace(inside, out_dir)
    return count


def write_image_npz(
    path: str | os.PathLike,
    images: Iterable[np.ndarray],
    shape: Sequence[int],
    labels: Sequence[int] | np.ndarray | None = None,
    preprocessing: str = "",
    classes: Sequence[str] | None = None,
) -> None:
    """Stream images uint8 [H, W, C] into arr_0 of an npz, and labels into arr_1 (int64 [N]).

    `shape` is [N, H, W, C], announced beforehand; memory holds one image at a time. `preprocessing`
    says how the images were made, `classes` what the labels 0, 1, ... are called; each is stored as
    a text of that name.

    Raises:
        ValueError: another number or shape of images, or not one label each.
    """
    if labels is not None and len(labels) != shape[0]:
        raise ValueError(f"{len(labels)} labels for {shape[0]} images: one each is needed")
    with scratch(path) as place:
        whole = os.path.join(place, os.path.basename(path))
        with NpzWriter(whole) as out:
            out.write("arr_0", shape, np.uint8, (image[None] for image in images))
            if labels is not None:
                out.write("arr_1", (shape[0],), np.int64, [np.asarray(labels, dtype=np.int64)])
            if classes is not None:
                names = np.array(list(classes))
                out.write(CLASSES, names.shape, names.dtype, [names])
            if preprocessing:
                text = made.as_array(preprocessing)
                out.write(made.KEY, text.shape, text.dtype, [text])
        os.replace(whole, path)


def render_npz(
    out_dir: str,
    source: Source,
    render: Callable[[Image.Image, str], np.ndarray],
    size: tuple[int, int],
    preprocessing: str,
) -> None:
    """Write OUT_DIR/train.npz: arr_0 uint8 [N, H, W, 3], the images of the source in its order,
    each through `render`.

    Images are decoded in threads (Pillow works outside the interpreter lock), 48 MB at a time. A
    set that is there already is left as it is.

    Args:
        render: RGB image and its name -> uint8 [H, W, 3].

    Raises:
        ValueError: an image cannot be read or is not as `render` wants it, named; or another set
            lies there already.
    """
    path, n = os.path.join(out_dir, TRAIN), len(source)
    if is_finished(path, n, preprocessing):
        return
    rows = max(1, _CHUNK_BYTES // (size[0] * size[1] * 3))

    def rendered() -> Iterator[np.ndarray]:
        for start in range(0, n, rows):
            numbers = range(start, min(start + rows, n))
            yield from pool.map(lambda i: render(source.image(i, 3), source.names[i]), numbers)

    pool = ThreadPoolExecutor()
    try:
        images = tqdm(rendered(), path, n, unit="img", disable=None)
        write_image_npz(path, images, (n, *size, 3), preprocessing=preprocessing)
    finally:
        pool.shutdown(cancel_futures=True)


def write_reference(out_dir: str, count: int, preprocessing: str) -> str:
    """OUT_DIR/reference.npz: `count` images of OUT_DIR/train.npz (`reference_rows`), or all if it
    has no more; returns a note.

    If it is all, the file is a second name (hard link) of train.npz and takes no space; where the
    file system cannot do that, train.npz itself is to be used.
    """
    train, path = os.path.join(out_dir, TRAIN), os.path.join(out_dir, REFERENCE)
    with NpzReader(train) as reader:
        n, *shape = reader.shape("arr_0")
        chosen = reference_rows(n, count)
        if is_finished(path, len(chosen), preprocessing):
            return f"{path}: {len(chosen):,} images, were there already"
        if len(chosen) == n:
            try:
                os.link(train, path)
            except OSError:
                return f"the reference is the whole training set: use {train}"
            return f"{path}: the whole training set, another name of {train}"
        images = (
            reader.rows("arr_0", int(i), int(i) + 1)[0]
            for i in tqdm(chosen, path, unit="img", disable=None)
        )
        write_image_npz(path, images, (len(chosen), *shape), preprocessing=preprocessing)
    return f"{path}: {len(chosen):,} images drawn from {n:,}"


def reference_rows(n: int, count: int) -> np.ndarray:
    """Which of n images the reference takes, int64 [min(count, n)], ascending: the first `count` of
    a fixed permutation.

    They are sorted(noise.permutation(seed 0, Stream.SHUFFLE, epoch 0, n)[:count]) and depend on n
    and count only.

    Raises:
        ValueError: count is not positive.
    """
    if count < 1:
        raise ValueError(f"{count} reference images: 1 or more are needed")
    return np.sort(permutation(0, Stream.SHUFFLE, 0, n)[:count].numpy())


def is_finished(path: str, n: int, preprocessing: str) -> bool:
    """Is the npz or the folder of PNGs there? If so, it must be the wanted set.

    Raises:
        ValueError: it is another one.
    """
    if not os.path.exists(path) or os.path.isdir(path) and not os.listdir(path):
        return False
    if os.path.isdir(path):
        found = count_images(path)
    else:
        with NpzReader(path) as reader:
            found = reader.shape("arr_0")[0]
    record = made.recorded(path)
    if (found, record) != (n, preprocessing):
        raise ValueError(
            f"{path} is there already and is another set: {found} images, "
            f"{record or 'of unknown making'!r}; wanted are {n}, {preprocessing!r}: remove it, or "
            "choose another folder"
        )
    return True


def count_images(folder: str | os.PathLike) -> int:
    """How many images lie in a folder and below; 0 if it does not exist or is empty."""
    if not os.path.isdir(folder) or not os.listdir(folder):
        return 0
    return len(FolderSource(os.fspath(folder), class_cond=False))


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
    """Write the images of a set, in its order, decoded, into one npz that all processes can map.

    It has the form that `load_data` reads anyway, not compressed: pixels lie in it as in memory.
    Labels, class names and the line about the making travel with them.

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
    chunks_wanted = -(-count // max(1, _WORKER_BYTES // int(np.prod(images.shape))))
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
