"""What the scripts in datasets/ know of a published set: where it is to be had, what its files are
called, how many images.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

from ..data.image_source import Source, SourceError


@dataclass(frozen=True)
class Published:
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
        return f"{problem}: download {self.name} from {self.page} and pass --source {' or '.join(self.files)}"

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
