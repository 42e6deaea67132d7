"""Turn images into a training set: a folder with class sub-folders, or an npz; and draw reference
images from it.

The scripts in datasets/ read their sources; the writing is done here, so that a set is either
complete under its final name or not there at all, and goes on where it was interrupted (`parts`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data import preprocessing as made
from ..data.image_io import NpzReader, NpzWriter, save_png, write_npz
from ..data.image_source import Source
from ..data.npz_source import CLASSES
from ..data.sources import FolderSource
from ..files import atomic_file
from ..noise import Stream, permutation
from .parts import Parts, discard

TRAIN = "train.npz"
REFERENCE = "reference.npz"
_PART_BYTES = 48 << 20  # of pixels: what memory holds, and what an interruption costs
_MOST_PARTS = 50  # of a set that is small


def write_image_folder(
    out_dir: str | os.PathLike,
    items: Iterable[tuple[np.ndarray, str | None]],
    digits: int = 4,
    preprocessing: str = "",
    parts: Parts | None = None,
) -> int:
    """Write PNGs OUT_DIR/CLASS/0000.png, numbered through the whole set; returns how many.

    Args:
        items: pairs of uint8 [H, W, C] (1, 3 or 4 channels) and class name; without a name the file
            goes to OUT_DIR itself.
        digits: of the numbers, at least.
        preprocessing: how the images were made, written beside them.
        parts: where to gather the PNGs, to be continued if interrupted: those that are there
            already are not written again. Without it an interrupted set vanishes.

    Raises:
        ValueError: out_dir has something in it, no items, or a class name that is no folder name.
    """
    out_dir = os.path.abspath(out_dir)
    if os.path.exists(out_dir) and not (os.path.isdir(out_dir) and not os.listdir(out_dir)):
        raise ValueError(f"{out_dir} is not empty: remove it or choose another folder")
    os.makedirs(os.path.dirname(out_dir), exist_ok=True)
    with _gathering(out_dir, parts) as inside:
        count = 0
        for image, name in items:
            if name is not None and (not name or name != os.path.basename(name) or name[0] == "."):
                raise ValueError(f"class name {name!r} cannot be the name of a folder")
            path = os.path.join(inside, name or "", f"{count:0{digits}d}.png")
            if parts is None or not os.path.exists(path):
                save_png(image, path)
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


@contextlib.contextmanager
def _gathering(out_dir: str, parts: Parts | None) -> Iterator[str]:
    """The folder that will become out_dir. Made by makedirs, hence open to the group, as usual."""
    if parts is not None:
        yield parts.path("set")
        parts.remove()
        return
    temporary = tempfile.mkdtemp(
        prefix=f".{os.path.basename(out_dir)}.", dir=os.path.dirname(out_dir)
    )
    try:
        yield os.path.join(temporary, "set")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_image_npz(
    path: str | os.PathLike,
    images: Iterable[np.ndarray],
    shape: Sequence[int],
    labels: Sequence[int] | None = None,
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
    with NpzWriter(path) as out:
        out.write("arr_0", shape, np.uint8, (image[None] for image in images))
        if labels is not None:
            out.write("arr_1", (shape[0],), np.int64, [np.asarray(labels, dtype=np.int64)])
        if classes is not None:
            names = np.array(list(classes))
            out.write(CLASSES, names.shape, names.dtype, [names])
        if preprocessing:
            text = made.as_array(preprocessing)
            out.write(made.KEY, text.shape, text.dtype, [text])


def render_npz(
    out_dir: str,
    source: Source,
    render: Callable[[Image.Image, str], np.ndarray],
    size: tuple[int, int],
    preprocessing: str,
) -> None:
    """Write OUT_DIR/train.npz: arr_0 uint8 [N, H, W, 3], the images of the source in its order,
    each through `render`.

    Images are decoded in threads (Pillow works outside the interpreter lock) and stored in pieces;
    the same call again goes on after the last whole one. Memory holds one piece, 48 MB.

    Args:
        render: RGB image and its name -> uint8 [H, W, 3].

    Raises:
        ValueError: an image cannot be read or is not as `render` wants it, named; or another set
            lies there already.
    """
    path, n = os.path.join(out_dir, TRAIN), len(source)
    if is_finished(path, n, preprocessing):
        discard(out_dir, "train")
        return
    names = hashlib.sha256("\n".join(source.names).encode()).hexdigest()
    parts = Parts(out_dir, "train", f"{preprocessing}; {n} images, names {names[:16]}")
    rows = max(1, min(_PART_BYTES // (size[0] * size[1] * 3), -(-n // _MOST_PARTS)))
    pieces = {f"{start:08d}.npz": range(start, min(start + rows, n)) for start in range(0, n, rows)}
    missing = parts.missing(list(pieces))
    done = n - sum(len(pieces[name]) for name in missing)
    pool = ThreadPoolExecutor()
    try:
        with tqdm(desc=path, total=n, initial=done, unit="img", disable=None) as bar:
            for name in missing:
                pixels = np.empty((len(pieces[name]), *size, 3), np.uint8)
                rendered = pool.map(
                    lambda i: render(source.image(i, 3), source.names[i]), pieces[name]
                )
                for k, image in enumerate(rendered):
                    pixels[k] = image
                    bar.update()
                write_npz(parts.path(name), {"arr_0": pixels})
    finally:
        pool.shutdown(cancel_futures=True)
    parts.join(list(pieces), path, {made.KEY: made.as_array(preprocessing)})


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
            "choose another --out"
        )
    return True


def count_images(folder: str | os.PathLike) -> int:
    """How many images lie in a folder and below; 0 if it does not exist or is empty."""
    if not os.path.isdir(folder) or not os.listdir(folder):
        return 0
    return len(FolderSource(os.fspath(folder), class_cond=False))
