"""Guidance towards a class: by a classifier's gradient, or free of one.

Classifier guidance moves a sampling step along grad_x log p(y | x_t) (Dhariwal & Nichol 2021,
Algorithms 1 and 2): `classifier_gradient` is its cond_fn, `condition_mean` and `condition_score`
apply it. Classifier-free guidance (Ho & Salimans 2022) needs no verb of the process:
`classifier_free` makes another network out of a network.

A cond_fn is called as cond_fn(x_t, t, **model_kwargs), t as a network wants it, and returns the
gradient, [N, C, H, W]. Epsilon scaling: the step's epsilon is divided by lambda(t) once, after the
classifier-free combination and before the classifier's gradient; the gradient never is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .process import Network

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion

CondFn = Callable[..., Tensor]


def condition_mean(
    process: GaussianDiffusion,
    cond_fn: CondFn,
    p_mean_var: dict[str, Tensor],
    x: Tensor,
    t: Tensor,
    model_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """The mean of p(x_{t-1} | x_t, y), [N, C, H, W]: mean + variance * gradient (Algorithm 1)."""
    gradient = cond_fn(x, process._scale_timesteps(t), **(model_kwargs or {}))
    return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()


def condition_score(
    process: GaussianDiffusion,
    cond_fn: CondFn,
    p_mean_var: dict[str, Tensor],
    x: Tensor,
    t: Tensor,
    model_kwargs: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """p_mean_var with its score moved by the gradient (Algorithm 2, for DDIM); x_0_hat is not
    clipped again.
    """
    gradient = cond_fn(x, process._scale_timesteps(t), **(model_kwargs or {}))
    eps = process.eps_from_xstart(x, t, p_mean_var["pred_xstart"])
    eps = eps - process.at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
    x_start = process.xstart_from_eps(x, t, eps)
    return {
        **p_mean_var,
        "pred_xstart": x_start,
        "mean": process.q_posterior_mean_variance(x_start, x, t)[0],
    }


def classifier_gradient(classifier: CondFn, scale: float = 1.0) -> CondFn:
    """cond_fn(x, t, y) = scale * grad_x log softmax(classifier(x, t))[y].

    Args:
        classifier: logits [N, classes] from (x [N, C, H, W], t [N]).
        scale: the guidance scale s of Algorithms 1 and 2.
    """

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        if y is None:
            raise ValueError(
                "classifier guidance needs the class labels: pass model_kwargs={'y': labels}"
            )
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = torch.log_softmax(classifier(x_in, t).float(), dim=-1)
            chosen = log_probs.gather(1, y.view(-1, 1)).sum()
            return torch.autograd.grad(chosen, x_in)[0] * scale

    return cond_fn


def classifier_free(model: Network, scale: float, null_label: int | None) -> Network:
    """A network whose prediction is uncond + scale (cond - uncond) (Ho & Salimans 2022, Eq. 6,
    scale = 1 + w).

    Both are evaluated in one batch of 2N. The prediction (the first C channels) is combined,
    whatever it means: epsilon, x_0 and x_{t-1} depend on each other linearly at given x_t, so that
    combining one combines all. A learned variance is that of the conditional half. scale 1 is
    `model` itself and scale 0 `model` with the null label, variance included.

    Args:
        model: called as model(x [N, C, H, W], t [N], y [N], **cond [N, ...]).
        scale: 1 = no guidance, 0 = without class.
        null_label: what the network was taught to take for "no class"; None if nothing.

    Returns: a function that is called like `model`; sampling loops want `device=` with it unless it
        is the CPU.

    Raises:
        ValueError: scale is not 1 and there is no null label, or scale is negative or infinite; at
            call, y is missing.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(
            f"guidance_scale must be 0 or positive, got {scale:g}: 1 switches it off, usual values "
            "are 1.5 to 8"
        )
    if scale == 1:
        return model
    if null_label is None:
        raise ValueError(
            f"guidance_scale {scale:g} compares the network with class and without, but this one "
            "has no label for 'no class': train it with --class_dropout 0.1, or sample with "
            "--guidance_scale 1"
        )

    def guided(x: Tensor, t: Tensor, y: Tensor | None = None, **cond: Tensor) -> Tensor:
        if y is None:
            raise ValueError(
                "classifier-free guidance needs the class labels: pass model_kwargs={'y': labels}"
            )
        null = torch.full_like(y, null_label)
        if scale == 0:
            return model(x, t, y=null, **cond)
        twice = {name: torch.cat([value, value]) for name, value in cond.items()}
        both = model(torch.cat([x, x]), t.expand(len(x)).repeat(2), y=torch.cat([y, null]), **twice)
        output, without = both.chunk(2)
        channels = x.shape[1]
        prediction, without = output[:, :channels], without[:, :channels]
        return torch.cat([without + scale * (prediction - without), output[:, channels:]], dim=1)

    guided.model = model  # type: ignore[attr-defined]  # for whoever looks into wrapped networks
    return guided
