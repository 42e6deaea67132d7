"""The reverse process p: what a network's output says about x_0 and x_{t-1}.

Everything that can be done with a process is a verb: a plain function whose first argument is the
process, in the file named after it. This class holds the settings, reads the network's output, and
binds the verbs as its methods:

    noise_schedule   q_sample, q_posterior_mean_variance, ... (the base class: needs no network)
    solvers          p_sample*, ddim_*: the only ones that read lambda (epsilon scaling)
    losses           training_losses: the only one that reads gamma (input perturbation)
    likelihood       calc_bpd_loop
    guidance         condition_mean, condition_score

A network is anything that is called as model(x, t, **model_kwargs), x [N, C, H, W], t [N], and
returns [N, C, H, W], or [N, 2C, H, W] when the variance is learned (prediction first, variance
second).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from . import guidance, likelihood, losses
from .epsilon_scaling import EpsilonScaling, divide, scale_xstart
from .input_perturbation import check_gamma
from .kinds import LossType, ModelMeanType, ModelVarType
from .loss_weighting import UNIFORM, LossWeighting, loss_weight_table
from .noise_schedule import NoiseSchedule
from .process import DenoisedFn, Network
from .solvers import ddim, ddpm

ProcessT = TypeVar("ProcessT", bound="GaussianDiffusion")


class GaussianDiffusion(NoiseSchedule):
    """A diffusion process with T = len(betas) steps.

    Args:
        betas: float [T], betas[0] at the clean end.
        model_mean_type: what the network predicts.
        model_var_type: where the variance of p(x_{t-1} | x_t) comes from.
        loss_type: what `training_losses` returns.
        rescale_timesteps: hand the network t * 1000 / T, a float, instead of t.
        input_perturbation: gamma of the IP paper, >= 0; read by `training_losses` only.
        eps_scaler: b of lambda(t) = k t + b, or T values; read by the sampling verbs only.
        eps_scaler_k: k.
        loss_weighting: what the MSE is multiplied by at each t; read by `training_losses` only.
        input_pertub: the published spelling of input_perturbation.

    Raises:
        ValueError: gamma < 0, lambda(t) <= 0 somewhere, impossible betas, a loss weighting that the
            loss or the prediction does not admit, or two spellings with different values.
    """

    def __init__(
        self,
        *,
        betas: Sequence[float] | np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        input_perturbation: float = 0.0,
        eps_scaler: float | Sequence[float] = 1.0,
        eps_scaler_k: float = 0.0,
        loss_weighting: LossWeighting = UNIFORM,
        input_pertub: float | None = None,
    ) -> None:
        super().__init__(betas)
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        if input_pertub is not None and input_perturbation not in (0.0, input_pertub):
            raise ValueError(
                f"input_perturbation={input_perturbation} and input_pertub={input_pertub} are two "
                "spellings of the same gamma with different values: give one"
            )
        gamma = input_perturbation if input_pertub is None else input_pertub
        self.input_perturbation = check_gamma(gamma, model_mean_type)
        self._scale_epsilon_by(EpsilonScaling.of(eps_scaler, eps_scaler_k))
        self.loss_weighting = loss_weighting
        self.loss_weights = loss_weight_table(loss_weighting, self.snr, model_mean_type, loss_type)

    def _scale_epsilon_by(self, scaling: EpsilonScaling) -> None:
        self.lambdas = scaling.lambdas(self.num_timesteps)
        self.scales_epsilon = bool((self.lambdas != 1).any())

    def with_scaling(self: ProcessT, scaling: EpsilonScaling) -> ProcessT:
        """The same process with another lambda(t).

        Raises:
            ValueError: a lambda that is not positive at some step, or a list of another length.
        """
        other = copy.copy(self)  # its cache of tables on the device is not copied
        other._scale_epsilon_by(scaling)
        return other

    def whole(self) -> GaussianDiffusion:
        """The process that this one is a subset of; itself unless respaced."""
        return self

    @property
    def input_pertub(self) -> float:
        """The published spelling of input_perturbation."""
        return self.input_perturbation

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """t as the network wants it. Every call to a network or to cond_fn goes through here."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def call_model(
        self, model: Network, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """model(x, t, **model_kwargs), with the number of output channels checked."""
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        channels = x.shape[1] * (2 if self.model_var_type.is_learned else 1)
        if output.shape != (x.shape[0], channels, *x.shape[2:]):
            raise ValueError(
                f"the network returned {tuple(output.shape)} for an input of {tuple(x.shape)}, "
                f"expected {channels} channels: model_var_type is {self.model_var_type.name}, so "
                f"learn_sigma must be {self.model_var_type.is_learned}"
            )
        return output

    def p_mean_variance(
        self,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        scale_epsilon: bool = False,
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t) and the prediction of x_0.

        Args:
            x: x_t, [N, C, H, W].
            t: int64 [N].
            clip_denoised: clamp x_0_hat to [-1, 1].
            denoised_fn: applied to x_0_hat before the clamp.
            scale_epsilon: divide the predicted epsilon by lambda(t). Off here; the sampling verbs
                switch it on.

        Returns:
            `mean`, `variance`, `log_variance`, `pred_xstart`, each [N, C, H, W].
        """
        output = self.call_model(model, x, t, model_kwargs)
        return self.read_output(output, x, t, clip_denoised, denoised_fn, scale_epsilon)

    def read_output(
        self,
        output: Tensor,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        scale_epsilon: bool = False,
    ) -> dict[str, Tensor]:
        """What `p_mean_variance` returns, from an output [N, C or 2C, H, W] that is already at
        hand.
        """
        prediction, log_variance = self._split_output(output, x, t)
        scaled = scale_epsilon and self.scales_epsilon
        x_start = self._predict_xstart(prediction, x, t, scaled)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        if self.model_mean_type is ModelMeanType.PREVIOUS_X and not scaled:
            mean = prediction
        else:
            mean = self.q_posterior_mean_variance(x_start, x, t)[0]
        return {
            "mean": mean,
            "variance": log_variance.exp(),
            "log_variance": log_variance,
            "pred_xstart": x_start,
        }

    def _split_output(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction and the log variance of p(x_{t-1} | x_t), both [N, C, H, W]."""
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            return output, self.at("posterior_log_variance_clipped", t, x).expand_as(x)
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            return output, self.at("fixed_large_log_variance", t, x).expand_as(x)
        prediction, raw = output.chunk(2, dim=1)
        if self.model_var_type is ModelVarType.LEARNED:
            return prediction, raw
        # LEARNED_RANGE: -1 .. 1 runs from the posterior variance to beta on a log scale (Nichol
        # 2021, Eq. 15).
        low = self.at("posterior_log_variance_clipped", t, x)
        high = self.at("log_betas", t, x)
        share = (raw + 1) / 2
        return prediction, share * high + (1 - share) * low

    def _predict_xstart(self, prediction: Tensor, x: Tensor, t: Tensor, scaled: bool) -> Tensor:
        """x_0_hat before clipping; `scaled` divides the (implied) epsilon by lambda(t), exactly
        once.
        """
        if self.model_mean_type is ModelMeanType.EPSILON:
            eps = divide(prediction, self.at("lambdas", t, x)) if scaled else prediction
            return self.xstart_from_eps(x, t, eps)
        if self.model_mean_type is ModelMeanType.START_X:
            x_start = prediction
        else:
            x_start = self.xstart_from_xprev(x, t, prediction)
        return scale_xstart(self, x, t, x_start, self.at("lambdas", t, x)) if scaled else x_start

    p_sample = ddpm.p_sample
    p_sample_loop = ddpm.p_sample_loop
    p_sample_loop_progressive = ddpm.p_sample_loop_progressive
    ddim_sample = ddim.ddim_sample
    ddim_reverse_sample = ddim.ddim_reverse_sample
    ddim_sample_loop = ddim.ddim_sample_loop
    ddim_sample_loop_progressive = ddim.ddim_sample_loop_progressive
    condition_mean = guidance.condition_mean
    condition_score = guidance.condition_score
    training_losses = losses.training_losses
    variational_bound = losses.variational_bound
    calc_bpd_loop = likelihood.calc_bpd_loop
