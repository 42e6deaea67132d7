"""Images in an npz: arr_0 uint8 [N, H, W, C], arr_1 int labels [N], maybe their names
(`classes`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .image_source import Source, as_image
from .npz_io import NpzReader

CLASSES = "classes"  # array of an npz: the names of its labels
_MOST_CLASSES = 10_000_000  # as --num_classes
_SEVERAL = 64  # images that are looked at to see in which range floating-point pixels lie


@dataclass(frozen=True)
class PixelRules:
    """What is accepted as arr_0: these numbers of channels, and maybe floating-point numbers that
    are whole numbers from 0 to 255, as guided-diffusion's evaluator accepts them.
    """

    channels: tuple[int, ...]
    floats: bool

    @property
    def wanted(self) -> str:
        """In words."""
        channels = " or ".join(map(str, self.channels))
        return f"arr_0 uint8 [N, H, W, C], values 0 to 255, with N >= 1 and C of {channels}"


TRAINING = PixelRules((1, 3, 4), floats=False)
EVALUATED = PixelRules((1, 3), floats=True)


class NpzSource(Source):
    """The images of an npz; memory-mapped if it is stored uncompressed.

    `keys` lists all arrays of the file.

    Raises:
        ValueError: the arrays are not of this form; says what was found, and how to save them.
    """

    kind = "npz"
    shape: tuple[int, int, int]

    def __init__(self, path: str, class_cond: bool, rules: PixelRules = TRAINING) -> None:
        self.path = path
        self._pixels: np.ndarray | None = None
        self._reader: NpzReader | None = None
        self.classes = self.labels = None
        reader = self._open()
        self.keys = reader.keys
        n, height, width, channels = check_pixels(reader, rules)
        self.shape = (height, width, channels)
        self._floats = reader.dtype("arr_0") != np.uint8
        self.names = range(n)  # type: ignore[assignment]  # rows have no names
        self.text = f"npz {path}, {n} images"
        if class_cond:
            self.labels = _read_labels(reader, n)
            self.classes = _read_classes(reader, int(self.labels.max()) + 1)
            self._add_classes_to_text(self.classes, "arr_1")

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [N, H, W, C]: a memory map, or in memory if the file is compressed."""
        if self._pixels is None:
            mapped = None if self._floats else self._open().mapped("arr_0")
            self._pixels = self.rows(0, len(self)) if mapped is None else np.asarray(mapped)
        return self._pixels

    def rows(self, start: int, stop: int) -> np.ndarray:
        pixels = self._open().rows("arr_0", start, stop)
        if not self._floats:
            return pixels
        whole = pixels.round()
        if not ((whole == pixels) & (whole >= 0) & (whole <= 255)).all():
            raise ValueError(
                f"{self.path}: arr_0 is {pixels.dtype} with values in rows {start} to {stop - 1} "
                "that are not whole numbers from 0 to 255; expected uint8"
            )
        return whole.astype(np.uint8)

    def image(self, i: int, channels: int) -> Image.Image:
        return as_image(self.pixels[i], channels)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._pixels = self._reader = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None, "_reader": None}

    def _open(self) -> NpzReader:
        if self._reader is None:
            self._reader = NpzReader(self.path)
        return self._reader


def check_pixels(reader: NpzReader, rules: PixelRules) -> tuple[int, ...]:
    """The shape [N, H, W, C] of arr_0.

    Raises:
        ValueError: it is missing, or no images as `rules` want them.
    """
    if "arr_0" not in reader.keys:
        images = [key for key in reader.keys if len(reader.shape(key)) == 4]
        hint = f"; {images[0]} may be what is meant" if len(images) == 1 else ""
        raise ValueError(
            f"{reader.path} has the arrays {reader.keys}, but needs {rules.wanted}{hint}: save it "
            "again with numpy.savez(path, arr_0=images)"
        )
    shape, dtype = reader.shape("arr_0"), reader.dtype("arr_0")
    found = f"{reader.path}: arr_0 is {dtype} {list(shape)}"
    if len(shape) == 3:
        raise ValueError(f"{found}, but needs a channel axis: save arr_0[..., None]")
    if len(shape) == 4 and shape[3] not in rules.channels and shape[1] in rules.channels:
        raise ValueError(
            f"{found}, which looks like [N, C, H, W]: save arr_0.transpose(0, 2, 3, 1).copy()"
        )
    if len(shape) != 4 or shape[3] not in rules.channels or 0 in shape:
        raise ValueError(
            f"{found}, {'no images, ' if 0 in shape else ''}but must be {rules.wanted}"
        )
    if dtype.kind == "f" and rules.floats:
        _check_range(reader, found)
    elif dtype != np.uint8:
        raise ValueError(
            f"{found}, but must be uint8 0..255: save x.astype(numpy.uint8), if x has that range"
        )
    return shape


def _check_range(reader: NpzReader, found: str) -> None:
    """An error for floating-point pixels in a range that is not 0 to 255."""
    some = reader.rows("arr_0", 0, min(reader.shape("arr_0")[0], _SEVERAL))
    if not np.isfinite(some).all():
        raise ValueError(f"{found} with values that are not finite; expected uint8")
    low, high = float(some.min()), float(some.max())
    if high > 1.5 or low >= 0 and high > 1:
        return
    looks, save = (
        ("[-1, 1]", "((x + 1) * 127.5).clip(0, 255)")
        if low < 0
        else ("[0, 1]", "(x * 255).round()")
    )
    raise ValueError(
        f"{found} from {low:g} to {high:g}, which looks like {looks}; expected uint8: save "
        f"{save}.astype(numpy.uint8)"
    )


def _read_labels(reader: NpzReader, n: int) -> np.ndarray:
    """int64 [n]."""
    if "arr_1" not in reader.keys:
        raise ValueError(
            f"{reader.path} has no labels (its arrays: {reader.keys}), but class_cond is on: save "
            "them as arr_1, integers [N]"
        )
    shape, dtype = reader.shape("arr_1"), reader.dtype("arr_1")
    if shape != (n,) or dtype.kind not in "iu":
        raise ValueError(
            f"{reader.path}: arr_1 is {dtype} {list(shape)}, but labels must be integers [{n}], "
            "one per image"
        )
    labels = reader.rows("arr_1", 0, n).astype(np.int64)
    if labels.max() >= _MOST_CLASSES:
        raise ValueError(
            f"{reader.path}: arr_1 holds the label {labels.max()}: labels must be below "
            f"{_MOST_CLASSES:,}; number the classes 0, 1, 2, ..."
        )
    if labels.min() < 0:
        raise ValueError(
            f"{reader.path}: arr_1 holds the label {labels.min()}: labels must be 0 or more"
        )
    return labels


def _read_classes(reader: NpzReader, least: int) -> list[str]:
    """The names of the labels, or their numbers as text."""
    if CLASSES not in reader.keys:
        return [str(k) for k in range(least)]
    shape, dtype = reader.shape(CLASSES), reader.dtype(CLASSES)
    if dtype.kind != "U" or len(shape) != 1 or shape[0] < least:
        raise ValueError(
            f"{reader.path}: {CLASSES} is {dtype} {list(shape)}, but must be texts [{least}] or "
            f"more, the names of the labels 0 to {least - 1}"
        )
    return reader.rows(CLASSES, 0, shape[0]).tolist()
