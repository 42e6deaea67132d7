"""How images were made from their source, in one line that travels with them.

    celeba-align-jpg > crop=center resize=box+bicubic 64x64x3

Before each " > " stands what was there, after it what was done, last the size HxWxC. Training and
reference images whose lines differ were made differently, and their Frechet distance is then too
large; an empty line says nothing either way. A folder or zip carries the line in a file
preprocessing.txt, an npz in an array `preprocessing`.
"""

from __future__ import annotations

import os
import zipfile

import numpy as np

from .. import files
from .npz_io import NpzReader

FILE = "preprocessing.txt"
KEY = "preprocessing"
_LONGEST = 10_000  # characters: a file of that name may be something else


def recorded(path: str | os.PathLike) -> str:
    """What the folder, zip or npz at `path` (local or remote) says about its making; "" if nothing,
    or another kind of file.

    In a zip of one folder, preprocessing.txt may lie in that folder.

    Raises:
        ValueError: there is a record, but it is no line of text, or it cannot be read.
    """
    path = os.fspath(path)
    kind = os.path.splitext(path)[1].lower()
    if files.is_remote(path) or os.path.isdir(path):
        inside = f"{path.rstrip('/')}/{FILE}"
        return _from_file(inside) if files.exists(inside) else ""
    if not os.path.isfile(path):
        return ""
    return {".npz": _from_npz, ".zip": _from_zip}.get(kind, lambda _: "")(path)


def of_loader(
    source_record: str,
    size: tuple[int, int],
    channels: int,
    random_crop: bool = False,
    stored_size: tuple[int, int, int] | None = None,
) -> str:
    """The line for images as the training loader hands them out.

    Args:
        source_record: what the source says about itself (`recorded`), may be "".
        size: (H, W) handed out. channels: handed out. random_crop: cut anywhere instead of the
            middle.
        stored_size: (H, W, C) of all images of the source, where that is known.

    Returns: the record itself if nothing is changed, because it ends with this size or all images
        have it; else the record (or "images") and the loader's step.
    """
    wanted = _shape_text((*size, channels))
    done = f"{source_record} {wanted}" if source_record else f"images {wanted}"
    if not random_crop and source_record.split(" ")[-1] == wanted:
        return source_record
    if not random_crop and stored_size is not None and _shape_text(stored_size) == wanted:
        return done
    crop = "random0.8-1" if random_crop else "center"
    return f"{source_record or 'images'} > crop={crop} resize=box+bicubic {wanted}"


def as_array(record: str) -> np.ndarray:
    """The line as an npz stores it: one piece of text, readable without pickle.

    Raises:
        ValueError: not one line of text.
    """
    return np.array(_line(record, KEY))


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _line(text: str, where: str) -> str:
    text = text.strip()
    if len(text) > _LONGEST or len(text.splitlines()) > 1:
        raise ValueError(f"{where} must hold one line of text that says how the images were made")
    return text


def _from_file(path: str) -> str:
    with files.open_binary(path) as file:
        return _decoded(file.read(4 * _LONGEST + 1), path)


def _from_zip(path: str) -> str:
    try:
        with zipfile.ZipFile(path) as packed:
            names = packed.namelist()
            tops = {name.partition("/")[0] for name in names}
            own = [
                name
                for name in (FILE, *(f"{top}/{FILE}" for top in tops if len(tops) == 1))
                if name in names
            ]
            if not own:
                return ""
            with packed.open(own[0]) as file:
                return _decoded(file.read(4 * _LONGEST + 1), f"{path}/{own[0]}")
    except files.DAMAGED_ZIP as error:
        raise ValueError(f"{path} cannot be read as a zip file: {error}") from error


def _from_npz(path: str) -> str:
    where = f"{path}: {KEY}"
    with NpzReader(path) as reader:
        if KEY not in reader.keys:
            return ""
        array = reader.whole(KEY, 16 * _LONGEST)
    if array.dtype.kind != "U" or array.size != 1:
        raise ValueError(
            f"{where} is {array.dtype} {list(array.shape)}, but must be one text: how the images "
            "were made"
        )
    return _line(str(array.reshape(-1)[0]), where)


def _decoded(data: bytes, where: str) -> str:
    try:
        return _line(data.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error
