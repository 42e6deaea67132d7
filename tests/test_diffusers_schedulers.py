"""Epsilon scaling in diffusers' schedulers: closed forms, our own sampler, and pipelines of
diffusers with random weights.
"""

import copy
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from golden_tools import load_seeded_weights, seeded_image, seeded_normal

pytest.importorskip("diffusers")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    EulerDiscreteScheduler,
    LDMPipeline,
    PNDMScheduler,
)
from test_diffusers_models import SIZE, diffusers, small_dit, small_unet, small_vae  # noqa: E402

from guided_diffusion_ip.interop import diffusers_schedulers  # noqa: E402
from guided_diffusion_ip.interop.diffusers_models import DiffusersModel  # noqa: E402
from guided_diffusion_ip.interop.diffusers_schedulers import EpsilonScaled, EpsilonScaling  # noqa: E402
from guided_diffusion_ip.script_util import create_gaussian_diffusion  # noqa: E402
from guided_diffusion_ip.settings.lambda_file import read_schedule, write_schedule  # noqa: E402

SHAPE = (2, 3, SIZE, SIZE)
STEPS = 6
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "euler": EulerDiscreteScheduler}
LAMBDAS = [1.03, 1.02, 1.0, 1.015, 0.99, 1.01]  # index 0: the last step


def chain(scheduler, unet, steps=STEPS, start=None, seed=0, **options):
    """x_0 [2, 3, 8, 8] by a loop as in diffusers' pipelines; every intermediate sample."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    x = (seeded_normal("start", SHAPE) if start is None else start) * scheduler.init_noise_sigma
    states = []
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = unet(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(output, t, x, **options).prev_sample
        states.append(x)
    return torch.stack(states)


def recorded(name, prediction_type="epsilon", **config):
    """A scheduler with a noise schedule that few steps can follow without clipping."""
    own = {} if name == "euler" else {"clip_sample": False}
    return SCHEDULERS[name](prediction_type=prediction_type, **{**own, **config})


# ---- lambda = 1 ----


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "name, options",
    [
        ("ddim", {"eta": 0.0}),
        ("ddim", {"eta": 1.0}),
        ("ddpm", {}),
        ("euler", {}),
        ("euler", {"s_churn": 1.0}),
    ],
)
def test_lambda_1_is_bitwise_the_wrapped_scheduler(name, options, prediction_type):
    unet, scheduler = small_unet(), recorded(name, prediction_type)
    want = chain(scheduler, unet, **options)
    assert torch.equal(chain(EpsilonScaled(scheduler), unet, **options), want)
    assert torch.equal(
        chain(
            EpsilonScaled(scheduler, schedule=[1.0] * STEPS, x0_only=name == "ddim"),
            unet,
            **options,
        ),
        want,
    )
    # Steps with lambda = 1 are plain ones beside others that are not; the last value is of the
    # first step.
    if not options.get("s_churn") or prediction_type == "epsilon":
        mixed = chain(
            EpsilonScaled(scheduler, schedule=[1.02] + [1.0] * (STEPS - 1)), unet, **options
        )
        assert torch.equal(mixed[:-1], want[:-1]) and not torch.equal(mixed[-1], want[-1])


# ---- one step in closed form ----


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_one_step_of_ddim_both_variants(eta):
    scheduler, lam = recorded("ddim"), 1.05
    scheduler.set_timesteps(10)
    x, eps, z = (seeded_normal(name, SHAPE).double() for name in ("x", "eps", "z"))
    t = 500
    a, p = (float(scheduler.alphas_cumprod[i]) for i in (t, 400))
    s = eta * math.sqrt((1 - p) / (1 - a) * (1 - a / p))
    x_0 = (x - math.sqrt(1 - a) * eps / lam) / math.sqrt(a)
    for x0_only in (False, True):
        direction = eps if x0_only else eps / lam
        want = math.sqrt(p) * x_0 + math.sqrt(1 - p - s**2) * direction + s * z
        scaled = EpsilonScaled(scheduler, lam, x0_only=x0_only)
        out = scaled.step(eps, t, x, eta=eta, variance_noise=z)
        torch.testing.assert_close(out.prev_sample, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.pred_original_sample, x_0, rtol=1e-6, atol=1e-6)
        pair = scaled.step(eps, t, x, eta=eta, variance_noise=z, return_dict=False)
        assert torch.equal(pair[0], out.prev_sample) and torch.equal(
            pair[1], out.pred_original_sample
        )


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_other_predictions_are_scaled_through_their_epsilon(name, prediction_type):
    """The same network in three languages takes the same step, with lambda and without."""
    x, eps = seeded_normal("x", SHAPE), seeded_normal("eps", SHAPE)
    steps = {}
    for kind in ("epsilon", prediction_type):
        for b in (1.0, 1.04):
            scheduler = EpsilonScaled(recorded(name, kind), b)
            scheduler.set_timesteps(10)
            t = scheduler.timesteps[4]
            if name == "euler":
                sigma = float(scheduler.sigmas[4])
                alpha, noise, sample = (
                    1 / math.sqrt(1 + sigma**2),
                    sigma / math.sqrt(1 + sigma**2),
                    x * math.sqrt(1 + sigma**2),
                )
            else:
                alpha_bar = float(scheduler.alphas_cumprod[int(t)])
                alpha, noise, sample = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), x
            x_0 = (x - noise * eps) / alpha
            output = {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - noise * x_0}[
                kind
            ]
            out = scheduler.step(output, t, sample, generator=torch.Generator().manual_seed(0))
            steps[kind, b] = out.prev_sample
            # Euler returns x_0_hat, too.
            torch.testing.assert_close(
                out.pred_original_sample, (x - noise * eps / b) / alpha, rtol=1e-4, atol=1e-4
            )
    for b in (1.0, 1.04):
        torch.testing.assert_close(
            steps[prediction_type, b], steps["epsilon", b], rtol=1e-4, atol=1e-4
        )
    assert (steps["epsilon", 1.04] - steps["epsilon", 1.0]).abs().max() > 1e-3


@pytest.mark.parametrize("churn", [0.0, 1.0])
def test_eulers_derivative_is_divided_at_every_step(churn):
    """A chain with the derivative (x - D) / sigma divided by lambda, written out (EDM-ES)."""
    unet, scheduler = (
        small_unet(),
        EpsilonScaled(recorded("euler", timestep_spacing="trailing"), schedule=LAMBDAS),
    )
    got = chain(scheduler, unet, s_churn=churn, s_noise=1.003)
    generator = torch.Generator().manual_seed(0)
    sigmas = scheduler.sigmas.double()
    x = seeded_normal("start", SHAPE) * scheduler.init_noise_sigma
    for i in range(STEPS):
        sigma = sigmas[i]
        with torch.no_grad():
            eps = unet((x / (sigma**2 + 1) ** 0.5).float(), scheduler.timesteps[i]).sample
        raised = sigma * (1 + min(churn / STEPS, math.sqrt(2) - 1))
        if churn:
            noise = torch.randn(SHAPE, generator=generator)
            x = x + noise * 1.003 * (raised**2 - sigma**2) ** 0.5
        x = x + (sigmas[i + 1] - raised) * eps / LAMBDAS[STEPS - 1 - i]
        torch.testing.assert_close(got[i], x.float(), rtol=1e-4, atol=1e-4)


def test_ddpm_leaves_a_learned_variance_alone():
    output, x = seeded_normal("output", (2, 6, SIZE, SIZE)), seeded_normal("x", SHAPE)
    plain, scaled = (
        EpsilonScaled(recorded("ddpm", variance_type="learned_range"), b) for b in (1.0, 1.04)
    )
    for scheduler in (plain, scaled):
        scheduler.set_timesteps(10)
    by_hand = torch.cat([output[:, :3] / 1.04, output[:, 3:]], dim=1)
    want = plain.step(by_hand, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert torch.equal(
        scaled.step(output, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample, want
    )


# ---- our own samplers ----


@pytest.mark.parametrize(
    "lambdas", [1.0, 1.02, [1.03, 1.02, 1.0, 1.015, 0.99]], ids=["plain", "b", "schedule"]
)
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_is_that_of_our_process(lambdas, clip):
    """Ours reads epsilon back from the clipped x_0_hat, which diffusers calls
    use_clipped_model_output.
    """
    unet = small_unet()
    process = create_gaussian_diffusion(timestep_respacing="ddim5", eps_scaler=lambdas)
    start = seeded_normal("start", SHAPE)
    want = torch.stack(
        [
            out["sample"]
            for out in process.ddim_sample_loop_progressive(
                DiffusersModel(unet), SHAPE, start, clip_denoised=clip
            )
        ]
    )
    scheduler = EpsilonScaled(DDIMScheduler(clip_sample=clip), lambdas)
    got = chain(scheduler, unet, steps=5, start=start, use_clipped_model_output=True)
    assert scheduler.timesteps.tolist() == process.timestep_map[::-1]
    # Without the clip a random network's chain grows to 85.
    torch.testing.assert_close(
        got, want, rtol=0, atol=1e-5 * (1 if clip else float(want.abs().max()))
    )


@pytest.mark.parametrize("b", [1.0, 1.02])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_is_that_of_our_process(b, variance):
    learned = variance == "learned_range"
    unet = small_unet(out_channels=6 if learned else 3)
    with torch.no_grad():
        unet.conv_out.weight[3:] *= (
            0.2  # between -1 and 1, as a trained network's: an exponential follows
        )
    process = create_gaussian_diffusion(
        timestep_respacing="ddim5",
        eps_scaler=b,
        eps_scaler_k=0.001,
        learn_sigma=learned,
        sigma_small=variance == "fixed_small",
    )
    start, generator = seeded_normal("start", SHAPE), torch.Generator().manual_seed(0)
    want = torch.stack(
        [
            out["sample"]
            for out in process.p_sample_loop_progressive(
                DiffusersModel(unet),
                SHAPE,
                start,
                randn_like=lambda x: torch.randn(x.shape, generator=generator),
            )
        ]
    )
    scheduler = EpsilonScaled(DDPMScheduler(clip_sample=True, variance_type=variance), b, 0.001)
    torch.testing.assert_close(
        chain(scheduler, unet, steps=5, start=start), want, rtol=0, atol=2e-5
    )


# ---- what lambda may be ----


def test_k_counts_from_the_clean_end_and_files_are_read(tmp_path):
    line = EpsilonScaled(DDIMScheduler(), 1.004, 0.002)
    line.set_timesteps(5)
    assert [line.lambda_at(t) for t in line.timesteps] == pytest.approx(
        [1.012, 1.010, 1.008, 1.006, 1.004]
    )
    write_schedule(tmp_path / "eps.yaml", {"steps": 5, "lambda": LAMBDAS[:5]})
    read = EpsilonScaled(DDIMScheduler(), *read_schedule(tmp_path / "eps.yaml", 5))
    read.set_timesteps(5)
    assert [read.lambda_at(t) for t in read.timesteps] == LAMBDAS[:5][::-1]
    array = EpsilonScaled(DDIMScheduler(), np.array(LAMBDAS))
    assert array.config.eps_scaler == LAMBDAS


def test_a_chain_that_starts_in_the_middle_keeps_its_lambdas():
    """As image-to-image pipelines do it: the schedule belongs to all steps, not to those that are
    taken.
    """
    for name in SCHEDULERS:
        scheduler = EpsilonScaled(SCHEDULERS[name](), schedule=LAMBDAS)
        scheduler.set_timesteps(STEPS)
        if name == "euler":
            scheduler.set_begin_index(2)
        assert scheduler.lambda_at(scheduler.timesteps[2]) == LAMBDAS[3]


def test_wrong_settings_are_answered_in_one_line():
    ddim = DDIMScheduler()
    for wrong, message in (
        (
            lambda: EpsilonScaled(PNDMScheduler(), 1.01),
            "got PNDMScheduler: others keep outputs of earlier steps",
        ),
        (
            lambda: EpsilonScaled(diffusers.DPMSolverMultistepScheduler(), 1.01),
            "DDIMScheduler.from_config",
        ),
        (lambda: EpsilonScaled(EpsilonScaled(ddim, 1.01), 1.01), "divides epsilon already"),
        (lambda: EpsilonScaled(ddim, 0.0), "lambda"),
        (lambda: EpsilonScaled(ddim, schedule=[1.0, -1.0]), "lambda"),
        (lambda: EpsilonScaled(ddim, 1.01, schedule=[1.0]), "give one of them"),
        (
            lambda: EpsilonScaled(DDPMScheduler(), 1.01, x0_only=True),
            "variant of DDIM's step, got DDPMScheduler",
        ),
        (
            lambda: EpsilonScaled(ddim, schedule=[1.01] * 5).set_timesteps(6),
            "5 values, but sampling has 6 steps",
        ),
        (lambda: EpsilonScaled(ddim, 1.01, -0.3).set_timesteps(6), r"lambda\(5\) = -0.49"),
        (
            lambda: chain(
                EpsilonScaled(ddim, 1.01, x0_only=True), small_unet(), use_clipped_model_output=True
            ),
            "use one of",
        ),
        (
            lambda: chain(
                EpsilonScaled(recorded("euler", "sample"), 1.01), small_unet(), s_churn=1.0
            ),
            "use s_churn=0",
        ),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            wrong()
        assert "\n" not in str(caught.value)
    scaled = EpsilonScaled(ddim, 1.01)
    scaled.set_timesteps(5)
    with pytest.raises(ValueError, match="timestep 7 is none of the 5"):
        scaled.step(torch.zeros(SHAPE), 7, torch.zeros(SHAPE))


def test_a_first_step_from_pure_noise_needs_lambda_1_there():
    config = dict(
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    with pytest.raises(ValueError, match="alpha_bar = 0"):
        chain(EpsilonScaled(DDIMScheduler(**config), 1.01), small_unet())
    spared = chain(
        EpsilonScaled(DDIMScheduler(**config), schedule=[1.01] * (STEPS - 1) + [1.0]), small_unet()
    )
    assert torch.isfinite(spared).all()
    config.pop("clip_sample")
    with pytest.warns(UserWarning, match="multiplies any change of epsilon by 4096"):
        chain(EpsilonScaled(EulerDiscreteScheduler(**config), 1.01), small_unet())


# ---- what diffusers does with schedulers ----


@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_is_a_scheduler_of_its_class_and_keeps_lambda_in_files(name, tmp_path):
    plain = recorded(name, beta_schedule="scaled_linear")
    scaled = EpsilonScaled(plain, LAMBDAS, 0.001, x0_only=name == "ddim")
    assert isinstance(scaled, SCHEDULERS[name]) and isinstance(scaled, EpsilonScaling)
    assert inspect.signature(scaled.step) == inspect.signature(plain.step)
    assert scaled.config.beta_schedule == "scaled_linear" and "eps_scaler" not in plain.config
    assert (
        scaled.order == plain.order
        and len(scaled) == len(plain)
        and scaled.init_noise_sigma == plain.init_noise_sigma
    )
    x, noise, t = seeded_normal("x", SHAPE), seeded_normal("noise", SHAPE), plain.timesteps[[3, 4]]
    assert torch.equal(scaled.add_noise(x, noise, t), plain.add_noise(x, noise, t))

    scaled.save_pretrained(tmp_path)
    unet, copies = (
        small_unet(),
        [
            type(scaled).from_pretrained(tmp_path),
            type(scaled).from_config(scaled.config),
            copy.deepcopy(scaled),
            pickle.loads(pickle.dumps(scaled)),
        ],
    )
    want = chain(scaled, unet)
    for other in copies:
        assert type(other) is type(scaled) and torch.equal(chain(other, unet), want)
    assert not torch.equal(want, chain(plain, unet))
    below = SCHEDULERS[name].from_config(scaled.config)
    assert torch.equal(chain(below, unet), chain(plain, unet)), (
        "made anew from the config: without lambda"
    )


def test_an_unknown_attribute_of_the_module_is_an_error():
    assert diffusers_schedulers.EpsilonScaledDDPMScheduler is type(EpsilonScaled(DDPMScheduler()))
    with pytest.raises(AttributeError):
        diffusers_schedulers.EpsilonScaledPNDMScheduler


# ---- pipelines ----


def images(pipe, **options):
    """np [2, H, W, 3]. Some pipelines give their generator to the start alone, and let steps draw
    from torch's own.
    """
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    return pipe(
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=STEPS,
        output_type="np",
        **options,
    ).images


@pytest.mark.parametrize("x0_only", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_latent_diffusion_pipeline(tmp_path, x0_only, eta):
    vae, unet = small_vae(codes=1024), small_unet()

    def pipe(scheduler):
        return LDMPipeline(vqvae=vae, unet=unet, scheduler=scheduler)

    plain = DDIMScheduler(beta_schedule="scaled_linear", clip_sample_range=2.0)
    want = images(pipe(plain), batch_size=2, eta=eta)
    assert want.shape == (2, 2 * SIZE, 2 * SIZE, 3)
    np.testing.assert_array_equal(
        images(pipe(EpsilonScaled(plain, x0_only=x0_only)), batch_size=2, eta=eta), want
    )

    scaled = pipe(EpsilonScaled(plain, schedule=LAMBDAS, x0_only=x0_only))
    got = images(scaled, batch_size=2, eta=eta)
    assert np.abs(got - want).max() > 1e-3
    x = by_hand(
        plain, unet, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), eta, x0_only
    )
    with torch.no_grad():
        decoded = vae.decode(x / vae.config.scaling_factor).sample
    np.testing.assert_allclose(
        got, (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-4
    )

    scaled.save_pretrained(tmp_path)
    again = LDMPipeline.from_pretrained(tmp_path)
    assert (
        type(again.scheduler) is type(scaled.scheduler)
        and again.scheduler.config.eps_scaler == LAMBDAS
    )
    np.testing.assert_array_equal(images(again, batch_size=2, eta=eta), got)


def by_hand(scheduler, unet, x, eta, x0_only):
    """DDIM with lambda, from its equation (Song et al. 2021, Eq. 12)."""
    torch.manual_seed(1)
    ab = scheduler.alphas_cumprod.double().tolist()
    stride = 1000 // STEPS
    for i in range(STEPS - 1, -1, -1):
        a, p, lam = ab[i * stride], ab[(i - 1) * stride] if i else 1.0, LAMBDAS[i]
        with torch.no_grad():
            eps = unet(x, torch.tensor(i * stride)).sample
        s = eta * math.sqrt((1 - p) / (1 - a) * (1 - a / p))
        x_0 = ((x - math.sqrt(1 - a) * eps / lam) / math.sqrt(a)).clamp(-2, 2)
        x = math.sqrt(p) * x_0 + math.sqrt(1 - p - s**2) * (eps if x0_only else eps / lam)
        if eta:
            x = x + s * torch.randn(x.shape)
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_class_conditional_transformer_with_guidance(name):
    """DiT: 2C output channels, and classifier-free guidance before the step."""
    vae = load_seeded_weights(
        AutoencoderKL(
            block_out_channels=(16, 32),
            latent_channels=4,
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )
    pipes = [
        DiTPipeline(small_dit(1000), vae, scheduler)
        for scheduler in (
            recorded(name),
            EpsilonScaled(recorded(name)),
            EpsilonScaled(recorded(name), 1.02),
        )
    ]
    plain, same, scaled = (images(pipe, class_labels=[1, 3], guidance_scale=2.0) for pipe in pipes)
    np.testing.assert_array_equal(same, plain)
    assert np.isfinite(scaled).all() and np.abs(scaled - plain).max() > 1e-3


def test_pipelines_that_make_their_scheduler_anew_take_it_afterwards():
    unet, scaled = small_unet(), EpsilonScaled(DDIMScheduler(), 1.02)
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=scaled)
    plain = images(diffusers.DDIMPipeline(unet=unet, scheduler=DDIMScheduler()))
    assert not isinstance(pipe.scheduler, EpsilonScaling)
    np.testing.assert_array_equal(images(pipe), plain)
    pipe.scheduler = scaled
    assert np.abs(images(pipe) - plain).max() > 1e-3


def test_half_precision():
    scheduler = EpsilonScaled(recorded("ddim", "v_prediction"), 1.02)
    scheduler.set_timesteps(10)
    x, v = seeded_image("x", SHAPE), seeded_image("v", SHAPE)
    want = scheduler.step(v, 500, x).prev_sample
    got = scheduler.step(v.half(), 500, x.half()).prev_sample
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), want, rtol=0, atol=5e-3)
