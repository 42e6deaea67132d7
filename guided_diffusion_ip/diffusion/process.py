"""What training asks of a diffusion process, as protocols: a process is whatever has these members.

GaussianDiffusion, SpacedDiffusion and EDMProcess satisfy `Process`; so does a class of one's own,
without inheriting from anything here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

Network = Callable[..., Tensor]  # called as model(x [N, C, H, W], t [N], **model_kwargs)
RandnLike = Callable[[Tensor], Tensor]  # standard normal noise shaped like x: torch.randn_like
DenoisedFn = Callable[[Tensor], Tensor]  # applied to x_0_hat before it is clipped


class HasTimesteps(Protocol):
    """What a timestep sampler needs: T. `continuous = True` besides says that t is any number in
    [0, T), not one of 0 .. T - 1.
    """

    @property
    def num_timesteps(self) -> int: ...


class Process(HasTimesteps, Protocol):
    """What TrainLoop needs of a process. One of one's own must have

        num_timesteps     T; t = 0 is the clean end
        training_losses   as below

    and may have

        continuous        True: `training_losses` takes a float t [N] in [0, T); absent or False:
                          an int64 t [N] of 0 .. T - 1
        augment_uniforms  how many uniform numbers an image's augmentation takes; if it is not 0,
                          model_kwargs has `augment_uniforms`, float [N, augment_uniforms] in [0, 1)
    """

    def training_losses(
        self,
        model: Network,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        gamma: float | None = None,
        randn_like: RandnLike | None = None,
    ) -> dict[str, Tensor]:
        """`loss` [N], which is minimised, and whatever else is to be logged, [N] each.

        Args:
            model: called as the process sees fit; `model_kwargs` go to it.
            x_start: clean images [N, C, H, W] in [-1, 1].
            t: timesteps [N].
            noise: epsilon, shaped like x_start.
            gamma: strength of the input perturbation; the training loop leaves it to the process.
            randn_like: source of the input perturbation's noise, to be called only if there is one.
        """
        ...


class NoisingProcess(HasTimesteps, Protocol):
    """What the training of a classifier needs: noised images, and t as a network receives it."""

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t [N, C, H, W] of the images x_start at t [N]."""
        ...

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """t [N] in the form that networks are called with."""
        ...


def is_continuous(process: HasTimesteps) -> bool:
    """Is t any number in [0, T)?"""
    return bool(getattr(process, "continuous", False))


def uniforms_per_image(process: HasTimesteps) -> int:
    """How many uniform numbers an image's augmentation takes; 0 without one."""
    return int(getattr(process, "augment_uniforms", 0))


def describe(process: HasTimesteps) -> str:
    """A process in words: T, what is predicted, gamma, and loss weights that are not uniform; the
    class and T of one that is not this library's.
    """
    from .edm_losses import EDMProcess  # here, because their files import this one
    from .gaussian_diffusion import GaussianDiffusion

    if isinstance(process, EDMProcess):
        return f"{process.loss}, gamma {process.input_perturbation:g}"
    if not isinstance(process, GaussianDiffusion):
        return f"{type(process).__name__}, T = {process.num_timesteps}"
    gamma = f"gamma {process.input_perturbation:g}"
    text = (
        f"T = {process.num_timesteps}, {process.model_mean_type.value}, "
        f"{process.model_var_type.value} variance, {gamma}"
    )
    rule, weights = process.loss_weighting.rule, process.loss_weights
    if rule == "uniform":
        return text
    ends = f"{weights[0]:.3g} at t = 0, {weights[-1]:.3g} at t = {len(weights) - 1}"
    return f"{text}, loss weights {rule} ({ends})"
