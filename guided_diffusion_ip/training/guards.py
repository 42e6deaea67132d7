"""What keeps a run from ruining itself in silence: checks of the data, of losses and gradients, and
advice when memory ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import dist_util, logger
from ..diffusion.process import HasTimesteps
from . import checkpoint
from .protocols import Losses
from .settings import TrainSettings


class Diverged(ValueError):
    """Training cannot go on: losses or gradients are not finite."""


def check_batch(images: Tensor, cond: dict[str, Tensor], model: nn.Module, batch_size: int) -> None:
    """Before the first step: are these the images that the network is for?

    Args:
        images: [N, C, H, W]; N = batch_size expected.

    Raises:
        ValueError: another shape or type, or values that are not in [-1, 1].
    """
    wanted = f"float [N, C, H, W] in [-1, 1], with N = {batch_size}"
    found = f"the first batch is {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    if not images.is_floating_point() or images.ndim != 4 or len(images) != batch_size:
        raise ValueError(f"{found}; expected {wanted}")
    channels = getattr(model, "in_channels", None)
    # A super-resolution network concatenates low_res to the images.
    if channels is not None and images.shape[1] * (2 if "low_res" in cond else 1) != channels:
        raise ValueError(f"{found}, but the network takes {channels} channels; expected {wanted}")
    if not torch.isfinite(images).all():
        raise ValueError(f"{found} with values that are not finite; expected {wanted}")
    low, high = float(images.min()), float(images.max())
    if low < -1.001 or high > 1.001:
        raise ValueError(
            f"{found} with values from {low:g} to {high:g}; expected {wanted}: divide uint8 by "
            "127.5 and subtract 1"
        )


def range_note(images: Tensor) -> str:
    """A hint if a batch looks like [0, 1] instead of [-1, 1], or ''."""
    if len(images) >= 2 and float(images.min()) >= 0 and float(images.max()) > 0.5:
        return (
            "warning: no value of the first batch is below 0: images in [0, 1]? The process is "
            "made for [-1, 1]; use 2 x - 1 (or the images are all brighter than middle grey)"
        )
    return ""


def first_bad_module(model: nn.Module, run: Callable[[], Losses]) -> tuple[str, Losses]:
    """The first module, in the order of computation, whose output is not finite while `run` calls
    the model ('' if none), and what `run` returns.
    """
    names = {module: name for name, module in model.named_modules() if not any(module.children())}
    bad: list[str] = []

    def look(module: nn.Module, _: object, output: object) -> None:
        if bad or not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if not torch.isfinite(output).all():
            bad.append(f"{names[module]} ({type(module).__name__})")

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        with torch.no_grad():
            losses = run()
    finally:
        for hook in hooks:
            hook.remove()
    return (bad[0] if bad else ""), losses


def bad_losses(losses: Losses, t: Tensor, num_timesteps: int) -> str:
    """Which terms [N] are not finite, and at which t: 'mse, loss at t = 912 (quartile q3)'; '' if
    all are.
    """
    terms = [name for name, values in losses.items() if not torch.isfinite(values).all()]
    if not terms:
        return ""
    # "loss" is the sum of the others: named last, and alone only if it is alone.
    terms = [name for name in terms if name != "loss"] or terms
    at = t[~torch.isfinite(losses[terms[0]])]
    quartiles = sorted({int(4 * x // num_timesteps) for x in at.tolist()})
    return (
        f"{', '.join(terms)} at t = "
        f"{', '.join(map(str, at.tolist()[:4]))}{', ...' if len(at) > 4 else ''} (quartile "
        f"{', '.join(f'q{q}' for q in quartiles)}; q0 is the clean end)"
    )


def diagnose(
    model: nn.Module,
    batch: Tensor,
    t: Tensor,
    microbatches: Iterable[tuple[Callable[[], Losses], slice]],
    process: HasTimesteps,
    precision: str,
) -> str:
    """Which term of the losses is not finite, on which rank, at which t, from which module on, and
    what to do. A collective: all ranks say the same, whichever of them ends first.

    Computed again: everything drawn in a step can be drawn again.

    Args:
        batch, t: this rank's images [N, C, H, W] and timesteps [N].
        microbatches: what computes the losses of each again, by calling `model`, and its images.
        precision: fp32, fp16 or bf16.
    """
    found = []
    if name := first_not_finite(model.named_parameters()):
        found.append(f"the weights {name} are not finite")
    if not torch.isfinite(batch).all():
        found.append("the images are not finite")
    for compute, part in microbatches:
        module, losses = first_bad_module(model, compute)
        if terms := bad_losses(losses, t[part], process.num_timesteps):
            found += [
                terms,
                f"first output that is not finite: {module}"
                if module
                else "all outputs of modules are finite",
            ]
            break
    here = dist_util.all_gather_objects("; ".join(found))
    where = (
        ". ".join(f"{text} (rank {rank})" for rank, text in enumerate(here) if text)
        or "all losses are, computed again"
    )
    saved = dist_util.broadcast_object(checkpoint.newest(logger.get_dir()))
    return (
        f"{where}. Nothing of this step has been kept; the last checkpoint is {saved or 'none'}. "
        "Try a lower --lr"
        + (", --precision fp32" if precision != "fp32" else "")
        + ", or look at the images"
    )


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The name of the first tensor that holds a NaN or an infinity, or ''."""
    return next(
        (name for name, x in tensors if x.is_floating_point() and not torch.isfinite(x).all()), ""
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Has an allocation failed, on a GPU or on the host?"""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def memory_advice(settings: TrainSettings, model: nn.Module) -> str:
    """The present values and what to try next, in the order of what costs least."""
    microbatch, device = settings.images_per_pass, next(model.parameters()).device
    checkpointing = bool(getattr(model, "use_checkpoint", False))
    return (
        f"out of memory on {device} with batch_size {settings.batch_size}, microbatch "
        f"{microbatch}, precision {settings.precision}, use_checkpoint {checkpointing}: try "
        + cheaper(microbatch, settings.precision, checkpointing, device)
    )


def cheaper(microbatch: int, precision: str, checkpointing: bool, device: torch.device) -> str:
    """The flag that saves memory at the least cost, among those that are left."""
    if precision == "fp32" and device.type == "cuda":
        return "--precision bf16 (or fp16 on a V100)"
    if microbatch > 1:
        half = max(1, microbatch // 2)
        return f"--microbatch {half} (the gradient stays that of the whole batch)"
    if not checkpointing:
        return "--use_checkpoint True (about a third slower)"
    return "a smaller network, or a device with more memory"
