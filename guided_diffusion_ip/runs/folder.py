"""The folder of a run that may be interrupted and continued: it says what it was made with, and
refuses anything else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from .. import dist_util
from ..files import atomic_file, remove_temporaries
from ..ownership import owning
from ..yaml_text import read_yaml_file


def claim_folder(out_dir: str, settings: dict[str, Any], holds: str) -> None:
    """Write settings.yaml, or compare with the one that is there; a collective.

    Args:
        settings: all that the results depend on, as plain values.
        holds: what lies in the folder, for the message: "samples".

    Raises:
        ValueError: the folder was claimed with other settings; on every rank.
    """
    complaint = None
    if dist_util.is_main():
        path = os.path.join(out_dir, "settings.yaml")
        if os.path.exists(path):
            try:
                there = read_yaml_file(path)
            except ValueError as error:
                there = str(error)
            complaint = (
                _difference(there, settings)
                if isinstance(there, dict)
                else f"other settings ({str(there)[:400] if there else 'an empty settings.yaml'})"
            )
        else:
            with atomic_file(path) as file:
                file.write(yaml.safe_dump(settings, sort_keys=False).encode())
    complaint = dist_util.broadcast_object(complaint)
    if complaint:
        raise ValueError(
            f"{out_dir} holds {holds} made with {complaint}: give another --out_dir, or remove it"
        )


def complete(
    out_dir: str,
    settings: dict[str, Any],
    holds: str,
    result: str,
    fill: Callable[[], None],
    finish: Callable[[], None],
) -> None:
    """Bring a run to its end, wherever an earlier one stopped; a collective.

    Args:
        settings, holds: see claim_folder.
        result: a file whose presence says that the run is complete.
        fill: make what is missing, on all processes. finish: make `result` of it, on rank 0.

    Raises:
        ValueError: the folder was claimed with other settings, or another run is at work in it; on
            every rank.
    """
    with owning(out_dir):
        if dist_util.is_main():
            # An evaluation is written by another program, which may be at work.
            remove_temporaries(out_dir, "(?!evaluation).*")
        claim_folder(out_dir, settings, holds)
        # Rank 0 alone looks: it also writes the file.
        if dist_util.broadcast_object(os.path.exists(result)):
            return
        fill()
        dist_util.barrier()
        if dist_util.is_main():
            finish()
        dist_util.barrier()


@contextlib.contextmanager
def resumable(total: int, missing: Callable[[], int]) -> Iterator[None]:
    """Ctrl-C within the block says how to go on, and how many of `total` images are done."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the same command continues; {total - missing()} of {total} images are done"
        ) from None


def _difference(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    """'seed 1 instead of 0, ...', or ''."""
    keys = [*wanted, *(key for key in there if key not in wanted)]
    odd = [
        f"{key} {there.get(key)!r} instead of {wanted.get(key)!r}"
        for key in keys
        if there.get(key) != wanted.get(key)
    ]
    return ", ".join(odd)
