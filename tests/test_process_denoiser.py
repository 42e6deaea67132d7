"""ADM's processes and networks behind EDM's samplers: the same ODE, the same noise, the same
answers.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_tools import load_seeded_weights, seeded_normal

from guided_diffusion_ip.diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion_ip.diffusion.denoiser import BoundDenoiser
from guided_diffusion_ip.diffusion.edm_sampling import ablation_sample, edm_sample
from guided_diffusion_ip.diffusion.guidance import classifier_free
from guided_diffusion_ip.diffusion.process_denoiser import ProcessDenoiser
from guided_diffusion_ip.script_util import create_gaussian_diffusion, create_model

SHAPE = (2, 3, 4, 4)
NOISE = seeded_normal("adapter/noise", SHAPE)


def make(schedule="cosine", steps=1000, respacing="", **kwargs):
    return create_gaussian_diffusion(
        noise_schedule=schedule, steps=steps, timestep_respacing=respacing, **kwargs
    )


def times(value, n=2):
    return torch.full((n,), value)


class Network:
    """A smooth epsilon(x_t, t): data of std 0.5, and a ripple that is gone at sigma = 0. t indexes
    `process`, whole or not.
    """

    def __init__(self, process):
        self.logs = np.log(process.sqrt_recipm1_alphas_cumprod)
        self.seen = []

    def __call__(self, x_t, t, **kwargs):
        self.seen.append((x_t, t, kwargs))
        steps = np.arange(len(self.logs))
        sigma = (
            torch.from_numpy(np.exp(np.interp(t.double().numpy(), steps, self.logs)))
            .to(x_t.dtype)
            .view(-1, 1, 1, 1)
        )
        x = x_t * (1 + sigma**2).sqrt()
        denoised = (
            0.25 * x / (0.25 + sigma**2) + 0.1 * torch.sin(3 * x) * sigma**2 / (1 + sigma**2) ** 2
        )
        return (x - denoised) / sigma


def latents_for(process):
    """EDM's latents of the chain that starts at x_T = NOISE."""
    return NOISE.double() / process.sqrt_one_minus_alphas_cumprod[-1]


def whole_range(d, **options):
    return {"sigma_min": d.sigma_min, "sigma_max": d.sigma_max, **options}


# ---- one evaluation ----


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("respacing", ["", "50", "ddim25"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("interpolate", [False, True])
def test_on_a_noise_level_of_the_process_it_is_the_predicted_x_start(
    schedule, respacing, rescale, interpolate
):
    process = make(schedule, 200, respacing, rescale_timesteps=rescale)
    model = lambda x, t: torch.tanh(x + 0.01 * t.view(-1, 1, 1, 1))  # noqa: E731
    d = ProcessDenoiser(process, model, interpolate=interpolate)
    for index in (0, 3, process.num_timesteps - 8, process.num_timesteps - 1):
        sigma = process.sqrt_recipm1_alphas_cumprod[index]
        x_t = NOISE.double()
        want = process.p_mean_variance(model, x_t.float(), times(index), clip_denoised=False)[
            "pred_xstart"
        ]
        got = d(x_t * np.sqrt(1 + sigma**2), torch.tensor(sigma, dtype=torch.float64))
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.float(), want, rtol=2e-5, atol=2e-5 * max(1.0, sigma))


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.LEARNED_RANGE])
def test_whatever_the_network_predicts(mean_type, var_type):
    process = GaussianDiffusion(
        betas=get_named_beta_schedule("linear", 50),
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=LossType.MSE,
    )
    twice = 2 if var_type.is_learned else 1
    model = lambda x, t: torch.cat([torch.tanh(x + 0.1 * t.view(-1, 1, 1, 1))] * twice, dim=1)  # noqa: E731
    d = ProcessDenoiser(process, model)
    sigma = torch.from_numpy(process.sqrt_recipm1_alphas_cumprod[[4, 30]])  # one per image
    x = NOISE.double() * (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
    want = process.p_mean_variance(model, NOISE, torch.tensor([4, 30]), clip_denoised=False)[
        "pred_xstart"
    ]
    torch.testing.assert_close(d(x, sigma).float(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("respacing", ["", "20"])
def test_what_the_network_is_told(respacing, rescale):
    process = make("linear", 100, respacing, rescale_timesteps=rescale)
    sigmas = process.sqrt_recipm1_alphas_cumprod
    told = []
    model = lambda x, t, **k: told.append((t, k)) or torch.zeros_like(x)  # noqa: E731
    labels = torch.tensor([3, 1])
    index = process.num_timesteps // 2
    between = torch.tensor(
        sigmas[index] ** 0.75 * sigmas[index + 1] ** 0.25
    )  # a quarter of the way, in log sigma
    rounding = ProcessDenoiser(process, model, model_kwargs={"low_res": 7})
    smooth = ProcessDenoiser(process, model, interpolate=True)
    rounding(NOISE, between, labels)
    smooth(NOISE, between, torch.nn.functional.one_hot(labels, 5).float())
    whole, above = (process._scale_timesteps(times(i)) for i in (index, index + 1))
    assert (
        torch.equal(told[0][0], whole)
        and told[0][1]["low_res"] == 7
        and torch.equal(told[0][1]["y"], labels)
    )
    torch.testing.assert_close(told[1][0], (0.75 * whole + 0.25 * above).float())
    assert torch.equal(told[1][1]["y"], labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_row_of_zeros_is_no_class_and_never_class_0(dtype):
    told = []
    model = lambda x, t, y: told.append(y) or torch.zeros_like(x)  # noqa: E731
    rows = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]], dtype=dtype)
    x = NOISE[[0, 1, 0, 1]]
    ProcessDenoiser(make(steps=50), model, null_label=3)(x, torch.tensor(1.0), rows)
    assert told[0].tolist() == [0, 3, 2, 3] and told[0].dtype == torch.int64
    without = ProcessDenoiser(make(steps=50), model)
    with pytest.raises(ValueError, match="2 of 4 rows .* no class, .* null_label="):
        without(x, torch.tensor(1.0), rows)
    without(x[::2], torch.tensor(1.0), rows[::2])
    assert told[1].tolist() == [0, 2]


def test_a_row_of_zeros_is_sampled_as_the_null_label_bitwise():
    """By a network that has one, guided and not."""
    model = create_model(
        8,
        32,
        1,
        channel_mult="1",
        attention_resolutions="",
        class_cond=True,
        num_classes=3,
        null_class=True,
    )
    model = load_seeded_weights(model)
    rows, numbers = torch.eye(4)[[2, 3], :3], torch.tensor([2, 3])
    noise = seeded_normal("adapter/rows", (2, 3, 8, 8))
    for guided in (model, classifier_free(model, 3.0, 3)):
        d = ProcessDenoiser(make(steps=50), guided, null_label=3)
        one, two = (edm_sample(d, noise, labels, num_steps=2) for labels in (rows, numbers))
        assert torch.equal(one, two)
    assert not torch.equal(one, edm_sample(d, noise, torch.tensor([2, 0]), num_steps=2))


def test_rounding_is_to_the_nearest_in_log_sigma():
    process = make("cosine", 50)
    d = ProcessDenoiser(process, None)
    sigmas = torch.from_numpy(process.sqrt_recipm1_alphas_cumprod)
    assert torch.equal(d.round_sigma(sigmas), sigmas)
    between = (sigmas[1:] * sigmas[:-1]).sqrt()
    assert torch.equal(d.round_sigma(between * 1.001), sigmas[1:]) and torch.equal(
        d.round_sigma(between * 0.999), sigmas[:-1]
    )
    assert torch.equal(
        d.round_sigma(torch.tensor([[1e-9, 1e9]], dtype=torch.float64)), sigmas[[0, -1]][None]
    )
    smooth = ProcessDenoiser(process, None, interpolate=True)
    assert torch.equal(smooth.round_sigma(between), between)
    assert (d.sigma_min, d.sigma_max) == (sigmas[0].item(), sigmas[-1].item())


def test_the_start_of_a_chain_has_the_noise_of_x_T():
    process = make("linear")
    network = Network(process)
    d = ProcessDenoiser(process, network)
    edm_sample(d, latents_for(process), **whole_range(d, num_steps=3))
    x_t, t, _ = network.seen[0]
    torch.testing.assert_close(x_t, NOISE, rtol=1e-5, atol=1e-6)
    assert t.tolist() == [999, 999] and x_t.dtype == torch.float32


# ---- whole chains ----


class ClampedFirst(BoundDenoiser):
    def __init__(self, d):
        super().__init__(
            lambda *args: d(*args).clamp(-1, 1),
            SimpleNamespace(
                sigma_min=d.sigma_min, sigma_max=d.sigma_max, label_dim=0, round_sigma=d.round_sigma
            ),
        )


@pytest.mark.parametrize("clip, lam", [(False, 1.0), (True, 1.0), (True, 1.05)])
def test_euler_on_the_process_own_levels_is_ddim(clip, lam):
    # iddpm's noise levels are those of ADM's cosine schedule, and DDIM is Euler's method in sigma.
    # With the clip, both divide epsilon by lambda first and clamp then.
    process = make("cosine", eps_scaler=lam)
    network = Network(process)
    ddim = process.ddim_sample_loop(network, SHAPE, noise=NOISE, clip_denoised=clip)
    d = ProcessDenoiser(process, network)
    # The ends are a hair wider: a level that is equal up to rounding must not fall out of the
    # range.
    euler = ablation_sample(
        d,
        latents_for(process),
        solver="euler",
        discretization="iddpm",
        num_steps=1000,
        sigma_min=1e-9,
        sigma_max=1e9,
        eps_scaler=lam,
        clip_denoised=clip,
    )
    # DDIM here is float32: at sigma = 20,000 its estimate of y is known to 2e-3 only, which matters
    # once lambda is not 1.
    torch.testing.assert_close(euler.float(), ddim, rtol=1e-4, atol=1e-4 if lam == 1 else 3e-3)
    if lam != 1:  # clamping first and dividing then is another thing
        other = ablation_sample(
            ClampedFirst(d),
            latents_for(process),
            solver="euler",
            discretization="iddpm",
            num_steps=1000,
            sigma_min=1e-9,
            sigma_max=1e9,
            eps_scaler=lam,
        )
        assert (other.float() - ddim).abs().max() > 0.05


def test_lambda_means_the_same_for_ddim_and_euler():
    # Unclipped DDIM divides both terms' epsilon; lambda is indexed alike. The process's own is not
    # applied on top.
    lambdas = [1.0 + 0.0001 * (i % 50) for i in range(1000)]
    plain, scaled = make("linear"), make("linear", eps_scaler=lambdas)
    network = Network(plain)
    x = NOISE
    for index in range(999, 899, -1):
        x = scaled.ddim_sample(network, x, times(index), clip_denoised=False)["sample"]
    sigmas = plain.sqrt_recipm1_alphas_cumprod
    state = latents_for(plain) * sigmas[999]
    d = ProcessDenoiser(scaled, network)
    for index in range(999, 899, -1):
        sigma = torch.tensor(sigmas[index])
        state = (
            state
            + (sigmas[index - 1] - sigmas[index])
            * (state - d(state, sigma))
            / sigma
            / lambdas[index]
        )
    torch.testing.assert_close(
        (state / np.sqrt(1 + sigmas[899] ** 2)).float(), x, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_heun_and_ddim_solve_the_same_ode(schedule):
    # Measured: DDIM in 125, 250, 500, 1000 steps is 0.016, 0.0081, 0.0042, 0.0022 from Heun with a
    # cosine schedule, and 0.028,
    # 0.015, 0.0075, 0.0038 with a linear one. From sigma = 20,000, where cosine schedules start, a
    # high rho serves best.
    distances = []
    for steps in (125, 250, 500, 1000):
        process = make(schedule, steps)
        network = Network(process)
        ddim = process.ddim_sample_loop(network, SHAPE, noise=NOISE, clip_denoised=False)
        d = ProcessDenoiser(process, network, interpolate=True)
        heun = edm_sample(d, latents_for(process), **whole_range(d, num_steps=400, rho=20))
        distances.append((ddim - heun).abs().max().item())
    assert distances[-1] < 0.005, distances
    np.testing.assert_allclose(
        np.log2(np.divide(distances[:-1], distances[1:])), 1, atol=0.25
    )  # DDIM is of first order

    errors = [
        (edm_sample(d, latents_for(process), **whole_range(d, num_steps=n, rho=20)) - heun)
        .abs()
        .max()
        .item()
        for n in (32, 64, 128)
    ]
    np.testing.assert_allclose(
        np.log2(np.divide(errors[:-1], errors[1:])), 2, atol=0.35
    )  # Heun of second


def test_heun_on_rounded_levels_is_near_the_smooth_one():
    process = make("cosine")
    network = Network(process)
    smooth, rounded = (ProcessDenoiser(process, network, interpolate=i) for i in (True, False))
    a, b = (edm_sample(d, latents_for(process), num_steps=30) for d in (smooth, rounded))
    assert (a - b).abs().max() < 0.02 and not torch.equal(a, b)


def test_lambda_one_is_the_baseline_bitwise():
    process = make("cosine", eps_scaler=1.05)  # whatever the process has of its own
    d = ProcessDenoiser(process, Network(process))
    bare = ProcessDenoiser(make("cosine"), Network(process))
    assert torch.equal(
        edm_sample(d, NOISE, num_steps=6), edm_sample(bare, NOISE, num_steps=6, eps_scaler=1.0)
    )


def test_a_clip_keeps_samples_in_range():
    process = make("linear")
    d = ProcessDenoiser(process, lambda x, t: torch.zeros_like(x))  # no noise at all: D(x) = x
    inside = edm_sample(d, NOISE, num_steps=4, clip_denoised=True)
    assert inside.abs().max() <= 1 < edm_sample(d, NOISE, num_steps=4).abs().max()


# ---- mistakes ----


def test_mistakes():
    process = GaussianDiffusion(
        betas=get_named_beta_schedule("linear", 50),
        model_mean_type=ModelMeanType.PREVIOUS_X,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )
    with pytest.raises(ValueError, match="interpolate=False"):
        ProcessDenoiser(process, None, interpolate=True)
    with pytest.raises(ValueError, match="two noise levels"):
        ProcessDenoiser(make("linear", 100, "1"), None, interpolate=True)
    with pytest.raises(ValueError, match="expected 6 channels"):
        ProcessDenoiser(make(learn_sigma=True), lambda x, t: x, interpolate=True)(
            NOISE, torch.tensor(1.0)
        )
