"""Loss weights: their values, what they multiply, and that the flags reach the process."""

import csv
import sys

import launch
import numpy as np
import pytest
import torch
import yaml

from guided_diffusion_ip.diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    get_named_beta_schedule,
)
from guided_diffusion_ip.diffusion.loss_weighting import RULES, LossWeighting, loss_weight_table
from guided_diffusion_ip.noise import Stream, normal, uniform
from guided_diffusion_ip.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    parameter_count,
)
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.timestep_samplers import UniformSampler
from guided_diffusion_ip.training.train_loop import TrainLoop

EPSILON, START_X = ModelMeanType.EPSILON, ModelMeanType.START_X
WEIGHTED = [
    LossWeighting("debias"),
    LossWeighting("p2", p2_k=0.5, p2_gamma=0.5),
    LossWeighting("min_snr", min_snr_gamma=2),
]
SNR = np.array([0.25, 1, 4, 100])


@pytest.mark.parametrize(
    "weighting, on_epsilon, on_x0",
    [
        (LossWeighting(), [1, 1, 1, 1], [1, 1, 1, 1]),
        (LossWeighting("debias"), [2, 1, 0.5, 0.1], [0.5, 1, 2, 10]),
        (LossWeighting("debias", clamp=1.5), [1.5, 1, 0.5, 0.1], [0.5, 1, 1.5, 1.5]),
        (LossWeighting("p2"), [0.8, 0.5, 0.2, 1 / 101], [0.2, 0.5, 0.8, 100 / 101]),
        (
            LossWeighting("p2", p2_k=5, p2_gamma=0.5),
            [5.25**-0.5, 6**-0.5, 1 / 3, 105**-0.5],
            [0.25 * 5.25**-0.5, 6**-0.5, 4 / 3, 100 * 105**-0.5],
        ),
        (LossWeighting("p2", p2_gamma=0), [1, 1, 1, 1], [0.25, 1, 4, 100]),
        (LossWeighting("min_snr"), [1, 1, 1, 0.05], [0.25, 1, 4, 5]),
        (LossWeighting("min_snr", min_snr_gamma=1), [1, 1, 0.25, 0.01], [0.25, 1, 1, 1]),
    ],
)
def test_values(weighting, on_epsilon, on_x0):
    np.testing.assert_allclose(loss_weight_table(weighting, SNR, EPSILON), on_epsilon, rtol=1e-12)
    np.testing.assert_allclose(loss_weight_table(weighting, SNR, START_X), on_x0, rtol=1e-12)


def make(mean_type=EPSILON, steps=1000, schedule="linear", **kwargs):
    kwargs = {"model_var_type": ModelVarType.FIXED_SMALL, "loss_type": LossType.MSE, **kwargs}
    return GaussianDiffusion(
        betas=get_named_beta_schedule(schedule, steps), model_mean_type=mean_type, **kwargs
    )


def test_debias_at_the_noisy_end_of_a_linear_schedule():
    weights = make(loss_weighting=LossWeighting("debias")).loss_weights
    assert weights[-1] == pytest.approx(157.41, abs=0.005) and weights.argmax() == 999
    assert weights[0] == pytest.approx(0.01, rel=1e-4)


def test_debias_at_the_noisy_end_of_a_cosine_schedule_is_told():
    with pytest.warns(UserWarning, match=r"20,291, at t = 999, .* --weight_clamp"):
        weights = make(schedule="cosine", loss_weighting=LossWeighting("debias")).loss_weights
    assert weights[-1] == pytest.approx(20291, abs=0.5)
    np.testing.assert_allclose(
        weights[[998, 990, 950, 900, 500, 0]],
        [641.7, 71.3, 13.07, 6.43, 1.0156, 0.006425],
        rtol=1e-3,
    )


@pytest.mark.filterwarnings("error")
def test_no_warning_with_a_clamp_nor_for_published_settings():
    weights = make(
        schedule="cosine", loss_weighting=LossWeighting("debias", clamp=100)
    ).loss_weights
    assert weights.max() == 100 and weights[900] == pytest.approx(6.43, rel=1e-3)
    for weighting in WEIGHTED:
        make(loss_weighting=weighting)
        make(START_X, loss_weighting=weighting)


def test_a_respaced_process_weighs_by_its_own_alpha_bar():
    kwargs = dict(
        model_mean_type=EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
        loss_weighting=LossWeighting("p2"),
    )
    spaced = SpacedDiffusion(
        use_timesteps=[10, 400, 999], betas=get_named_beta_schedule("linear", 1000), **kwargs
    )
    assert spaced.loss_weights.shape == (3,)
    np.testing.assert_allclose(
        spaced.loss_weights, make(loss_weighting=LossWeighting("p2")).loss_weights[[10, 400, 999]]
    )
    np.testing.assert_allclose(spaced.loss_weights, 1 - spaced.alphas_cumprod)  # 1 / (1 + SNR)


# ---- what is multiplied ----

X0, NOISE = (
    torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
)
XI = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(2))
T = torch.tensor([0, 1, 100, 500, 900, 999])


def losses(process, network, gamma=0.0):
    return process.training_losses(
        network, X0, T, noise=NOISE, gamma=gamma, randn_like=lambda x: XI
    )


def shaky(channels):
    return lambda x, t: torch.cat([torch.sin(3 * x)] * (channels // 3), dim=1)


@pytest.mark.parametrize("weighting", WEIGHTED, ids=lambda w: w.rule)
def test_the_same_prediction_costs_the_same_said_as_epsilon_or_as_x0(weighting):
    on_epsilon, on_x0 = make(loss_weighting=weighting), make(START_X, loss_weighting=weighting)
    rough = lambda x, t: 0.9 * NOISE + 0.3 * XI  # noqa: E731
    same = lambda x, t: on_x0.xstart_from_eps(x, t, rough(x, t))  # noqa: E731
    # At t = 0 the two differences are 1 % of what they are differences of.
    torch.testing.assert_close(
        losses(on_x0, same)["loss"], losses(on_epsilon, rough)["loss"], rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("gamma", [0.0, 0.15])
@pytest.mark.parametrize("mean_type", [EPSILON, START_X])
@pytest.mark.parametrize("weighting", WEIGHTED, ids=lambda w: w.rule)
@pytest.mark.filterwarnings("ignore:input perturbation is meant for")
def test_the_mse_alone_is_multiplied_and_gamma_changes_no_weight(weighting, mean_type, gamma):
    kinds = dict(
        mean_type=mean_type,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.RESCALED_MSE,
    )
    weighted, plain = make(loss_weighting=weighting, **kinds), make(**kinds)
    got, base = losses(weighted, shaky(6), gamma), losses(plain, shaky(6), gamma)
    factor = torch.from_numpy(weighted.loss_weights)[T].float()
    assert torch.equal(got["mse"], base["mse"] * factor) and not torch.equal(
        got["mse"], base["mse"]
    )
    assert torch.equal(got["vb"], base["vb"]) and base["vb"].min() > 0
    assert torch.equal(got["loss"], base["mse"] * factor + base["vb"])
    if gamma:
        assert not torch.equal(base["mse"], losses(plain, shaky(6))["mse"])


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
@pytest.mark.parametrize("loss_type", list(LossType))
def test_uniform_is_the_unweighted_loss_bitwise(mean_type, loss_type):
    process = make(
        mean_type, loss_type=loss_type, loss_weighting=LossWeighting("uniform", clamp=0.5)
    )
    got = losses(process, shaky(3))["loss"]
    if loss_type.is_vb():
        return
    x_t = process.q_sample(X0, T, NOISE)
    target = {EPSILON: NOISE, START_X: X0}.get(
        mean_type, process.q_posterior_mean_variance(X0, x_t, T)[0]
    )
    assert torch.equal(got, ((target - shaky(3)(x_t, T)) ** 2).flatten(1).mean(1))


def test_the_timestep_sampler_sees_the_weighted_total():
    class Spy(UniformSampler):
        def update(self, t, losses):
            self.seen = t, losses

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, t):
            return shaky(6)(x, t) * self.scale

    process, images = (
        create_gaussian_diffusion(learn_sigma=True, loss_weighting="debias"),
        X0.clamp(-1, 1),
    )
    settings = TrainSettings(batch_size=6, microbatch=4, lr=0.0)
    loop = TrainLoop(Network(), process, iter(()), settings, schedule_sampler=Spy(process))
    loop.run_step(images, {})
    t, seen = loop.schedule_sampler.seen
    noise = normal(0, Stream.EPSILON, range(6), 0, X0.shape[1:])
    expected = process.training_losses(Network(), images, t, noise=noise)
    torch.testing.assert_close(seen, expected["loss"].detach())
    assert ((expected["mse"] / expected["loss"]) > 0.5).any(), "the weight must matter in this test"


# ---- refusals ----


@pytest.mark.parametrize("weighting", WEIGHTED, ids=lambda w: w.rule)
def test_without_an_mse_of_epsilon_or_x0_there_is_nothing_to_weigh(weighting):
    with pytest.raises(ValueError, match="PREVIOUS_X"):
        make(ModelMeanType.PREVIOUS_X, loss_weighting=weighting)
    for loss_type in (LossType.KL, LossType.RESCALED_KL):
        with pytest.raises(ValueError, match="--use_kl False"):
            make(loss_type=loss_type, loss_weighting=weighting)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "best"}, "uniform, debias, p2, min_snr"),
        ({"p2_k": -1}, "p2_k must be 0 or positive, got -1"),
        ({"p2_gamma": float("nan")}, "p2_gamma"),
        ({"min_snr_gamma": 0}, "5 is the published value"),
        ({"clamp": float("inf")}, "weight_clamp"),
    ],
)
def test_parameters_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LossWeighting(**options)


@pytest.mark.parametrize(
    "weighting, mean_type, at, limit",
    [
        (LossWeighting("debias"), EPSILON, 1, None),
        (LossWeighting("debias"), START_X, 1, 0.0),
        (LossWeighting("debias"), START_X, 2, None),
        (LossWeighting("p2"), EPSILON, 1, 1.0),
        (LossWeighting("p2", p2_k=0, p2_gamma=2), START_X, 1, None),
        (LossWeighting("min_snr"), EPSILON, 1, 1.0),
        (LossWeighting("min_snr"), START_X, 2, 5.0),
    ],
)
def test_at_no_signal_and_at_no_noise_a_weight_is_its_limit_or_an_error(
    weighting, mean_type, at, limit
):
    snr = np.array([3.0, 0.0, np.inf])[[0, at]]
    if limit is None:
        with pytest.raises(ValueError, match=r"infinite weight at t = 1 .*--weight_clamp"):
            loss_weight_table(weighting, snr, mean_type)
        clamped = LossWeighting(weighting.rule, weighting.p2_k, weighting.p2_gamma, clamp=50)
        assert loss_weight_table(clamped, snr, mean_type)[1] == 50
    else:
        assert loss_weight_table(weighting, snr, mean_type)[1] == pytest.approx(limit, abs=1e-100)


# ---- flags ----


def test_the_flag_has_an_old_spelling_and_the_choices_are_the_rules(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("diffusion:\n  loss_weight: uniform\n")
    assert parse("image_train", "", ["--config", str(path)]).loss_weighting == "uniform"
    for rule in RULES:
        assert parse("image_train", "", ["--loss_weight", rule]).loss_weighting == rule


@pytest.mark.parametrize(
    "name, rule, largest",
    [
        ("debias_ffhq256", "debias", 157.41),
        ("debias_imagenet256", "debias", 157.41),
        ("debias_cifar10", "debias", 157.41),
        ("p2_ffhq256", "p2", 1.0),
    ],
)
def test_published_settings(name, rule, largest):
    cfg = parse("image_train", "", ["--config", str(launch.ROOT / "configs" / f"{name}.yaml")])
    with torch.device("meta"):
        model, process = create_model_and_diffusion(
            **cfg.section("model"), **cfg.section("diffusion")
        )
    assert cfg.loss_weighting == rule and process.loss_weights.max() == pytest.approx(
        largest, abs=0.005
    )
    if name == "p2_ffhq256":
        assert round(parameter_count(model) / 1e6) in (93, 94), "the paper's light ADM"


TINY = (
    "--image_size 8 --in_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 "
    "--attention_resolutions 4 --num_head_channels 32 --noise_schedule cosine"
).split()


def test_from_the_command_line_to_the_loss(tmp_path):
    """Batch 1 and a network that says 0: the logged mse of step 1 is the weight of the t that was
    drawn, times a known mse.
    """
    images = tmp_path / "images.npz"
    np.savez(images, arr_0=np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8))
    out = tmp_path / "run"
    done = launch.run(
        [
            sys.executable,
            "scripts/image_train.py",
            *TINY,
            "--data_dir",
            str(images),
            "--out_dir",
            str(out),
            "--max_steps",
            "2",
            "--batch_size",
            "1",
            "--log_interval",
            "1",
            "--loss_weighting",
            "debias",
            "--sample_interval",
            "2",
            "--sample_count",
            "1",
            "--sample_respacing",
            "2",
            "--seed",
            "5",
        ]
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("warning: ") == 1
        and "the largest weight is 20,291, at t = 999" in done.stderr
    )
    assert "loss weights debias (0.00643 at t = 0, 2.03e+04 at t = 999)" in done.stdout
    assert (
        yaml.safe_load((out / "config.yaml").read_text())["diffusion"]["loss_weighting"] == "debias"
    )
    t = int(1000 * uniform(5, Stream.TIMESTEP, [0], 0))
    eps = normal(5, Stream.EPSILON, [0], 0, (1, 8, 8))
    with open(out / "progress.csv", newline="") as file:
        first = next(csv.DictReader(file))
    ab = np.cumprod(1 - get_named_beta_schedule("cosine", 1000))[t]
    weight = np.sqrt((1 - ab) / ab)
    assert abs(weight - 1) > 0.1, "choose another seed"
    assert float(first["mse"]) == pytest.approx(weight * float((eps**2).mean()), rel=1e-4)

    sampled = launch.run(
        [
            sys.executable,
            "scripts/image_sample.py",
            "--model_path",
            str(out / "model000002.pt"),
            "--num_samples",
            "1",
            "--timestep_respacing",
            "2",
        ]
    )
    assert sampled.returncode == 0 and "warning" not in sampled.stderr, (
        "sampling has nothing to do with the weights"
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--loss_weighting best", "uniform, debias, p2, min_snr"),
        ("--loss_weighting p2 --use_kl True", "--use_kl False"),
        ("--loss_weighting p2 --p2_k -1", "at least 0"),
        ("--loss_weighting debias --loss_weight p2", "two spellings"),
        ("--loss_weighting min_snr --min_snr_gamma 0", "5 is the published value"),
    ],
)
def test_wrong_flags_end_in_one_line(argv, message, tmp_path):
    done = launch.run(
        [
            sys.executable,
            "scripts/image_train.py",
            *TINY,
            "--data_dir",
            str(tmp_path),
            *argv.split(),
        ]
    )
    assert (
        done.returncode == 2
        and message in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    ), done.stderr
