"""A set of images where it lies: the base of all sources, and the rule that finds classes in names.

Sources on disk are in sources.py and npz_source.py; image_set.py makes pixels of one size of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..files import is_utf8
from .image_io import pil_mode

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "bmp", "webp", "tif", "tiff")
_EXPECTED = (
    f"a folder of images ({' '.join(EXTENSIONS)}; sub-folders are searched), a .zip of images, or "
    "a .npz with arr_0 uint8 [N, H, W, C]"
)


class SourceError(ValueError):
    """There are no images at the place that was given; `problem` says why, in a few words.

    Callers put the name of the flag or the argument before it.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}: expected {_EXPECTED}")
        self.problem = problem


class Source:
    """Images in the order of their numbers. Worker processes may have it; they open files again.

    Attributes:
        kind: "folder", "zip", "npz", ... path: where the images are.
        names: of the images, in the order of their numbers.
        labels: int64 [n], and classes: their names; None without classes.
        text: one line for the log. preprocessing: how the images were made, maybe "".
        shape: (H, W, C) of all images if they are stored as an array, else None.
    """

    kind = "source"
    preprocessing = ""
    shape: tuple[int, int, int] | None = None

    def __init__(self, path: str, names: Sequence[str], class_cond: bool) -> None:
        self.path = path
        self.names: Sequence[str] = sorted(names)
        if not self.names:
            raise SourceError(f"{path} holds no images{self._hint()}")
        self.classes: list[str] | None = None
        self.labels: np.ndarray | None = None
        self.text = f"{self.kind} {path}, {len(self.names)} images"
        if class_cond:
            self.classes, self.labels, rule = classes_of(self.names, path)
            self._add_classes_to_text(self.classes, rule)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int, channels: int) -> Image.Image:
        """Image number i, decoded to 1, 3 or 4 channels.

        Raises:
            ValueError: it cannot be read; names the file.
        """
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop-1 as stored, uint8 [n, *shape]; only where `shape` is set."""
        raise NotImplementedError

    def close(self) -> None:
        """Close open files; they are opened again when needed."""

    def _hint(self) -> str:
        return ""

    def _add_classes_to_text(self, classes: Sequence[str], rule: str) -> None:
        shown = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
        self.text += f", {len(classes)} classes from {rule} ({shown})"


class ArraySource(Source):
    """Images in memory, uint8 [N, H, W, C]."""

    kind, path, text = "array", "(memory)", "images in memory"

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self.names = range(len(pixels))  # type: ignore[assignment]  # rows have no names
        self.labels = self.classes = None
        self.shape = pixels.shape[1:]

    def image(self, i: int, channels: int) -> Image.Image:
        return as_image(self._pixels[i], channels)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._pixels[start:stop]


class SubsetSource(Source):
    """The images of another source that are numbered `index` [n], in that order."""

    def __init__(self, source: Source, index: Sequence[int] | np.ndarray) -> None:
        self._source = source
        self._index = np.asarray(index, dtype=np.int64)
        self.of_all = len(source.names)
        self.kind, self.path, self.text = source.kind, source.path, source.text
        self.names = [source.names[i] for i in self._index]
        self.labels = None if source.labels is None else source.labels[self._index]
        self.classes, self.shape = source.classes, source.shape
        self.preprocessing = source.preprocessing

    def image(self, i: int, channels: int) -> Image.Image:
        return self._source.image(int(self._index[i]), channels)

    def rows(self, start: int, stop: int) -> np.ndarray:
        part = self._index[start:stop]
        if len(part) and part[-1] - part[0] + 1 == len(part):  # one piece of the file
            return self._source.rows(int(part[0]), int(part[-1]) + 1)
        return np.concatenate([self._source.rows(int(i), int(i) + 1) for i in part])

    def close(self) -> None:
        self._source.close()


def as_image(pixels: np.ndarray, channels: int) -> Image.Image:
    """uint8 [H, W, C] as a Pillow image of 1, 3 or 4 channels."""
    grey = pixels.shape[-1] == 1
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels))
    return image.convert(pil_mode(channels))


def classes_of(names: Sequence[str], root: str) -> tuple[list[str], np.ndarray, str]:
    """Class names (sorted), labels int64 [n], and the rule that gave them.

    Rule 1: the part before the first "_" of the file name, if every name has one (cat_001.png).
    Rule 2: the folder directly around the file (cat/001.png). It also wins where rule 1 would see
    but one class in several folders (cat/img_001.png, dog/img_001.png).

    Raises:
        ValueError: neither rule applies.
    """
    folders = [name.rpartition("/")[0].rpartition("/")[2] for name in names]
    prefixes = [name.rpartition("/")[2].partition("_") for name in names]
    by_folder = all(folders) and len(set(folders)) > 1
    by_prefix = all(underscore for _, underscore, _ in prefixes)
    if by_prefix and not (by_folder and len({prefix for prefix, _, _ in prefixes}) == 1):
        found, rule = [prefix for prefix, _, _ in prefixes], "file-name prefixes"
    elif by_folder:
        found, rule = folders, "sub-folder names"
    else:
        raise ValueError(
            f"{root}: no classes found, but class_cond is on. Put each class in a sub-folder "
            "(cat/001.png), or begin every file name with class and underscore (cat_001.png); "
            f"a name found here: {names[folders.index('')] if '' in folders else names[0]}"
        )
    classes = sorted(set(found))
    for name in classes:
        if not is_utf8(name):
            raise ValueError(
                f"{root}: the name of the class {name!r} is not UTF-8, so that no file could name "
                "it: rename it (convmv -f latin1 -t utf8 -r does it for whole folders)"
            )
    number = {name: k for k, name in enumerate(classes)}
    return classes, np.array([number[name] for name in found], dtype=np.int64), rule
