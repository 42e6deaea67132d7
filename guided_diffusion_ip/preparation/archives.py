"""The files of a published download: an unpacked folder, a .zip, a .tar or .tar.gz. Nothing is
unpacked to disk.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from typing import IO


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what a damaged archive raises into one line that names it.

    Raises:
        ValueError: so it is.
    """
    try:
        yield
    except (
        OSError,
        EOFError,
        RuntimeError,
        NotImplementedError,
        zlib.error,
        zipfile.BadZipFile,
        tarfile.TarError,
    ) as error:
        raise ValueError(f"{name} cannot be read: {error} (download it again)") from error


class Archive:
    """The files called `wanted` (base names, in whatever folder), in the order in which they are
    stored.

    Raises:
        ValueError: `path` is no such thing, or damaged.
    """

    def __init__(self, path: str, wanted: Collection[str]) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | tarfile.TarFile | None = None
        self._open = contextlib.ExitStack()
        with reading(path):
            if os.path.isdir(path):
                found = [
                    os.path.join(folder, name)
                    for folder, _, names in os.walk(path)
                    for name in sorted(names)
                ]
            elif zipfile.is_zipfile(path):
                self._archive = self._open.enter_context(zipfile.ZipFile(path))
                found = self._archive.namelist()
            else:
                self._archive = self._open.enter_context(tarfile.open(path))
                found = [member.name for member in self._archive if member.isreg()]
        # Stored order: going back in a compressed tar means to decompress it again from its
        # beginning.
        self._members = {
            os.path.basename(name): name for name in found if os.path.basename(name) in wanted
        }
        self.names = list(self._members)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """One of `names`, for reading in a `with` block; what fails inside because of damage names
        the archive.
        """
        member = self._members[name]
        with contextlib.ExitStack() as stack:
            stack.enter_context(reading(f"{self.path}: {name}"))
            if isinstance(self._archive, zipfile.ZipFile):
                yield stack.enter_context(self._archive.open(member))
            elif self._archive is not None:
                yield stack.enter_context(self._archive.extractfile(member))
            else:
                yield stack.enter_context(open(member, "rb"))

    def close(self) -> None:
        """Close the archive."""
        self._open.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
