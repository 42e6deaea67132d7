"""Checkpoint files: a set of them per step, each written whole or not at all.

    model000500.pt  ema_0.9999_000500.pt  opt000500.pt  state000500.pt      500 = updates completed

model and ema are plain state_dicts with the published parameter names; state holds what is ours (step, timestep sampler,
loss scale, seed) and is written last: a set is complete if it has one.
"""
from __future__ import annotations

import os
import re
from typing import Any

import torch

from .. import dist_util
from ..files import atomic_file, exists


def checkpoint_name(part: str, step: int) -> str:
    """model000500.pt, ema_0.9999_000500.pt, opt000500.pt, state000500.pt."""
    return f"{part}_{step:06d}.pt" if part.startswith("ema_") else f"{part}{step:06d}.pt"


def parse_resume_step_from_filename(filename: str) -> int:
    """The updates completed, from a name such as model000500.pt; 0 for other names."""
    match = re.fullmatch(r"model(\d+)\.pt", os.path.basename(filename))
    return int(match[1]) if match else 0


def find_ema_checkpoint(main_checkpoint: str, step: int, rate: float | str) -> str | None:
    """The averaged weights that belong to main_checkpoint, if they are there."""
    path = os.path.join(os.path.dirname(main_checkpoint), f"ema_{rate}_{step:06d}.pt")
    return path if exists(path) else None


def save_set(folder: str, step: int, parts: dict[str, dict[str, Any]], state: dict[str, Any]) -> str:
    """Write every part and then the state; returns the path of the model file. Call on one rank."""
    for part, content in [*parts.items(), ("state", state)]:
        with atomic_file(os.path.join(folder, checkpoint_name(part, step))) as file:
            torch.save(content, file)
    return os.path.join(folder, checkpoint_name("model", step))


def load_set(model_path: str, ema_names: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The parts and the state of the set that modelNNNNNN.pt belongs to, on the CPU.

    Raises:
        ValueError: not a modelNNNNNN.pt, or a part of the set is missing, damaged or unsafe; it is named.
    """
    if not re.fullmatch(r"model\d+\.pt", os.path.basename(model_path)):
        raise ValueError(f"resume_checkpoint must be a file named modelNNNNNN.pt (NNNNNN = updates completed), got "
                         f"{model_path}")
    step, folder = parse_resume_step_from_filename(model_path), os.path.dirname(model_path)
    names = ["model", *ema_names, "opt", "state"]
    paths = {name: os.path.join(folder, checkpoint_name(name, step)) for name in names}
    missing = [path for path in paths.values() if not exists(path)]
    if missing:
        raise ValueError(f"cannot resume from {model_path}: {', '.join(missing)} "
                         f"{'is' if len(missing) == 1 else 'are'} missing; the set is written together and needed whole")
    parts = {name: dist_util.load_state_dict(path) for name, path in paths.items()}
    return parts, parts.pop("state")
