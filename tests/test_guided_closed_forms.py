"""Guided sampling that has an exact answer: Gaussian data and a classifier whose log p(y | x_t) is
a quadratic.

Data N(0, s^2); y is x_0 seen through noise of variance tau^2. The network and the classifier are
exact, so that each step is x <- A x + B + noise, with A and B known, and mean and variance of the
chain follow by recursion: with lambda where it belongs, once, and with the two mistakes that were
made elsewhere (epsilon divided twice; the gradient divided too).
"""

import numpy as np
import pytest
import torch
from test_closed_forms import S, eps_slope, exact_network, make

from guided_diffusion_ip.diffusion import ModelMeanType, ModelVarType

Y, TAU = 0.8, 0.5
NUMBERS = 64 * 4096


def gradient_slope(process):
    """(a, b) at every t: grad_x log p(y | x_t) = a x_t + b, with p(y | x_t) = N(E[x_0 | x_t],
    Var[x_0 | x_t] + tau^2).
    """
    ab = process.alphas_cumprod
    total = ab * S**2 + 1 - ab
    mean, spread = np.sqrt(ab) * S**2 / total, S**2 * (1 - ab) / total + TAU**2
    return -(mean**2) / spread, mean * Y / spread


def exact_classifier(process):
    """cond_fn for log p(y | x_t); t is an index of this process."""
    a, b = (torch.from_numpy(values).float() for values in gradient_slope(process))
    return lambda x, t: a[t].view(-1, 1, 1, 1) * x + b[t].view(-1, 1, 1, 1)


def guided_recursion(process, eta, divide_epsilon=1, divide_gradient=0):
    """(means, variances) of x_{t-1} down the chain; eta None is DDPM. The last two: how often
    lambda divides what.
    """
    ab, ab_prev = process.alphas_cumprod, process.alphas_cumprod_prev
    slope = eps_slope(process) / process.lambdas**divide_epsilon
    a, b = (values / process.lambdas**divide_gradient for values in gradient_slope(process))
    mean, variance, rows = 0.0, 1.0, []
    for t in reversed(range(process.num_timesteps)):
        if eta is None:
            large = process.model_var_type is ModelVarType.FIXED_LARGE
            noise = np.exp(
                (
                    process.fixed_large_log_variance
                    if large
                    else process.posterior_log_variance_clipped
                )[t]
            )
            x0_slope = (1 - np.sqrt(1 - ab[t]) * slope[t]) / np.sqrt(ab[t])
            step = (
                process.posterior_mean_coef1[t] * x0_slope
                + process.posterior_mean_coef2[t]
                + noise * a[t]
            )
            shift = noise * b[t]
        else:
            noise = eta**2 * (1 - ab_prev[t]) / (1 - ab[t]) * (1 - ab[t] / ab_prev[t])
            sigma = np.sqrt(1 - ab[t])
            eps, eps_shift = slope[t] - sigma * a[t], -sigma * b[t]  # Algorithm 2
            direction = np.sqrt(1 - ab_prev[t] - noise)
            step = np.sqrt(ab_prev[t]) * (1 - sigma * eps) / np.sqrt(ab[t]) + direction * eps
            shift = (direction - np.sqrt(ab_prev[t] / ab[t]) * sigma) * eps_shift
        mean, variance = step * mean + shift, step**2 * variance + (noise if t else 0)
        rows.append((mean, variance))
    return np.array(rows).T


def sampled(process, eta, mean_type=ModelMeanType.EPSILON, values=NUMBERS):
    """(means, variances) of a run of the real sampler, over so many numbers."""
    generator = torch.Generator().manual_seed(1)
    loop = (
        process.p_sample_loop_progressive if eta is None else process.ddim_sample_loop_progressive
    )
    rows = [
        (out["sample"].mean().item(), out["sample"].var().item())
        for out in loop(
            exact_network(process, mean_type),
            (64, 1, 1, values // 64),
            clip_denoised=False,
            cond_fn=exact_classifier(process),
            randn_like=lambda x: torch.randn(x.shape, generator=generator),
            **({} if eta is None else {"eta": eta}),
        )
    ]
    return np.array(rows).T


def distance(got, expected):
    """How far (means, variances) are away, in units of what is allowed: 5 standard errors and a
    little for float32.
    """
    allowed = (
        5 * np.sqrt(expected[1] / NUMBERS) + 1e-3,
        expected[1] * (5 * np.sqrt(2 / NUMBERS) + 1e-3),
    )
    return float((np.abs(got - expected) / allowed).max())


SAMPLERS = pytest.mark.parametrize("eta", [None, 0.0, 0.6], ids=["ddpm", "ddim", "ddim-0.6"])


@SAMPLERS
@pytest.mark.parametrize(
    "lam",
    [{}, {"eps_scaler": 1.4}, {"eps_scaler": 0.7, "eps_scaler_k": 0.004}],
    ids=["1", "b", "kt+b"],
)
def test_guided_chains_follow_the_recursion_with_lambda_once(eta, lam):
    process = make(**lam)
    expected = guided_recursion(process, eta)
    assert distance(sampled(process, eta), expected) < 1
    if lam:  # the test can tell: each mistake would be far outside
        for mistake in ({"divide_epsilon": 2}, {"divide_epsilon": 0}, {"divide_gradient": 1}):
            assert distance(guided_recursion(process, eta, **mistake), expected) > 5, mistake


@SAMPLERS
@pytest.mark.parametrize("mean_type", [ModelMeanType.START_X, ModelMeanType.PREVIOUS_X])
def test_networks_that_do_not_predict_epsilon_are_guided_the_same(mean_type, eta):
    process = make(mean_type, eps_scaler=1.4)
    assert distance(sampled(process, eta, mean_type), guided_recursion(process, eta)) < 1


def test_the_fixed_large_variance_guides_by_itself():
    """Algorithm 1 multiplies the gradient by the variance that the step has."""
    process = make(var_type=ModelVarType.FIXED_LARGE, eps_scaler=1.4)
    assert distance(sampled(process, None), guided_recursion(process, None)) < 1


@SAMPLERS
def test_exact_guidance_ends_at_bayes_posterior(eta):
    """p(x_0 | y) = N(s^2 y / (s^2 + tau^2), s^2 tau^2 / (s^2 + tau^2)), by the recursion that the
    samplers were seen to follow.
    """
    means, variances = guided_recursion(make(steps=4000), eta)
    assert means[-1] == pytest.approx(S**2 * Y / (S**2 + TAU**2), rel=0.01)
    assert variances[-1] == pytest.approx(S**2 * TAU**2 / (S**2 + TAU**2), rel=0.01)
