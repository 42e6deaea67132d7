"""Classifier-free guidance: labels that are dropped in training, predictions that are combined in
sampling.
"""

import dataclasses
import math
import sys

import launch
import numpy as np
import pytest
import torch
import yaml
from golden_tools import load_seeded_weights

from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion_ip.diffusion.guidance import classifier_free
from guided_diffusion_ip.interop.adm_checkpoint import load_network
from guided_diffusion_ip.runs.sample_batch import process_sampler
from guided_diffusion_ip.script_util import create_model_and_diffusion
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.train_prologue import add_null_class
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.train_loop import TrainLoop

CLASSES = 3
FLAGS = dict(
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    learn_sigma=True,
    noise_schedule="cosine",
    num_head_channels=32,
    class_cond=True,
    num_classes=CLASSES,
)


def command_line(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# ---- the combination ----


def toy(x, t, y, shift=None):
    """Predicts y x + 0.1 y, and 10 y as its variance (image channels: 2); label 9 is the null
    label.
    """
    toy.batches.append(len(x))
    y = torch.where(y == 9, -1, y).view(-1, 1, 1, 1).float()
    prediction = y * x + 0.1 * y + 0.001 * t.view(-1, 1, 1, 1)
    return torch.cat(
        [prediction if shift is None else prediction + shift, (10 * y).expand_as(x)], dim=1
    )


toy.batches = []
X = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
TIMES, Y = torch.arange(5), torch.tensor([0, 1, 2, 3, 4])


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
def test_the_prediction_is_linear_in_the_scale_and_the_variance_is_the_conditional_one(scale):
    shift = torch.randn(5, 1, 1, 1)
    toy.batches.clear()
    got = classifier_free(toy, scale, 9)(X, TIMES, y=Y, shift=shift)
    assert toy.batches == [10], "one batch of 2N"
    cond, uncond = toy(X, TIMES, Y, shift), toy(X, TIMES, torch.full_like(Y, 9), shift)
    torch.testing.assert_close(
        got[:, :2], (1 - scale) * uncond[:, :2] + scale * cond[:, :2], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(got[:, 2:], cond[:, 2:]) and not torch.equal(cond[:, 2:], uncond[:, 2:])


def test_scale_one_is_the_network_itself_and_zero_the_network_without_class():
    assert classifier_free(toy, 1, 9) is toy and classifier_free(toy, 1, None) is toy
    toy.batches.clear()
    assert torch.equal(
        classifier_free(toy, 0, 9)(X, TIMES, y=Y), toy(X, TIMES, torch.full_like(Y, 9))
    )
    assert toy.batches == [5, 5]


def test_what_cannot_be_combined():
    with pytest.raises(ValueError, match="no label for 'no class'.*--class_dropout"):
        classifier_free(toy, 2, None)
    with pytest.raises(ValueError, match="0 or positive, got -1"):
        classifier_free(toy, -1, 9)
    with pytest.raises(ValueError, match="model_kwargs"):
        classifier_free(toy, 2, 9)(X, TIMES)


def make(mean_type=ModelMeanType.EPSILON, **kwargs):
    return GaussianDiffusion(
        betas=get_named_beta_schedule("linear", 40),
        model_mean_type=mean_type,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
        **kwargs,
    )


def eps_of_class(x, t, y):
    return toy(x, t, y)[:, :2] * 0.2


@pytest.mark.parametrize("t_value", [0, 20, 39])
def test_epsilon_is_divided_by_lambda_once_and_after_the_combination(t_value):
    scale, lam = 3.0, 1.25
    process, t = make(eps_scaler=lam), torch.full((5,), t_value)
    out = process.ddim_sample(
        classifier_free(eps_of_class, scale, 9), X, t, clip_denoised=False, model_kwargs={"y": Y}
    )
    cond, uncond = (eps_of_class(X, t, y).double() for y in (Y, torch.full_like(Y, 9)))
    eps = (uncond + scale * (cond - uncond)) / lam
    ab, before = process.alphas_cumprod[t_value], process.alphas_cumprod_prev[t_value]
    x_start = (X - np.sqrt(1 - ab) * eps) / np.sqrt(ab)
    torch.testing.assert_close(out["pred_xstart"].double(), x_start, rtol=1e-4, atol=1e-4)
    expected = np.sqrt(before) * x_start + np.sqrt(1 - before) * eps
    # At t = 0 epsilon is read back from x_0_hat at a noise level of 1 %.
    torch.testing.assert_close(out["sample"].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean_type", [ModelMeanType.START_X, ModelMeanType.PREVIOUS_X])
@pytest.mark.parametrize("lam", [1.0, 1.1])
def test_combining_x0_or_the_previous_x_is_combining_epsilon(mean_type, lam):
    on_epsilon, other = make(eps_scaler=lam), make(mean_type, eps_scaler=lam)

    def same_network(x, t, y):
        x_start = on_epsilon.xstart_from_eps(x, t, eps_of_class(x, t, y))
        if mean_type is ModelMeanType.START_X:
            return x_start
        return on_epsilon.q_posterior_mean_variance(x_start, x, t)[0]

    t = torch.tensor([1, 5, 10, 20, 39])
    options = {"clip_denoised": False, "model_kwargs": {"y": Y}}
    want = on_epsilon.ddim_sample(classifier_free(eps_of_class, 3.0, 9), X, t, **options)
    got = other.ddim_sample(classifier_free(same_network, 3.0, 9), X, t, **options)
    for name in ("sample", "pred_xstart"):
        torch.testing.assert_close(got[name], want[name], rtol=2e-3, atol=2e-3)


# ---- a U-Net with a null class ----


def network_and_sampler(**options):
    model, diffusion = create_model_and_diffusion(
        **FLAGS, null_class=True, timestep_respacing="4", eps_scaler=1.01
    )
    return load_seeded_weights(model), process_sampler(diffusion, (1, 8, 8), **options)


@pytest.mark.parametrize("options", [{}, {"solver": "ddim"}, {"solver": "ddim", "eta": 0.5}])
def test_the_ends_of_the_scale_are_plain_sampling_bitwise(options):
    model, sampler = network_and_sampler(**options)
    labels = {"y": torch.tensor([0, 1, 2, 0])}
    plain = sampler(model, range(4), labels)
    without = sampler(model, range(4), {"y": torch.full((4,), CLASSES)})
    guided = {
        scale: dataclasses.replace(sampler, guidance_scale=scale, null_label=CLASSES)(
            model, range(4), labels
        )
        for scale in (0.0, 1.0, 3.0)
    }
    assert torch.equal(guided[1.0], plain) and torch.equal(guided[0.0], without)
    assert not torch.allclose(guided[3.0], plain, atol=0.01) and not torch.allclose(
        plain, without, atol=0.01
    )


def test_the_null_class_is_a_row_of_its_own_and_only_on_demand():
    rows = {
        null: create_model_and_diffusion(**FLAGS, null_class=null)[0].label_emb.weight.shape[0]
        for null in (False, True)
    }
    assert rows == {False: CLASSES, True: CLASSES + 1}
    with pytest.raises(ValueError, match="--class_cond True"):
        create_model_and_diffusion(**{**FLAGS, "class_cond": False}, null_class=True)


@pytest.mark.parametrize(
    "saved, built, message",
    [
        ({"null_class": True}, {}, r"needs --null_class True \(now False\)$"),
        ({}, {"null_class": True}, r"needs --null_class False \(now True\)$"),
        ({"num_classes": 8}, {}, r"needs --num_classes 8 \(now 3\)$"),
        (
            {"num_classes": 8, "null_class": True},
            {"null_class": True},
            r"needs --num_classes 8 \(now 3\)$",
        ),
    ],
)
def test_a_bare_checkpoint_says_what_it_needs(saved, built, message, tmp_path):
    path = str(tmp_path / "bare.pt")
    torch.save(create_model_and_diffusion(**{**FLAGS, **saved})[0].state_dict(), path)
    flags = {"null_class": False, **FLAGS, **built}
    with pytest.raises(ValueError, match=message):
        load_network(create_model_and_diffusion(**flags)[0], path, flags)


# ---- labels that are dropped ----


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(
        path,
        arr_0=rng.integers(0, 256, (24, 8, 8, 1), dtype=np.uint8),
        arr_1=np.arange(24) % CLASSES,
    )
    return str(path)


def stream(images, batch_size=8, class_dropout=0.3, **options):
    return load_data(
        data_dir=images,
        batch_size=batch_size,
        image_size=8,
        channels=1,
        class_cond=True,
        num_classes=CLASSES,
        class_dropout=class_dropout,
        **options,
    )


def test_as_many_labels_as_asked_for_are_dropped_and_nothing_else_changes(images):
    share, steps, batch = 0.2, 100, 50
    dropped = 0
    for (x, cond), (x_plain, plain) in zip(
        take(stream(images, batch, share), steps), take(stream(images, batch, 0.0), steps)
    ):
        assert torch.equal(x, x_plain)
        kept = cond["y"] != CLASSES
        assert torch.equal(cond["y"][kept], plain["y"][kept]) and plain["y"].max() < CLASSES
        dropped += int((~kept).sum())
    n = steps * batch
    assert abs(dropped - share * n) < 4 * math.sqrt(n * share * (1 - share)), (
        "binomial: 4 standard deviations"
    )


def take(batches, count):
    return (next(batches) for _ in range(count))


def test_the_same_labels_are_dropped_for_any_number_of_ranks_and_after_a_seek(images):
    whole = [cond["y"] for _, cond in take(stream(images), 6)]
    ranks = [stream(images, 2, rank=rank, world=4) for rank in range(4)]
    assert all(torch.equal(torch.cat([next(rank)[1]["y"] for rank in ranks]), y) for y in whole)
    later = stream(images)
    later.seek(4)
    assert torch.equal(next(later)[1]["y"], whole[4])
    assert len({tuple((y == CLASSES).tolist()) for y in whole}) > 1, "each step drops others"
    other = [cond["y"] for _, cond in take(stream(images, seed=1), 6)]
    assert [(y == CLASSES).tolist() for y in other] != [(y == CLASSES).tolist() for y in whole]
    assert stream(images, class_dropout=0.99).examples(8)[1]["y"].max() < CLASSES, (
        "pictures to show keep their class"
    )


@pytest.mark.parametrize("microbatch", [-1, 3])
def test_microbatches_see_the_same_labels(images, microbatch):
    seen = []

    def objective(model, x, t, cond, epsilon, xi):
        seen.append(cond["y"])
        return {"loss": model(x, t, **cond).flatten(1).mean(1)}

    model, diffusion = create_model_and_diffusion(**FLAGS, null_class=True)
    settings = TrainSettings(batch_size=8, microbatch=microbatch, lr=0.0)
    loop = TrainLoop(model, diffusion, stream(images), settings, objective=objective)
    loop.forward_backward(*next(loop.data))
    expected = next(stream(images))[1]["y"]
    assert torch.equal(torch.cat(seen), expected) and (expected == CLASSES).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_dropout": 1.0}, r"in \[0, 1\)"),
        ({"class_dropout": -0.1}, r"in \[0, 1\)"),
        ({"class_dropout": float("nan")}, r"in \[0, 1\)"),
        ({"class_dropout": 0.1, "num_classes": None}, "needs labels"),
    ],
)
def test_impossible_dropout(images, options, message):
    with pytest.raises(ValueError, match=message):
        load_data(
            **{
                "data_dir": images,
                "batch_size": 2,
                "image_size": 8,
                "class_cond": True,
                "num_classes": CLASSES,
                **options,
            }
        )


# ---- scripts ----


def script(name, *argv):
    return launch.run([sys.executable, f"scripts/{name}.py", *argv])


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Two runs of two steps, with dropout and without."""
    runs = {}
    for name, argv in (("free", ["--class_dropout", "0.4"]), ("plain", [])):
        runs[name] = tmp_path_factory.mktemp("runs") / name
        done = script(
            "image_train",
            *command_line(**FLAGS),
            "--data_dir",
            images,
            "--out_dir",
            str(runs[name]),
            "--max_steps",
            "2",
            "--batch_size",
            "4",
            "--ema_rate",
            "0.5",
            "--lr",
            "0.01",
            *argv,
        )
        assert done.returncode == 0, done.stderr
        assert ("0.4 of the labels replaced by 'no class'" in done.stdout) == bool(argv)
    return runs


def test_training_leaves_a_network_with_a_null_class_and_sampling_learns_of_it(trained, tmp_path):
    assert (
        yaml.safe_load((trained["free"] / "config.yaml").read_text())["model"]["null_class"] is True
    )
    common = [
        "--model_path",
        str(trained["free"] / "ema_0.5_000002.pt"),
        "--num_samples",
        "4",
        "--timestep_respacing",
        "3",
        "--eps_scaler",
        "1.01",
    ]
    arrays = {}
    for name, argv in (
        ("plain", []),
        ("one", ["--guidance_scale", "1"]),
        ("ddpm", ["--guidance_scale", "2"]),
        ("ddim", ["--guidance_scale", "2", "--use_ddim", "True"]),
    ):
        done = script("image_sample", *common, *argv, "--out_dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert ("guidance scale 2" in done.stdout) == ("2" in argv)
        with np.load(tmp_path / name / "samples_4x8x8x1.npz") as npz:
            arrays[name] = npz["arr_0"]
            assert npz["arr_1"].max() < CLASSES
    np.testing.assert_array_equal(arrays["plain"], arrays["one"])
    assert (arrays["ddpm"] != arrays["plain"]).any()
    done = script(
        "image_sample", *common, "--guidance_scale", "3", "--out_dir", str(tmp_path / "ddpm")
    )
    assert done.returncode == 2 and "guidance_scale" in done.stderr, (
        "samples of two scales do not mix"
    )


def test_dropout_can_be_added_to_the_settings_of_a_run_without(trained):
    cfg = parse(
        "image_train",
        "",
        ["--config", str(trained["plain"] / "config.yaml"), "--class_dropout", "0.1"],
    )
    assert cfg.null_class is False
    assert add_null_class(cfg).null_class is True and cfg.null_class is False


def test_a_super_resolution_model_can_be_guided(images, tmp_path):
    flags = {name: value for name, value in FLAGS.items() if name != "image_size"}
    done = script(
        "super_res_train",
        *command_line(**flags, large_size=8, small_size=4),
        "--data_dir",
        images,
        "--out_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "1",
        "--batch_size",
        "4",
        "--class_dropout",
        "0.5",
    )
    assert done.returncode == 0, done.stderr
    np.savez(
        tmp_path / "small.npz", arr_0=np.zeros((2, 4, 4, 1), dtype=np.uint8), arr_1=np.array([0, 2])
    )
    done = script(
        "super_res_sample",
        "--model_path",
        str(tmp_path / "run" / "model000001.pt"),
        "--base_samples",
        str(tmp_path / "small.npz"),
        "--num_samples",
        "2",
        "--timestep_respacing",
        "2",
        "--guidance_scale",
        "2",
    )
    assert done.returncode == 0 and "guidance scale 2" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--class_dropout", "0.1"], "add --class_cond True"),
        (["--null_class", "True"], "add --class_cond True"),
        (["--class_cond", "True", "--class_dropout", "1"], "in [0, 1)"),
        (["--class_dropout", "-1"], "at least 0"),
        (
            ["--class_cond", "True", "--class_dropout", "0.1", "--null_class", "False"],
            "leave one of them out",
        ),
    ],
)
def test_wrong_flags_for_training(argv, message, images, tmp_path):
    flags = command_line(**{**FLAGS, "class_cond": False})
    one_line(
        script(
            "image_train", *flags, "--data_dir", images, "--out_dir", str(tmp_path / "out"), *argv
        ),
        message,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--guidance_scale", "2"], "has no label for 'no class': train with --class_dropout"),
        (["--guidance_scale", "0"], "has no label for 'no class'"),
        (["--guidance_scale", "-1"], "at least 0"),
        (["--null_class", "True"], "trained with null_class False"),
        (
            ["--model_path", "{tmp}/bare.pt", "--class_cond", "False", "--guidance_scale", "2"],
            "unconditional",
        ),
    ],
)
def test_wrong_flags_for_sampling(argv, message, trained, tmp_path):
    checkpoint = trained["plain"] / "model000002.pt"
    (tmp_path / "bare.pt").write_bytes(checkpoint.read_bytes())
    argv = [word.replace("{tmp}", str(tmp_path)) for word in argv]
    one_line(
        script(
            "image_sample",
            "--model_path",
            str(checkpoint),
            "--num_samples",
            "2",
            "--out_dir",
            str(tmp_path / "out"),
            *argv,
        ),
        message,
    )
    assert not (tmp_path / "out").exists()


def one_line(done, message):
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
