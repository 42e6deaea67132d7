"""guided_diffusion.gaussian_diffusion: the process for those who subclass it or replace its parts.

The mathematics is diffusion's. What differs is who calls whom: every method of guided-diffusion's
class, private ones too, is called by its published name and parameters wherever guided-diffusion
called it, so that a subclass, or a function set on an instance, takes effect there. Functions of
this module (`mean_flat`, `_extract_into_tensor`, ...) are looked up when they are used, and may be
replaced as well.

The sampling methods are in `sampling`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch as th
from torch import Tensor

from ..diffusion import gaussian_diffusion as core
from ..diffusion import noise_schedule
from ..diffusion.input_perturbation import check_gamma, perturb
from ..diffusion.kinds import LossType, ModelMeanType, ModelVarType
from ..diffusion.losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from ..diffusion.noise_schedule import HasDimensions, betas_for_alpha_bar
from ..diffusion.process import DenoisedFn, Network, RandnLike
from ..diffusion.solvers.loop import Output
from . import sampling

__all__ = [  # what a star import brought: modules too
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "enum",
    "get_named_beta_schedule",
    "math",
    "mean_flat",
    "normal_kl",
    "np",
    "th",
]


def _cosine_level(u: float) -> float:
    # Nichol & Dhariwal 2021, Eq. 17, with s = 0.008.
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Betas, float64 [T]; "cosine" goes through this module's `betas_for_alpha_bar`.

    Raises:
        ValueError: unknown name, fewer than 1 step, or `linear` with fewer than 21 steps.
    """
    if schedule_name == "cosine" and num_diffusion_timesteps >= 1:
        return betas_for_alpha_bar(num_diffusion_timesteps, _cosine_level)
    return noise_schedule.get_named_beta_schedule(schedule_name, num_diffusion_timesteps)


def _extract_into_tensor(
    arr: np.ndarray, timesteps: Tensor, broadcast_shape: Sequence[int]
) -> Tensor:
    """arr[timesteps], float32, expanded to broadcast_shape [N, ...]; every table is read here."""
    table = th.from_numpy(np.asarray(arr, dtype=np.float64)).to(th.float32)
    values = table.to(timesteps.device)[timesteps]
    return values.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(tuple(broadcast_shape))


class GaussianDiffusion(core.GaussianDiffusion):
    """The library's process under guided-diffusion's hooks; constructed as the library's.

    `gamma` and `randn_like`, which guided-diffusion's methods do not have, are passed on only where
    they were given.
    """

    @property
    def input_pertub(self) -> float:
        """The IP paper's spelling of input_perturbation; it may also be set."""
        return self.input_perturbation

    @input_pertub.setter
    def input_pertub(self, gamma: float) -> None:
        self.input_perturbation = check_gamma(gamma, self.model_mean_type)

    # ---- what the library's verbs call, led through the hooks ----

    def at(self, table: str, t: Tensor, like: HasDimensions) -> Tensor:
        """`table`[t] as float32, expanded to the shape of `like` [N, ...] where it has one."""
        shape = like.shape if isinstance(like, Tensor) else (len(t), *[1] * (like.ndim - 1))
        return _extract_into_tensor(getattr(self, table), t, shape)

    def xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self._predict_xstart_from_eps(x_t=x_t, t=t, eps=eps)

    def eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        return self._predict_eps_from_xstart(x_t, t, x_start)

    def xstart_from_xprev(self, x_t: Tensor, t: Tensor, x_prev: Tensor) -> Tensor:
        return self._predict_xstart_from_xprev(x_t=x_t, t=t, xprev=x_prev)

    def variational_bound(
        self,
        model_output: Tensor,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
    ) -> Output:
        def answered(*_: Any, **__: Any) -> Tensor:
            return model_output

        return self._vb_terms_bpd(
            model=answered, x_start=x_start, x_t=x_t, t=t, clip_denoised=clip_denoised
        )

    # ---- the hooks ----

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return super().xstart_from_eps(x_t, t, eps)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return super().eps_from_xstart(x_t, t, pred_xstart)

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        return super().xstart_from_xprev(x_t, t, xprev)

    def p_mean_variance(
        self,
        model: Network,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        scale_epsilon: bool | None = None,
    ) -> Output:
        """p(x_{t-1} | x_t) and the prediction of x_0, as the library's; by default epsilon is
        divided by lambda(t) if it is a sampling method that asks.
        """
        scaled = sampling.scaling.get() if scale_epsilon is None else scale_epsilon
        output = super().call_model(model, x, t, model_kwargs)
        read = self.read_output(output, x, t, clip_denoised, denoised_fn, scaled)
        if self.model_var_type is ModelVarType.FIXED_SMALL:  # which is 0 at t = 0, its log is not
            read["variance"] = self.at("posterior_variance", t, x)
        return read

    def _vb_terms_bpd(
        self,
        model: Network,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Output:
        """The variational bound's term at t in bits per dimension, `output` [N], and `pred_xstart`
        (Ho et al. 2020, Eq. 5); see `losses.variational_bound`.
        """
        mean, _, log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        p = self.p_mean_variance(
            model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
        )
        kl = mean_flat(normal_kl(mean, log_variance, p["mean"], p["log_variance"]))
        log_likelihood = discretized_gaussian_log_likelihood(
            x_start, means=p["mean"], log_scales=0.5 * p["log_variance"]
        )
        term = th.where(t == 0, -mean_flat(log_likelihood), kl) / math.log(2)
        return {"output": term, "pred_xstart": p["pred_xstart"]}

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """What the schedule leaves of x_start at the noisy end, [N]; see `likelihood.prior_bpd`."""
        last = th.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        zero = th.zeros_like(mean)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)

    # ---- training and likelihood ----

    def training_losses(
        self,
        model: Network,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        gamma: float | None = None,
        randn_like: RandnLike | None = None,
    ) -> Output:
        """Losses for one batch, [N] each; see `losses.training_losses`."""
        gamma = (
            self.input_perturbation if gamma is None else check_gamma(gamma, self.model_mean_type)
        )
        if noise is None:
            noise = (randn_like or th.randn_like)(x_start)
        x_t = self.q_sample(x_start, t, noise=perturb(noise, gamma, randn_like))
        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(
                model=model,
                x_start=x_start,
                x_t=x_t,
                t=t,
                clip_denoised=False,
                model_kwargs=model_kwargs,
            )["output"]
            rescaled = self.loss_type is LossType.RESCALED_KL
            return {"loss": loss * self.num_timesteps if rescaled else loss}
        output = super().call_model(model, x_t, t, model_kwargs)
        return self._mse_terms(output, x_start, x_t, t, noise)

    def _mse_terms(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> Output:
        channels = x_start.shape[1]
        prediction, target = output[:, :channels], noise
        if self.model_mean_type is ModelMeanType.START_X:
            target = x_start
        elif self.model_mean_type is ModelMeanType.PREVIOUS_X:
            target = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
        mse = mean_flat((target - prediction) ** 2)
        if self.loss_weighting.rule != "uniform":
            mse = mse * self.at("loss_weights", t, mse)
        if not self.model_var_type.is_learned:
            return {"mse": mse, "loss": mse}
        # The bound teaches the variance only (Nichol & Dhariwal 2021, Sec. 3.1).
        frozen = th.cat([prediction.detach(), output[:, channels:]], dim=1)
        vb = self.variational_bound(frozen, x_start, x_t, t, clip_denoised=False)["output"]
        if self.loss_type is LossType.RESCALED_MSE:
            vb = vb * (self.num_timesteps / 1000)
        return {"mse": mse, "vb": vb, "loss": mse + vb}

    def calc_bpd_loop(
        self,
        model: Network,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        randn_like: RandnLike | None = None,
        progress: bool = False,
    ) -> Output:
        """The variational bound term by term; see `likelihood.calc_bpd_loop`."""
        steps: Iterable[int] = range(self.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm.auto import tqdm

            steps = tqdm(steps, desc="likelihood", unit="step", leave=False)
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for index in steps:
            t = th.full((len(x_start),), index, device=x_start.device)
            noise = (randn_like or th.randn_like)(x_start)
            x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
            with th.no_grad():
                term = self._vb_terms_bpd(
                    model,
                    x_start=x_start,
                    x_t=x_t,
                    t=t,
                    clip_denoised=clip_denoised,
                    model_kwargs=model_kwargs,
                )
            eps = self._predict_eps_from_xstart(x_t, t, term["pred_xstart"])
            columns["vb"].append(term["output"])
            columns["xstart_mse"].append(mean_flat((term["pred_xstart"] - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        by_step = {name: th.stack(terms, dim=1) for name, terms in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": by_step["vb"].sum(dim=1) + prior, "prior_bpd": prior, **by_step}

    # All options have names here, where the library's loops take **options.
    p_sample = sampling.p_sample
    p_sample_loop = sampling.p_sample_loop  # type: ignore[assignment]
    p_sample_loop_progressive = sampling.p_sample_loop_progressive  # type: ignore[assignment]
    ddim_sample = sampling.ddim_sample
    ddim_reverse_sample = sampling.ddim_reverse_sample
    ddim_sample_loop = sampling.ddim_sample_loop  # type: ignore[assignment]
    ddim_sample_loop_progressive = sampling.ddim_sample_loop_progressive  # type: ignore[assignment]
