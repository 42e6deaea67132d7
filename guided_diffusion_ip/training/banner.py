"""What is about to be trained, in a few lines for the log before the first step."""

from __future__ import annotations

import torch
from torch import nn

from .. import dist_util
from ..diffusion.process import Process, describe
from .protocols import Batches
from .settings import TrainSettings
from .timestep_samplers import ScheduleSampler


def device_text(device: torch.device) -> str:
    """cpu (8 threads), or cuda:0 (NVIDIA H200)."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def banner(
    model: nn.Module,
    process: Process,
    data: Batches,
    settings: TrainSettings,
    *,
    schedule_sampler: ScheduleSampler,
    image_shape: tuple[int, int, int],
    out_dir: str,
) -> str:
    """One fact per line. image_shape: (C, H, W); process: one of this library's."""
    low, high = getattr(data, "value_range", (-1, 1))
    shape = ", ".join(map(str, image_shape))
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "output": out_dir,
        "device": _device_and_processes(next(model.parameters()).device),
        "batch": _batch(settings),
        "precision": settings.precision,
        "images": f"{getattr(data, 'num_images', None)}, [{shape}] (channels, height, width) in "
        f"[{low:g}, {high:g}]",
        "classes": _classes(data),
        "parameters": f"{parameters / 1e6:.2f} million",
        "process": f"{describe(process)}, t by {type(schedule_sampler).__name__}",
        "EMA": ", ".join(map(str, settings.ema_rates)) or "none",
        "stops": _end(settings),
    }
    return "\n".join(f"  {name:<11}{text}" for name, text in facts.items())


def _device_and_processes(device: torch.device) -> str:
    world = dist_util.get_world_size()
    return f"{device_text(device)}, {world} process{'es' if world > 1 else ''}"


def _batch(settings: TrainSettings) -> str:
    each, at_once = settings.batch_size, settings.images_per_pass
    text = f"{each} per process, {each * dist_util.get_world_size()} in all"
    return text + (f", in microbatches of {at_once}" if at_once < each else "")


def _classes(data: Batches) -> str:
    classes, dropped = getattr(data, "classes", None), getattr(data, "class_dropout", 0)
    if not classes:
        return "not used"
    note = f", and {dropped:.3g} of the labels replaced by 'no class'" if dropped else ""
    return f"{len(classes)}{note}"


def _end(settings: TrainSettings) -> str:
    limits, ends = settings.limits, []
    if step := limits.last_step(settings.batch_size * dist_util.get_world_size()):
        ends.append(f"after {step} steps")
    if limits.max_hours:
        ends.append(f"after {limits.max_hours:g} hours")
    if settings.lr_anneal_steps:
        ends.append(f"after {settings.lr_anneal_steps} steps, lr falling to 0")
    return " or ".join(ends) or "never by itself"


def warn_about_ema(settings: TrainSettings, last_step: int | None) -> str:
    """A hint if the first average will still remember its random start at the end, or ''."""
    if last_step is None or not settings.ema_rates or settings.ema_warmup:
        return ""
    rate = settings.ema_rates[0]
    left = rate**last_step
    if left < 0.05:
        return ""
    # Leaves exp(-5), or 3 % once rounded.
    better = 1 - float(f"{5 / last_step:.0e}") if last_step > 5 else 0.0
    return (
        f"note: after {last_step} steps, {left:.0%} of the weights averaged with rate {rate} "
        f"will still be the random start; --ema_rate {better:.10g} or --ema_warmup True would suit "
        "so short a run"
    )
