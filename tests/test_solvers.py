"""Solvers: the registry, and the mathematics of those that are more than a name for a loop."""

import math

import numpy as np
import pytest
import torch

from guided_diffusion_ip.diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    get_named_beta_schedule,
    space_timesteps,
)
from guided_diffusion_ip.diffusion.epsilon_scaling import UNSCALED, EpsilonScaling
from guided_diffusion_ip.diffusion.solvers import SOLVERS, Solver
from guided_diffusion_ip.diffusion.solvers.paths import AlongProcess, Step
from guided_diffusion_ip.diffusion.solvers.sigma_path import AlongSigma, SigmaGrid
from guided_diffusion_ip.runs.sample_batch import Sampler

S = 0.5  # standard deviation of the Gaussian data
SHAPE = (1, 8, 8)


def process(steps="", schedule="linear", **options):
    return SpacedDiffusion(
        use_timesteps=space_timesteps(1000, steps or [1000]),
        betas=get_named_beta_schedule(schedule, 1000),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
        **options,
    )


def exact_epsilon(x, t, schedule="linear"):
    """E[epsilon | x_t] for data N(0, S^2), with t in original steps."""
    ab = (
        torch.from_numpy(process(schedule=schedule).alphas_cumprod).to(x.dtype)[t].view(-1, 1, 1, 1)
    )
    return (1 - ab).sqrt() / (ab * S**2 + 1 - ab) * x


class Exact:
    """D(x, sigma) for data N(0, S^2)."""

    sigma_min, sigma_max, label_dim = 0.0, math.inf, 0

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, labels=None, augment_labels=None):
        return S**2 / (S**2 + sigma**2) * x


def along_sigma(n, scaling=UNSCALED, sigma_min=0.002):
    grid = SigmaGrid(n, sigma_min=sigma_min)
    return AlongSigma(lambda network, kwargs: Exact(), grid, scaling)


def error_at_sigma_min(solver, n, lam=1.0):
    """Distance from the ODE's solution at the lowest noise level, relative to it."""
    sampler = Sampler(along_sigma(n, EpsilonScaling(lam), 0.05), SHAPE, solver=solver)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    path = sampler.bind(None)
    steps = list(sampler.chain(path, noise, torch.randn_like))
    x, level = steps[-2].x, steps[-2].level  # before the step to sigma = 0
    start, end = path.sigmas[-1], float(level.sigma)
    exact = path.start(noise) * ((S**2 + end**2) / (S**2 + start**2)) ** (1 / (2 * lam))
    return float((x - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("lam", [1.0, 1.01])
def test_order_of_convergence_on_gaussian_data(solver, order, lam):
    errors = [error_at_sigma_min(solver, n, lam) for n in (36, 72, 144, 288)]
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.abs(slopes - order).max() < 0.2, slopes


def error_along_process(solver, steps, schedule):
    """Relative error of the standard deviation of finished samples of Gaussian data."""
    along = AlongProcess(process(steps, schedule), clip_denoised=False)
    sampler = Sampler(along, SHAPE, solver=solver)
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    network = lambda x, t: exact_epsilon(x, t, schedule)
    *_, last = sampler.chain(sampler.bind(network), noise, torch.randn_like)
    ab = along.process.alphas_cumprod[-1]
    return float((last.x / noise).mean() / (S / math.sqrt(ab * S**2 + 1 - ab))) - 1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpmpp_2m_along_the_steps_of_a_process(schedule):
    """At least second order, and several times nearer than DDIM already at few steps."""
    errors = {n: error_along_process("dpmpp_2m", n, schedule) for n in ("10", "20", "50")}
    ddim = {n: error_along_process("ddim", n, schedule) for n in errors}
    assert all(abs(errors[n]) < abs(ddim[n]) / 2.5 for n in errors), (errors, ddim)
    assert abs(errors["20"]) < 0.02 and abs(errors["50"]) < 0.003, errors


def test_dpmpp_2m_begins_as_ddim_and_its_first_step_is_all_that_measures_take():
    along = AlongProcess(process("10"), clip_denoised=False)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    chains = {}
    for solver in ("ddim", "dpmpp_2m"):
        sampler = Sampler(along, SHAPE, solver=solver)
        chains[solver] = list(sampler.chain(sampler.bind(exact_epsilon), noise, torch.randn_like))
    torch.testing.assert_close(chains["dpmpp_2m"][0].x, chains["ddim"][0].x, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(chains["dpmpp_2m"][5].x, chains["ddim"][5].x, rtol=2e-3)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddim", "ddpm"])
def test_lambda_one_is_no_lambda_and_another_changes_the_images(solver):
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))

    def end(**scaling):
        sampler = Sampler(AlongProcess(process("10", **scaling)), SHAPE, solver=solver)
        torch.manual_seed(0)
        return list(sampler.chain(sampler.bind(exact_epsilon), noise, torch.randn_like))[-1].x

    assert torch.equal(end(), end(eps_scaler=1.0)) and not torch.equal(end(), end(eps_scaler=1.01))


def test_solvers_say_what_they_cannot():
    with pytest.raises(ValueError, match="no solver 'hein'"):
        Sampler(along_sigma(3), SHAPE, solver="hein")
    with pytest.raises(ValueError, match="DDPM goes along the steps of a process, not along EDM"):
        Sampler(along_sigma(3), SHAPE, solver="ddpm")
    with pytest.raises(ValueError, match="Heun goes along EDM's noise levels"):
        Sampler(AlongProcess(process("3")), SHAPE, solver="heun")
    with pytest.raises(ValueError, match="DDPM has no option eta"):
        Sampler(AlongProcess(process("3")), SHAPE, options={"eta": 0.5})


def test_a_solver_of_ones_own(monkeypatch):
    """Straight to x_0_hat, from anywhere."""

    def step(path, x, here, there, previous, randn_like):
        p = path.predict(x, here)
        return Step(p.x_start, there, p)

    monkeypatch.setitem(SOLVERS, "jump", Solver("jump", "Jump", "either", step))
    for along in (AlongProcess(process("3"), clip_denoised=False), along_sigma(3)):
        sampler = Sampler(along, SHAPE, solver="jump")
        assert sampler(exact_epsilon, [0, 1]).shape == (2, *SHAPE)
