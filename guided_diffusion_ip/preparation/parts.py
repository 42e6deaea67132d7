"""Pieces of a set on their way: each whole or absent, so that the same command again goes on where
it was interrupted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from ..data.npz_io import NpzReader, merge_npz
from ..files import atomic_file


class Parts:
    """The folder OUT_DIR/.parts/NAME, for the pieces of what will be OUT_DIR/NAME....

    Not for two processes at a time.

    Args:
        settings: text that says what is being made; pieces made with others are not mixed in.

    Raises:
        ValueError: the folder was begun with other settings.
    """

    def __init__(self, out_dir: str | os.PathLike, name: str, settings: str) -> None:
        self._out_dir, self._name = out_dir, name
        self.folder = _folder(out_dir, name)
        note = self.path("settings.txt")
        if os.path.exists(note):
            with open(note, encoding="utf-8") as file:
                begun = file.read()
            if begun != settings:
                raise ValueError(
                    f"{self.folder} was begun with {begun!r}, not {settings!r}: remove it, "
                    "or choose another --out"
                )
        else:
            with atomic_file(note) as file:
                file.write(settings.encode())
        for folder, _, names in os.walk(self.folder):
            for left in names:  # of a process that was killed while it wrote
                if left.startswith(".") and left.endswith(".tmp"):
                    os.remove(os.path.join(folder, left))

    def path(self, name: str) -> str:
        """Where the piece `name` lies, or will."""
        return os.path.join(self.folder, name)

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the pieces that are still to be made."""
        return [name for name in names if not os.path.exists(self.path(name))]

    def rows(self, names: Sequence[str]) -> int:
        """How many images (rows of arr_0) the npz pieces hold together."""
        total = 0
        for name in names:
            with NpzReader(self.path(name)) as piece:
                total += piece.shape("arr_0")[0]
        return total

    def join(
        self, names: Sequence[str], path: str | os.PathLike, extra: Mapping[str, np.ndarray]
    ) -> None:
        """Make one npz `path` of all rows of the npz pieces, in the order given, and of the arrays
        `extra`; remove the pieces.

        The disk holds both for a while. `path` and the pieces must be on one file system.
        """
        whole = self.path("joined.npz")
        merge_npz(whole, [self.path(name) for name in names], self.rows(names), extra)
        os.replace(whole, path)
        self.remove()

    def remove(self) -> None:
        """Delete all pieces."""
        discard(self._out_dir, self._name)


def discard(out_dir: str | os.PathLike, name: str) -> None:
    """Delete what is left of the pieces of a set that is finished, if the process that made it was
    killed before it could.
    """
    folder = _folder(out_dir, name)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or other sets are on their way beside this one
        os.rmdir(os.path.dirname(folder))


def _folder(out_dir: str | os.PathLike, name: str) -> str:
    return os.path.join(os.path.abspath(out_dir), ".parts", name)
