"""What is about to be trained, told before the first step."""
from __future__ import annotations

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
    if loop.max_steps:
        limits.append(f"after {loop.max_steps} steps")
    if loop.lr_anneal_steps:
        limits.append(f"after {loop.lr_anneal_steps} steps, lr falling to 0")
    facts = {
        "output": out_dir,
        "device": f"{device_text(loop.device)}, {loop.world} process{'es' if loop.world > 1 else ''}",
        "batch": f"{loop.batch_size} per process, {loop.global_batch} in all"
                 + (f", in microbatches of {loop.microbatch}" if loop.microbatch < loop.batch_size else ""),
        "precision": loop.precision.mode,
        "images": f"{n}, [{', '.join(map(str, image_shape))}] (channels, height, width) in [{low:g}, {high:g}]",
        "classes": f"{len(classes)}" if classes else "not used",
        "parameters": f"{parameters / 1e6:.2f} million",
        "process": f"T = {process.num_timesteps}, {process.model_mean_type.value}, {process.model_var_type.value} variance, "
                   f"gamma {process.input_perturbation:g}, t by {type(loop.schedule_sampler).__name__}",
        "EMA": rates,
        "stops": " or ".join(limits) or "never by itself: runs until it is stopped (--max_steps N sets a limit)",
    }
    return "\n".join(f"  {name:<11}{text}" for name, text in facts.items())


def warn_about_ema(loop: TrainLoop) -> str:
    """A hint if the average will still remember its random start when training ends, or ''."""
    if loop.last_step is None or not loop.emas:
        return ""
    rate = loop.emas[0].rate
    left = rate**loop.last_step
    if left < 0.05:
        return ""
    better = round(1 - 5 / loop.last_step, 4) if loop.last_step > 5 else 0.0
    return (f"note: after {loop.last_step} steps, {left:.0%} of the weights averaged with rate {rate} will still be the "
            f"random start; --ema_rate {better} would suit so short a run")


