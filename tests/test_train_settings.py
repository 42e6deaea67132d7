"""Training from Python: settings that are checked, hooks, processes and batches of one's own, and
train(), which does what the script does.
"""

import dataclasses
import sys

import launch
import numpy as np
import pytest
import torch
from test_guards import close_logs  # noqa: F401 (a fixture)
from test_resume import TINY, TRAIN, assert_same_run, make_loop, rows

from guided_diffusion_ip import logger
from guided_diffusion_ip.data import sources
from guided_diffusion_ip.diffusion.edm_losses import EDMLoss, EDMProcess
from guided_diffusion_ip.diffusion.process import describe
from guided_diffusion_ip.script_util import create_gaussian_diffusion
from guided_diffusion_ip.settings.image_training import train
from guided_diffusion_ip.training import resume
from guided_diffusion_ip.training.checkpoint import SavePolicy, complete_steps
from guided_diffusion_ip.training.hooks import Hook
from guided_diffusion_ip.training.protocols import SeekableBatches
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.stopping import Limits
from guided_diffusion_ip.training.train_loop import TrainLoop


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 grey images of 3 classes."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
    np.savez(path, arr_0=pixels, arr_1=np.arange(24) % 3)
    return str(path)


# ---- train() ----


def test_python_and_the_command_line_train_the_same(images, tmp_path):
    flags = dict(
        **TINY,
        data_dir=images,
        batch_size=4,
        dropout=0.1,
        ema_rate="0.9",
        log_interval=2,
        schedule_sampler="loss-second-moment",
        class_cond=True,
        class_dropout=0.1,
        sample_interval=3,
        sample_count=2,
        sample_respacing="2",
    )
    out = train(**flags, out_dir=tmp_path / "python", max_steps=2)
    assert out == str(tmp_path / "python") and complete_steps(out) == [2]
    train(resume=out, max_steps=4)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    whole = tmp_path / "script"
    done = launch.run(
        [sys.executable, TRAIN, *words, "--out_dir", str(whole), "--max_steps", "4"], 120
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, out, 4, ("model", "ema_0.9_", "opt"))
    by_step = {row["step"]: row for row in rows(out)}
    assert all(by_step[row["step"]] == row for row in rows(whole))
    for name in ("samples_000003.png", "config.yaml"):
        assert (whole / name).exists() and (tmp_path / "python" / name).exists()
    assert logger.get_current().get_dir() is None, "the run's log is still open"


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"max_stepz": 3}, "unknown argument --max_stepz. Did you mean --max_steps?"),
        ({"max_steps": "three"}, "expected a whole number"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"data_dir": "nowhere"}, "nowhere does not exist"),
        ({}, "no training images"),
    ],
)
def test_python_refuses_what_the_command_line_refuses(flags, words, tmp_path):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        train(**{**TINY, "out_dir": str(tmp_path / "run"), **flags})
    assert not (tmp_path / "run").exists()


def test_images_are_listed_once(images, tmp_path, monkeypatch):
    opened = []
    real = sources.NpzSource.__init__
    monkeypatch.setattr(
        sources.NpzSource,
        "__init__",
        lambda self, path, *more: (opened.append(path), real(self, path, *more))[1],
    )
    train(**TINY, data_dir=images, out_dir=tmp_path, max_steps=1, class_cond=True, batch_size=2)
    assert opened == [images]


# ---- settings ----


@pytest.mark.parametrize(
    "values, words",
    [
        ({"batch_size": 0}, "batch_size must be a number of at least 1, got 0"),
        ({"lr": -1e-4}, "lr must be a number of at least 0, got -0.0001"),
        ({"lr": float("nan")}, "lr must be a number of at least 0, got nan"),
        ({"grad_clip": float("inf")}, "grad_clip must be a number"),
        ({"log_interval": 0}, "log_interval must be a number of at least 1"),
        ({"max_skipped": 0}, "max_skipped"),
        ({"ema_rates": (0.9, 1.0)}, "ema_rate must be at least 0 and below 1, got 1.0"),
        ({"precision": "fp8"}, "unknown precision 'fp8': use one of fp32, fp16, bf16"),
        ({"precision": "fp16", "fp16_scale_growth": 0}, "fp16_scale_growth must be positive"),
    ],
)
def test_settings_outside_their_range_are_one_line(values, words):
    with pytest.raises(ValueError, match=words) as error:
        TrainSettings(**{"batch_size": 1, **values})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SavePolicy(0), "interval must be at least 1, got 0"),
        (lambda: SavePolicy(keep_last=-1), "keep_last must be at least 0, got -1"),
        (lambda: Limits(max_hours=-1), "max_hours must be at least 0"),
        (lambda: Hook(0, print), "every 1 or more steps, not every 0"),
    ],
)
def test_parts_of_the_settings_are_checked_too(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_settings_cannot_be_changed_and_say_when_they_end():
    settings = TrainSettings(batch_size=4, lr_anneal_steps=9, limits=Limits(max_images=50))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.lr = 1.0
    assert (settings.images_per_pass, settings.last_step(1), settings.last_step(2)) == (4, 9, 7)
    assert dataclasses.replace(settings, microbatch=3).images_per_pass == 3
    assert TrainSettings(batch_size=4).last_step(1) is None


# ---- what is of one's own ----


class Noising:
    """The least that a process must have: two members."""

    num_timesteps = 10

    def training_losses(
        self, model, x_start, t, model_kwargs=None, noise=None, gamma=None, randn_like=None
    ):
        share = t[:, None, None, None] / self.num_timesteps
        predicted = model(x_start + share * noise)
        return {"loss": (predicted - noise).square().mean((1, 2, 3))}


def endless():
    while True:
        yield torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8), {}


def test_a_process_batches_and_hooks_of_ones_own(tmp_path):
    logger.configure(str(tmp_path), format_strs=["csv"])
    torch.manual_seed(0)
    network, seen = torch.nn.Conv2d(1, 1, 3, padding=1), []

    def averaged(model, step):
        assert not torch.is_grad_enabled() and not network.training
        seen.append((step, float(model(torch.ones(1, 1, 8, 8)).mean())))
        return {"height": step}

    def present(model, step):
        seen.append((step, float(model(torch.ones(1, 1, 8, 8)).mean())))
        return {}

    settings = TrainSettings(batch_size=4, lr=0.1, log_interval=4, limits=Limits(4))
    hooks = [Hook(2, averaged), Hook(2, present, averaged=False)]
    loop = TrainLoop(network, Noising(), endless(), settings, hooks=hooks)
    loop.run_loop()
    assert [step for step, _ in seen] == [2, 2, 4, 4]
    assert seen[2][1] != seen[3][1], "the average is the present network"
    assert network.training and [row["height"] for row in rows(tmp_path)][-1] == "3.0"


def test_what_can_seek_is_moved(images, tmp_path):
    loop = make_loop(images, tmp_path, 2)
    assert isinstance(loop.data, SeekableBatches) and not isinstance(endless(), SeekableBatches)
    loop.run_loop()
    again = make_loop(images, tmp_path, 3, resume=str(tmp_path / "model000002.pt"))
    assert again.data.step == 2 and not any("cannot be moved" in line for line in again.resumed)
    settings = dataclasses.replace(again.settings)
    bare = TrainLoop(again.model, again.process, endless(), settings)
    assert bare.step == 2 and "cannot be moved" in bare.resumed[-1]


def test_processes_in_words():
    usual = create_gaussian_diffusion(learn_sigma=True, input_perturbation=0.1)
    assert describe(usual) == "T = 1000, epsilon, learned_range variance, gamma 0.1"
    weighted = create_gaussian_diffusion(loss_weighting="debias")
    assert "loss weights debias (0.01 at t = 0, 157 at t = 999)" in describe(weighted)
    assert describe(EDMProcess(EDMLoss())).startswith("EDMLoss(P_mean=-1.2")


# ---- what may change on resume ----


def test_how_evaluations_are_made_may_change_in_silence():
    before = {"train": {"eval_metrics": "fid", "inception_weights": "", "eval_samples": 8, "lr": 1}}
    after = {"train": {"eval_metrics": "kid", "inception_weights": "x", "eval_samples": 9, "lr": 2}}
    assert resume.compare_settings(before, after) == ["note: lr was 1 before, is 2 from here on"]
