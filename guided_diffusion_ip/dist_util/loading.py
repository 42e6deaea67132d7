"""Checkpoint files -> tensors. A checkpoint can never run code here."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..files import is_remote, open_binary
from .collectives import from_main

if TYPE_CHECKING:
    from torch.serialization import MAP_LOCATION


def load_state_dict(path: str | os.PathLike, map_location: MAP_LOCATION = "cpu") -> Any:
    """What torch.save() wrote to a local or remote path: tensors and plain containers only.

    Every rank reads the file by itself: no collective is inside, so one rank may call it alone.
    (Whole runs of several processes have load_state_dict_once.)

    Raises:
        ValueError: the file is missing, damaged or no checkpoint, or holds more than tensors.
    """
    name = os.fspath(path)
    try:
        with open_binary(name) as file:
            # Remote streams cannot jump about as a zip archive wants.
            source = io.BytesIO(file.read()) if is_remote(name) else file
            with warnings.catch_warnings():
                # Of the pickle's version, ahead of an error that says all.
                warnings.simplefilter("ignore")
                return torch.load(source, map_location=map_location, weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        found = "a folder" if isinstance(error, IsADirectoryError) else "no such file"
        raise ValueError(f"checkpoint {name}: {found}; give the path of a .pt file") from None
    except (torch.OutOfMemoryError, PermissionError):
        raise
    # A changed bit sends the reader to places before the beginning (OSError), or builds calls that
    # nobody wrote (the last three).
    except (
        pickle.UnpicklingError,
        struct.error,
        RuntimeError,
        EOFError,
        LookupError,
        ValueError,
        OSError,
        TypeError,
        AssertionError,
        AttributeError,
    ) as error:
        raise ValueError(_explain(name, error)) from None


def load_state_dict_once(path: str | os.PathLike, device: torch.device | str) -> Any:
    """load_state_dict on rank 0; the other ranks receive what it has read, on `device`. A
    collective.

    So the file is read once and held in the host's memory once, however many ranks there are, and
    is needed where rank 0 is only.

    Raises:
        ValueError, OSError: as load_state_dict, on every rank.
    """
    return from_main(lambda: load_state_dict(path), device)


def _explain(name: str, error: Exception) -> str:
    text = str(error)
    if name.lower().endswith(".pkl"):  # as EDM publishes its networks
        return (
            f"checkpoint {name}: a pickled program, which is not run; if it is one of EDM's, "
            f"python scripts/convert_checkpoint.py {name} FOLDER makes a .pt and its config.yaml "
            "of it"
        )
    if refused := re.search(r"(?:GLOBAL|class) ([\w.]+)", text):
        return (
            f"checkpoint {name}: refused, it holds {refused[1]} besides tensors, and reading "
            "that could run code; save its state_dict alone with torch.save and load that, or let "
            f"python -m guided_diffusion_ip.compat.checkpoints {name} OUT.pt do it, which knows "
            "argparse.Namespace and the like"
        )
    # PyTorch explains weights_only at length first; the reason follows "error:".
    reason = (text.partition("WeightsUnpickler error:")[2] or text).strip()
    reason = re.split(r"[.\n]", reason)[0][:100] or "empty"
    return (
        f"checkpoint {name}: damaged, incomplete or no PyTorch checkpoint "
        f"({type(error).__name__}: {reason}); copy or download it again, or use the one "
        f"before it"
    )
