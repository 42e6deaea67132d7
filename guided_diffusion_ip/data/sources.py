"""Where training images come from: a folder, a zip, an npz, a remote folder; and their classes.

A source has `names` (one per image, sorted), `labels` (int64 [n] or None), `classes` (their names
or None), `text` (one line for the log), `preprocessing` (how its images were made, maybe ""),
`shape` ((H, W, C) of all images, if that is known without reading them) and `image(i, channels)`.
It may be sent to worker
processes: open files stay behind and are opened again there.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from . import preprocessing
from .image_io import NpzReader, decode_image, pil_mode

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "bmp", "webp", "tif", "tiff")
CLASSES = "classes"  # array of an npz: the names of its labels
_REMOTE = ("gs://", "az://")
_ALLOWED = (
    f"a folder of images ({' '.join(EXTENSIONS)}; sub-folders are searched), a .zip of "
    "images, or a .npz with arr_0 uint8 [N, H, W, C]"
)


def open_source(data_dir: str | os.PathLike, class_cond: bool) -> Source:
    """The source that `data_dir` names.

    Args:
        data_dir: a folder, .zip or .npz, or a remote folder gs:// or az:// (through blobfile).
        class_cond: whether classes are wanted; otherwise none are looked for.

    Raises:
        ValueError: nothing there, no images in it, an unknown kind of file, or no classes.
    """
    if not data_dir:
        raise ValueError(f"no data given: --data_dir must name {_ALLOWED}")
    path = os.fspath(data_dir)
    if path.startswith(_REMOTE):
        return RemoteSource(path, class_cond)
    source = _open_local(path, class_cond)
    source.preprocessing = preprocessing.recorded(path)
    return source


def _open_local(path: str, class_cond: bool) -> Source:
    if os.path.isdir(path):
        return FolderSource(path, class_cond)
    if not os.path.exists(path):
        raise ValueError(
            f"{path} does not exist (seen from {os.getcwd()}): --data_dir must name {_ALLOWED}"
        )
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".zip", ".npz"):
        raise ValueError(f"{path} is a file of another kind: --data_dir must name {_ALLOWED}")
    return ZipSource(path, class_cond) if kind == ".zip" else NpzSource(path, class_cond)


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
    number = {name: k for k, name in enumerate(classes)}
    return classes, np.array([number[name] for name in found], dtype=np.int64), rule


def read_image(path: str | os.PathLike, channels: int) -> Image.Image:
    """The image at a local or remote path, decoded to 1, 3 or 4 channels.

    Raises:
        ValueError: it cannot be read; names the path.
    """
    path = os.fspath(path)
    if not path.startswith(_REMOTE):
        return decode_image(path, channels, path)
    try:
        with _blobfile().BlobFile(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return decode_image(data, channels, path)


class Source:
    """What all sources share; see the module's first lines."""

    kind = "source"
    preprocessing = ""
    shape: tuple[int, int, int] | None = None

    def __init__(self, path: str, names: list[str], class_cond: bool) -> None:
        self.path = path
        self.names = sorted(names)
        if not self.names:
            raise ValueError(
                f"{path} holds no images{self._hint()}: --data_dir must name {_ALLOWED}"
            )
        self.classes: list[str] | None = None
        self.labels: np.ndarray | None = None
        self.text = f"{self.kind} {path}, {len(self.names)} images"
        if class_cond:
            self.classes, self.labels, rule = classes_of(self.names, path)
            self._tell_classes(rule)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int, channels: int) -> Image.Image:
        """Image number i, decoded to 1, 3 or 4 channels.

        Raises:
            ValueError: it cannot be read; names the file.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close open files; they are opened again when needed."""

    def _hint(self) -> str:
        return ""

    def _tell_classes(self, rule: str) -> None:
        shown = ", ".join(self.classes[:4]) + (", ..." if len(self.classes) > 4 else "")
        self.text += f", {len(self.classes)} classes from {rule} ({shown})"


class FolderSource(Source):
    """Images in a folder and its sub-folders."""

    kind = "folder"

    def __init__(self, path: str, class_cond: bool) -> None:
        names = []
        for folder, _, files in os.walk(path, followlinks=True, onerror=_cannot_list):
            inside = os.path.relpath(folder, path).replace(os.sep, "/")
            prefix = "" if inside == "." else f"{inside}/"
            names += [prefix + name for name in files if _is_image(prefix + name)]
        super().__init__(path, names, class_cond)

    def image(self, i: int, channels: int) -> Image.Image:
        return read_image(os.path.join(self.path, self.names[i]), channels)

    def _hint(self) -> str:
        packed = [n for n in sorted(os.listdir(self.path)) if n.lower().endswith((".npz", ".zip"))]
        return f" (did you mean {os.path.join(self.path, packed[0])}?)" if packed else ""


class RemoteSource(Source):
    """Images below gs://bucket/folder or az://account/container/folder."""

    kind = "remote folder"

    def __init__(self, path: str, class_cond: bool) -> None:
        root = path.rstrip("/") + "/"
        names = []
        for folder, _, files in _blobfile().walk(root):
            prefix = folder.rstrip("/") + "/"
            names += [prefix.removeprefix(root) + name for name in files]
        super().__init__(root, [name for name in names if _is_image(name)], class_cond)
        if preprocessing.FILE in names:
            self.preprocessing = preprocessing.recorded(root)

    def image(self, i: int, channels: int) -> Image.Image:
        return read_image(self.path + self.names[i], channels)


class ZipSource(Source):
    """Images in a zip file, read in place."""

    kind = "zip"

    def __init__(self, path: str, class_cond: bool) -> None:
        self._zip: zipfile.ZipFile | None = None
        self.path = path
        names = [name for name in self._open().namelist() if _is_image(name)]
        super().__init__(path, names, class_cond)

    def _open(self) -> zipfile.ZipFile:
        # A file descriptor shared by forked workers would share its position too: one per process.
        if self._zip is None or self._owner != os.getpid():
            try:
                self._zip, self._owner = zipfile.ZipFile(self.path), os.getpid()
            except (OSError, zipfile.BadZipFile) as error:
                raise ValueError(f"{self.path} cannot be read as a zip file: {error}") from error
        return self._zip

    def image(self, i: int, channels: int) -> Image.Image:
        name = f"{self.path}/{self.names[i]}"
        try:
            data = self._open().read(self.names[i])
        except (
            OSError,
            RuntimeError,
            NotImplementedError,
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
        ) as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        return decode_image(data, channels, name)

    def close(self) -> None:
        if self._zip is not None and self._owner == os.getpid():
            self._zip.close()
        self._zip = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None}


class NpzSource(Source):
    """arr_0 uint8 [N, H, W, C] of an npz, arr_1 int labels [N] and maybe `classes`, their names;
    mapped if stored uncompressed.
    """

    kind = "npz"

    def __init__(self, path: str, class_cond: bool) -> None:
        self.path = path
        self._pixels: np.ndarray | None = None
        self.classes = self.labels = None
        with NpzReader(path) as reader:
            n = self._check_pixels(reader)
            self.names = range(n)  # type: ignore[assignment]  # rows have no names
            self.text = f"npz {path}, {n} images"
            if class_cond:
                self.labels = self._read_labels(reader, n)
                self.classes = self._read_classes(reader, int(self.labels.max()) + 1)
                self._tell_classes("arr_1")
        _ = self.pixels  # a compressed file is unpacked here, once, before workers exist

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [N, H, W, C]: a memory map, or in memory if the file is compressed."""
        if self._pixels is None:
            with NpzReader(self.path) as reader:
                mapped = reader.mapped("arr_0")
                self._pixels = (
                    np.asarray(mapped)
                    if mapped is not None
                    else np.concatenate(list(reader.chunks("arr_0")))
                )
        return self._pixels

    def image(self, i: int, channels: int) -> Image.Image:
        row = self.pixels[i]
        image = Image.fromarray(np.ascontiguousarray(row[..., 0] if row.shape[-1] == 1 else row))
        return image.convert(pil_mode(channels))

    def close(self) -> None:
        self._pixels = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}

    def _check_pixels(self, reader: NpzReader) -> int:
        """The number of images."""
        wanted = "arr_0 uint8 [N, H, W, C] (and arr_1 with integer labels [N])"
        if "arr_0" not in reader.keys:
            raise ValueError(
                f"{self.path} has the arrays {reader.keys}, but needs {wanted}: "
                "save it again with numpy.savez(path, arr_0=images)"
            )
        shape, dtype = reader.shape("arr_0"), reader.dtype("arr_0")
        found = f"{self.path}: arr_0 is {dtype} {list(shape)}"
        if dtype != np.uint8:
            raise ValueError(f"{found}, but pixels must be uint8 0..255: {wanted}")
        if len(shape) == 3:
            raise ValueError(f"{found}, but needs a channel axis: save arr_0[..., None]")
        if len(shape) == 4 and shape[3] not in (1, 3, 4) and shape[1] in (1, 3, 4):
            raise ValueError(
                f"{found}, which looks like [N, C, H, W]: save arr_0.transpose(0, 2, 3, 1).copy()"
            )
        if len(shape) != 4 or shape[3] not in (1, 3, 4) or 0 in shape:
            raise ValueError(f"{found}, but must be {wanted} with N >= 1 and C of 1, 3 or 4")
        self.shape = shape[1:]
        return shape[0]

    def _read_labels(self, reader: NpzReader, n: int) -> np.ndarray:
        """int64 [n]."""
        if "arr_1" not in reader.keys:
            raise ValueError(
                f"{self.path} has no labels (its arrays: {reader.keys}), but "
                "class_cond is on: save them as arr_1, integers [N]"
            )
        shape, dtype = reader.shape("arr_1"), reader.dtype("arr_1")
        if shape != (n,) or dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: arr_1 is {dtype} {list(shape)}, but labels must be "
                f"integers [{n}], one per image"
            )
        labels = reader.rows("arr_1", 0, n).astype(np.int64)
        if labels.min() < 0:
            raise ValueError(
                f"{self.path}: arr_1 holds the label {labels.min()}: labels must be 0 or more"
            )
        return labels

    def _read_classes(self, reader: NpzReader, least: int) -> list[str]:
        """The names of the labels, or their numbers as text."""
        if CLASSES not in reader.keys:
            return [str(k) for k in range(least)]
        shape, dtype = reader.shape(CLASSES), reader.dtype(CLASSES)
        if dtype.kind != "U" or len(shape) != 1 or shape[0] < least:
            raise ValueError(
                f"{self.path}: {CLASSES} is {dtype} {list(shape)}, but must be texts [{least}] or "
                f"more, the names of the labels 0 to {least - 1}"
            )
        return reader.rows(CLASSES, 0, shape[0]).tolist()


def _blobfile():
    try:
        import blobfile  # only here: it is slow to import and most data are local
    except ImportError as error:
        raise ValueError(
            "remote data need the blobfile package: pip install blobfile, or copy the "
            "images to a local folder"
        ) from error
    return blobfile


def _is_image(name: str) -> bool:
    """By extension; names that begin with a dot are other programs' notes (macOS: ._001.png)."""
    return name.rpartition(".")[2].lower() in EXTENSIONS and not any(
        part.startswith(".") for part in name.split("/")
    )


def _cannot_list(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be listed: {error.strerror}") from error
