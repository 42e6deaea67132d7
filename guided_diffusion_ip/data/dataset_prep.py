"""Turn an iterator of images into a training set: a folder with class sub-folders, or an npz.

The scripts in datasets/ read their sources; the writing is done here, so that a set is either
complete under its final name or not there at all.
"""
from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np

from .image_io import NpzWriter, save_png
from .sources import FolderSource


def write_image_folder(out_dir: str | os.PathLike,
                       items: Iterable[tuple[np.ndarray, str | None]]) -> int:
    """Write PNGs OUT_DIR/CLASS/0000.png, numbered through the whole set; returns how many.

    Args:
        items: pairs of uint8 [H, W, C] (1, 3 or 4 channels) and class name; without a name the file
            goes to OUT_DIR itself.

    Raises:
        ValueError: out_dir has something in it, no items, or a class name that is no folder name.
    """
    out_dir = os.path.abspath(out_dir)
    if os.path.exists(out_dir) and not (os.path.isdir(out_dir) and not os.listdir(out_dir)):
        raise ValueError(f"{out_dir} is not empty: remove it or choose another folder")
    os.makedirs(os.path.dirname(out_dir), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(out_dir)}.",
                                 dir=os.path.dirname(out_dir))
    try:
        count = 0
        inside = os.path.join(temporary, "set")  # made by makedirs: open to the group, as usual
        for image, name in items:
            if name is not None and (not name or name != os.path.basename(name) or name[0] == "."):
                raise ValueError(f"class name {name!r} cannot be the name of a folder")
            save_png(image, os.path.join(inside, name or "", f"{count:04d}.png"))
            count += 1
        if not count:
            raise ValueError(f"there are no images to write to {out_dir}")
        if os.path.isdir(out_dir):
            os.rmdir(out_dir)
        os.replace(inside, out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def write_image_npz(path: str | os.PathLike, images: Iterable[np.ndarray],
                    shape: Sequence[int], labels: Sequence[int] | None = None) -> None:
    """Stream images uint8 [H, W, C] into arr_0 of an npz, and labels into arr_1 (int64 [N]).

    `shape` is [N, H, W, C], announced beforehand; memory holds one image at a time.

    Raises:
        ValueError: another number or shape of images, or not one label each.
    """
    if labels is not None and len(labels) != shape[0]:
        raise ValueError(f"{len(labels)} labels for {shape[0]} images: one each is needed")
    with NpzWriter(path) as out:
        out.write("arr_0", shape, np.uint8, (image[None] for image in images))
        if labels is not None:
            out.write("arr_1", (shape[0],), np.int64, [np.asarray(labels, dtype=np.int64)])


def count_images(folder: str | os.PathLike) -> int:
    """How many images lie in a folder and below; 0 if it does not exist or is empty."""
    if not os.path.isdir(folder) or not os.listdir(folder):
        return 0
    return len(FolderSource(os.fspath(folder), class_cond=False))
