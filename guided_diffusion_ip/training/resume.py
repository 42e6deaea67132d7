"""Continuing a run, and starting one from given weights: what may differ from before, and what was
taken.

On resume, stop conditions, intervals, folders and worker processes may change. Architecture,
process, loss, seed, global batch and EMA rates may not: the result would be neither the old run nor
a new one. Anything else is told.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import __version__, dist_util
from . import checkpoint

Sections = Mapping[str, Mapping[str, Any]]

# Every flag of a training script is of a fixed section, fixed by itself, free, or may change with a
# note (tests/test_resume.py lists those).
_FIXED_SECTIONS = ("model", "super_res", "classifier", "edm", "diffusion")
_FIXED = {
    "seed",
    "schedule_sampler",
    "ema_rate",
    "ema_warmup",
    "class_dropout",
    "noised",
    "timestep_respacing",
}
# No effect on what is computed, or handled elsewhere (batch sizes: by the global batch).
_FREE = {
    "compile",
    "use_checkpoint",
    "use_fp16",
    "classifier_use_fp16",
    "batch_size",
    "global_batch_size",
    "max_steps",
    "max_images",
    "max_hours",
    "log_interval",
    "save_interval",
    "save_minutes",
    "keep_last",
    "keep_every",
    "sample_interval",
    "sample_count",
    "sample_respacing",
    "resume",
    "resume_checkpoint",
    "init_from",
    "num_workers",
    "cache_mb",
    "out_dir",
    "val_data_dir",
    "eval_interval",
    "eval_samples",
    "eval_ref",
    "eval_features",
    "eval_metrics",
    "eval_respacing",
    "inception_weights",
    "iterations",
    "max_skipped",
    "overwrite",
}


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "guided_diffusion_ip": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def compare_settings(saved: Sections, now: Sections) -> list[str]:
    """Notes on what has changed since the checkpoint was written.

    Raises:
        ValueError: something has that may not; with both values.
    """
    notes = []
    for section in saved:
        for name, before in saved[section].items():
            if (
                name in _FREE
                or section not in now
                or name not in now[section]
                or now[section][name] == before
            ):
                continue
            after = now[section][name]
            if section in _FIXED_SECTIONS or name in _FIXED:
                raise ValueError(
                    f"{name} is {after!r}, but the run to be continued has {before!r}: leave it as "
                    "it was (a new run from its weights: --init_from)"
                )
            notes.append(f"note: {name} was {before!r} before, is {after!r} from here on")
    return notes


def compare_run(state: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """The same for what the loop knows by itself.

    Args:
        state: the checkpoint's.
        facts: the run's own values of the same names: seed, global_batch, sampler_type, world,
            microbatch, data.
    """
    for name, text in (
        ("seed", "seed"),
        ("global_batch", "the global batch"),
        ("sampler_type", "the timestep sampler"),
    ):
        before, after = state.get(name), facts[name]
        if before is not None and before != after:
            raise ValueError(
                f"{text} is {after}, but the run to be continued has {before}: leave it as it was"
                + (
                    " (--global_batch_size keeps it for any number of processes)"
                    if name == "global_batch"
                    else ""
                )
            )
    return [
        *_notes_on_processes(state, facts),
        *_notes_on_data(state.get("data") or {}, facts["data"]),
        *_notes_on_versions(state.get("versions") or {}),
    ]


def _notes_on_processes(state: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    if state["world"] != facts["world"]:
        return [
            f"note: {state['world']} processes before, {facts['world']} now, with the same global "
            "batch: images, t and noise stay what they would have been; no longer exact are "
            "dropout, which depends on the process, and the order of sums"
        ]
    if state.get("microbatch", facts["microbatch"]) != facts["microbatch"]:
        return [
            f"note: microbatches of {state['microbatch']} before, {facts['microbatch']} now: "
            "dropout and the order of sums change"
        ]
    return []


def _notes_on_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    notes = []
    for name in ("num_images", "preprocessing"):
        before, after = saved.get(name), now.get(name)
        if before is not None and after is not None and before != after:
            notes.append(
                f"warning: the training data have {name} {after!r}, before it was {before!r}: "
                "other images"
            )
    before, after = saved.get("classes") or (), now.get("classes") or ()
    if odd := [k for k, (a, b) in enumerate(zip(before, after)) if a != b]:
        notes.append(
            f"warning: label {odd[0]} is class {after[odd[0]]!r} of the training data, before it "
            f"was {before[odd[0]]!r}: the network has learned it as that"
        )
    return notes


def _notes_on_versions(saved: Mapping[str, str]) -> list[str]:
    now = versions()
    return [
        f"note: {name} {before} before, {now[name]} now: sums may round differently"
        for name, before in saved.items()
        if now.get(name, before) != before
    ]


def find(resume: str, resume_checkpoint: str, out_dir: str) -> tuple[str, str]:
    """The model file to continue from ('' for none) and what to tell; a collective.

    Args:
        resume: "auto", the weights of a checkpoint, a run's folder, or ''.
        resume_checkpoint: the published flag: a modelNNNNNN.pt, or ''.
        out_dir: where "auto" looks.

    Raises:
        ValueError: both flags with different files, or a folder without a complete checkpoint.
    """
    if resume and resume_checkpoint and resume != resume_checkpoint:
        raise ValueError(f"--resume {resume} and --resume_checkpoint {resume_checkpoint}: give one")
    path = resume or resume_checkpoint
    if path == "auto":
        # Rank 0 looks: other ranks might see another state of a shared disk.
        path = dist_util.broadcast_object(checkpoint.newest(out_dir))
        return path, "" if path else f"no complete checkpoint in {out_dir}: starting at step 0"
    if path and os.path.isdir(path):
        folder, path = path, dist_util.broadcast_object(checkpoint.newest(path))
        if not path:
            raise ValueError(checkpoint.none_in(folder))
    return path, ""


def init_from(model: nn.Module, path: str) -> str:
    """Load the weights of a checkpoint as far as names and shapes agree; returns a report. A
    collective.

    Raises:
        ValueError: the file cannot be read, or none of its tensors fits.
    """
    given = dist_util.load_state_dict_once(path, next(model.parameters()).device)
    own = model.state_dict()
    fitting = {
        name: x
        for name, x in given.items()
        if name in own and isinstance(x, torch.Tensor) and x.shape == own[name].shape
    }
    if not fitting:
        raise ValueError(
            f"--init_from {path}: none of its {len(given)} entries fits this network; its first is "
            f"{next(iter(given), 'none')}, the network's first is {next(iter(own))}: is it a "
            "state_dict of this architecture?"
        )
    model.load_state_dict(fitting, strict=False)
    lines = [f"weights from {path}: {len(fitting)} of {len(own)} tensors taken"]
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in given and name not in fitting
    ]
    for what, names in (
        ("of another shape, left at their start", shapes),
        ("not in the file, left at their start", [name for name in own if name not in given]),
        ("in the file only", [name for name in given if name not in own]),
    ):
        if names:
            lines.append(
                f"  {len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )
    return "\n".join(lines)
