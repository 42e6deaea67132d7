"""Data sets as their publishers hand them out: where to download them, what their files are called,
how many images they hold; and the archives that the files come in, which are never unpacked to
disk.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import IO

from .. import files
from ..data.image_source import Source, SourceError


@dataclass(frozen=True)
class PublishedSet:
    """A set of `count` images: the download `page`, and the names of its `files`, any one of which
    will do.
    """

    name: str
    page: str
    files: tuple[str, ...]
    count: int

    def parser(self, description: str) -> argparse.ArgumentParser:
        """A command line with what all scripts have: --source, --out, --allow_partial."""
        parser = argparse.ArgumentParser(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "--source",
            default="",
            metavar="PATH",
            help=f"{', '.join(self.files)}, or the folder that holds it; from {self.page}",
        )
        parser.add_argument("--out", required=True, metavar="DIR", help="folder to create")
        parser.add_argument(
            "--allow_partial",
            action="store_true",
            help="accept another number of images than published",
        )
        return parser

    def find(self, source: str) -> str:
        """The path of the set: `source`, or a file of the expected name in the folder `source`.

        Raises:
            ValueError: not given, or not there.
        """
        if not source or not os.path.exists(source):
            raise ValueError(
                self.advice(f"{source} does not exist" if source else "no --source given")
            )
        inside = [os.path.join(source, name) for name in self.files]
        return next((path for path in inside if os.path.exists(path)), source)

    def advice(self, problem: str) -> str:
        """One line: the problem, and where to get what is expected."""
        names = " or ".join(self.files)
        return f"{problem}: download {self.name} from {self.page} and pass --source {names}"

    def open(self, source: str, opener: Callable[[str], Source]) -> Source:
        """The images of the set.

        Raises:
            ValueError: nothing usable there.
        """
        path = self.find(source)
        try:
            return opener(path)
        except SourceError as error:
            raise ValueError(self.advice(error.problem)) from error
        except ValueError as error:
            raise ValueError(self.advice(str(error))) from error

    def check(self, found: int, allow_partial: bool, expected: int | None = None) -> int:
        """`found`, if that is the published number of images, or if another one is accepted (and
        then noted).

        Raises:
            ValueError: it is another one.
        """
        expected = self.count if expected is None else expected
        if found == expected:
            return found
        note = f"{self.name}: found {found:,} images, published are {expected:,}"
        if not allow_partial or not found:
            raise ValueError(
                f"{note}: the download is not complete, or not this set (--allow_partial takes "
                "what is there)"
            )
        print(f"note: {note}; figures will not compare with published ones", flush=True)
        return found


LARGEST_MEMBER = 1 << 30  # bytes of a packed file that is read whole; the largest has 0.4 GB


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what a damaged archive raises into one line that names it.

    Raises:
        ValueError: the archive is damaged.
    """
    try:
        yield
    except (*files.DAMAGED_ZIP, tarfile.TarError) as error:
        raise ValueError(f"{name} cannot be read: {error} (download it again)") from error


class Archive:
    """A folder, .zip, .tar or .tar.gz: the files called `wanted` (base names, in whatever folder),
    in the order in which they are stored.

    Raises:
        ValueError: `path` is neither a folder nor a zip or tar file, or it is damaged.
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
                self._refuse_huge(name, self._archive.getinfo(member).file_size)
                yield stack.enter_context(self._archive.open(member))
            elif self._archive is not None:
                self._refuse_huge(name, self._archive.getmember(member).size)
                data = self._archive.extractfile(member)
                if data is None:
                    raise tarfile.ReadError("it is no file")
                yield stack.enter_context(data)
            else:
                yield stack.enter_context(open(member, "rb"))

    def _refuse_huge(self, name: str, size: int) -> None:
        if size > LARGEST_MEMBER:
            raise ValueError(
                f"{self.path}: {name} would take {size:,} bytes, and no published file has more "
                f"than {LARGEST_MEMBER:,}: download it again"
            )

    def close(self) -> None:
        """Close the archive."""
        self._open.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
