"""EDM's samplers: numbers of the published code, orders of convergence on Gaussian data, and where
epsilon scaling acts.

For data N(0, s^2) the best denoiser is D = x s^2 / (s^2 + sigma^2), and dx/dsigma = (x - D) /
(sigma lambda) has the solution x(sigma) = x(sigma_T) ((s^2 + sigma^2) / (s^2 + sigma_T^2))^(1 / (2
lambda)).
"""

import json
import math

import numpy as np
import pytest
import torch
from golden_tools import DATA, relative_error, seeded_normal

from guided_diffusion_ip.diffusion.edm_sampling import (
    ablation_sample,
    ablation_sample_progressive,
    edm_sample,
    edm_sample_progressive,
)
from guided_diffusion_ip.diffusion.edm_schedules import (
    NoiseLevels,
    VPSchedule,
    default_range,
    iddpm_levels,
    make_path,
)

GOLDEN = np.load(DATA / "edm_samplers_golden.npz")
CASES = json.loads(GOLDEN["cases"].tobytes())
S = 0.5
STEPS = (36, 72, 144, 288)


class Denoiser:
    """A function of (x, sigma) as a denoiser; remembers the sigmas and labels that it was asked
    for.
    """

    label_dim = 0

    def __init__(self, function, sigma_min=0.002, sigma_max=80.0):
        self.function, self.sigma_min, self.sigma_max = function, sigma_min, sigma_max
        self.sigmas, self.labels = [], []

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, labels=None):
        self.sigmas.append(float(sigma))
        self.labels.append(labels)
        return self.function(x, sigma)


def wavy(x, sigma):
    """The denoiser of the golden numbers: Gaussian data's best, and a ripple."""
    return 0.25 * x / (0.25 + sigma**2) + 0.05 * torch.sin(3 * x) * sigma**2 / (0.25 + sigma**2)


def exact(x, sigma, s=S):
    return x * s**2 / (s**2 + sigma**2)


def latents(n=2):
    return seeded_normal("edm/latents", (n, 1, 4, 4)).double()


def numbered(prefix, seed):
    """A randn_like whose n-th call, from 1, is the golden run's n-th draw."""
    count = iter(range(1, 10**6))
    return lambda x: seeded_normal(f"{prefix}/z{next(count)}", tuple(x.shape), seed).double()


@pytest.mark.parametrize("i", range(len(CASES["samplers"])))
def test_published_numbers(i):
    options = dict(CASES["samplers"][i])
    sample = {"edm": edm_sample, "ablation": ablation_sample}[options.pop("kind")]
    start = seeded_normal(f"samplers/{i}/latents", (3, 3, 4, 4), CASES["seed"]).double()
    got = sample(
        Denoiser(wavy),
        start,
        eps_scaler=options.pop("lam"),
        randn_like=numbered(f"samplers/{i}", CASES["seed"]),
        **options,
    )
    assert got.dtype == torch.float64
    assert relative_error(got, GOLDEN[f"samplers/{i}"]) < 1e-12


# ---- convergence ----


def scaled(function, lam):
    """The denoiser whose implied epsilon is that of `function` divided by lam."""
    return lambda x, sigma: x - (x - function(x, sigma)) / lam


def at_predictors_only(function, lam):
    """Scaling as by somebody who forgot Heun's corrector: every other call, from the first."""
    calls = iter(range(10**6))
    return lambda x, sigma: (scaled(function, lam) if next(calls) % 2 == 0 else function)(x, sigma)


def errors(lam=1.0, function=lambda: exact, **options):
    """Largest relative errors at sigma_min for each of STEPS, against the closed form; `function`
    makes D's function anew.
    """
    eps_scaler = options.pop("eps_scaler", lam)
    result = []
    for steps in STEPS:
        outs = list(
            ablation_sample_progressive(
                Denoiser(function()), latents(), num_steps=steps, eps_scaler=eps_scaler, **options
            )
        )
        sigma = outs[-2]["sigma"]
        high = min(default_range(options.get("discretization", "edm"), 1e-3)[1], 80.0)
        s_of_t = 1 / math.sqrt(1 + sigma**2) if options.get("scaling") == "vp" else 1.0
        want = latents() * high * ((S**2 + sigma**2) / (S**2 + high**2)) ** (0.5 / lam)
        result.append(float(((outs[-2]["sample"] / s_of_t - want) / want).abs().max()))
    return np.array(result)


def converges(order, lam, **options):
    """Whether the errors fall with the order of the method, down to what such steps should give."""
    e = errors(lam, **options)
    slopes = np.log2(e[:-1] / e[1:])
    return bool((abs(slopes - order) < 0.2).all() and e[-1] < {1: 0.05, 2: 1e-3}[order])


@pytest.mark.parametrize("lam", [1.0, 1.01, 0.98])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence_on_gaussian_data(solver, order, lam):
    assert converges(order, lam, solver=solver)


@pytest.mark.parametrize("lam", [1.0, 1.01])
@pytest.mark.parametrize(
    "path",
    [
        {"schedule": "vp", "scaling": "vp"},
        {"schedule": "vp", "scaling": "none"},
        {"schedule": "linear", "scaling": "vp"},
        {"schedule": "ve", "scaling": "none"},
    ],
)
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_all_paths_lead_to_the_same_closed_form(path, lam, solver, order):
    e = errors(lam, solver=solver, **path)
    slopes = np.log2(e[:-1] / e[1:])
    assert slopes[-1] == pytest.approx(order, abs=0.3), e
    assert e[-1] < {1: 0.1, 2: 0.01}[order], e


@pytest.mark.parametrize("lam", [1.0, 1.01])
@pytest.mark.parametrize(
    "discretization, path",
    [
        ("vp", ("vp", "vp")),
        ("ve", ("ve", "none")),
        ("iddpm", ("linear", "none")),
        ("iddpm", ("vp", "vp")),
    ],
)
def test_all_discretisations_converge(discretization, path, lam):
    # iddpm's levels are a list, taken by rounding, without a clean order and without 80 itself: the
    # ODE's start is its own.
    schedule, scaling = path
    if discretization == "iddpm":
        out = list(
            ablation_sample_progressive(
                Denoiser(exact),
                latents(),
                discretization="iddpm",
                schedule=schedule,
                scaling=scaling,
                num_steps=300,
                eps_scaler=lam,
            )
        )[-2]
        high, sigma = next(u for u in iddpm_levels(1000, 0.001, 0.008) if u <= 80), out["sigma"]
        s_of_t = 1 / math.sqrt(1 + sigma**2) if scaling == "vp" else 1.0
        want = latents() * high * ((S**2 + sigma**2) / (S**2 + high**2)) ** (0.5 / lam)
        torch.testing.assert_close(out["sample"] / s_of_t, want, rtol=2e-3, atol=0)
    else:
        e = errors(lam, discretization=discretization, schedule=schedule, scaling=scaling)
        assert np.log2(e[-2] / e[-1]) == pytest.approx(2, abs=0.3) and e[-1] < 0.01, e


@pytest.mark.parametrize("alpha", [0.5, 2 / 3])
def test_other_second_order_methods(alpha):
    e = errors(1.01, alpha=alpha)  # on these levels the midpoint rule happens to be of order 3
    assert (np.log2(e[:-1] / e[1:]) > 1.8).all() and e[-1] < 1e-3


# ---- the checks above notice scaling in the wrong places ----


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_scaling_twice_is_noticed(solver, order):
    assert not converges(order, 1.01, solver=solver, function=lambda: scaled(exact, 1.01))


def test_scaling_at_the_predictor_only_is_noticed():
    assert not converges(2, 1.01, function=lambda: at_predictors_only(exact, 1.01), eps_scaler=1.0)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_no_scaling_and_the_inverse_are_noticed(solver, order):
    assert not converges(order, 1.01, solver=solver, eps_scaler=1.0)
    assert not converges(order, 1.01, solver=solver, eps_scaler=1 / 1.01)


# ---- lambda ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "euler"},
        {"schedule": "vp", "scaling": "vp", "discretization": "vp"},
        {"S_churn": 30.0},
    ],
)
def test_lambda_one_is_the_baseline_bitwise(options):
    runs = [
        ablation_sample(
            Denoiser(wavy),
            latents(),
            num_steps=9,
            randn_like=numbered("x", 1),
            **scaling,
            **options,
        )
        for scaling in (
            {},
            {"eps_scaler": 1},
            {"eps_scaler": [1.0] * 9},
            {"eps_scaler": 1.0, "eps_scaler_k": 0.0},
        )
    ]
    assert all(torch.equal(runs[0], run) for run in runs[1:])
    assert not torch.equal(
        runs[0],
        ablation_sample(
            Denoiser(wavy),
            latents(),
            num_steps=9,
            randn_like=numbered("x", 1),
            eps_scaler=1.001,
            **options,
        ),
    )


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("scaling", ["none", "vp"])
def test_lambda_counts_from_the_clean_end_and_both_calls_of_a_step_share_it(solver, scaling):
    steps, k, b = 5, 0.03, 0.9
    by_sigma = {}

    def by_hand(x, sigma):
        # The calls of step i are at t_i and, corrected, at t_{i + 1}: predictor first, so that
        # calls pair up.
        call = len(by_sigma)
        i = call // 2 if solver == "heun" else call
        by_sigma[call] = i
        return scaled(wavy, k * (steps - 1 - i) + b)(x, sigma)

    options = dict(num_steps=steps, solver=solver, scaling=scaling)
    want = ablation_sample(Denoiser(by_hand), latents(), **options)
    got = ablation_sample(Denoiser(wavy), latents(), eps_scaler=b, eps_scaler_k=k, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    listed = ablation_sample(
        Denoiser(wavy), latents(), eps_scaler=[k * t + b for t in range(steps)], **options
    )
    torch.testing.assert_close(listed, want, rtol=1e-12, atol=1e-12)


# ---- steps, noise, states ----


def test_edm_is_the_default_of_the_generalised_sampler():
    assert torch.equal(
        edm_sample(Denoiser(wavy), latents()), ablation_sample(Denoiser(wavy), latents())
    )


@pytest.mark.parametrize("solver, calls", [("heun", 11), ("euler", 6)])
def test_number_of_calls_and_noise_levels(solver, calls):
    d = Denoiser(wavy)
    outs = list(edm_sample_progressive(d, latents(), num_steps=6, solver=solver))
    levels = [(80 ** (1 / 7) + i / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(6)]
    np.testing.assert_allclose([out["sigma"] for out in outs], [*levels[1:], 0], rtol=1e-12)
    want = [*levels, *levels[1:]] if solver == "heun" else levels
    np.testing.assert_allclose(sorted(d.sigmas), sorted(want), rtol=1e-12)
    assert len(d.sigmas) == calls


def test_the_last_step_returns_what_the_denoiser_says():
    outs = list(edm_sample_progressive(Denoiser(exact), latents(), num_steps=4))
    torch.testing.assert_close(outs[-1]["sample"], outs[-1]["denoised"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outs[0]["denoised"], exact(80 * latents(), 80.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("discretization", ["edm", "vp", "ve", "iddpm"])
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_one_step_works_and_is_one_call(discretization, solver):
    d = Denoiser(exact)
    got = ablation_sample(d, latents(), discretization=discretization, solver=solver, num_steps=1)
    sigma = d.sigmas[0]
    assert len(d.sigmas) == 1 and (70 if discretization == "iddpm" else 79.999) < sigma < 80.001
    torch.testing.assert_close(got, exact(latents() * sigma, sigma), rtol=1e-9, atol=1e-12)


def test_float32_latents_and_denoiser_give_float64_states():
    class Float32(Denoiser):
        def __call__(self, x, sigma, labels=None):
            assert x.dtype == torch.float64
            return super().__call__(x.float(), sigma.float(), labels)

    got = edm_sample(Float32(wavy), latents().float())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, edm_sample(Denoiser(wavy), latents()), rtol=1e-4, atol=1e-5)


def test_labels_reach_the_denoiser_and_no_graph_is_kept():
    d, labels = (
        Denoiser(lambda x, sigma: wavy(x, sigma) * torch.ones((), requires_grad=True)),
        torch.tensor([3, 4]),
    )
    assert not edm_sample(d, latents(), labels, num_steps=3).requires_grad
    assert all(got is labels for got in d.labels)


def test_noise_is_drawn_once_per_step_or_never():
    count = []
    draw = lambda x: count.append(1) or torch.randn_like(x)  # noqa: E731
    edm_sample(Denoiser(wavy), latents(), num_steps=7, randn_like=draw)
    assert not count
    edm_sample(
        Denoiser(wavy), latents(), num_steps=7, randn_like=draw, S_churn=5, S_min=1.0, S_max=10.0
    )
    assert len(count) == 7


@pytest.mark.parametrize(
    "S_churn, factor", [(2.0, 1.25), (3.2, 1.4), (3.4, math.sqrt(2)), (100.0, math.sqrt(2))]
)
def test_the_network_is_asked_at_levels_raised_by_churn_over_steps(S_churn, factor):
    """sigma (1 + min(S_churn / N, sqrt(2) - 1)), N = 8, within [S_min, S_max], ends included
    (Algorithm 2).
    """
    levels = NoiseLevels(8, 0.002, 80.0).sigmas()
    inside = (levels >= levels[5]) & (levels <= levels[2])
    d = Denoiser(wavy)
    edm_sample(
        d,
        latents(),
        num_steps=8,
        solver="euler",
        S_churn=S_churn,
        S_min=float(levels[5]),
        S_max=float(levels[2]),
    )
    np.testing.assert_allclose(d.sigmas, torch.where(inside, levels * factor, levels), rtol=1e-12)


@pytest.mark.parametrize("scaling", ["none", "vp"])
def test_churn_keeps_the_distribution(scaling):
    # A stochastic sampler of Gaussian data ends with the data's variance; without its fresh noise
    # it would not.
    torch.manual_seed(0)
    start = torch.randn(32, 1, 32, 32, dtype=torch.float64)
    run = lambda **o: (
        ablation_sample(Denoiser(exact), start, num_steps=128, S_churn=40, scaling=scaling, **o)
        .std()
        .item()
    )  # noqa: E731
    assert run() == pytest.approx(S, rel=0.025)
    assert run(S_noise=0.0) < 0.8 * S


def test_noise_outside_its_range_changes_nothing():
    plain = edm_sample(Denoiser(wavy), latents(), num_steps=7)
    off = edm_sample(Denoiser(wavy), latents(), num_steps=7, S_churn=40, S_min=100.0)
    torch.testing.assert_close(off, plain, rtol=1e-12, atol=1e-12)


# ---- noise levels ----


@pytest.mark.parametrize("discretization", ["edm", "vp", "ve", "iddpm"])
def test_levels_run_from_the_highest_to_the_lowest(discretization):
    low, high = default_range(discretization, 1e-3)
    sigmas = NoiseLevels(40, low, high, discretization).sigmas()
    assert (sigmas.diff() < 0).all()
    if discretization != "iddpm":
        np.testing.assert_allclose([sigmas[0], sigmas[-1]], [high, low], rtol=1e-9)
    else:
        assert low <= sigmas[-1] < 0.01 and 75 < sigmas[0] <= high


@pytest.mark.parametrize("discretization", ["edm", "vp", "ve"])
def test_two_levels_are_the_ends(discretization):
    np.testing.assert_allclose(
        NoiseLevels(2, 0.01, 50.0, discretization).sigmas(), [50.0, 0.01], rtol=1e-9
    )
    assert NoiseLevels(1, 0.01, 50.0, discretization).sigmas().tolist() == pytest.approx([50.0])


def test_ranges_are_limited_to_what_the_model_knows():
    d = Denoiser(exact, sigma_min=0.03, sigma_max=20.0)
    edm_sample(d, latents(), num_steps=5)
    assert max(d.sigmas) == pytest.approx(20) and min(d.sigmas) == pytest.approx(0.03)


@pytest.mark.parametrize("schedule", ["linear", "ve", "vp"])
@pytest.mark.parametrize("scaling", ["none", "vp"])
def test_derivatives_and_inverses_of_paths(schedule, scaling):
    path = make_path(schedule, scaling, NoiseLevels(2, 0.002, 80.0))
    sigma = torch.tensor([0.004, 0.1, 1.0, 30.0], dtype=torch.float64)
    t = path.schedule.sigma_inv(sigma).requires_grad_()
    torch.testing.assert_close(path.schedule.sigma(t), sigma, rtol=1e-9, atol=0)
    (slope,) = torch.autograd.grad(path.schedule.sigma(t).sum(), t)
    torch.testing.assert_close(path.schedule.sigma_deriv(t.detach()), slope, rtol=1e-9, atol=0)
    log_s = path.s(t).log().sum()
    s_slope = torch.autograd.grad(log_s, t)[0] if log_s.requires_grad else torch.zeros_like(t)
    torch.testing.assert_close(path.log_s_deriv(t.detach()), s_slope, rtol=1e-9, atol=0)


def test_a_vp_schedule_goes_through_the_ends():
    schedule = VPSchedule.through(0.01, 80.0, 1e-3)
    ends = schedule.sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(ends, [0.01, 80.0], rtol=1e-9)


def test_iddpm_levels_are_adm_cosine_schedule():
    from guided_diffusion_ip.script_util import create_gaussian_diffusion

    ours = create_gaussian_diffusion(
        noise_schedule="cosine", steps=1000
    ).sqrt_recipm1_alphas_cumprod
    np.testing.assert_allclose(iddpm_levels(1000, 0.001, 0.008)[:-1], ours[::-1], rtol=1e-6)


# ---- mistakes ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"solver": "rk4"}, "solver.*heun, euler"),
        ({"discretization": "log"}, "discretization.*vp"),
        ({"schedule": "cosine"}, "schedule.*linear"),
        ({"scaling": "ve"}, "scaling"),
        ({"sigma_min": 3.0, "sigma_max": 3.0}, "sigma_min"),
        ({"sigma_min": 90.0}, "0.002 and 80"),
        ({"rho": 0}, "rho"),
        ({"S_churn": -1}, "S_churn"),
        ({"S_churn": math.nan}, "S_churn"),
        ({"S_noise": -1}, "S_noise"),
        ({"S_min": 3, "S_max": 2}, "S_min"),
        ({"eps_scaler": 0}, "lambda"),
        ({"eps_scaler": 1.0, "eps_scaler_k": -0.2}, "lambda"),
        ({"eps_scaler": [1.0] * 3}, "3 values"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": 1.5}, "alpha"),
        ({"epsilon_s": 0.0}, "epsilon_s"),
        ({"epsilon_s": 1.5}, "epsilon_s"),
        ({"C_2": -1}, "C_2"),
        ({"C_1": 0}, "C_1"),
        ({"M": 0}, "M must"),
        (
            {"schedule": "vp", "sigma_min": 1.0},
            "vp schedule cannot rise.*lower sigma_min below 0.13",
        ),
        (
            {"discretization": "iddpm", "M": 2, "sigma_min": 0.5, "sigma_max": 0.6},
            "none of iddpm's",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(options, message):
    d = Denoiser(exact)
    with pytest.raises(ValueError, match=message):
        ablation_sample_progressive(d, latents(), **options)
    assert not d.sigmas


def test_a_model_without_limits_of_its_own():
    d = Denoiser(exact, sigma_min=0.0, sigma_max=math.inf)
    with pytest.raises(ValueError, match="sigma_min"):
        edm_sample(d, latents(), sigma_min=0.0)
    with pytest.raises(ValueError, match="sigma_max"):
        edm_sample(d, latents(), sigma_max=math.inf)
    assert torch.isfinite(edm_sample(d, latents())).all()
