"""All of a run that a checkpoint holds: objects with a state_dict, saved and loaded as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import dist_util, logger
from . import checkpoint, resume
from .checkpoint import SavePolicy
from .guards import first_not_finite
from .protocols import Batches, Stateful, facts_of
from .settings import TrainSettings
from .timestep_samplers import ScheduleSampler
from .update import Progress


class CannotResume(ValueError):
    """A checkpoint that should be continued is not whole."""


def run_facts(
    settings: TrainSettings, data: Batches, schedule_sampler: ScheduleSampler
) -> dict[str, Any]:
    """What describes a run to whoever continues it."""
    world = dist_util.get_world_size()
    return {
        "seed": settings.seed,
        "world": world,
        "global_batch": settings.batch_size * world,
        "microbatch": settings.images_per_pass,
        "precision": settings.precision,
        "data": facts_of(data),
        "sampler_type": type(schedule_sampler).__name__,
        "settings": settings.record,
        "versions": resume.versions(),
    }


@dataclass(frozen=True)
class RunState:
    """What makes up a run.

    Args:
        parts: have a file each: "model", "opt", and the averages by name.
        entries: have an entry of the state file each. Their state_dict() may be a collective.
        progress: its numbers stand in the state file.
        facts: see run_facts; saved, and compared on resume.
    """

    parts: Mapping[str, Stateful]
    entries: Mapping[str, Stateful]
    progress: Progress
    facts: Mapping[str, Any]

    def save(self, folder: str, policy: SavePolicy) -> None:
        """Write the checkpoint of this step, then remove what the policy does not keep; a
        collective: rank 0 writes.

        Raises:
            ValueError: it cannot be written; what was there before is untouched. Or it would hold a
                NaN.
        """
        entries = {name: entry.state_dict() for name, entry in self.entries.items()}
        complaint = self._write(folder, policy, entries) if dist_util.is_main() else ""
        if complaint := dist_util.broadcast_object(complaint):
            raise ValueError(complaint)

    def _write(self, folder: str, policy: SavePolicy, entries: Mapping[str, Any]) -> str:
        """Returns what is wrong, '' if nothing."""
        step = self.progress.step
        state = {
            **self.progress.state_dict(),
            "images_seen": step * self.facts["global_batch"],
            **self.facts,
            **entries,
        }
        try:
            path = checkpoint.save_set(folder, step, self._finite_parts(), state)
            removed = checkpoint.prune(folder, policy, step)
        except (OSError, ValueError) as error:
            return (
                f"the checkpoint of step {step} could not be saved in {folder}: {error}. The last "
                f"complete one is {checkpoint.newest(folder) or 'none'}; with the cause removed, "
                "the same command with --resume auto continues"
            )
        gone = f"; removed step {', '.join(map(str, removed))}" if removed else ""
        logger.log(f"step {step}: saved {path}{gone}")
        return ""

    def _finite_parts(self) -> dict[str, Any]:
        """What goes into a file each. Weights or averages that are not finite would be of no use to
        anybody.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        for name, content in parts.items():
            if name != "opt" and (bad := first_not_finite(content.items())):
                raise ValueError(f"{name} has values that are not finite in {bad}")
        return parts

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
