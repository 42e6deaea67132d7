"""Classifier guidance: move a sampling step along grad_x log p(y | x_t) (Dhariwal & Nichol 2021, Algorithms 1 and 2).

A cond_fn is called as cond_fn(x_t, t, **model_kwargs), t as a network wants it, and returns the gradient, [N, C, H, W].
Epsilon scaling: the step's epsilon has been divided by lambda(t) once, before these verbs; the gradient never is.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .gaussian_diffusion import GaussianDiffusion

CondFn = Callable[..., Tensor]


def condition_mean(
    process: GaussianDiffusion, cond_fn: CondFn, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor,
    model_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """The mean of p(x_{t-1} | x_t, y), [N, C, H, W]: mean + variance * gradient (Algorithm 1)."""
    gradient = cond_fn(x, process._scale_timesteps(t), **(model_kwargs or {}))
    return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()


def condition_score(
    process: GaussianDiffusion, cond_fn: CondFn, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor,
    model_kwargs: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """p_mean_var with its score moved by the gradient (Algorithm 2, for DDIM); x_0_hat is not clipped again."""
    gradient = cond_fn(x, process._scale_timesteps(t), **(model_kwargs or {}))
    eps = process.eps_from_xstart(x, t, p_mean_var["pred_xstart"])
    eps = eps - process.at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
    x_start = process.xstart_from_eps(x, t, eps)
    return {**p_mean_var, "pred_xstart": x_start, "mean": process.q_posterior_mean_variance(x_start, x, t)[0]}


def classifier_gradient(classifier: CondFn, scale: float = 1.0) -> CondFn:
    """cond_fn(x, t, y) = scale * grad_x log softmax(classifier(x, t))[y].

    Args:
        classifier: logits [N, classes] from (x [N, C, H, W], t [N]).
        scale: the guidance scale s of Algorithms 1 and 2.
    """

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        if y is None:
            raise ValueError("classifier guidance needs the class labels: pass model_kwargs={'y': labels}")
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = torch.log_softmax(classifier(x_in, t).float(), dim=-1)
            chosen = log_probs.gather(1, y.view(-1, 1)).sum()
            return torch.autograd.grad(chosen, x_in)[0] * scale

    return cond_fn
