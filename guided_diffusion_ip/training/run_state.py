"""Everything of a run that a checkpoint holds: from a TrainLoop and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dist_util, logger
from . import checkpoint, resume
from .guards import first_not_finite


def gather(
    loop: Any, statistics: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The parts (model, averages, optimizer) and the state of a checkpoint.

    Args:
        loop: the TrainLoop.
        statistics: its unfinished means, gathered over ranks.

    Raises:
        ValueError: weights or averages are not finite: such a checkpoint would be of no use to
            anybody.
    """
    loop.schedule_sampler.settle()
    parts = {
        "model": loop.model.state_dict(),
        **{ema.name: ema.state_dict() for ema in loop.emas},
        "opt": loop.opt.state_dict(),
    }
    for part, content in parts.items():
        if part != "opt" and (name := first_not_finite(content.items())):
            raise ValueError(f"{part} has values that are not finite in {name}")
    return parts, {
        "step": loop.step,
        "images_seen": loop.step * loop.global_batch,
        "skipped": loop.skipped,
        "skipped_in_a_row": loop.skipped_in_a_row,
        "seed": loop.seed,
        "world": loop.world,
        "global_batch": loop.global_batch,
        "microbatch": loop.microbatch,
        "precision": loop.precision.mode,
        "data": {
            name: getattr(loop.data, name)
            for name in ("num_images", "preprocessing", "classes")
            if hasattr(loop.data, name)
        },
        "sampler_type": type(loop.schedule_sampler).__name__,
        "sampler": loop.schedule_sampler.state_dict(),
        "scaler": loop.precision.state_dict(),
        "statistics": statistics,
        "ema_updates": [ema.updates for ema in loop.emas],
        "pending": logger.get_current().state_dict(),
        "settings": loop.settings,
        "versions": resume.versions(),
    }


def restore(loop: Any, path: str) -> list[str]:
    """Continue where a checkpoint ended: weights, averages, optimizer, timestep sampler, loss
    scale, data, unfinished means.

    A collective: rank 0 reads the files, one part after the other, and the other ranks receive them
    on their devices.

    Returns: what to tell.

    Raises:
        ValueError: a part is missing or damaged, or something has changed that may not.
    """
    try:
        paths, state = dist_util.from_main(
            lambda: checkpoint.check_set(path, [ema.name for ema in loop.emas])
        )
    except ValueError as error:
        asked = loop.settings.get("train", {})  # none if the loop was made in Python
        flag = next(
            (
                f"--{name} {asked[name]}: "
                for name in ("resume", "resume_checkpoint")
                if asked.get(name)
            ),
            "",
        )
        raise ValueError(f"{flag}{error}") from None
    notes = resume.compare_settings(state.get("settings") or {}, loop.settings)
    notes += resume.compare_run(
        state,
        seed=loop.seed,
        global_batch=loop.global_batch,
        world=loop.world,
        micro=loop.microbatch,
        sampler=type(loop.schedule_sampler).__name__,
        data=loop.data,
    )
    loop.model.load_state_dict(dist_util.load_state_dict_once(paths["model"], loop.device))
    for ema, updates in zip(
        loop.emas, state.get("ema_updates") or [state["step"]] * len(loop.emas)
    ):
        ema.load_state_dict(dist_util.load_state_dict_once(paths[ema.name], loop.device), updates)
    weight_decay = loop.opt.param_groups[0]["weight_decay"]
    restore_optimizer(loop.opt, dist_util.load_state_dict_once(paths["opt"], loop.device))
    for group in loop.opt.param_groups:  # what the command line says now
        group["lr"], group["weight_decay"] = loop.lr, weight_decay
    loop.schedule_sampler.load_state_dict(state["sampler"])
    loop.precision.load_state_dict(state["scaler"])
    loop.statistics.load_state_dict(state.get("statistics") or {})
    loop.step = state["step"]
    loop.skipped, loop.skipped_in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)
    loop.pending = state.get("pending") or {}
    told = [f"continuing from {path}: {loop.step} steps done", *notes]
    if hasattr(loop.data, "seek"):
        loop.data.seek(loop.step)
    else:
        told.append(
            "note: the data iterator cannot be moved, so its images start again from the beginning"
        )
    return told


def restore_optimizer(opt: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take over a state_dict, also one of guided-diffusion's or of weights in another layout.

    Raises:
        ValueError: it is of other parameters.
    """
    for group in saved[
        "param_groups"
    ]:  # how it is computed is this program's business, not the checkpoint's
        group.update(fused=opt.defaults["fused"], foreach=opt.defaults["foreach"])
    opt.load_state_dict(saved)
    _take_layout_of_parameters(opt)


def _take_layout_of_parameters(opt: torch.optim.Optimizer) -> None:
    """Moments in the strides of their parameters, whatever those of the run that saved them were.

    Fused AdamW walks through memory: on a CPU it silently mixes elements up where strides differ
    (seen in PyTorch 2.13).
    """
    for p, state in opt.state.items():
        for name, value in state.items():
            if (
                isinstance(value, Tensor)
                and value.shape == p.shape
                and value.stride() != p.stride()
            ):
                state[name] = torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(
                    value
                )
