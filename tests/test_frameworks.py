"""EDM's and DDPM's models through the same scripts as ADM's: training, resuming, sampling along
sigma, and what is refused.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from test_scripts import ROOT, TINY, flags, images, run  # noqa: F401 (images is a fixture)

from guided_diffusion_ip import script_util
from guided_diffusion_ip.interop.adm_checkpoint import load_for_sampling
from guided_diffusion_ip.runs.sample_batch import draw_images
from guided_diffusion_ip.runs.samples import SampleRun
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.identity import what_decides_the_images
from guided_diffusion_ip.settings.image_training import sampler_on_the_way
from guided_diffusion_ip.settings.lambdas import settle_lambda
from guided_diffusion_ip.settings.make_sampler import make_sampler
from guided_diffusion_ip.settings.models import create_for_sampling, network_flags, process_flags
from guided_diffusion_ip.settings.solver import sampling_precision, settle_sampler
from guided_diffusion_ip.training.optimizer import set_learning_rate
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.train_loop import TrainLoop

EDM = dict(
    framework="edm",
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    augment_dim=9,
    augment=0.5,
    class_cond=True,
    num_classes=3,
    label_dropout=0.2,
    input_perturbation=0.1,
)
DDPM = dict(
    framework="ddpm",
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    dropout=0.1,
    input_perturbation=0.1,
)


def train(out, images, steps, *more, **model):  # noqa: F811
    done = subprocess.run(
        [
            sys.executable,
            "scripts/image_train.py",
            *flags(**model),
            "--data_dir",
            images,
            "--out_dir",
            str(out),
            "--max_steps",
            str(steps),
            "--batch_size",
            "4",
            "--ema_rate",
            "0.5",
            "--save_interval",
            "2",
            "--log_interval",
            "1",
            "--random_flip",
            "False",
            *more,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def edm(images, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("edm") / "run"
    said = train(
        out,
        images,
        4,
        "--sample_interval",
        "4",
        "--sample_count",
        "4",
        "--sample_respacing",
        "2",
        "--lr_warmup_steps",
        "3",
        **EDM,
    )
    return out, said


@pytest.fixture(scope="module")
def ddpm(images, tmp_path_factory):  # noqa: F811
    pytest.importorskip("diffusers")
    out = tmp_path_factory.mktemp("ddpm") / "run"
    return out, train(
        out,
        images,
        4,
        "--sample_interval",
        "4",
        "--sample_count",
        "4",
        "--sample_respacing",
        "2",
        **DDPM,
    )


def test_edm_trains_through_the_same_loop(edm):
    out, said = edm
    assert "EDMLoss" in said and "gamma 0.1" in said and "mse_q" in said
    assert {"ema_0.5_000004.pt", "samples_000004.png", "config.yaml"} <= set(os.listdir(out))
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["model"]["framework"] == "edm" and saved["edm"]["augment_dim"] == 9
    names = torch.load(out / "ema_0.5_000004.pt", weights_only=True)
    assert "model.map_augment.weight" in names and "model.enc.8x8_conv.weight" in names


@pytest.mark.parametrize("model", ["edm", "ddpm"])
def test_a_continued_run_equals_an_uninterrupted_one_bitwise(model, request, images, tmp_path):  # noqa: F811
    out, _ = request.getfixturevalue(model)
    more = ["--lr_warmup_steps", "3"] if model == "edm" else []
    settings = EDM if model == "edm" else DDPM
    train(tmp_path, images, 2, *more, **settings)
    train(tmp_path, images, 4, *more, "--resume", "auto", **settings)
    for name in ("model000004.pt", "ema_0.5_000004.pt"):
        whole, continued = (
            torch.load(folder / name, weights_only=True) for folder in (out, tmp_path)
        )
        assert all(torch.equal(whole[key], continued[key]) for key in whole)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--sampler", "euler", "--edm_steps", "3", "--eps_scaler", "1.01"),
        (
            "--S_churn",
            "4",
            "--edm_steps",
            "3",
            "--discretization",
            "vp",
            "--noise_level_schedule",
            "vp",
            "--noise_level_scaling",
            "vp",
        ),
    ],
)
def test_edm_samples_by_heun_and_euler(edm, tmp_path, capsys, monkeypatch, more):
    code, said, err = run(
        "image_sample",
        "--model_path",
        str(edm[0] / "ema_0.5_000004.pt"),
        "--num_samples",
        "5",
        "--batch_size",
        "2",
        "--out_dir",
        str(tmp_path),
        *more,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code in (0, None), err
    assert ("Euler, steps 3" if "euler" in more else "Heun, steps") in said
    with np.load(tmp_path / "samples_5x8x8x1.npz") as file:
        assert file["arr_0"].shape == (5, 8, 8, 1) and set(file["arr_1"]) <= {0, 1, 2}


def test_images_do_not_depend_on_the_batch(edm, tmp_path, capsys, monkeypatch):
    def sample(batch, name):
        run(
            "image_sample",
            "--model_path",
            str(edm[0] / "ema_0.5_000004.pt"),
            "--num_samples",
            "5",
            "--batch_size",
            str(batch),
            "--S_churn",
            "4",
            "--edm_steps",
            "3",
            "--out_dir",
            str(tmp_path / name),
            capsys=capsys,
            monkeypatch=monkeypatch,
        )
        return np.load(tmp_path / name / "samples_5x8x8x1.npz")["arr_0"].astype(int)

    assert np.abs(sample(2, "a") - sample(5, "b")).max() <= 1


def test_ddpm_samples_by_every_sampler(ddpm, tmp_path, capsys, monkeypatch):
    for name, more in (
        ("ddpm", ["--timestep_respacing", "3"]),
        ("ddim", ["--sampler", "ddim", "--timestep_respacing", "3"]),
        ("heun", ["--sampler", "heun", "--edm_steps", "3", "--eps_scaler", "1.01"]),
    ):
        code, said, err = run(
            "image_sample",
            "--model_path",
            str(ddpm[0] / "ema_0.5_000004.pt"),
            "--num_samples",
            "3",
            "--out_dir",
            str(tmp_path / name),
            *more,
            capsys=capsys,
            monkeypatch=monkeypatch,
        )
        assert code in (0, None), err
        assert os.path.exists(tmp_path / name / "samples_3x8x8x1.npz")


# ---- pixels ----

LEVEL = 100.7  # of 0 to 255


class ConstantDenoiser(torch.nn.Module):
    """D = LEVEL whatever it is asked: every chain ends at it exactly, since D stands alone at sigma
    = 0.
    """

    sigma_min, sigma_max, label_dim = 0.0, float("inf"), 0

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, labels=None, augment_labels=None):
        return torch.full_like(x, LEVEL / 127.5 - 1)


EDM_8 = flags(framework="edm", image_size=8, in_channels=1)


def test_pixels_of_edm_models_are_rounded(tmp_path):
    model = ConstantDenoiser()
    for sampler in ("heun", "euler"):
        sampler = make_sampler(settled(*EDM_8, "--sampler", sampler), model, (8, 8))
        path = SampleRun(sampler, 3, str(tmp_path / sampler.solver), {})(
            model, 2, torch.device("cpu")
        )
        assert np.unique(np.load(path)["arr_0"]).tolist() == [101]


def test_pixels_of_adm_models_are_truncated_by_every_sampler(tmp_path):
    def model(x, t):  # predicts x_0
        return torch.full_like(x, LEVEL / 127.5 - 1)

    process = script_util.create_gaussian_diffusion(predict_xstart=True, timestep_respacing="3")
    for kind in ("ddpm", "ddim", "heun", "euler"):
        sampler = make_sampler(
            settled(*flags(image_size=8, in_channels=1), "--sampler", kind), process, (8, 8)
        )
        assert not sampler.rounded
        if kind in ("ddpm", "ddim"):  # the others stop at the lowest of the process's noise levels
            path = SampleRun(sampler, 3, str(tmp_path / kind), {})(model, 2, torch.device("cpu"))
            assert np.unique(np.load(path)["arr_0"]).tolist() == [100]


def test_pictures_and_evaluations_during_training_have_the_pixels_of_their_framework():
    model = ConstantDenoiser()
    cfg = parse("image_train", "", EDM_8)
    for respacing in ("sample_respacing", "eval_respacing"):
        pixels = draw_images(
            sampler_on_the_way(cfg, model, (1, 8, 8), respacing), model, 3, 2, lambda index: {}
        )
        assert np.unique(pixels).tolist() == [101]
    assert not sampler_on_the_way(
        parse("image_train", "", flags(**TINY)), None, (1, 8, 8), "sample_respacing"
    ).rounded


def test_rounded_images_are_not_mixed_with_truncated_ones(edm, tmp_path, capsys, monkeypatch):
    command = [
        "image_sample",
        "--model_path",
        str(edm[0] / "ema_0.5_000004.pt"),
        "--num_samples",
        "3",
        "--edm_steps",
        "2",
        "--out_dir",
        str(tmp_path),
    ]
    code, _, err = run(*command, capsys=capsys, monkeypatch=monkeypatch)
    assert code in (0, None), err
    path = tmp_path / "settings.yaml"
    settings = yaml.safe_load(path.read_text())
    assert settings["quantisation"] == "rounded"
    path.write_text(
        yaml.safe_dump({key: value for key, value in settings.items() if key != "quantisation"})
    )
    code, _, err = run(*command, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and "quantisation None instead of 'rounded'" in err and "--out_dir" in err


# ---- number formats ----


@pytest.mark.parametrize(
    "half, argv, halves",
    [
        ("True", [], "fp16"),
        ("True", ["--precision", "fp32"], "fp32"),
        ("True", ["--precision", "bf16"], "bf16"),
        ("False", [], "fp32"),
        ("False", ["--precision", "fp16"], "fp16"),
        ("False", ["--precision", "fp32"], "fp32"),
    ],
)
def test_precision_wins_over_the_use_fp16_of_an_edm_checkpoint(edm, tmp_path, half, argv, halves):
    saved = yaml.safe_load((edm[0] / "config.yaml").read_text())
    saved["model"]["use_fp16"] = half == "True"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    path = str(edm[0] / "ema_0.5_000004.pt")
    cfg = settled("--config", str(tmp_path / "config.yaml"), "--model_path", path, *argv)
    model, denoiser = create_for_sampling(network_flags(cfg), process_flags(cfg))
    load_for_sampling(model, path, cfg.section("model"), sampling_precision(cfg))
    assert (denoiser.use_fp16, denoiser.use_bf16) == (halves == "fp16", halves == "bf16")
    settings = what_decides_the_images(cfg)
    assert (settings["precision"], settings["use_fp16"]) == (halves, halves == "fp16")


# ---- settings ----


def settled(*argv, config=""):
    cfg = parse(
        "image_sample",
        "",
        [*argv, *(["--config", str(ROOT / "configs" / config)] if config else [])],
    )
    return settle_sampler(cfg)


def test_the_command_line_wins_over_a_config_about_the_sampler():
    assert settled(config="edm_cifar10.yaml").solver == "heun"
    assert settled("--sampler", "euler", config="edm_cifar10.yaml").solver == "euler"
    cfg = settled("--use_ddim", "True")
    assert (cfg.solver, cfg.use_ddim) == ("ddim", True)
    cfg = settled("--sampler", "ddim")
    assert (cfg.solver, cfg.use_ddim) == ("ddim", True)
    assert settled().solver == "ddpm"


def test_edm_models_are_clipped_only_if_asked_for_and_the_settings_tell():
    assert settled().clip_denoised is True and settled("--framework", "edm").clip_denoised is False
    assert settled("--framework", "edm", "--clip_denoised", "True").clip_denoised is True


@pytest.mark.parametrize(
    "config, sampler, steps, b",
    [
        ("edm_cifar10.yaml", "heun", 18, 1.0005),
        ("edm_cifar10.yaml", "heun", 11, 0.9985),
        ("edm_cifar10.yaml", "euler", 13, 1.0048),
        ("edm_cifar10_cond.yaml", "heun", 7, 1.0070),
        ("edm_cifar10_cond.yaml", "euler", 35, 1.0035),
    ],
)
def test_published_lambdas_of_heun_and_euler(config, sampler, steps, b):
    cfg = settled(
        "--sampler", sampler, "--edm_steps", str(steps), "--eps_scaler", "published", config=config
    )
    cfg = settle_lambda(cfg)
    assert (cfg.eps_scaler, cfg.eps_scaler_k) == (b, 0.0)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--sampler", "ddim", "--framework", "edm"], "alpha_bar"),
        (["--sampler", "heun", "--use_ddim", "True"], "two samplers"),
        (["--sampler", "heun", "--eta", "0.5"], "S_churn"),
        (["--sampler", "heun", "--timestep_respacing", "10"], "--edm_steps"),
        (["--edm_steps", "10"], "--timestep_respacing"),
        (["--S_churn", "10"], "heun"),
        (["--framework", "edm", "--guidance_scale", "2", "--class_cond", "True"], "no class"),
    ],
)
def test_meaningless_combinations_are_refused(argv, words):
    with pytest.raises(ValueError, match=words):
        make_sampler(settled(*flags(**TINY), *argv), None, (8, 8))


@pytest.mark.parametrize("script", ["classifier_sample", "super_res_sample"])
def test_guided_and_super_resolution_sampling_say_why_not_heun(script):
    cfg = parse(script, "", ["--sampler", "heun"])
    with pytest.raises(ValueError, match="image_sample"):
        make_sampler(cfg, None, (8, 8))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--noise_schedule", "cosine"], "noise_schedule"),
        (["--schedule_sampler", "loss-second-moment"], "continuous"),
        (["--augment", "0.1"], "--augment_dim 9"),
        (["--class_dropout", "0.1", "--class_cond", "True"], "--label_dropout"),
        (["--learn_sigma", "True"], "learn_sigma"),
        (["--image_size", "8x16"], "square"),
        (["--sample_interval", "1", "--sample_respacing", "ddim5"], "Heun"),
    ],
)
def test_training_refuses_what_edm_has_not(argv, words, images, tmp_path, capsys, monkeypatch):  # noqa: F811
    code, _, err = run(
        "image_train",
        "--framework",
        "edm",
        "--image_size",
        "8",
        "--num_channels",
        "32",
        "--num_res_blocks",
        "1",
        "--channel_mult",
        "1",
        "--in_channels",
        "1",
        "--data_dir",
        images,
        "--out_dir",
        str(tmp_path / "out"),
        *argv,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and words in err and err.strip().count("\n") == 0, err
    assert not (tmp_path / "out").exists()


def test_learning_rate_warms_up_linearly():
    model = torch.nn.Conv2d(1, 1, 1)
    process = script_util.create_gaussian_diffusion(steps=100)
    settings = TrainSettings(batch_size=1, lr=0.4, ema_rates=(), lr_warmup_steps=4)
    opt = TrainLoop(model, process, iter([]), settings).opt
    rates = []
    for step in range(6):
        set_learning_rate(opt, settings, step)
        rates.append(opt.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_a_checkpoint_of_another_framework_is_named(edm, tmp_path, capsys, monkeypatch):
    bare = tmp_path / "bare.pt"  # without config.yaml beside it
    torch.save(torch.load(edm[0] / "ema_0.5_000004.pt", weights_only=True), bare)
    code, _, err = run(
        "image_sample",
        *flags(**TINY),
        "--model_path",
        str(bare),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and "--framework edm" in err
    code, _, err = run(
        "image_sample",
        *flags(**(EDM | dict(num_channels=64, augment=0))),
        "--model_path",
        str(bare),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and "tensors differ" in err and err.strip().count("\n") == 0


@pytest.mark.parametrize("limit, clipped", [(0.0, False), (1e-3, True), (1e6, False)])
def test_gradients_are_clipped_to_their_norm(limit, clipped):
    torch.manual_seed(0)
    model, process = script_util.create_model_and_diffusion(**TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    settings = TrainSettings(batch_size=2, lr=1e-3, ema_rates=(), grad_clip=limit)
    loop = TrainLoop(model, process, iter([]), settings)
    loop.run_step(torch.rand(2, 1, 8, 8) * 2 - 1, {})
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    before = float(loop.update.grad_norm)
    assert before > 1e-2, "what is logged is the norm before clipping"
    np.testing.assert_allclose(float(norm), limit if clipped else before, rtol=1e-3)


@pytest.mark.parametrize("sampler, steps", [("heun", 2), ("euler", 3)])
def test_adm_checkpoints_are_sampled_along_sigma(
    sampler, steps, images, tmp_path, capsys, monkeypatch
):  # noqa: F811
    model, _ = script_util.create_model_and_diffusion(**TINY, class_cond=True, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "adm.pt")
    code, said, err = run(
        "image_sample",
        *flags(**TINY, class_cond=True, num_classes=3),
        "--model_path",
        str(tmp_path / "adm.pt"),
        "--num_samples",
        "3",
        "--sampler",
        sampler,
        "--edm_steps",
        str(steps),
        "--eps_scaler",
        ",".join(["1.01"] * steps),
        "--out_dir",
        str(tmp_path / "out"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code in (0, None), err
    settings = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
    assert (
        settings["sampler"] == sampler
        and settings["edm_steps"] == steps
        and settings["eps_scaler"] == [1.01] * steps
    )


@pytest.mark.slow
def test_compiled_networks_train_and_sample_alike(images, tmp_path, capsys, monkeypatch):  # noqa: F811
    small = TINY | dict(input_perturbation=0.1)
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        train(tmp_path / name, images, 2, "--lr", "1e-4", *more, **small)
    plain, other = (
        torch.load(tmp_path / name / "model000002.pt", weights_only=True)
        for name in ("plain", "compiled")
    )
    moved = torch.cat([(plain[key] - other[key]).flatten().abs() for key in plain])
    assert (
        moved.mean() < 2e-6 and moved.max() <= 4.1e-4
    )  # AdamW takes steps of lr, whatever the size of a gradient near 0
    pictures = []
    for more in ([], ["--compile"]):
        out = tmp_path / f"samples{len(more)}"
        code, _, err = run(
            "image_sample",
            "--model_path",
            str(tmp_path / "plain" / "ema_0.5_000002.pt"),
            "--num_samples",
            "4",
            "--batch_size",
            "4",
            "--timestep_respacing",
            "4",
            "--out_dir",
            str(out),
            *more,
            capsys=capsys,
            monkeypatch=monkeypatch,
        )
        assert code in (0, None), err
        pictures.append(np.load(out / "samples_4x8x8x1.npz")["arr_0"].astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_the_laboratory_measures_edm_models(solver, edm, images, tmp_path):  # noqa: F811
    """exposure_bias.py and calibrate_eps.py take them; its rule `norm`, where a step is one network
    call.
    """
    common = ["--model_path", str(edm[0] / "ema_0.5_000004.pt"), "--data_dir", images]
    common += ["--num_images", "8", "--batch_size", "4", "--edm_steps", "4", "--solver", solver]

    def script(name, *more):
        command = [sys.executable, f"scripts/{name}.py", *common, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = script("exposure_bias", "--out_dir", str(tmp_path), "--plots", "True")
    assert done.returncode == 0, done.stderr
    assert f"{solver.capitalize()}, steps 4, lambda 1" in done.stdout
    content = json.loads((tmp_path / "measures.json").read_text())
    assert len(content["sigma"]) == 4 and content["sigma"][-1] == 80 and content["alpha"] == [1] * 4
    assert (tmp_path / "norm.png").exists() and len(content["measures"]["norm"]["ratio"]) == 4
    done = script("calibrate_eps", "--features", "pixels", "--out", str(tmp_path / "eps.yaml"))
    assert done.returncode == 0 and "lowest at b = " in done.stdout, done.stderr
    done = script("calibrate_eps", "--by", "norm", "--out", str(tmp_path / "eps.yaml"))
    if solver == "heun":
        assert done.returncode == 2 and "--solver ddpm, ddim or euler" in done.stderr
    else:
        assert done.returncode in (0, 2), done.stderr  # 2: nothing to be solved in four steps
        assert not done.returncode or "nothing was solved" in done.stderr


def test_a_solver_of_the_registry_works_everywhere(edm, images, tmp_path):  # noqa: F811
    """DPM-Solver++ in sampling, measures and folders, for EDM's models and for a process."""
    adm = tmp_path / "adm"
    train(adm, images, 2, **{**DDPM, "framework": "adm", "dropout": 0})
    for checkpoint, steps in (
        (edm[0] / "ema_0.5_000004.pt", ["--edm_steps", "3"]),
        (adm / "ema_0.5_000002.pt", ["--timestep_respacing", "3"]),
    ):
        common = ["--model_path", str(checkpoint), "--solver", "dpmpp_2m", *steps]
        for script, more in (
            ("image_sample", ["--num_samples", "4", "--eps_scaler", "1.01"]),
            ("exposure_bias", ["--data_dir", images, "--num_images", "4", "--measures", "norm"]),
            ("calibrate_eps", ["--data_dir", images, "--num_images", "8", "--features", "pixels"]),
        ):
            done = subprocess.run(
                [sys.executable, f"scripts/{script}.py", *common, *more],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            if script == "calibrate_eps":
                assert "calibrating dpmpp_2m at 3 steps" in done.stdout
                continue
            assert "DPM-Solver++(2M), steps 3, lambda 1" in done.stdout
        assert list((checkpoint.parent / "samples").glob("*-dpmpp_2m-n4-*/samples_4x8x8x1.npz"))
