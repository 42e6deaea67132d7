"""Checkpoint files: a set of them per step, complete or not there at all.

    model000500.pt  ema_0.9999_000500.pt  opt000500.pt  state000500.pt      500 = steps completed

model and ema are plain state_dicts with the published parameter names. state holds what is ours
(step, timestep sampler, loss scale, settings, and the SHA-256 of the other files) and is written
last: a set without one was interrupted and is not a set. Because of the hashes, a state knows its
set under any name, and config.yaml is not needed to know what the weights are.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import torch

from .. import dist_util, files
from ..files import atomic_file, exists

_PARTS = r"(?:model|opt|ema_.+_)"  # of a set, besides its state, before the step
_LARGEST_STATE = (
    64 << 20
)  # bytes; a state holds no weights, and larger files need not be tried as one


@dataclass(frozen=True)
class SavePolicy:
    """When checkpoints are written, and which of them stay.

    Args:
        interval: steps between them.
        minutes: also after so much time since the last one; 0: no.
        keep_last: the newest so many stay; 0: all.
        keep_every: those at multiples of this step stay in any case; 0: none.

    Raises:
        ValueError: an interval below 1, or another number below 0.
    """

    interval: int = 10_000
    minutes: float = 0
    keep_last: int = 0
    keep_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("minutes", 0), ("keep_last", 0), ("keep_every", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"SavePolicy: {name} must be at least {least}, got {value}")


def checkpoint_name(part: str, step: int) -> str:
    """model000500.pt, ema_0.9999_000500.pt, opt000500.pt, state000500.pt."""
    return f"{part}_{step:06d}.pt" if part.startswith("ema_") else f"{part}{step:06d}.pt"


def parse_resume_step_from_filename(filename: str) -> int:
    """The steps completed, from a name such as model000500.pt; 0 for other names."""
    match = re.fullmatch(r"model(\d+)\.pt", os.path.basename(filename))
    return int(match[1]) if match else 0


def find_ema_checkpoint(main_checkpoint: str, step: int, rate: float | str) -> str | None:
    """The averaged weights that belong to main_checkpoint, if they are there."""
    path = os.path.join(os.path.dirname(main_checkpoint), f"ema_{rate}_{step:06d}.pt")
    return path if exists(path) else None


def complete_steps(folder: str) -> list[int]:
    """The steps of the complete sets in a local folder, ascending."""
    if not os.path.isdir(folder):
        return []
    return sorted(
        int(match[1])
        for name in os.listdir(folder)
        if (match := re.fullmatch(r"state(\d+)\.pt", name))
    )


def newest(folder: str) -> str:
    """The model file of the newest complete set in a local folder; '' if there is none."""
    steps = complete_steps(folder)
    return os.path.join(folder, checkpoint_name("model", steps[-1])) if steps else ""


def none_in(folder: str) -> str:
    """What to say of a folder to be continued in which there is no complete set."""
    begun = (
        f"; --resume auto --out_dir {folder} begins at step 0"
        if exists(os.path.join(folder, "config.yaml"))
        else ""
    )
    return (
        f"--resume {folder}: there is no complete checkpoint (modelNNNNNN.pt with its "
        f"stateNNNNNN.pt) in it{begun}"
    )


def save_set(
    folder: str, step: int, parts: dict[str, dict[str, Any]], state: dict[str, Any]
) -> str:
    """Write every part, then the state, and read all back; returns the path of the model file. Call
    on one rank.

    If it fails, what it had written is removed: earlier sets stay as they were.

    Raises:
        OSError: it cannot be written, or reads back differently.
    """
    paths = {part: os.path.join(folder, checkpoint_name(part, step)) for part in (*parts, "state")}
    hashes: dict[str, str] = {}
    try:
        if os.path.exists(paths["state"]):
            os.remove(paths["state"])  # a set of this step from before: incomplete from here on
            for name in set(_parts_of(folder, step)) - set(map(os.path.basename, paths.values())):
                os.remove(
                    os.path.join(folder, name)
                )  # another run's averages, which the new state does not know
        for part, content in parts.items():
            hashes[part] = _write(paths[part], content)
        written = dict(hashes)
        state = {**state, "sha256": hashes}
        written["state"] = _write(paths["state"], {**state, "content": content_hash(state)})
        for part, digest in written.items():
            if files.sha256(paths[part]) != digest:
                raise OSError(
                    f"{paths[part]} reads back differently from what was written: the disk is not "
                    "to be trusted"
                )
    except BaseException as error:
        for part in ("state", *parts):
            if os.path.exists(paths[part]):
                os.remove(paths[part])
        if isinstance(error, RuntimeError):  # torch.save wraps what the file system said
            if isinstance(error.__context__, KeyboardInterrupt):  # a second Ctrl-C
                raise error.__context__ from None
            raise OSError(str(error.__context__ or error)) from error
        raise
    return paths["model"]


def prune(folder: str, policy: SavePolicy, saved: int) -> list[int]:
    """Remove the sets that the policy does not keep; returns their steps. Call after the set
    `saved` has been read back.

    Sets of later steps are of an earlier run in this folder, or from before a return to an older
    checkpoint: they do not count. The state goes first: a set is whole or none also while it is
    being removed.
    """
    steps = [step for step in complete_steps(folder) if step <= saved]
    if not policy.keep_last:
        return []
    old = [
        step
        for step in steps[: -policy.keep_last]
        if not (policy.keep_every and step % policy.keep_every == 0)
    ]
    for step in old:
        for name in (checkpoint_name("state", step), *_parts_of(folder, step)):
            os.remove(os.path.join(folder, name))
    return old


def _parts_of(folder: str, step: int) -> list[str]:
    """The names of the files of a set, but for its state."""
    return [name for name in os.listdir(folder) if re.fullmatch(rf"{_PARTS}{step:06d}\.pt", name)]


def without_state(folder: str) -> list[str]:
    """The names of weights in a local folder that belong to no complete set: nothing but
    config.yaml says what they are.
    """
    steps = set(complete_steps(folder))
    found = (
        (name, re.fullmatch(rf"{_PARTS}(\d+)\.pt", name)) for name in sorted(os.listdir(folder))
    )
    return [
        name
        for name, match in found
        if match and int(match[1]) not in steps and not name.startswith("opt")
    ]


def remove_leftovers(folder: str) -> None:
    """Remove the temporary files of saves that were killed."""
    files.remove_temporaries(folder, r"(model|opt|ema_|state).*\.pt|config\.yaml")


def read_state(path: str) -> dict[str, Any]:
    """The content of a state file, on the CPU.

    Raises:
        ValueError: missing, damaged, unsafe, or no state.
    """
    state = dist_util.load_state_dict(path)
    if not isinstance(state, dict) or state.pop("content", "") != content_hash(state):
        raise ValueError(f"{path} is damaged (its content is not what was written)")
    return state


def states_near(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, content) of the states that may know the file at `path`: that of its step or, if its
    name tells none, all in its folder, newest first. Those that cannot be read are left out.
    """
    folder, name = os.path.split(path)
    if match := re.fullmatch(rf"{_PARTS}(\d+)\.pt", name):
        names = [f"state{match[1]}.pt"]
    else:
        known = [checkpoint_name("state", step) for step in reversed(complete_steps(folder or "."))]
        names = known + [
            other
            for other in _torch_files(folder or ".")
            if other not in (name, *known)
            and os.path.getsize(os.path.join(folder, other)) <= _LARGEST_STATE
            and not re.fullmatch(rf"{_PARTS}\d+\.pt", other)
        ]
    for candidate in (os.path.join(folder, name) for name in names):
        if exists(candidate):
            try:
                yield candidate, read_state(candidate)
            except ValueError:
                continue


def state_that_knows(path: str) -> tuple[str, str, dict[str, Any]] | None:
    """The state of the set that the file at `path` belongs to by its content: its path, the file's
    part ("model", "ema_0.9999", "opt"), and the state. None if no state near it knows the file.
    """
    digest = ""
    for candidate, state in states_near(path):
        digest = digest or files.sha256(path)
        for part, known in state.get("sha256", {}).items():
            if known == digest:
                return candidate, part, state
    return None


def saved_settings(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings in a state, in the form of a config.yaml (without the paper's numbers); {} if it
    has none.
    """
    data = {
        name: value
        for name, value in (state.get("data") or {}).items()
        if name in ("preprocessing", "classes") and value
    }
    return (
        {**state["settings"], **({"data": data} if data else {})} if state.get("settings") else {}
    )


def check_set(model_path: str, ema_names: Iterable[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The files of the parts (model, averages, opt) of the set that the weights at model_path
    belong to, and its state, on the CPU.

    modelNNNNNN.pt has the others beside it under their names; under another name, the set is found
    by the hashes in its state. Every file has been read and compared with its hash.

    Raises:
        ValueError: not the weights of a set, or a part of the set is missing, damaged or unsafe; it
            is named.
    """
    paths = _paths_of_set(model_path, ["model", *ema_names, "opt", "state"])
    missing = [path for path in paths.values() if not exists(path)]
    if missing:
        raise ValueError(
            f"cannot resume from {model_path}: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; the set is written together and "
            "needed whole (--init_from starts at step 0 from weights alone)"
        )
    try:
        state = read_state(paths.pop("state"))
    except ValueError as error:
        raise ValueError(
            f"cannot resume from {model_path}: {error}; --resume with an earlier checkpoint"
        ) from None
    for name, path in paths.items():
        known = state.get("sha256", {}).get(name)
        if known and files.sha256(path) != known:
            raise ValueError(
                f"cannot resume from {model_path}: {path} is damaged (its SHA-256 is not the one "
                "noted when it was written); --resume with an earlier checkpoint"
            )
    return paths, state


def _paths_of_set(model_path: str, parts: list[str]) -> dict[str, str]:
    """Where each part is, or ought to be."""
    folder, name = os.path.split(model_path)
    if re.fullmatch(r"model\d+\.pt", name):
        step = parse_resume_step_from_filename(model_path)
        return {part: os.path.join(folder, checkpoint_name(part, step)) for part in parts}
    if not exists(model_path):
        raise ValueError(f"cannot resume from {model_path}: there is no such file")
    found = state_that_knows(model_path)
    if found is None or found[1] != "model":
        what = (
            f"holds {found[1]} of step {found[2]['step']}, not the weights"
            if found
            else (
                "is not named modelNNNNNN.pt (NNNNNN = steps completed), and no state file beside "
                "it knows it by its content"
            )
        )
        raise ValueError(
            f"cannot resume from {model_path}: it {what}; give the modelNNNNNN.pt of a set, or the "
            "run's folder (--init_from starts at step 0 from weights alone)"
        )
    path, _, state = found
    paths = {part: os.path.join(folder, checkpoint_name(part, state["step"])) for part in parts}
    paths |= {"model": model_path, "state": path}
    lost = {state["sha256"].get(part): part for part, there in paths.items() if not exists(there)}
    if lost:  # renamed as well: only their content tells which they are
        for other in (os.path.join(folder, other) for other in _torch_files(folder or ".")):
            if part := lost.get(files.sha256(other)):
                paths[part] = other
    return paths


def _torch_files(folder: str) -> list[str]:
    """The names of the .pt files in a local folder; none in a remote one."""
    return (
        sorted(name for name in os.listdir(folder) if name.endswith(".pt"))
        if os.path.isdir(folder)
        else []
    )


def content_hash(content: Any) -> str:
    """SHA-256 of nested dicts, lists and tuples of tensors and plain values: for what cannot hold
    the hash of its own file.

    (torch.load does not look at the checksums of the archive that it reads.)
    """
    digest = hashlib.sha256()

    def take(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
            flat = torch.cat(
                [x.detach().cpu().reshape(-1)]
            )  # a copy: one element may have a stride that forbids the view
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(x, (dict, list, tuple)):
            digest.update(f"{type(x).__name__} {len(x)}".encode())
            for item in x.items() if isinstance(x, dict) else x:
                take(item)
        else:
            digest.update(f"{type(x).__name__} {x!r}".encode())

    take(content)
    return digest.hexdigest()


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write(path: str, content: dict[str, Any]) -> str:
    """Returns the SHA-256 of what was written."""
    with atomic_file(path) as file:
        hashing = _Hashing(file)
        torch.save(content, cast("IO[bytes]", hashing))
    return hashing.digest.hexdigest()
