"""Training losses: MSE of the prediction, and the variational bound. Input perturbation and loss
weights act here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .input_perturbation import check_gamma, perturb
from .kinds import LossType, ModelMeanType
from .process import Network, RandnLike

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all but the first dimension: [N, ...] -> [N]."""
    return tensor.flatten(1).mean(1)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) in nats, elementwise; arguments broadcast,
    numbers are welcome.
    """
    like = next((v for v in (mean1, logvar1, mean2, logvar2) if isinstance(v, Tensor)), None)
    if like is None:
        raise ValueError("normal_kl needs at least one tensor among its arguments")
    logvar1, logvar2 = (
        torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (logvar1, logvar2)
    )
    ratio = logvar1 - logvar2
    return 0.5 * (torch.expm1(ratio) - ratio + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The standard normal's CDF by Page's tanh formula (1977), error below 2e-4; what published
    likelihoods were made with.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log P(x) in nats, elementwise, where a Gaussian is integrated over x's 8-bit cell (Ho et al.
    2020, Eq. 13).

    x holds the 256 levels scaled to [-1, 1]; the outermost cells reach to infinity. Shapes must
    agree.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            f"x {tuple(x.shape)}, means {tuple(means.shape)} and log_scales "
            f"{tuple(log_scales.shape)} must have the same shape"
        )
    precision = torch.exp(-log_scales)
    below, above = ((x - means + side / 255) * precision for side in (-1, 1))
    cdf_below = torch.where(x < -0.999, 0.0, approx_standard_normal_cdf(below))
    cdf_above = torch.where(x > 0.999, 1.0, approx_standard_normal_cdf(above))
    # Page's formula says 1 in float32 well before the tail is empty: the uppermost cell is read
    # from the other side.
    mass = torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below)
    return mass.clamp(min=1e-12).log()


def variational_bound(
    process: GaussianDiffusion,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
) -> dict[str, Tensor]:
    """The bound's term at t, in bits per dimension (Ho et al. 2020, Eq. 5).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) at t = 0.

    Args:
        model_output: [N, C or 2C, H, W], the network's answer for x_t.

    Returns:
        `output` [N] and `pred_xstart` [N, C, H, W].
    """
    true_mean, _, true_log_variance = process.q_posterior_mean_variance(x_start, x_t, t)
    p = process.read_output(model_output, x_t, t, clip_denoised)
    kl = mean_flat(normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"]))
    decoder = -mean_flat(
        discretized_gaussian_log_likelihood(
            x_start, means=p["mean"], log_scales=0.5 * p["log_variance"]
        )
    )
    return {
        "output": torch.where(t == 0, decoder, kl) / math.log(2),
        "pred_xstart": p["pred_xstart"],
    }


def training_losses(
    process: GaussianDiffusion,
    model: Network,
    x_start: Tensor,
    t: Tensor,
    model_kwargs: dict[str, Any] | None = None,
    noise: Tensor | None = None,
    gamma: float | None = None,
    randn_like: RandnLike | None = None,
) -> dict[str, Tensor]:
    """Losses for one batch, [N] each, not yet averaged.

    Args:
        x_start: clean images [N, C, H, W] in [-1, 1].
        t: int64 [N].
        noise: epsilon, [N, C, H, W]; drawn if absent.
        gamma: strength of the input perturbation; the process's own if absent.
        randn_like: source of epsilon (unless given), then of xi (unless gamma is 0).

    Returns:
        `loss`, and for the MSE losses its parts `mse` (weighted) and, with a learned variance,
        `vb`.
    """
    gamma = (
        process.input_perturbation if gamma is None else check_gamma(gamma, process.model_mean_type)
    )
    if noise is None:
        noise = (randn_like or torch.randn_like)(x_start)
    x_t = process.q_sample(x_start, t, perturb(noise, gamma, randn_like))
    output = process.call_model(model, x_t, t, model_kwargs)
    if process.loss_type.is_vb():
        bound = process.variational_bound(output, x_start, x_t, t, clip_denoised=False)["output"]
        return {
            "loss": bound * process.num_timesteps
            if process.loss_type is LossType.RESCALED_KL
            else bound
        }

    prediction = output[:, : x_start.shape[1]]
    target = _target(process, x_start, x_t, t, noise)
    mse = mean_flat((target - prediction) ** 2)
    if process.loss_weighting.rule != "uniform":
        mse = mse * process.at("loss_weights", t, mse)
    terms = {"mse": mse, "loss": mse}
    if process.model_var_type.is_learned:
        # The bound teaches the variance only; the prediction learns from the MSE (Nichol & Dhariwal
        # 2021, Sec. 3.1).
        frozen = torch.cat([prediction.detach(), output[:, x_start.shape[1] :]], dim=1)
        terms["vb"] = process.variational_bound(frozen, x_start, x_t, t, clip_denoised=False)[
            "output"
        ]
        if process.loss_type is LossType.RESCALED_MSE:
            terms["vb"] = terms["vb"] * (process.num_timesteps / 1000)
        terms["loss"] = mse + terms["vb"]
    return terms


def _target(
    process: GaussianDiffusion, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """What the network should say, [N, C, H, W]: the *unperturbed* noise, x_0, or the posterior
    mean.
    """
    if process.model_mean_type is ModelMeanType.EPSILON:
        return noise
    if process.model_mean_type is ModelMeanType.START_X:
        return x_start
    return process.q_posterior_mean_variance(x_start, x_t, t)[0]
