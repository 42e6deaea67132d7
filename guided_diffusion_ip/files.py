"""Files that appear whole or not at all, and paths that may be remote (gs://, az://; blobfile is
imported only for those).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

# Where the header of a safetensors file has the text of its config.yaml.
CONFIG_IN_HEADER = "config"
try:
    from lzma import LZMAError
except ImportError:  # a Python that was built without it, and cannot read such files at all
    LZMAError = RuntimeError  # type: ignore[assignment, misc]

# What zipfile raises where a file is damaged: names that are not the UTF-8 they say they are, sizes
# beyond the file, methods and versions that do not exist, encryption, each in its own way.
DAMAGED_ZIP = (
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    UnicodeDecodeError,
    struct.error,
    zlib.error,
    LZMAError,
    zipfile.BadZipFile,
)
_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


def is_remote(path: str | os.PathLike) -> bool:
    """Is it gs://..., az://... rather than a path of this machine?"""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def remote(path: str | os.PathLike) -> Iterator[Any]:
    """The module blobfile, for what is done with a remote path in the block.

    Raises:
        ValueError: it is not installed, or it cannot do it.
    """
    try:
        import blobfile  # only here: it is slow to import and most data are local
    except ImportError as error:
        raise ValueError(
            "remote data need the blobfile package: pip install blobfile, or copy the "
            "images to a local folder"
        ) from error
    try:
        yield blobfile
    except blobfile.Error as error:
        raise ValueError(f"{path} cannot be read or written: {error}") from error


def open_binary(path: str | os.PathLike) -> IO[bytes]:
    """The file, open for reading bytes."""
    if not is_remote(path):
        return open(path, "rb")
    with remote(path) as blobfile:
        return blobfile.BlobFile(os.fspath(path), "rb")


def exists(path: str | os.PathLike) -> bool:
    """Is there a file or folder?"""
    if not is_remote(path):
        return os.path.exists(path)
    with remote(path) as blobfile:
        return blobfile.exists(os.fspath(path))


def is_utf8(name: str) -> bool:
    """Can a file of text hold this name? Names of files may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def folder_beside(path: str | os.PathLike) -> str:
    """The folder of a local file; runs/ for a remote one, since results are written to this
    machine.
    """
    return "runs" if is_remote(path) else os.path.dirname(path) or "."


def results_folder(given: str, default: str) -> str:
    """Where results go: `given`, else the environment's OPENAI_LOGDIR, else `default`.

    Raises:
        ValueError: a remote folder; logs and shards grow line by line, which object stores cannot
            do.
    """
    folder = given or os.environ.get("OPENAI_LOGDIR") or default
    if is_remote(folder):
        raise ValueError(
            f"results cannot go to {folder}: give --out_dir a folder of this machine, and copy it "
            "afterwards (checkpoints and images may be read from remote folders)"
        )
    return folder


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of the file's content."""
    digest = hashlib.sha256()
    with open_binary(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_tree(path: str | os.PathLike) -> str:
    """Hex digest of a file's content, or of the names and contents of all files in a folder and
    below.
    """
    if not os.path.isdir(path):
        return sha256(path)
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(os.fspath(path)):
        folders.sort()
        for name in sorted(names):
            full = os.path.join(folder, name)
            digest.update(f"{os.path.relpath(full, path)}\0{sha256(full)}\n".encode())
    return digest.hexdigest()


def safetensors_config(path: str | os.PathLike) -> str:
    """The text of the config in the header of a safetensors file; "" if it has none. Needs no
    library.

    Raises:
        ValueError: no such file, or one that does not begin as a safetensors file does.
    """
    try:
        with open_binary(path) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if 2 <= size <= _LARGEST_HEADER else None
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"checkpoint {path}: no such file") from None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(
            f"{path}: damaged, or no safetensors file (it has no header); copy or download it again"
        )
    about = header.get("__metadata__")
    text = about.get(CONFIG_IN_HEADER, "") if isinstance(about, dict) else ""
    return text if isinstance(text, str) else ""


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, flush: bool = True) -> Iterator[IO[bytes]]:
    """A file open for writing that becomes `path` when the block ends well, and else vanishes.

    With `flush` its contents are on the disk before the name is, so that it survives a power cut.
    """
    if is_remote(path):  # an object store shows an object when its upload is complete
        with remote(path) as blobfile, blobfile.BlobFile(os.fspath(path), "wb") as file:
            yield file
        return
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    try:
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 would hide the file from colleagues
        with os.fdopen(handle, "wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong first is what counts
            os.remove(temporary)
        raise


def remove_temporaries(folder: str, names: str = ".*") -> None:
    """Remove what killed processes have left of files that `atomic_file` was to write in a local
    folder. For the folder's owner alone.

    Args:
        names: regular expression of the files' names.
    """
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if re.fullmatch(rf"\.({names})\.[a-z0-9_]{{8}}\.tmp", name):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
