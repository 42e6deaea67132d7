"""Mathematics that has an exact answer: Gaussian data, for which the best network is known.

Data N(0, s^2): x_t has variance V_t = ab s^2 + 1 - ab, and E[epsilon | x_t] = sqrt(1 - ab) / V_t *
x_t.
"""

import warnings

import numpy as np
import pytest
import torch

from guided_diffusion_ip.diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    get_named_beta_schedule,
    space_timesteps,
)
from guided_diffusion_ip.diffusion.epsilon_scaling import EpsilonScaling
from guided_diffusion_ip.diffusion.noise_schedule import NoiseSchedule
from guided_diffusion_ip.script_util import create_gaussian_diffusion

S = 0.5


def eps_slope(process, s=S):
    """E[epsilon | x_t] / x_t at every t of this process."""
    ab = process.alphas_cumprod
    return np.sqrt(1 - ab) / (ab * s**2 + 1 - ab)


def exact_network(process, kind=ModelMeanType.EPSILON, s=S):
    """The best network for N(0, s^2) data; t is an index of this (unspaced) process."""
    ab = process.alphas_cumprod
    slope = {
        ModelMeanType.EPSILON: eps_slope(process, s),
        ModelMeanType.START_X: np.sqrt(ab) * s**2 / (ab * s**2 + 1 - ab),
    }
    slope[ModelMeanType.PREVIOUS_X] = (
        process.posterior_mean_coef1 * slope[ModelMeanType.START_X] + process.posterior_mean_coef2
    )
    table = torch.from_numpy(slope[kind]).float()
    return lambda x, t: table[t].view(-1, 1, 1, 1) * x


def make(
    mean_type=ModelMeanType.EPSILON,
    var_type=ModelVarType.FIXED_SMALL,
    steps=40,
    schedule="linear",
    **kwargs,
):
    return GaussianDiffusion(
        betas=get_named_beta_schedule(schedule, steps),
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=LossType.MSE,
        **kwargs,
    )


def recursion(process, eta, sampler, s=S, start=1.0):
    """Variances V_{t-1} = A_t^2 V_t + v_t for the exact network whose epsilon is divided by
    lambda(t).
    """
    ab, ab_prev = process.alphas_cumprod, process.alphas_cumprod_prev
    slope = eps_slope(process, s) / process.lambdas
    x0_slope = (1 - np.sqrt(1 - ab) * slope) / np.sqrt(ab)
    variances, v = [], start
    for t in range(process.num_timesteps - 1, -1, -1):
        if sampler == "ddpm":
            a = process.posterior_mean_coef1[t] * x0_slope[t] + process.posterior_mean_coef2[t]
            noise = (
                process.posterior_variance[t]
                if process.model_var_type is ModelVarType.FIXED_SMALL
                else process.betas[t]
            )
        else:
            noise = eta**2 * (1 - ab_prev[t]) / (1 - ab[t]) * (1 - ab[t] / ab_prev[t])
            a = np.sqrt(ab_prev[t]) * x0_slope[t] + np.sqrt(1 - ab_prev[t] - noise) * slope[t]
        v = a**2 * v + (noise if t else 0)
        variances.append(v)
    return np.array(variances)


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
@pytest.mark.parametrize(
    "lam",
    [
        {},
        {"eps_scaler": 1.02},
        {"eps_scaler": 0.99, "eps_scaler_k": 0.001},
        {"eps_scaler": list(np.linspace(1.03, 0.98, 40))},
    ],
)
@pytest.mark.parametrize(
    "sampler, eta", [("ddpm", None), ("ddim", 0.0), ("ddim", 0.6), ("ddim", 1.0)]
)
def test_every_sampler_follows_the_variance_recursion(mean_type, lam, sampler, eta):
    process = make(mean_type, **lam)
    model = exact_network(process, mean_type)
    generator = torch.Generator().manual_seed(1)
    shape = (64, 1, 64, 64)  # 262,144 numbers: the variance has a standard error of 0.28 %
    randn_like = lambda x: torch.randn(x.shape, generator=generator)  # noqa: E731
    options = {} if eta is None else {"eta": eta}
    progressive = (
        process.p_sample_loop_progressive
        if sampler == "ddpm"
        else process.ddim_sample_loop_progressive
    )
    got = [
        out["sample"].var().item()
        for out in progressive(model, shape, clip_denoised=False, randn_like=randn_like, **options)
    ]
    np.testing.assert_allclose(got, recursion(process, eta, sampler), rtol=0.02)


def test_fixed_large_variance_follows_the_recursion():
    process = make(var_type=ModelVarType.FIXED_LARGE)
    torch.manual_seed(0)
    got = [
        out["sample"].var().item()
        for out in process.p_sample_loop_progressive(
            exact_network(process), (64, 1, 64, 64), clip_denoised=False
        )
    ]
    np.testing.assert_allclose(got, recursion(process, None, "ddpm"), rtol=0.02)


def test_the_deterministic_path_is_exact_for_gaussian_data():
    # With many steps DDIM's ODE carries N(0, 1) to N(0, s^2) pointwise: x_0 = s x_T.
    process = make(steps=4000)
    x = torch.randn(2, 1, 4, 4)
    out = process.ddim_sample_loop(exact_network(process), x.shape, noise=x, clip_denoised=False)
    torch.testing.assert_close(out, S * x, rtol=3e-3, atol=1e-3)


def test_reverse_ddim_retraces_the_path():
    process = make(steps=1000)
    model = exact_network(process)
    x0 = torch.randn(2, 1, 4, 4) * S
    x = x0
    for t in range(process.num_timesteps - 1):
        x = process.ddim_reverse_sample(model, x, torch.full((2,), t), clip_denoised=False)[
            "sample"
        ]
    back = x
    for t in range(process.num_timesteps - 1, -1, -1):
        back = process.ddim_sample(model, back, torch.full((2,), t), clip_denoised=False)["sample"]
    torch.testing.assert_close(back, x0, rtol=0.02, atol=0.01)


def test_reverse_ddim_is_not_scaled_unless_asked():
    plain, scaled = make(steps=40), make(steps=40, eps_scaler=1.1)
    model, x, t = exact_network(plain), torch.randn(2, 1, 4, 4), torch.tensor([3, 30])
    reverse = lambda p, **k: p.ddim_reverse_sample(model, x, t, clip_denoised=False, **k)["sample"]  # noqa: E731
    assert torch.equal(reverse(plain), reverse(scaled))
    assert not torch.allclose(reverse(plain), reverse(scaled, scale_epsilon=True))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("t", [5, 20, 39])
def test_best_linear_predictor_under_input_perturbation(gamma, t):
    # Fit y = a x by least squares through training_losses itself: the minimum of a quadratic from
    # three points.
    process = make(input_perturbation=gamma)
    torch.manual_seed(t)
    x0 = torch.randn(16, 1, 128, 128) * S
    eps, xi = torch.randn_like(x0), torch.randn_like(x0)
    steps = torch.full((16,), t)

    def loss(a):
        return (
            process.training_losses(
                lambda x, t: a * x, x0, steps, noise=eps, randn_like=lambda z: xi
            )["loss"]
            .double()
            .mean()
            .item()
        )

    down, centre, up = loss(-1.0), loss(0.0), loss(1.0)
    best = (down - up) / (2 * (down + up - 2 * centre))
    ab = process.alphas_cumprod[t]
    expected = np.sqrt(1 - ab) / (ab * S**2 + (1 - ab) * (1 + gamma**2))
    assert best == pytest.approx(expected, rel=0.01)


def test_loss_floor_under_input_perturbation():
    # With pure noise at the input, epsilon can be told from epsilon + gamma xi only up to gamma^2 /
    # (1 + gamma^2).
    gamma = 0.5
    process = make(steps=1000, schedule="cosine", input_perturbation=gamma)
    torch.manual_seed(0)
    x0 = torch.zeros(8, 1, 128, 128)
    t = torch.full((8,), 999)
    loss = process.training_losses(lambda x, t: x / (1 + gamma**2), x0, t)["loss"].mean().item()
    assert loss == pytest.approx(gamma**2 / (1 + gamma**2), rel=0.02)


def scrambled(channels_out):
    """A network without meaning, for bitwise comparisons."""
    torch.manual_seed(3)
    w = torch.randn(channels_out, 3)
    return lambda x, t: torch.tanh(torch.einsum("oc,nchw->nohw", w, x) + 0.01 * t.view(-1, 1, 1, 1))


ALL_KINDS = [(m, v) for m in ModelMeanType for v in ModelVarType]


@pytest.mark.parametrize("mean_type, var_type", ALL_KINDS)
def test_lambda_one_is_the_baseline_bitwise(mean_type, var_type):
    model = scrambled(6 if var_type.is_learned else 3)
    noise = torch.randn(2, 3, 4, 4)
    plain = make(mean_type, var_type)
    ones = make(mean_type, var_type, eps_scaler=[1.0] * 40)
    scaled = make(mean_type, var_type, eps_scaler=1.01)
    for loop in ("p_sample_loop", "ddim_sample_loop"):

        def run(process):
            torch.manual_seed(5)
            return getattr(process, loop)(model, noise.shape, noise=noise)

        assert torch.equal(run(plain), run(ones))
        assert not torch.equal(run(plain), run(scaled))


@pytest.mark.parametrize("mean_type, var_type", ALL_KINDS)
@pytest.mark.parametrize("loss_type", list(LossType))
@pytest.mark.filterwarnings("ignore:input perturbation is meant for")
def test_gamma_and_lambda_do_not_touch_each_others_path(mean_type, var_type, loss_type):
    model = scrambled(6 if var_type.is_learned else 3)
    x0, t = torch.rand(4, 3, 4, 4) * 2 - 1, torch.tensor([0, 7, 20, 39])

    def process(**kwargs):
        return GaussianDiffusion(
            betas=get_named_beta_schedule("linear", 40),
            model_mean_type=mean_type,
            model_var_type=var_type,
            loss_type=loss_type,
            **kwargs,
        )

    def loss(p, gamma=None):
        torch.manual_seed(1)
        return p.training_losses(model, x0, t, gamma=gamma)["loss"]

    def samples(p):
        torch.manual_seed(1)
        return p.p_sample_loop(model, (2, 3, 4, 4))

    plain = process()
    assert torch.equal(loss(plain), loss(process(eps_scaler=1.1)))
    assert torch.equal(loss(plain), loss(plain, gamma=0.0))
    assert torch.equal(loss(process(input_perturbation=0.2)), loss(plain, gamma=0.2))
    assert not torch.equal(loss(plain), loss(plain, gamma=0.2))
    assert torch.equal(samples(plain), samples(process(input_perturbation=0.2)))
    bpd = lambda p: (torch.manual_seed(2), p.calc_bpd_loop(model, x0))[1]["total_bpd"]  # noqa: E731
    assert torch.equal(bpd(plain), bpd(process(input_perturbation=0.2, eps_scaler=1.1)))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("rescale", [False, True])
def test_spaced_with_all_steps_is_the_process_itself_bitwise(schedule, rescale):
    betas = get_named_beta_schedule(schedule, 100)
    kwargs = dict(
        betas=betas,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.RESCALED_MSE,
        rescale_timesteps=rescale,
    )
    whole, spaced = GaussianDiffusion(**kwargs), SpacedDiffusion(use_timesteps=range(100), **kwargs)
    model, noise = scrambled(6), torch.randn(2, 3, 4, 4)
    x0, t = torch.rand(3, 3, 4, 4), torch.tensor([0, 50, 99])
    for run in (
        lambda p: p.p_sample_loop(model, noise.shape, noise=noise),
        lambda p: p.ddim_sample_loop(model, noise.shape, noise=noise, eta=0.5),
        lambda p: p.training_losses(model, x0, t)["loss"],
    ):
        torch.manual_seed(0)
        first = run(whole)
        torch.manual_seed(0)
        assert torch.equal(first, run(spaced))


def test_respacing_keeps_alpha_bar_and_tells_the_network_the_original_time():
    seen = []

    def model(x, t):
        seen.append(t.clone())
        return torch.zeros_like(x)

    d = create_gaussian_diffusion(
        steps=1000, noise_schedule="cosine", timestep_respacing="10", rescale_timesteps=True
    )
    original = np.cumprod(1 - get_named_beta_schedule("cosine", 1000))
    np.testing.assert_allclose(d.alphas_cumprod, original[d.timestep_map], rtol=1e-12, atol=1e-17)
    d.p_sample_loop(model, (1, 3, 2, 2))
    assert [float(t[0]) for t in seen] == pytest.approx([float(t) for t in d.timestep_map[::-1]])

    seen.clear()
    gradients = []
    d.p_sample_loop(
        model, (1, 3, 2, 2), cond_fn=lambda x, t: (gradients.append(t), torch.zeros_like(x))[1]
    )
    assert all(torch.equal(a, b) for a, b in zip(seen, gradients)), (
        "cond_fn must see the network's time"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("4", {0, 3, 6, 9}),
        ("ddim5", {0, 2, 4, 6, 8}),
        ("ddim4", {0, 3, 6, 9}),
        ("2,3", {0, 4, 5, 7, 9}),
        ("1", {0}),
        ([10], set(range(10))),
    ],
)
def test_space_timesteps(text, expected):
    assert space_timesteps(10, text) == expected


@pytest.mark.parametrize("steps, possible", [(10, 6), (100, 19), (1000, 63), (4000, 126)])
def test_ddim_takes_what_some_stride_gives_and_names_the_neighbours_otherwise(steps, possible):
    """guided-diffusion's definition, by brute force: the first stride that leaves N of
    the steps.
    """
    kept = {}
    for stride in range(1, steps + 1):
        kept.setdefault(len(range(0, steps, stride)), set(range(0, steps, stride)))
    assert len(kept) == possible
    for n in range(steps + 3):
        if n in kept:
            assert space_timesteps(steps, f"ddim{n}") == kept[n]
        else:
            near = [
                max((m for m in kept if m < n), default=0),
                min((m for m in kept if m > n), default=0),
            ]
            named = ", ".join(f"ddim{m}" for m in near if m)
            plain = min(max(n, 1), steps)
            with pytest.raises(
                ValueError,
                match=f"ddim{n}: .* {n} of {steps} steps; possible near it: "
                f"{named}, or {plain} without 'ddim'$",
            ):
                space_timesteps(steps, f"ddim{n}")


def test_guidance_scales_epsilon_once_and_the_gradient_never():
    lam, gradient = 1.25, 0.3
    cond_fn = lambda x, t: torch.full_like(x, gradient)  # noqa: E731
    zero_clip = dict(clip_denoised=False)
    for t_value in (5, 30):
        t, x = torch.full((2,), t_value), torch.randn(2, 3, 4, 4)
        plain, scaled = make(), make(eps_scaler=lam)
        model = exact_network(plain)
        eps = model(x, t)
        ab = float(plain.alphas_cumprod[t_value])
        out = scaled.ddim_sample(model, x, t, cond_fn=cond_fn, **zero_clip)
        expected_eps = eps / lam - np.sqrt(1 - ab) * gradient
        expected_x0 = (x - np.sqrt(1 - ab) * expected_eps) / np.sqrt(ab)
        torch.testing.assert_close(out["pred_xstart"], expected_x0, rtol=1e-4, atol=1e-5)

        torch.manual_seed(0)
        guided = scaled.p_sample(model, x, t, cond_fn=cond_fn, **zero_clip)["sample"]
        torch.manual_seed(0)
        unguided = scaled.p_sample(model, x, t, **zero_clip)["sample"]
        variance = float(plain.posterior_variance[t_value])
        torch.testing.assert_close(
            guided - unguided, torch.full_like(x, variance * gradient), rtol=1e-3, atol=1e-6
        )


def test_bound_is_zero_for_the_true_posterior_and_prior_for_a_long_chain():
    process = make(ModelMeanType.START_X, ModelVarType.FIXED_SMALL, steps=1000)
    x0 = torch.rand(4, 3, 8, 8) * 2 - 1
    result = process.calc_bpd_loop(lambda x, t: x0, x0)
    assert result["prior_bpd"].abs().max() < 1e-4
    assert result["vb"][:, :-1].abs().max() < 1e-5, (
        "a network that knows x_0 pays nothing for t > 0"
    )
    assert result["vb"].shape == (4, 1000)


# ---- where the limits are ----


def spaced(*timesteps):
    return SpacedDiffusion(
        timesteps,
        betas=get_named_beta_schedule("linear", 100),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )


@pytest.mark.parametrize("timesteps", [(), (-1, 5), (0, 100), (100,)])
def test_steps_that_the_process_does_not_have(timesteps):
    with pytest.raises(ValueError, match=r"must lie in 0 \.\. 99"):
        spaced(*timesteps)


def test_the_first_and_the_last_step_may_be_kept():
    assert spaced(99, 0).timestep_map == [0, 99]


@pytest.mark.parametrize("betas", [[], [[0.1]], 0.1, [0.0], [-0.1, 0.1], [0.1, 1.0001], [np.nan]])
def test_betas_that_are_none(betas):
    with pytest.raises(ValueError, match=r"one-dimensional sequence of numbers in \(0, 1\]"):
        NoiseSchedule(betas)


def test_a_last_beta_of_one_leaves_no_signal():
    schedule = NoiseSchedule([0.5, 1.0])
    assert schedule.alphas_cumprod.tolist() == [0.5, 0.0] and np.isinf(
        schedule.sqrt_recip_alphas_cumprod[1]
    )
    assert schedule.snr.tolist() == [1.0, 0.0]


def test_the_linear_schedule_needs_21_steps():
    assert get_named_beta_schedule("linear", 21)[-1] == pytest.approx(0.02 * 1000 / 21)
    with pytest.raises(ValueError, match="at least 21 diffusion steps, got 20"):
        get_named_beta_schedule("linear", 20)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("value", [0.0, -0.5, np.nan, np.inf, -np.inf])
def test_every_lambda_must_be_positive_and_finite(at, value):
    with pytest.raises(ValueError, match=r"lambda\(t\) > 0 at every step"):
        EpsilonScaling.of([value if t == at else 1.0 for t in range(3)]).lambdas(3)


def test_a_line_is_positive_down_to_its_lower_end():
    np.testing.assert_allclose(EpsilonScaling(1.0, -0.33).lambdas(4), [1, 0.67, 0.34, 0.01])
    with pytest.raises(ValueError, match=r"lambda\(3\) = -0.02"):
        EpsilonScaling(1.0, -0.34).lambdas(4)


@pytest.mark.parametrize(
    "gain, lam, clip, warns",
    [
        (1100, 1.01, False, True),
        (900, 1.01, False, False),
        (1100, 1.0, False, False),
        (1100, 1.01, True, False),
    ],
)
def test_unclipped_scaling_is_warned_of_where_the_first_step_multiplies_epsilon_by_a_thousand(
    gain, lam, clip, warns
):
    process = GaussianDiffusion(
        betas=[0.1, 1 - 1 / (0.9 * (1 + gain**2))],
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
        eps_scaler=lam,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        process.p_sample_loop(lambda x, t: x, (1, 1, 2, 2), clip_denoised=clip)
    assert [f"by {gain}" in str(one.message) for one in caught] == [True] * warns


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_gamma_is_warned_of_where_the_network_does_not_predict_epsilon(mean_type, gamma):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(mean_type, input_perturbation=gamma)
    assert len(caught) == (gamma > 0 and mean_type is not ModelMeanType.EPSILON)
    assert all(f"with {mean_type.name} targets" in str(one.message) for one in caught)
