"""Everything of a run that a checkpoint holds: objects with a state_dict, saved and loaded as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import dist_util
from . import checkpoint, resume
from .guards import first_not_finite
from .protocols import Stateful
from .update import Progress


class CannotResume(ValueError):
    """A checkpoint that should be continued is not whole."""


@dataclass(frozen=True)
class RunState:
    """What makes up a run.

    Args:
        parts: have a file each: "model", "opt", and the averages by name.
        entries: have an entry of the state file each. Their state_dict() may be a collective.
        progress: its numbers stand in the state file.
        facts: what describes the run (seed, global_batch, settings, ...); saved, and compared on
            resume.
    """

    parts: Mapping[str, Stateful]
    entries: Mapping[str, Stateful]
    progress: Progress
    facts: Mapping[str, Any]

    def gather(self) -> dict[str, Any]:
        """The content of the state file. A collective."""
        entries = {name: entry.state_dict() for name, entry in self.entries.items()}
        images_seen = self.progress.step * self.facts["global_batch"]
        return {**self.progress.state_dict(), "images_seen": images_seen, **self.facts, **entries}

    def write(self, folder: str, state: dict[str, Any]) -> str:
        """Write a checkpoint, `state` being gather()'s; returns the path of its model file. On one
        rank.

        Raises:
            ValueError: weights or averages are not finite: such a checkpoint would be of no use to
                anybody.
            OSError: it cannot be written, or reads back differently.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        for name, content in parts.items():
            if name != "opt" and (bad := first_not_finite(content.items())):
                raise ValueError(f"{name} has values that are not finite in {bad}")
        return checkpoint.save_set(folder, self.progress.step, parts, state)

    def restore(self, path: str, device: torch.device) -> list[str]:
        """Continue where the checkpoint with the weights at `path` ended; returns what the user
        should know.

        A collective: rank 0 reads the files, one part after the other, and the other ranks receive
        them on their devices.

        Raises:
            CannotResume: a part is missing or damaged.
            ValueError: something has changed that may not.
        """
        averages = [name for name in self.parts if name not in ("model", "opt")]
        try:
            paths, state = dist_util.from_main(lambda: checkpoint.check_set(path, averages))
        except ValueError as error:
            raise CannotResume(str(error)) from None
        notes = resume.compare_settings(state.get("settings") or {}, self.facts["settings"])
        notes += resume.compare_run(state, self.facts)
        if not state.get("ema_updates"):  # as in the first checkpoints of this library
            state["ema_updates"] = [state["step"]] * len(averages)
        for name, part in self.parts.items():
            part.load_state_dict(dist_util.load_state_dict_once(paths[name], device))
        for name, entry in self.entries.items():
            entry.load_state_dict(state.get(name) or {})
        self.progress.load_state_dict(state)
        return [f"continuing from {path}: {self.progress.step} steps done", *notes]
