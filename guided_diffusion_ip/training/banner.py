"""What is about to be trained, told before the first step."""

from __future__ import annotations

from typing import Any

import torch

from .train_loop import TrainLoop


def device_text(device: torch.device) -> str:
    """cpu (8 threads), or cuda:0 (NVIDIA H200)."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def banner(loop: TrainLoop, out_dir: str, image_shape: tuple[int, int, int]) -> str:
    """One fact per line."""
    data, process = loop.data, loop.diffusion
    n, classes = getattr(data, "num_images", None), getattr(data, "classes", None)
    low, high = getattr(data, "value_range", (-1, 1))
    parameters = sum(p.numel() for p in loop.model.parameters())
    rates = ", ".join(str(ema.rate) for ema in loop.emas) or "none"
    limits = []
    if step := loop.limits.last_step(loop.global_batch):
        limits.append(f"after {step} steps")
    if loop.limits.max_hours:
        limits.append(f"after {loop.limits.max_hours:g} hours")
    if loop.lr_anneal_steps:
        limits.append(f"after {loop.lr_anneal_steps} steps, lr falling to 0")
    facts = {
        "output": out_dir,
        "device": f"{device_text(loop.device)}, {loop.world} process{'es' if loop.world > 1 else ''}",
        "batch": f"{loop.batch_size} per process, {loop.global_batch} in all"
        + (f", in microbatches of {loop.microbatch}" if loop.microbatch < loop.batch_size else ""),
        "precision": loop.precision.mode,
        "images": f"{n}, [{', '.join(map(str, image_shape))}] (channels, height, width) in [{low:g}, {high:g}]",
        "classes": f"{len(classes)}{_dropped(data)}" if classes else "not used",
        "parameters": f"{parameters / 1e6:.2f} million",
        "process": f"{_kind(process)}, gamma {process.input_perturbation:g}, {_weights(process)}t by "
        f"{type(loop.schedule_sampler).__name__}",
        "EMA": rates,
        "stops": " or ".join(limits) or "never by itself",
    }
    return "\n".join(f"  {name:<11}{text}" for name, text in facts.items())


def _dropped(data: Any) -> str:
    share = getattr(data, "class_dropout", 0)
    return f", and {share:.3g} of the labels replaced by 'no class'" if share else ""


def _kind(process: Any) -> str:
    """T = 1000, epsilon, learned range variance; or the loss of a process with continuous noise
    levels.
    """
    if getattr(process, "continuous", False):
        return str(process.loss)
    return f"T = {process.num_timesteps}, {process.model_mean_type.value}, {process.model_var_type.value} variance"


def _weights(process: Any) -> str:
    """loss weights debias (0.01 at t = 0, 157 at t = 999); '' if they are uniform."""
    if getattr(process, "continuous", False):
        return ""
    rule, weights = process.loss_weighting.rule, process.loss_weights
    if rule == "uniform":
        return ""
    return f"loss weights {rule} ({weights[0]:.3g} at t = 0, {weights[-1]:.3g} at t = {len(weights) - 1}), "


def warn_about_ema(loop: TrainLoop) -> str:
    """A hint if the average will still remember its random start when training ends, or ''."""
    if loop.last_step is None or not loop.emas:
        return ""
    rate = loop.emas[0].rate
    left = rate**loop.last_step
    if left < 0.05 or loop.emas[0].warmup:
        return ""
    better = (
        1 - float(f"{5 / loop.last_step:.0e}") if loop.last_step > 5 else 0.0
    )  # leaves exp(-5), or 3 % once rounded
    return (
        f"note: after {loop.last_step} steps, {left:.0%} of the weights averaged with rate {rate} "
        f"will still be the random start; --ema_rate {better:.10g} or --ema_warmup True would suit "
        "so short a run"
    )
