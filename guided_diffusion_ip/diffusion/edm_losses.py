"""EDM's training losses: which noise levels to train on, what they weigh, and the process that a
training loop asks for losses.

Karras et al. 2022 (arXiv 2206.00364), Table 1, bottom. A loss is two functions, the same for all
three siblings:
    sigma(u)       the noise level at quantile u in (0, 1) of the training distribution, increasing
                   in u
    weight(sigma)  what |D(y + sigma n; sigma) - y|^2 is multiplied by
Quantiles rather than draws: training then owns the randomness, and u = t / num_timesteps is the "t"
of its logs.

Input perturbation in EDM's terms: D is given y + sigma (n + gamma xi), is told sigma, and has the
target y + sigma gamma xi, so that its implied epsilon (x - D) / sigma is trained towards n, as in
the IP paper, and not towards n + gamma xi.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .edm_schedules import VPSchedule
from .input_perturbation import check_gamma, perturb
from .losses import mean_flat
from .process import Network, RandnLike

if TYPE_CHECKING:
    from .edm_augmentation import Augmentation


@dataclass(frozen=True)
class EDMLoss:
    """ln sigma ~ N(P_mean, P_std^2), and the weight that makes EDM's preconditioned loss 1 at every
    sigma at the start.

    Raises:
        ValueError: P_std or sigma_data is not positive.
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("P_std", self.P_std), ("sigma_data", self.sigma_data)):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name} must be positive and finite, got {value:g}: published "
                    f"{getattr(EDMLoss, name):g}"
                )

    def sigma(self, u: Tensor) -> Tensor:
        return (self.P_mean + self.P_std * torch.special.ndtri(u)).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class VPLoss:
    """sigma of the variance-preserving SDE at a time that is uniform in [epsilon_t, 1].

    Raises:
        ValueError: a schedule that does not rise, or epsilon_t outside (0, 1).
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def __post_init__(self) -> None:
        if not (self.beta_d > 0 and self.beta_min >= 0):
            raise ValueError(
                f"the vp loss needs beta_d > 0 and beta_min >= 0, got {self.beta_d:g} and "
                f"{self.beta_min:g}: published 19.9 and 0.1"
            )
        if not 0 < self.epsilon_t < 1:
            raise ValueError(
                f"epsilon_t must lie between 0 and 1, got {self.epsilon_t:g}: published 1e-5"
            )

    def sigma(self, u: Tensor) -> Tensor:
        return VPSchedule(self.beta_d, self.beta_min).sigma(
            self.epsilon_t + u * (1 - self.epsilon_t)
        )

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / sigma**2


@dataclass(frozen=True)
class VELoss:
    """ln sigma uniform between sigma_min and sigma_max.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"the ve loss needs 0 < sigma_min < sigma_max, got {self.sigma_min:g} and "
                f"{self.sigma_max:g}: published 0.02 and 100"
            )

    def sigma(self, u: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / sigma**2


EDM_LOSSES = {"edm": EDMLoss, "vp": VPLoss, "ve": VELoss}


@dataclass(frozen=True)
class EDMProcess:
    """What a training loop needs of EDM: `num_timesteps`, and `training_losses` for a t that is
    continuous.

    Args:
        loss: EDMLoss, VPLoss or VELoss.
        input_perturbation: gamma of the IP paper, >= 0.
        augment: applied to the images; its labels go to the denoiser.
        num_timesteps: the unit of t, nothing else: t / num_timesteps is the quantile of sigma.

    Raises:
        ValueError: gamma < 0, or num_timesteps < 1.
    """

    loss: EDMLoss | VPLoss | VELoss
    input_perturbation: float = 0.0
    augment: Augmentation | None = None
    num_timesteps: int = 1000
    continuous = True

    def __post_init__(self) -> None:
        check_gamma(self.input_perturbation)
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {self.num_timesteps}")

    @property
    def augment_uniforms(self) -> int:
        """How many uniform numbers an image's augmentation takes; 0 without."""
        return self.augment.uniforms if self.augment is not None else 0

    def sigma(self, t: Tensor) -> Tensor:
        """The noise levels, float64 [N], of t in [0, num_timesteps)."""
        assert t.is_floating_point(), (
            "EDM's t is continuous: an integer t would train on a few noise levels only"
        )
        # Half the distance between neighbours of a 32-bit number in [0, 1): sigma is finite
        # whatever is drawn.
        return self.loss.sigma((t.double() / self.num_timesteps).clamp(2.0**-33, 1 - 2.0**-33))

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
        """Losses for one batch, means over pixels, [N] each.

        EDM's own code sums over them. Adam does not mind the factor C H W, except where root mean
        square gradients are not far above its eps (1e-8 in both): what it adds to their size counts
        C H W times more here.

        Args:
            model: a denoiser, called as model(x, sigma, labels), and with augment_labels= if there
                is an augmentation.
            x_start: clean images [N, C, H, W] in [-1, 1].
            t: float [N] in [0, num_timesteps).
            model_kwargs: `y`: labels; `augment_uniforms`: float [N, augment_uniforms] in [0, 1),
                drawn if absent.
            noise: n, [N, C, H, W]; drawn if absent.
            gamma: strength of the input perturbation; the process's own if absent.
            randn_like: source of n (unless given), then of xi (unless gamma is 0).

        Returns:
            `loss`, weighted, and `mse`, not weighted.
        """
        gamma = self.input_perturbation if gamma is None else check_gamma(gamma)
        given = dict(model_kwargs or {})
        labels, uniforms = given.pop("y", None), given.pop("augment_uniforms", None)
        if self.augment is not None:
            if uniforms is None:
                uniforms = torch.rand(len(x_start), self.augment_uniforms, device=x_start.device)
            x_start, given["augment_labels"] = self.augment(x_start, uniforms)
        if noise is None:
            noise = (randn_like or torch.randn_like)(x_start)
        sigma = self.sigma(t)
        spread = sigma.to(x_start.dtype).view(-1, *[1] * (x_start.ndim - 1))
        perturbed = perturb(noise, gamma, randn_like)
        target = x_start + spread * (perturbed - noise) if gamma else x_start
        denoised = model(x_start + spread * perturbed, sigma.to(x_start.dtype), labels, **given)
        mse = mean_flat((denoised - target) ** 2)
        return {"loss": mse * self.loss.weight(sigma).to(mse.dtype), "mse": mse}
