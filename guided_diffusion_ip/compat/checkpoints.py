"""Checkpoints that hold records, such as an argparse.Namespace, beside tensors.

    python -m guided_diffusion_ip.compat.checkpoints IN.pt OUT.pt [KEY]

writes OUT.pt with dictionaries and texts in their place (or only what IN.pt has under KEY), which
all scripts read. Nothing is read that could run code.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import pathlib
import sys
import types
from typing import Any

import torch

from .. import dist_util

# Restoring one of these sets attributes, or makes a value: no code of the file's choice runs.
# Classes of numpy are not among them, whose restoring trusts sizes that the file states.
PLAIN_CLASSES: tuple[type, ...] = (
    argparse.Namespace,
    types.SimpleNamespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    pathlib.WindowsPath,
    pathlib.PureWindowsPath,
    datetime.date,
    datetime.datetime,
    datetime.timedelta,
)


def plain_classes_allowed() -> contextlib.AbstractContextManager:
    """A context in which torch.load(weights_only=True) also restores PLAIN_CLASSES."""
    return torch.serialization.safe_globals(list(PLAIN_CLASSES))


def load_with_records(path: str | os.PathLike, map_location: Any = "cpu") -> Any:
    """What torch.save() wrote: tensors, plain containers and PLAIN_CLASSES.

    Raises:
        ValueError: the file is missing, damaged or no checkpoint, or holds something else.
    """
    with plain_classes_allowed():
        return dist_util.load_state_dict(path, map_location)


def without_records(value: Any) -> Any:
    """The same with dictionaries in the place of namespaces, texts in that of paths and dates."""
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        value = vars(value)
    if isinstance(value, dict):
        return {name: without_records(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [without_records(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return str(value) if isinstance(value, PLAIN_CLASSES) else value


def main() -> None:
    """Convert one file."""
    if len(sys.argv) not in (3, 4):
        sys.exit(f"error: give IN.pt OUT.pt, and a KEY if wanted\n{__doc__}")
    source, target, *keys = sys.argv[1:]
    try:
        content = without_records(load_with_records(source))
    except ValueError as error:
        sys.exit(f"error: {error}")
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            found = ", ".join(map(str, content)) if isinstance(content, dict) else "no keys"
            sys.exit(f"error: {source} has no {key!r}; it has {found[:200]}")
        content = content[key]
    torch.save(content, target)


if __name__ == "__main__":
    main()
