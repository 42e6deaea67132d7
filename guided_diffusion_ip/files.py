"""Paths that may be remote (gs://, az://): blobfile is imported only for those."""
from __future__ import annotations

import hashlib
import os
from typing import IO


def is_remote(path: str | os.PathLike) -> bool:
    """Is it gs://..., az://... rather than a path of this machine?"""
    return "://" in os.fspath(path)


def open_binary(path: str | os.PathLike) -> IO[bytes]:
    """The file, open for reading bytes."""
    if not is_remote(path):
        return open(path, "rb")
    import blobfile

    return blobfile.BlobFile(os.fspath(path), "rb")


def exists(path: str | os.PathLike) -> bool:
    """Is there a file or folder?"""
    if not is_remote(path):
        return os.path.exists(path)
    import blobfile

    return blobfile.exists(os.fspath(path))


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of the file's content."""
    digest = hashlib.sha256()
    with open_binary(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
