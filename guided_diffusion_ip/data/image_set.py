"""A finite set of images by number, as pixels of one size: for evaluation, likelihoods,
low-resolution inputs, measures, packing, and pictures during training.

    images = open_image_set("faces", (64, 64), 3)
    images.pixels([0, 7])        # uint8 [2, 64, 64, 3]
    images.images([0, 7])        # float32 [2, 3, 64, 64] in [-1, 1]

Nothing is random, and only what is asked for is read: memory does not grow with the set.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..sizes import size_text
from .image_io import render, to_model_range
from .image_source import ArraySource, Source, SubsetSource
from .npz_source import EVALUATED, NpzSource
from .preprocessing import of_loader
from .sources import open_source

_CHUNK = 64  # images read at a time where a whole set is gone through
_DECODERS = 8  # threads; Pillow decodes outside the interpreter lock
_LOOKED_AT = 16  # a coloured set may begin with one grey picture, hardly with so many
Numbers = Sequence[int] | np.ndarray  # of images
SCALE = "give an image size to have all scaled and cropped"


@runtime_checkable
class Images(Protocol):
    """What an evaluation needs of a set: `n` images of `shape` (H, W, C) at `path`, which need not
    exist; `preprocessing` says how they were made ("" if unknown).
    """

    @property
    def n(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def path(self) -> str: ...

    @property
    def preprocessing(self) -> str: ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop-1, uint8 [stop - start, H, W, C]."""
        ...

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """Images start .. stop-1 in batches uint8 [<= size, H, W, C]."""
        ...


class ImageSet:
    """The images of a source in its order: that of the sorted names, or of an npz's rows.

    Args:
        size: (height, width) of the images handed out; others are scaled and cropped as for
            training. None: all must have the first one's size.
        channels: of the images handed out; others are converted as for training. None: as they are
            stored; of files 1 if the first ones are grey, else 3.
        exact: refuse images of another size, and stored arrays with other channels, instead of
            changing them.
        remedy: the end of the message about an image of another size.
        grey_remedy: if given, coloured images are refused where `channels` is 1, with this remedy.

    `preprocessing` says how the images were made, up to what is handed out (see preprocessing.py).

    Raises:
        ValueError: an image of another size or with colours that are not wanted; from the
            constructor for arrays, from reading for files.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int] | None = None,
        channels: int | None = None,
        *,
        exact: bool = False,
        remedy: str = SCALE,
        grey_remedy: str = "",
    ) -> None:
        self.source = source
        self.channels = channels if channels is not None else _channels_of(source)
        self.preprocessing = source.preprocessing
        self._like_first = size is None
        if size is None:
            size = _size_of_first(source)
        else:
            self.preprocessing = of_loader(
                source.preprocessing, size, self.channels, stored_size=source.shape
            )
        self.size = size
        self._exact = exact or self._like_first
        self._remedy = remedy
        self._grey_remedy = grey_remedy if self.channels == 1 else ""
        if exact and source.shape is not None and source.shape != self.shape:
            height, width, stored = source.shape
            raise ValueError(
                f"{source.path} holds images of {height} x {width} with {stored} channels, but "
                f"the model takes {size[0]} x {size[1]} with {channels}: {remedy}"
            )

    def __len__(self) -> int:
        return len(self.source)

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.source)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images handed out."""
        return (*self.size, self.channels)

    @property
    def path(self) -> str:
        """Where the images are; "(memory)" for those in memory."""
        return self.source.path

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [n], or None."""
        return self.source.labels

    @property
    def classes(self) -> list[str] | None:
        """Names of the labels 0, 1, ..., or None."""
        return self.source.classes

    @property
    def text(self) -> str:
        """Where the images come from, in one line."""
        return self.source.text

    def pixels(self, index: Numbers) -> np.ndarray:
        """The images numbered `index`, uint8 [n, H, W, C].

        Raises:
            ValueError: an image cannot be read; names it.
        """
        return np.stack([self._one(int(i)) for i in index])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop-1, uint8 [stop - start, H, W, C], read in one piece or by several
        threads.
        """
        if self.source.shape is None:
            with ThreadPoolExecutor(_DECODERS) as pool:
                return np.stack(list(pool.map(self._one, range(start, stop))))
        stored = self.source.rows(start, stop)
        if self.source.shape == self.shape:
            return stored
        made = ImageSet(ArraySource(stored), self.size, self.channels)
        return made.pixels(range(len(stored))) if len(stored) else np.empty((0, *self.shape), "u1")

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """Images start .. stop-1 in batches uint8 [<= size, H, W, C]; the next one is read while
        the last is worked on.
        """
        with ThreadPoolExecutor(1) as reader:
            waiting = None
            for first in range(start, stop, size):
                coming = reader.submit(self.rows, first, min(first + size, stop))
                if waiting is not None:
                    yield waiting.result()
                waiting = coming
            if waiting is not None:
                yield waiting.result()

    def images(self, index: Numbers) -> Tensor:
        """The images numbered `index`, float32 [n, C, H, W] in [-1, 1]."""
        return to_model_range(self.pixels(index))

    def cond(self, index: Numbers) -> dict[str, Tensor]:
        """{"y": int64 [n]}, or {} without classes."""
        return {} if self.labels is None else {"y": torch.from_numpy(self.labels[list(index)])}

    def __call__(self, index: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        """`images` and `cond` of the images numbered `index`."""
        return self.images(index), self.cond(index)

    def digest(self, count: int | None = None) -> str:
        """sha256 of the first `count` images (None: all) and their labels, whatever kind of file
        holds them. Reads them all.

        Raises:
            ValueError: an image cannot be read; names it.
        """
        count = len(self) if count is None else count
        sha = hashlib.sha256(repr((count, self.size, self.channels)).encode())
        for start in range(0, count, _CHUNK):
            sha.update(self.pixels(range(start, min(start + _CHUNK, count))).tobytes())
        if self.labels is not None:
            sha.update(self.labels[:count].astype("<i8").tobytes())
        return sha.hexdigest()

    @property
    def of_all(self) -> int:
        """Of a subset: how many images the whole set has; else the number of images."""
        return getattr(self.source, "of_all", len(self))

    def subset(self, index: Numbers) -> ImageSet:
        """The images numbered `index`, as a set of their own, numbered from 0."""
        part = copy.copy(self)
        part.source = SubsetSource(self.source, index)
        return part

    def _one(self, i: int) -> np.ndarray:
        image = self.source.image(i, 3 if self._grey_remedy else self.channels)
        if self._exact and (image.height, image.width) != self.size:
            first = f"{self.source.names[0]} is" if self._like_first else "the model takes"
            raise ValueError(
                f"{self._name(i)} is {image.height} x {image.width}, but {first} {self.size[0]} x "
                f"{self.size[1]}: {self._remedy}"
            )
        if self._grey_remedy:
            if _has_colours(image):
                raise ValueError(
                    f"{self._name(i)} has colours, the first images have none: {self._grey_remedy}"
                )
            image = image.convert("L")
        return render(image, self.size)

    def _name(self, i: int) -> str:
        return f"{self.source.path}: {self.source.names[i]}"


def open_image_set(
    path: str | os.PathLike,
    size: tuple[int, int],
    channels: int,
    *,
    num_classes: int | None = None,
    exact: bool = False,
    what: str = "data_dir",
    remedy: str = SCALE,
) -> ImageSet:
    """The images at `path`: a folder, a zip or an npz; see sources.

    Args:
        num_classes: of a class-conditional model; None: no labels are looked for.
        exact, remedy: see ImageSet.
        what: what `path` was given by, for messages.

    Raises:
        ValueError: nothing usable there, no labels though num_classes is given, or one that is too
            large.
    """
    try:
        source = open_source(path, class_cond=num_classes is not None)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    found = len(source.classes or ())
    if num_classes is not None and found > num_classes:
        raise ValueError(f"{source.text}: {found} classes, but the model knows {num_classes}")
    return ImageSet(source, size, channels, exact=exact, remedy=remedy)


def open_images(
    path: str | os.PathLike, what: str, size: tuple[int, int] | None = None, *, remedy: str = SCALE
) -> ImageSet:
    """The images at `path`, as an evaluation takes them.

    Args:
        what: "reference" or "samples", for messages.
        size: (H, W) to which the images are scaled and cropped as for training; None: as they are.
        remedy: see ImageSet.

    Raises:
        ValueError: nothing usable there; says what was found and what is expected.
    """
    try:
        source = open_source(path, class_cond=False, rules=EVALUATED)
        if size is not None and isinstance(source, NpzSource):
            size = _new_size(source, size)
        return ImageSet(source, size, remedy=remedy)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def in_memory(pixels: np.ndarray) -> ImageSet:
    """uint8 [N, H, W, C] as a set."""
    return ImageSet(ArraySource(pixels))


def _new_size(source: NpzSource, size: tuple[int, int]) -> tuple[int, int] | None:
    """The size to which the images are to be scaled; None if they have it.

    Raises:
        ValueError: the file holds statistics too, which cannot be scaled.
    """
    height, width, _ = source.shape
    if size == (height, width):
        return None
    if "mu" in source.keys:
        raise ValueError(
            f"{source.path} holds statistics (mu) of {height} x {width} images, which cannot be "
            f"scaled to {size[0]} x {size[1]}: make it again from its images with "
            "evaluations/make_reference.py --image_size, or give --image_size "
            f"{size_text((height, width))}"
        )
    return size


def _size_of_first(source: Source) -> tuple[int, int]:
    if source.shape is not None:
        return source.shape[:2]
    first = source.image(0, 3)
    return first.height, first.width


def _channels_of(source: Source) -> int:
    if source.shape is not None:
        return source.shape[2]
    some = range(min(_LOOKED_AT, len(source)))
    return 3 if any(_has_colours(source.image(i, 3)) for i in some) else 1


def _has_colours(image: Image.Image) -> bool:
    return bool(np.ptp(np.asarray(image), axis=2).any())
