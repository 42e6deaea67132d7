"""Numbers while training: the same for one and two processes, for the same weights, across a
resume; classes that are asked for.
"""

import contextlib
import csv
import io
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import launch
import numpy as np
import pytest
import torch
import yaml
from test_guards import close_logs  # noqa: F401 (a fixture)
from test_resume import FLAGS, TRAIN, make_loop, rows

from guided_diffusion_ip import logger
from guided_diffusion_ip.metrics.manifold import precision_recall
from guided_diffusion_ip.runs.sample_batch import Sampler
from guided_diffusion_ip.training.checkpoint import complete_steps
from guided_diffusion_ip.training.hooks import Hook
from guided_diffusion_ip.training.precision import DTYPES

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = str(ROOT / "scripts" / "image_sample.py")
CLASSIFY = str(ROOT / "scripts" / "classifier_train.py")
REFERENCE = str(ROOT / "evaluations" / "make_reference.py")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """64 grey images of 8 classes."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(
        path, arr_0=rng.integers(0, 256, (64, 8, 8, 1), dtype=np.uint8), arr_1=np.arange(64) % 8
    )
    return str(path)


def python(*argv, code=0, processes=1):
    done = (
        launch.torchrun(processes, list(argv), timeout=120)
        if processes > 1
        else launch.run([sys.executable, *argv], 120)
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def here(path, *argv, code=0):
    """The script in this process, which saves the seconds of a start; returns what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [path, *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(path, run_name="__main__")
    logger.reset()
    assert end.value.code == code, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def command(images, out, *more):
    return [
        TRAIN,
        *FLAGS,
        "--data_dir",
        images,
        "--out_dir",
        str(out),
        "--global_batch_size",
        "4",
        "--log_interval",
        "4",
        "--ema_rate",
        "0.5",
        "--eval_features",
        "pixels",
        "--eval_samples",
        "12",
        "--eval_respacing",
        "4",
        *more,
    ]


def column(folder, name):
    with open(Path(folder) / "progress.csv", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.fixture(scope="module")
def evaluated(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    done = here(
        *command(
            images, out, "--eval_interval", "2", "--max_steps", "4", "--eval_metrics", "fid,kid"
        )
    )
    return out, done.stdout


def test_numbers_are_in_the_csv_on_the_screen_and_in_tensorboard(evaluated):
    out, said = evaluated
    assert "step 2: fid@12 " in said and "step 4: fid@12 " in said
    fid = column(out, "fid@12")
    assert list(fid) == [4] and 0 < fid[4] < 1e4 and list(column(out, "kid@12")) == [4]
    events = next((out / "tb").glob("events*")).read_bytes()
    assert b"fid@12" in events and b"kid@12" in events


def test_two_processes_measure_the_same(evaluated, images, tmp_path):
    python(
        *command(
            images,
            tmp_path,
            "--eval_interval",
            "2",
            "--max_steps",
            "4",
            "--eval_metrics",
            "fid,kid",
        ),
        processes=2,
    )
    for name in ("fid@12", "kid@12"):
        one, two = column(evaluated[0], name), column(tmp_path, name)
        assert one.keys() == two.keys() and two[4] == pytest.approx(one[4], rel=1e-3), name


def test_the_same_weights_give_the_same_number(images, tmp_path):
    here(
        *command(
            images,
            tmp_path,
            "--eval_interval",
            "1",
            "--log_interval",
            "1",
            "--max_steps",
            "3",
            "--lr",
            "0",
        )
    )
    assert (
        len(set(column(tmp_path, "fid@12").values())) == 1 and len(column(tmp_path, "fid@12")) == 3
    )
    here(
        *command(
            images,
            tmp_path,
            "--eval_interval",
            "1",
            "--log_interval",
            "1",
            "--max_steps",
            "4",
            "--resume",
            "auto",
            "--lr",
            "0.01",
        )
    )
    assert len(set(column(tmp_path, "fid@12").values())) == 2, "other weights, the same number"


def test_a_stored_reference_is_what_is_compared_with(evaluated, images, tmp_path):
    """Statistics of the training images give the number that the images give; of
    others, another.
    """
    other = tmp_path / "other.npz"
    np.savez(
        other,
        arr_0=np.full((40, 8, 8, 1), 7, np.uint8)
        + np.random.default_rng(1).integers(0, 9, (40, 8, 8, 1), np.uint8),
    )
    for name, source in (("same", images), ("other", str(other))):
        here(
            REFERENCE,
            source,
            "--out",
            str(tmp_path / f"{name}_reference.npz"),
            "--features",
            "pixels",
        )
        here(
            *command(
                images,
                tmp_path / name,
                "--eval_interval",
                "2",
                "--max_steps",
                "4",
                "--eval_metrics",
                "fid",
                "--eval_ref",
                str(tmp_path / f"{name}_reference.npz"),
            )
        )
    fid = column(evaluated[0], "fid@12")[4]
    assert column(tmp_path / "same", "fid@12")[4] == pytest.approx(fid, rel=1e-6)
    assert column(tmp_path / "other", "fid@12")[4] > 1.5 * fid


@pytest.mark.parametrize(
    "more, words",
    [
        (["--eval_metrics", "sfid"], "--eval_metrics sfid"),
        (["--eval_metrics", "fud"], "fud"),
        (["--eval_ref", "nowhere.npz"], "nowhere.npz"),
        (["--eval_features", "inception", "--inception_weights", "no.pth"], "no.pth"),
        (["--eval_features", "no.onnx"], "no.onnx"),
        (["--image_size", "72"], "72x72x1 have 5184 pixel values"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_written(more, words, images, tmp_path):
    out = tmp_path / "run"
    done = here(*command(images, out, "--eval_interval", "1", "--max_steps", "1", *more), code=2)
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not out.exists()


def test_samples_with_a_nan_are_told_and_training_goes_on(images, tmp_path):
    """From half-precision sampling, say: weights and losses are fine."""
    sample = Sampler.__call__

    def spoil(*args, **kwargs):
        images = sample(*args, **kwargs)
        images[1:2] = float("nan")
        return images

    with mock.patch.object(Sampler, "__call__", spoil):
        done = here(
            *command(
                images,
                tmp_path,
                "--eval_interval",
                "1",
                "--max_steps",
                "2",
                "--sample_interval",
                "2",
                "--sample_count",
                "4",
                "--sample_respacing",
                "2",
            )
        )
    for line in ("step 1: not evaluated", "step 2: not evaluated", "step 2: no picture of samples"):
        assert f"warning: {line}: " in done.stdout and "images contain NaN" in done.stdout
    assert (
        complete_steps(str(tmp_path)) == [2]
        and not column(tmp_path, "fid@12")
        and not list(tmp_path.glob("*.png"))
    )


def settled(images, folder, steps, resume=""):
    return make_loop(
        images,
        folder,
        steps,
        resume=resume,
        random_crop=False,
        log_interval=10,
        hooks=[Hook(3, lambda model, step: {"score": step / 7})],
    )


@pytest.mark.parametrize("stop", [3, 7, 8])
def test_numbers_that_were_not_yet_logged_survive_a_stop(stop, images, tmp_path):
    """Evaluations at 3, 6, 9 belong to the line at 10; stopped at 3, 7 or 8, by a limit or a
    signal, they still do.
    """
    settled(images, tmp_path / "whole", 10).run_loop()
    settled(images, tmp_path / "limit", stop).run_loop()
    told = settled(images, tmp_path / "told", 20)
    for _ in range(stop):
        told.run_step(*next(told.data))
        told._after_step(False)
    told.save()
    for name in ("limit", "told"):
        settled(
            images, tmp_path / name, 10, str(tmp_path / name / f"model{stop:06d}.pt")
        ).run_loop()
        line, whole = (
            {row["step"]: row for row in rows(tmp_path / run)}["10"] for run in (name, "whole")
        )
        assert line == whole and float(line["score"]) == pytest.approx(6 / 7)


# ---- 8 classes ----


def test_a_run_on_8_classes_samples_only_those(images, tmp_path):
    out, classes = tmp_path / "run", ["--class_cond", "True", "--num_classes", "8"]
    done = python(
        *command(
            images,
            out,
            *classes,
            "--max_steps",
            "1",
            "--sample_interval",
            "1",
            "--sample_count",
            "8",
            "--sample_respacing",
            "2",
            "--eval_interval",
            "1",
        )
    )
    assert (
        "classes    8" in done.stdout
        and "note: the images have" not in done.stdout
        and (out / "samples_000001.png").exists()
    )
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["num_classes"] == 8
    assert torch.load(out / "model000001.pt", weights_only=True)["label_emb.weight"].shape[0] == 8
    here(
        SAMPLE,
        "--model_path",
        str(out / "ema_0.5_000001.pt"),
        "--num_samples",
        "64",
        "--batch_size",
        "32",
        "--timestep_respacing",
        "2",
        "--out_dir",
        str(tmp_path / "samples"),
    )
    with np.load(next((tmp_path / "samples").glob("*.npz"))) as file:
        assert sorted(set(file["arr_1"].tolist())) == list(range(8)) and len(file["arr_0"]) == 64


def test_a_network_of_more_classes_is_told_and_sampled_by_those_of_the_data(images, tmp_path):
    """Of 1000 classes a network of 8-class data has learned 8: pictures and evaluations on the way
    never ask for others.
    """
    seen, forward = set(), torch.nn.Embedding.forward

    def look(self, y):
        seen.update(y.tolist())
        return forward(self, y)

    with mock.patch.object(torch.nn.Embedding, "forward", look):
        done = here(
            *command(
                images,
                tmp_path / "run",
                "--class_cond",
                "True",
                "--num_classes",
                "1000",
                "--max_steps",
                "1",
                "--sample_interval",
                "1",
                "--sample_count",
                "32",
                "--sample_respacing",
                "2",
                "--eval_interval",
                "1",
                "--eval_samples",
                "32",
            )
        )
    assert seen == set(range(8))
    assert (
        "note: the images have 8 classes, the network 1000: sampling draws only those 8"
        in done.stdout
    )
    done = here(
        SAMPLE,
        "--model_path",
        str(tmp_path / "run" / "ema_0.5_000001.pt"),
        "--num_samples",
        "32",
        "--timestep_respacing",
        "2",
        "--batch_size",
        "32",
        "--out_dir",
        str(tmp_path / "samples"),
    )
    assert (
        "note: the network has rows for 1000 classes, the training images were of 8: only these "
        "are sampled" in done.stdout
    )
    with np.load(next((tmp_path / "samples").glob("*.npz"))) as file:
        assert set(file["arr_1"].tolist()) <= set(range(8))


def test_fewer_classes_than_the_images_have_are_an_error(images, tmp_path):
    done = here(
        *command(images, tmp_path / "run", "--class_cond", "True", "--num_classes", "7"), code=2
    )
    assert "8 classes, but the model has 7" in done.stderr and not (tmp_path / "run").exists()


# ---- the classifier's script ----


def test_a_classifier_continues_bitwise_with_its_averages(images, tmp_path):
    def classify(out, steps):
        here(
            CLASSIFY,
            "--image_size",
            "8",
            "--in_channels",
            "1",
            "--num_classes",
            "8",
            "--classifier_width",
            "32",
            "--classifier_depth",
            "1",
            "--classifier_attention_resolutions",
            "4",
            "--data_dir",
            images,
            "--val_data_dir",
            images,
            "--eval_interval",
            "2",
            "--out_dir",
            str(out),
            "--iterations",
            str(steps),
            "--ema_rate",
            "0.9",
            "--log_interval",
            "5",
            "--batch_size",
            "4",
            "--resume",
            "auto",
        )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    classify(whole, 5)
    classify(parts, 3)
    classify(parts, 5)
    assert complete_steps(str(parts)) == [3, 5]
    for name in ("model000005.pt", "ema_0.9_000005.pt"):
        a, b = (torch.load(run / name, weights_only=True) for run in (whole, parts))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    by_step = [{row["step"]: row for row in rows(run)}["5"] for run in (whole, parts)]
    assert by_step[0] == by_step[1] and by_step[0]["val_loss"]


# ---- precision ----


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_only_the_network_computes_in_half_precision(mode, images, tmp_path):
    """What is done with samples (features, distances, scores) stays float32; the network's
    convolutions do not.
    """
    features = [
        torch.from_numpy(x)
        for x in np.random.default_rng(0).standard_normal((2, 400, 64), np.float32)
    ]
    exact = precision_recall(*features)
    outside, inside = [], []

    def use(model, step):
        outside.append((torch.is_autocast_enabled("cpu"), precision_recall(*features) == exact))
        with (
            loop.model.middle_block[0]
            .in_layers[2]
            .register_forward_hook(lambda module, x, y: inside.append(y.dtype))
        ):
            assert (
                model(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)).dtype
                == torch.float32
            )
        return {}

    loop = make_loop(
        images,
        tmp_path,
        1,
        random_crop=False,
        precision=mode,
        hooks=[Hook(1, use, averaged=False), Hook(1, use), Hook(1, use)],
    )
    loop.run_loop()
    assert outside == [(False, True)] * 3 and inside == [DTYPES[mode]] * 3
