"""guided_diffusion.train_util: the training loop, and the helpers that users call or replace."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import dist_util, logger
from ..files import exists
from ..training import run_state, train_loop
from ..training.checkpoint import (
    checkpoint_name,
    find_ema_checkpoint,
    parse_resume_step_from_filename,
)

__all__ = [
    "TrainLoop",
    "find_ema_checkpoint",
    "find_resume_checkpoint",
    "get_blob_logdir",
    "log_loss_dict",
    "parse_resume_step_from_filename",
]


def get_blob_logdir() -> str:
    """Where checkpoints go: the logger's folder."""
    return logger.get_dir()


def find_resume_checkpoint() -> str | None:
    """None. Replace it to find the newest checkpoint by rules of your own; TrainLoop prefers what
    it says.
    """
    return None


def log_loss_dict(diffusion: Any, ts: Tensor, losses: Mapping[str, Tensor]) -> None:
    """Add losses [N] at timesteps ts [N] to the row: means over all, and by quarter of the process
    (_q0 the clean one).
    """
    quarters = (4 * ts // diffusion.num_timesteps).tolist()
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean())
        for quarter, value in zip(quarters, values.detach().tolist()):
            logger.logkv_mean(f"{name}_q{quarter}", value)


class TrainLoop(train_loop.TrainLoop):
    """The library's loop, for callers who prepare things as they had to for the published one.

    A network that has been converted to half precision comes back to float32, and use_fp16 means
    autocast; resume_checkpoint may also be the work of guided_diffusion, or weights alone (to
    fine-tune); the process may be one of their own, whose training_losses has the published
    parameters only.
    """

    @functools.wraps(train_loop.TrainLoop.__init__)  # its signature is ours
    def __init__(self, *, model: nn.Module, resume_checkpoint: str, **kwargs: Any) -> None:
        if any(p.dtype == torch.float16 for p in model.parameters()):
            model.float()
        super().__init__(
            model=model, resume_checkpoint=find_resume_checkpoint() or resume_checkpoint, **kwargs
        )

    def _training_losses(
        self,
        model: Callable[..., Tensor],
        images: Tensor,
        t: Tensor,
        cond: dict[str, Tensor],
        epsilon: Tensor,
        xi: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """The process's losses, given as much of the loop's noise as they take."""
        known = inspect.signature(self.diffusion.training_losses).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
        noise = {
            name: value
            for name, value in (("noise", epsilon), ("randn_like", xi))
            if anything or name in known
        }
        return self.diffusion.training_losses(model, images, t, model_kwargs=cond, **noise)

    def _resume(self, path: str) -> list[str]:
        """Continue from a whole set of ours exactly; from other checkpoints, with as much as lies
        beside them (for rank 0).
        """
        step, folder = parse_resume_step_from_filename(path), os.path.dirname(path)
        beside = {
            part: os.path.join(folder, checkpoint_name(part, step)) for part in ("opt", "state")
        }
        there = dist_util.from_main(lambda: {part: exists(file) for part, file in beside.items()})
        if os.path.basename(path) == checkpoint_name("model", step) and there["state"]:
            return super()._resume(path)
        self.model.load_state_dict(dist_util.load_state_dict_once(path, self.device))
        fresh = ["timestep sampler"] if self.schedule_sampler.state_dict() else []
        for ema in self.emas:
            averaged = dist_util.broadcast_object(find_ema_checkpoint(path, step, ema.rate))
            weights = (
                dist_util.load_state_dict_once(averaged, self.device)
                if averaged
                else self.model.state_dict()
            )
            ema.load_state_dict(weights, step)
            fresh += [] if averaged else [f"average of rate {ema.rate}"]
        if not (there["opt"] and self._adopt_optimizer(beside["opt"])):
            fresh.append("optimizer")
        self.step = step
        if hasattr(self.data, "seek"):
            self.data.seek(step)
        return [
            f"continuing from {path}: {step} steps done"
            + (f"; starting afresh: {', '.join(fresh)}" if fresh else "")
        ]

    def _adopt_optimizer(self, path: str) -> bool:
        saved = dist_util.load_state_dict_once(path, self.device)
        try:
            run_state.restore_optimizer(self.opt, saved)
        except ValueError:  # guided_diffusion's fp16 training kept all weights in two long vectors
            return False
        return True
