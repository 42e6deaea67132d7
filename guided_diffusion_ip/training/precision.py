"""Number formats of a training step: fp32 weights, averages and optimizer state; autocast inside the forward pass.

fp16 multiplies the loss by a scale that grows until gradients overflow; for fp32 and bf16 the scaler does nothing.
"""
from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """What the loop asks of a number format.

    Args:
        mode: fp32, fp16 or bf16.
        device: where the model is.
        scale_growth: growth of log2(loss scale) per step (fp16).
    """

    def __init__(self, mode: str, device: torch.device, scale_growth: float = 1e-3) -> None:
        if mode not in DTYPES:
            raise ValueError(f"unknown precision {mode!r}: use one of {', '.join(DTYPES)}")
        if mode == "fp16" and not scale_growth > 0:
            raise ValueError(f"fp16_scale_growth must be positive, got {scale_growth}: 0.001 is usual")
        self.mode = mode
        self.device_type = device.type
        interval = max(1, round(1 / scale_growth)) if scale_growth > 0 else 1000
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16, growth_interval=interval,
                                           enabled=mode == "fp16")

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device_type, DTYPES[self.mode], enabled=self.mode != "fp32")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients in their true size from here on; call once, before looking at them or stepping."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update, unless fp16 gradients have overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)
