"""TrainSettings: every number that the training loop takes, as one checked value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .checkpoint import SavePolicy
from .ema import check_rate
from .precision import check_mode
from .stopping import Limits


@dataclass(frozen=True)
class TrainSettings:
    """How to train; what is trained on which images are TrainLoop's other arguments.

    Args:
        batch_size: images per process and step.
        microbatch: images per forward pass; 0 or less: the whole batch. The gradient is that of
            the batch in any case.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        lr_warmup_steps: if > 0, lr rises linearly over so many steps.
        lr_anneal_steps: if > 0, lr falls linearly to 0 and training stops there.
        grad_clip: if > 0, gradients whose norm is larger are scaled down to it.
        max_skipped: so many steps in a row without finite gradients end the run.
        ema_rates: one set of averaged weights for each; those of the first are previewed and
            evaluated.
        ema_warmup: let the averages forget their start: rate min(rate, (1 + n) / (10 + n)) in
            update n.
        precision: fp32, fp16 or bf16, inside the network; weights are always float32.
        fp16_scale_growth: growth of log2(loss scale) per step in fp16.
        compile: call the network through torch.compile.
        seed: of t, epsilon, xi and dropout.
        log_interval: steps between log lines.
        limits: when to stop.
        saving: when to write checkpoints, and which of them to keep.
        resume: a modelNNNNNN.pt to continue from, or these weights under another name; their ema,
            opt and state files must lie beside them. '' starts at step 0.
        record: the run's flags by section; saved with every checkpoint, and compared on resume.

    Raises:
        ValueError: a value outside its range.
    """

    batch_size: int
    microbatch: int = -1
    lr: float = 1e-4
    weight_decay: float = 0.0
    lr_warmup_steps: int = 0
    lr_anneal_steps: int = 0
    grad_clip: float = 0.0
    max_skipped: int = 25
    ema_rates: tuple[float, ...] = (0.9999,)
    ema_warmup: bool = False
    precision: str = "fp32"
    fp16_scale_growth: float = 1e-3
    compile: bool = False
    seed: int = 0
    log_interval: int = 100
    limits: Limits = field(default_factory=Limits)
    saving: SavePolicy = field(default_factory=SavePolicy)
    resume: str = ""
    record: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("lr", 0),
            ("weight_decay", 0),
            ("lr_warmup_steps", 0),
            ("lr_anneal_steps", 0),
            ("grad_clip", 0),
            ("max_skipped", 1),
            ("seed", 0),
            ("log_interval", 1),
        ):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least {least}, got {value}")
        for rate in self.ema_rates:
            check_rate(rate)
        check_mode(self.precision, self.fp16_scale_growth)

    @property
    def images_per_pass(self) -> int:
        """Images in a forward pass: `microbatch`, or the whole batch."""
        return self.microbatch if self.microbatch > 0 else self.batch_size

    def last_step(self, world: int) -> int | None:
        """Where training with `world` processes stops by itself; None if it does not."""
        by_limits = self.limits.last_step(self.batch_size * world)
        return min(filter(None, (self.lr_anneal_steps, by_limits)), default=None)
