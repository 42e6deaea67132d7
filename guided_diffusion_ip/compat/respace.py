"""guided_diffusion.respace: a process on a subset of another's steps, whose network is wrapped.

In the library, respacing is the process's `_scale_timesteps`. In guided-diffusion, and here, it is
in the network that the methods see: `_WrappedModel` maps each t to the step that the network was
trained on, and rescales it, so that a subclass may replace `_scale_timesteps` or ask the wrapped
network by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch as th
from torch import Tensor

from ..diffusion import respace as core
from ..diffusion.guidance import CondFn
from ..diffusion.process import Network
from ..diffusion.respace import space_timesteps
from ..diffusion.solvers.loop import Output
from .gaussian_diffusion import GaussianDiffusion

__all__ = [  # what a star import brought: modules too
    "GaussianDiffusion",
    "SpacedDiffusion",
    "np",
    "space_timesteps",
    "th",
]


class SpacedDiffusion(GaussianDiffusion):
    """A process on a subset of another's timesteps, under guided-diffusion's hooks.

    Args:
        use_timesteps: original timesteps to keep.
        kwargs: as for GaussianDiffusion; `betas` are the original ones.
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs: Any) -> None:
        kinds = ("betas", "model_mean_type", "model_var_type", "loss_type")
        spaced = core.SpacedDiffusion(
            use_timesteps, **{name: value for name, value in kwargs.items() if name in kinds}
        )
        self.use_timesteps = spaced.use_timesteps
        self.timestep_map = spaced.timestep_map
        self.original_num_steps = spaced.original_num_steps
        self._original = dict(kwargs)
        super().__init__(**{**kwargs, "betas": spaced.betas})

    # These read what __init__ sets.
    whole = core.SpacedDiffusion.whole
    finer = core.SpacedDiffusion.finer
    _original_without_scaling = core.SpacedDiffusion._original_without_scaling

    def _wrap_model(self, model: Network) -> Network:
        """`model` with the map of timesteps in it; a wrapped one is left as it is."""
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(
            model, self.timestep_map, self.rescale_timesteps, self.original_num_steps
        )

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """t as it is: the wrapped network does the rest."""
        return t

    def call_model(
        self, model: Network, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        return super().call_model(self._wrap_model(model), x, t, model_kwargs)

    def p_mean_variance(self, model: Network, *args: Any, **kwargs: Any) -> Output:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Network, *args: Any, **kwargs: Any) -> Output:
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: CondFn, *args: Any, **kwargs: Any) -> Tensor:
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: CondFn, *args: Any, **kwargs: Any) -> Output:
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)


class _WrappedModel:
    """A network, or a cond_fn, that is called with the t of a spaced process.

    Args:
        timestep_map: the original step that each t stands for.
        rescale_timesteps: hand the network t * 1000 / original_num_steps, a float.
    """

    def __init__(
        self,
        model: Network,
        timestep_map: Sequence[int],
        rescale_timesteps: bool,
        original_num_steps: int,
    ) -> None:
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        t = th.tensor(self.timestep_map, device=ts.device, dtype=ts.dtype)[ts]
        if self.rescale_timesteps:
            t = t.float() * (1000.0 / self.original_num_steps)
        return self.model(x, t, **kwargs)
