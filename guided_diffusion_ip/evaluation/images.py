"""Sets of images to be evaluated: an npz with arr_0, a folder or a zip of images, as uint8 batches
in the order of the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from ..data.batches import render
from ..data.npz_io import NpzReader
from ..data.preprocessing import of_loader, recorded
from ..data.sources import Source, open_source

_DECODERS = 8  # threads; Pillow decodes outside the interpreter lock


class ImageFile:
    """The images of one set.

    `n` images of `shape` (H, W, C); `preprocessing` says how they were made, '' if the set does
    not.
    """

    path: str
    n: int
    shape: tuple[int, int, int]
    preprocessing: str
    kind: str

    def rows(self, start: int, stop: int) -> np.ndarray:
        """uint8 [stop - start, H, W, C].

        Raises:
            ValueError: what is there cannot be read, or is no image of this set; names it.
        """
        raise NotImplementedError

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """Consecutive batches uint8 [<= size, H, W, C]; the next one is read while the last is
        worked on.
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


def open_images(
    path: str | os.PathLike, what: str, image_size: tuple[int, int] | None = None
) -> ImageFile:
    """The images at `path`.

    Args:
        what: "reference" or "samples", for messages.
        image_size: (H, W) to which the images are scaled and cropped as for training; None: as they
            are.

    Raises:
        ValueError: nothing usable there; says what was found and what is expected.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise ValueError(
            f"{what}: {path} does not exist (seen from {os.getcwd()}); expected an npz with arr_0 "
            "uint8 [N, H, W, 3], a folder of images, or a zip of images"
        )
    if os.path.isdir(path) or path.lower().endswith(".zip"):
        return _Pictures(path, what, image_size)
    if path.lower().endswith(".npy"):
        raise ValueError(
            f"{what}: {path} is a .npy file; expected .npz: numpy.savez({path[:-4]!r}, "
            "arr_0=numpy.load(...))"
        )
    NpzReader(path).close()  # a file of another kind is an error here, with its name
    return _Npz(path, what, image_size)


def check_sizes(reference: ImageFile, samples: ImageFile, fixed: bool = False) -> None:
    """Are the images of both sides of one height and width?

    Inception would take them as they are, and measure how they were scaled.

    Args:
        fixed: the reference cannot be scaled, because it has statistics too.

    Raises:
        ValueError: they are not; names the flag that scales.
    """
    if reference.shape[:2] != samples.shape[:2]:
        # An npz mostly has the size of the model already.
        wanted = reference if fixed or reference.kind == "npz" != samples.kind else samples
        (h, w, _), (height, width, _) = reference.shape, samples.shape
        raise ValueError(
            f"reference images are {h} x {w}, samples {height} x {width} (height x width), "
            "and would differ by their scaling alone: give --image_size "
            f"{size_text(wanted.shape)} to scale and crop as training does"
        )


def size_text(shape: tuple[int, ...]) -> str:
    """(64, 64, 3) as --image_size takes it: 64, or HEIGHTxWIDTH."""
    return str(shape[0]) if shape[0] == shape[1] else f"{shape[0]}x{shape[1]}"


class _Npz(ImageFile):
    kind = "npz"

    def __init__(self, path: str, what: str, image_size: tuple[int, int] | None = None) -> None:
        self.path, self.preprocessing = path, recorded(path)
        self._reader = NpzReader(path)
        self._name = f"{what}: {path}"
        key = self._key()
        shape, dtype = self._reader.shape(key), self._reader.dtype(key)
        found = f"{self._name}: {key} is {dtype} {list(shape)}"
        wanted = "expected uint8 [N, H, W, 3], or 1 channel, values 0 to 255"
        if len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
            raise ValueError(
                f"{found}, which looks like [N, C, H, W]; {wanted}: save x.transpose(0, 2, 3, 1)"
            )
        if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:]:
            raise ValueError(f"{found}; {wanted}")
        if shape[0] == 0:
            raise ValueError(f"{found}: there are no images; {wanted}")
        self.n, self.shape = shape[0], shape[1:]
        self._scaled = image_size is not None and image_size != shape[1:3]
        if self._scaled:
            if "mu" in self._reader.keys:
                raise ValueError(
                    f"{self._name} holds statistics (mu) of {shape[1]} x {shape[2]} images, "
                    f"which cannot be scaled to {image_size[0]} x {image_size[1]}: make it "
                    "again from its images with evaluations/make_reference.py --image_size, "
                    f"or give --image_size {size_text(shape[1:])}"
                )
            self.shape = (*image_size, shape[3])
            self.preprocessing = of_loader(
                self.preprocessing, image_size, shape[3], stored_size=shape[1:]
            )
        self._floats = dtype.kind == "f"
        if dtype != np.uint8 and not self._floats:
            raise ValueError(f"{found}; {wanted}: save x.astype(numpy.uint8)")
        self._check_range(found, wanted)

    def _key(self) -> str:
        keys = self._reader.keys
        if "arr_0" in keys:
            return "arr_0"
        images = [key for key in keys if len(self._reader.shape(key)) == 4]
        hint = f": {images[0]} may be what is meant; save it as arr_0" if len(images) == 1 else ""
        raise ValueError(
            f"{self._name} has the arrays {keys}, but images are expected as arr_0, uint8 [N, H, "
            f"W, 3]{hint}"
        )

    def _check_range(self, found: str, wanted: str) -> None:
        """Floating-point pixels are taken if they are whole numbers from 0 to 255, as the published
        evaluator takes them.
        """
        if not self._floats:
            return
        some = self._reader.rows("arr_0", 0, min(self.n, 64))
        if not np.isfinite(some).all():
            raise ValueError(f"{found} with values that are not finite; {wanted}")
        low, high = float(some.min()), float(some.max())
        if low < 0 and high <= 1.5:
            raise ValueError(
                f"{found} from {low:g} to {high:g}, which looks like [-1, 1]; {wanted}: "
                "save ((x + 1) * 127.5).clip(0, 255).astype(numpy.uint8)"
            )
        if high <= 1:
            raise ValueError(
                f"{found} from {low:g} to {high:g}, which looks like [0, 1]; {wanted}: "
                "save (x * 255).round().astype(numpy.uint8)"
            )

    def rows(self, start: int, stop: int) -> np.ndarray:
        pixels = self._reader.rows("arr_0", start, stop)
        if self._floats:
            whole = pixels.round()
            if not ((whole == pixels) & (whole >= 0) & (whole <= 255)).all():
                raise ValueError(
                    f"{self._name}: arr_0 is {pixels.dtype} with values in rows {start} to "
                    f"{stop - 1} that are not whole numbers from 0 to 255; expected uint8"
                )
            pixels = whole.astype(np.uint8)
        if not self._scaled:
            return pixels
        scaled = np.empty((len(pixels), *self.shape), np.uint8)
        for k, row in enumerate(pixels):
            image = Image.fromarray(row[..., 0] if row.shape[2] == 1 else row)
            scaled[k] = render(image, self.shape[:2])
        return scaled


class _Pictures(ImageFile):
    """A folder or zip: all images of one size, that of the first, unless image_size says to which
    they are brought.
    """

    def __init__(self, path: str, what: str, image_size: tuple[int, int] | None) -> None:
        try:
            self._source: Source = open_source(path, class_cond=False)
        except ValueError as error:
            raise ValueError(f"{what}: " + str(error).replace("--data_dir", "it")) from None
        self.path, self._name, self.kind = path, what, self._source.kind
        self.n = len(self._source)
        first = self._source.image(0, 3)
        # Grey pictures stay grey, so that they compare with a grey model's samples in the space of
        # pixels.
        channels = 1 if np.ptp(np.asarray(first), axis=2).max() == 0 and self._is_grey() else 3
        self._scaled = bool(image_size)
        size = image_size or (first.height, first.width)
        self.shape = (*size, channels)
        record = recorded(path)
        self.preprocessing = of_loader(record, size, channels) if self._scaled else record
        self._pool = ThreadPoolExecutor(_DECODERS)

    def _is_grey(self) -> bool:
        """Are the first images grey throughout? A colour set may begin with one grey picture,
        hardly with 16.
        """
        return all(
            np.ptp(np.asarray(self._source.image(i, 3)), axis=2).max() == 0
            for i in range(min(16, self.n))
        )

    def rows(self, start: int, stop: int) -> np.ndarray:
        return np.stack(list(self._pool.map(self._one, range(start, stop))))

    def _one(self, i: int) -> np.ndarray:
        image = self._source.image(i, self.shape[2])
        height, width = self.shape[:2]
        if not self._scaled and (image.height, image.width) != (height, width):
            raise ValueError(
                f"{self._name}: {self.path}: {self._source.names[i]} is {image.height} x "
                f"{image.width}, but {self._source.names[0]} is {height} x {width}: give "
                "--image_size to scale and crop all"
            )
        return render(image, (height, width))


class ArrayImages(ImageFile):
    """Images in memory, uint8 [N, H, W, C]."""

    kind, path, preprocessing = "array", "(memory)", ""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self.n, self.shape = len(pixels), pixels.shape[1:]

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._pixels[start:stop]


class Subset(ImageFile):
    """Some images of another set, in the order of `index` [n]."""

    def __init__(self, images: ImageFile, index: np.ndarray) -> None:
        self._images, self._index = images, index
        self.path, self.kind, self.preprocessing = images.path, images.kind, images.preprocessing
        self.n, self.shape = len(index), images.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        part = self._index[start:stop]
        if len(part) and part[-1] - part[0] + 1 == len(part):
            return self._images.rows(int(part[0]), int(part[-1]) + 1)
        return np.concatenate([self._images.rows(int(i), int(i) + 1) for i in part])
