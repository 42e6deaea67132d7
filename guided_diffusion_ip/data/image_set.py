"""A finite set of images by number: for likelihoods, low-resolution inputs, and pictures during
training.

Nothing is random, and only what is asked for is read: memory does not grow with the set.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .batches import render
from .image_io import to_model_range
from .preprocessing import of_loader
from .sources import NpzSource, Source, open_source

_CHUNK = 64  # images read at a time where a whole set is gone through
_SCALE_THEM = (
    "add --resize_base True to have them scaled and cropped as training images are, or give others"
)


class ImageSet:
    """The images of a source in its order: that of the sorted names, or of an npz's rows.

    Args:
        size: (height, width) of the images handed out; others are scaled and cropped as for
            training.
        channels: of the images handed out; others are converted as for training.

    `preprocessing` says how the images were made, up to what is handed out (see preprocessing.py).
    """

    def __init__(self, source: Source, size: tuple[int, int], channels: int) -> None:
        self.source = source
        self.size = size
        self.channels = channels
        self.labels = source.labels
        self.classes = source.classes
        self.text = source.text
        self.preprocessing = of_loader(
            source.preprocessing, size, channels, stored_size=source.shape
        )

    def __len__(self) -> int:
        return len(self.source)

    def pixels(self, index: Sequence[int]) -> np.ndarray:
        """The images numbered `index`, uint8 [n, H, W, C].

        Raises:
            ValueError: an image cannot be read; names it.
        """
        return np.stack([self._one(i) for i in index])

    def images(self, index: Sequence[int]) -> Tensor:
        """The images numbered `index`, float32 [n, C, H, W] in [-1, 1]."""
        return to_model_range(self.pixels(index))

    def cond(self, index: Sequence[int]) -> dict[str, Tensor]:
        """{"y": int64 [n]}, or {} without classes."""
        return {} if self.labels is None else {"y": torch.from_numpy(self.labels[list(index)])}

    def digest(self, count: int) -> str:
        """sha256 of the first `count` images and their labels, whatever kind of file holds them.
        Reads them all.

        Raises:
            ValueError: an image cannot be read; names it.
        """
        sha = hashlib.sha256(repr((count, self.size, self.channels)).encode())
        for index in _chunks(count):
            sha.update(self.pixels(index).tobytes())
        if self.labels is not None:
            sha.update(self.labels[:count].astype("<i8").tobytes())
        return sha.hexdigest()

    def _one(self, i: int) -> np.ndarray:
        return render(self.source.image(int(i), self.channels), self.size)


class ExactImageSet(ImageSet):
    """An ImageSet that refuses images of another size, and npz rows with other channels, instead of
    changing them.

    Raises:
        ValueError: so it is; from the constructor for an npz, from reading for a file.
    """

    def __init__(self, source: Source, size: tuple[int, int], channels: int) -> None:
        super().__init__(source, size, channels)
        if isinstance(source, NpzSource):
            found = source.pixels.shape[1:]
            if found != (*size, channels):
                raise ValueError(
                    f"{source.path} holds images of {found[0]} x {found[1]} with {found[2]} "
                    f"channels, but the model takes {size[0]} x {size[1]} with {channels}: "
                    f"{_SCALE_THEM}"
                )

    def _one(self, i: int) -> np.ndarray:
        image = self.source.image(int(i), self.channels)
        if (image.height, image.width) != self.size:
            raise ValueError(
                f"{self.source.path}: {self.source.names[i]} is {image.height} x {image.width}, "
                f"but the model takes {self.size[0]} x {self.size[1]}: {_SCALE_THEM}"
            )
        return render(image, self.size)


def open_image_set(
    path: str | os.PathLike,
    size: tuple[int, int],
    channels: int,
    *,
    num_classes: int | None = None,
    exact: bool = False,
    flag: str = "data_dir",
) -> ImageSet:
    """The images at `path`: a folder, a zip or an npz; see sources.

    Args:
        num_classes: of a class-conditional model; None: no labels are looked for.
        exact: refuse images that are not of this size already.
        flag: what `path` was given by, for messages.

    Raises:
        ValueError: nothing usable there, no labels though num_classes is given, or one that is too
            large.
    """
    try:
        source = open_source(path, class_cond=num_classes is not None)
    except ValueError as error:
        raise ValueError(str(error).replace("--data_dir", f"--{flag}")) from None
    if num_classes is not None and len(source.classes) > num_classes:
        raise ValueError(
            f"{source.text}: {len(source.classes)} classes, but the model knows {num_classes}"
        )
    return (ExactImageSet if exact else ImageSet)(source, size, channels)


def _chunks(count: int) -> Iterator[range]:
    return (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
