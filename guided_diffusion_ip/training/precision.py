"""Number formats of a training step: fp32 weights, averages and optimizer state; autocast inside
the forward pass.

fp16 multiplies the loss by a scale that grows until gradients overflow; for fp32 and bf16 the
scaler does nothing. The same code runs on CPU and GPU. fp16 needs nothing that a V100 lacks.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LEAST_SCALE = 1.0  # below it, gradients that overflow do so by themselves


def check_mode(mode: str, scale_growth: float) -> None:
    """Is there such a number format?

    Raises:
        ValueError: an unknown mode, or for fp16 a growth of the loss scale that is not positive.
    """
    if mode not in DTYPES:
        raise ValueError(f"unknown precision {mode!r}: use one of {', '.join(DTYPES)}")
    if mode == "fp16" and not scale_growth > 0:
        raise ValueError(f"fp16_scale_growth must be positive, got {scale_growth}: 0.001 is usual")


def check_device(mode: str, device: torch.device) -> None:
    """Can this device do it, with this build of PyTorch?

    Raises:
        ValueError: bf16 on a GPU without bf16 units, or a GPU that the installed PyTorch has no
            code for.
    """
    if (
        device.type != "cuda" or torch.version.hip
    ):  # ROCm names code and capabilities by other rules
        return
    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    known = torch.cuda.get_arch_list()
    # Code for x.y runs on x.z with z >= y; PTX (compute_..) is compiled for newer devices when
    # loaded.
    binary = any(
        int(arch[3:-1]) == major and int(arch[-1]) <= minor
        for arch in known
        if arch[:3] == "sm_" and arch[3:].isdigit()
    )
    ptx = any(
        int(arch[8:]) <= 10 * major + minor
        for arch in known
        if arch[:8] == "compute_" and arch[8:].isdigit()
    )
    if known and not (binary or ptx):
        raise ValueError(
            f"PyTorch {torch.__version__} has no code for {name} (sm_{major}{minor}; it has "
            f"{', '.join(known)}): install another build, for a V100: pip install torch "
            "--index-url https://download.pytorch.org/whl/cu126"
        )
    if mode == "bf16" and major < 8:
        raise ValueError(f"{name} (sm_{major}{minor}) has no bf16 units: use --precision fp16")


class Precision:
    """What the loop asks of a number format.

    Args:
        mode: fp32, fp16 or bf16.
        device: where the model is.
        scale_growth: growth of log2(loss scale) per step (fp16).

    Raises:
        ValueError: an unknown mode, one that the device cannot do, or a growth that is not
            positive.
    """

    def __init__(self, mode: str, device: torch.device, scale_growth: float = 1e-3) -> None:
        check_mode(mode, scale_growth)
        check_device(mode, device)
        self.mode = mode
        self.device_type = device.type
        interval = max(1, round(1 / scale_growth)) if scale_growth > 0 else 1000
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=2.0**16, growth_interval=interval, enabled=mode == "fp16"
        )

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device_type, DTYPES[self.mode], enabled=self.mode != "fp32")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients in their true size from here on; call once, before looking at them
        or stepping.
        """
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights; call with finite gradients."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def skip(self) -> str:
        """Instead of `step`, when gradients have overflowed: halve the loss scale. Returns what to
        tell, '' outside fp16.
        """
        if self.mode != "fp16":
            return ""
        before = self.scaler.get_scale()
        after = max(before / 2, _LEAST_SCALE)
        self.scaler.update(after)
        # update() counts good steps on from before; the scale is to grow after so many without one
        # like this.
        self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})
        if after == before:
            return f"loss scale stays at its least, {after:g}"
        return (
            f"loss scale {before:g} -> {after:g} (usual in the first steps of fp16, and now and "
            "then later)"
        )

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises nothing if the run was saved in another format: a fresh loss scale then, and a
        warning.
        """
        if bool(state) != self.scaler.is_enabled():
            warnings.warn(
                "the checkpoint was written in another precision: the loss scale starts afresh"
            )
        elif state:
            self.scaler.load_state_dict(state)


def resolve(precision: str, use_fp16: bool) -> str:
    """The mode that --precision and guided-diffusion's --use_fp16 mean together.

    Raises:
        ValueError: they contradict each other.
    """
    if use_fp16 and precision not in ("", "fp16"):
        raise ValueError(
            f"--use_fp16 True and --precision {precision} contradict each other: keep one"
        )
    return "fp16" if use_fp16 else precision or "fp32"
