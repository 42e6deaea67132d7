"""Where images come from: a folder, a zip, an npz, a remote folder."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from typing import NoReturn

from PIL import Image

from ..files import DAMAGED_ZIP, remote
from . import preprocessing
from .image_io import decode_image
from .image_source import EXTENSIONS, Source, SourceError
from .npz_source import TRAINING, NpzSource, PixelRules

LARGEST_VARIABLE = "GUIDED_DIFFUSION_IP_LARGEST_IMAGE_FILE"
_LARGEST_MB = 256  # of a packed image
_REMOTE = ("gs://", "az://")


def open_source(place: str | os.PathLike, class_cond: bool, rules: PixelRules = TRAINING) -> Source:
    """The images at `place`.

    Args:
        place: a folder, .zip or .npz, or a remote folder gs:// or az:// (through blobfile).
        class_cond: whether classes are wanted; otherwise none are looked for.
        rules: what is accepted as the pixels of an npz.

    Raises:
        SourceError: nothing there, no images in it, or an unknown kind of file.
        ValueError: it cannot be read, or has no classes.
    """
    path = os.fspath(place)
    if not path:
        raise SourceError("no data given")
    if path.startswith(_REMOTE):
        return RemoteSource(path, class_cond)
    source = _open_local(path, class_cond, rules)
    source.preprocessing = preprocessing.recorded(path)
    return source


def _open_local(path: str, class_cond: bool, rules: PixelRules) -> Source:
    if os.path.isdir(path):
        return FolderSource(path, class_cond)
    if not os.path.exists(path):
        raise SourceError(f"{path} does not exist (seen from {os.getcwd()})")
    kind = os.path.splitext(path)[1].lower()
    if kind == ".npy":
        raise ValueError(
            f"{path} is a .npy file: numpy.savez({path[:-4]!r}, arr_0=numpy.load({path!r})) makes "
            "an npz of it"
        )
    if kind not in (".zip", ".npz"):
        raise SourceError(f"{path} is a file of another kind")
    return ZipSource(path, class_cond) if kind == ".zip" else NpzSource(path, class_cond, rules)


def read_image(path: str | os.PathLike, channels: int) -> Image.Image:
    """The image at a local or remote path, decoded to 1, 3 or 4 channels.

    Raises:
        ValueError: it cannot be read; names the path.
    """
    path = os.fspath(path)
    try:
        if not path.startswith(_REMOTE):
            # A FIFO would be waited for, a device read without end.
            if os.path.exists(path) and not os.path.isfile(path):
                raise ValueError(
                    f"{path} is no regular file (a pipe, a socket, a device or a folder): remove it"
                )
            return decode_image(path, channels, path)
        with remote(path) as blobfile, blobfile.BlobFile(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return decode_image(data, channels, path)


class FolderSource(Source):
    """Images in a folder and its sub-folders."""

    kind = "folder"

    def __init__(self, path: str, class_cond: bool) -> None:
        names = []
        for folder, _, files in _walk(path):
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
        with remote(path) as blobfile:
            for folder, _, files in blobfile.walk(root):
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
        self._owner = 0  # the process that has opened it
        self.path = path
        names = [name for name in self._open().namelist() if _is_image(name)]
        super().__init__(path, names, class_cond)

    def _open(self) -> zipfile.ZipFile:
        # A file descriptor shared by forked workers would share its position too: one per process.
        if self._zip is None or self._owner != os.getpid():
            try:
                self._zip, self._owner = zipfile.ZipFile(self.path), os.getpid()
            except DAMAGED_ZIP as error:
                raise ValueError(f"{self.path} cannot be read as a zip file: {error}") from error
        return self._zip

    def image(self, i: int, channels: int) -> Image.Image:
        name = f"{self.path}/{self.names[i]}"
        try:
            member = self._open().getinfo(self.names[i])
            if member.file_size > _largest_mb() << 20:
                raise ValueError(
                    f"{name} would take {member.file_size:,} bytes; an image may have "
                    f"{_largest_mb()} MB ({LARGEST_VARIABLE} raises that)"
                )
            data = self._open().read(member)
        except DAMAGED_ZIP as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        return decode_image(data, channels, name)

    def close(self) -> None:
        if self._zip is not None and self._owner == os.getpid():
            self._zip.close()
        self._zip = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None}


def _largest_mb() -> int:
    given = os.environ.get(LARGEST_VARIABLE) or str(_LARGEST_MB)
    if not given.isdecimal():
        raise ValueError(f"{LARGEST_VARIABLE}={given}: expected a number of MB, such as 1024")
    return int(given)


def _is_image(name: str) -> bool:
    """By extension; names that begin with a dot are other programs' notes (macOS: ._001.png)."""
    return name.rpartition(".")[2].lower() in EXTENSIONS and not any(
        part.startswith(".") for part in name.split("/")
    )


def _walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk that follows links.

    Raises:
        ValueError: a link leads to a folder that it lies in, or a folder cannot be listed.
    """
    above: dict[str, tuple[tuple[int, int], ...]] = {}  # of each folder, it and those around it
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_cannot_list):
        around = above.pop(folder, None) or (_identity(folder),)
        for name in folders:
            inside = os.path.join(folder, name)
            identity = _identity(inside)
            if identity in around:
                raise ValueError(
                    f"{inside} is a link to a folder that it lies in, which has no end: remove it"
                )
            above[inside] = (*around, identity)
        yield folder, folders, files


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        _cannot_list(error)
    return found.st_dev, found.st_ino


def _cannot_list(error: OSError) -> NoReturn:
    raise ValueError(f"{error.filename} cannot be listed: {error.strerror}") from error
