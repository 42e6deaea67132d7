"""The scripts as a user runs them: what they write, and what they say about wrong input."""

import io
import os
import pickle
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    learn_sigma=True,
    noise_schedule="cosine",
    num_head_channels=32,
)


def flags(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run(script, *argv, capsys, monkeypatch):
    """Runs the script as __main__ in this process: (exit code, stdout, stderr)."""
    path = ROOT / "scripts" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr()
    return end.value.code, out.out, out.err


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(
            folder / str(i % 3) / f"{i}.png"
        )
    return str(folder)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run of two steps, by a real process."""
    out = tmp_path_factory.mktemp("run") / "trained"
    done = subprocess.run(
        [
            sys.executable,
            "scripts/image_train.py",
            *flags(**TINY),
            "--data_dir",
            images,
            "--out_dir",
            str(out),
            "--max_steps",
            "2",
            "--batch_size",
            "4",
            "--ema_rate",
            "0.5,0.9",
            "--class_cond",
            "True",
            "--num_classes",
            "3",
            "--sample_interval",
            "2",
            "--sample_count",
            "4",
            "--sample_respacing",
            "3",
            "--log_interval",
            "1",
            "--input_pertub",
            "0.1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_training_tells_what_it_does_and_leaves_what_is_needed(trained):
    out, said = trained
    assert (
        said.count(str(out)) >= 2
        and str(out) in said.splitlines()[0]
        and str(out) in said.splitlines()[-1]
    )
    for fact in (
        "1 process",
        "4 per process, 4 in all",
        "fp32",
        "12, [1, 8, 8]",
        "in [-1, 1]",
        "parameters",
        "gamma 0.1",
        "after 2 steps",
        "0.5, 0.9",
        "3 classes from sub-folder names",
    ):
        assert fact in said, fact
    names = set(os.listdir(out))
    assert {
        "config.yaml",
        "model000002.pt",
        "ema_0.5_000002.pt",
        "ema_0.9_000002.pt",
        "opt000002.pt",
        "progress.csv",
        "samples_000002.png",
    } <= names
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["model"]["num_classes"] == 3 and saved["diffusion"]["input_perturbation"] == 0.1
    header = (out / "progress.csv").read_text().splitlines()[0].split(",")
    assert {"step", "loss", "loss_q0", "mse", "vb", "images/s", "data_wait_%", "grad_norm"} <= set(
        header
    )
    assert any(name.startswith("events") for _, _, files in os.walk(out) for name in files), (
        "TensorBoard's file"
    )
    state = torch.load(out / "model000002.pt", weights_only=True)
    assert all(v.dtype == torch.float32 for v in state.values())


def test_sampling_needs_only_the_checkpoint(trained, capsys, monkeypatch):
    out, _ = trained
    code, said, err = run(
        "image_sample",
        "--model_path",
        str(out / "ema_0.9_000002.pt"),
        "--num_samples",
        "5",
        "--batch_size",
        "2",
        "--timestep_respacing",
        "3",
        "--save_png",
        "--class_ids",
        "0,2",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    npz = next(line.split(": ", 1)[1] for line in said.splitlines() if line.startswith("samples: "))
    assert Path(npz).parent.parent == out / "samples"
    with np.load(npz) as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 1) and set(arrays["arr_1"]) <= {0, 2}
        first = arrays["arr_0"][0, ..., 0]
    png = np.asarray(Image.open(Path(npz).parent / "png" / "000000.png"))
    np.testing.assert_array_equal(png, first)
    assert (Path(npz).parent / "grid.png").exists() and (
        Path(npz).parent / "settings.yaml"
    ).exists()


def test_an_equal_architecture_flag_is_fine_and_a_harmless_one_too(trained, capsys, monkeypatch):
    out, _ = trained
    code, _, err = run(
        "image_sample",
        "--model_path",
        str(out / "model000002.pt"),
        "--num_samples",
        "2",
        "--num_channels",
        "32",
        "--dropout",
        "0.3",
        "--timestep_respacing",
        "2",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err


def test_a_bare_checkpoint_is_sampled_by_flags(trained, tmp_path, capsys, monkeypatch):
    out, _ = trained
    bare = tmp_path / "bare.pt"
    bare.write_bytes((out / "ema_0.9_000002.pt").read_bytes())
    common = [
        "--model_path",
        str(bare),
        "--num_samples",
        "2",
        "--timestep_respacing",
        "2",
        "--out_dir",
        str(tmp_path / "out"),
    ]
    code, _, err = run(
        "image_sample",
        *common,
        *flags(**TINY),
        "--class_cond",
        "True",
        "--num_classes",
        "3",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    code, _, err = run(
        "image_sample",
        *common,
        *flags(**{**TINY, "num_res_blocks": 2, "num_channels": 64}),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err)
    for needed in (
        "--num_channels 32 ",
        "--class_cond True --num_classes 3 --num_res_blocks 1 (now 64, False, 1000, 2)",
    ):
        assert needed in err, err


def test_the_error_about_a_bare_checkpoint_can_be_copied(trained, tmp_path, capsys, monkeypatch):
    """Class count, widths, the size of the images and its attention are asked for together, once;
    what was assumed is told.
    """
    bare = tmp_path / "bare.pt"
    bare.write_bytes((trained[0] / "ema_0.9_000002.pt").read_bytes())
    common = [
        "--model_path",
        str(bare),
        "--num_samples",
        "2",
        "--timestep_respacing",
        "2",
        "--out_dir",
    ]
    tools = dict(capsys=capsys, monkeypatch=monkeypatch)
    code, _, err = run("image_sample", *common, str(tmp_path / "a"), **tools)
    assert (
        code == 2 and one_line(err) and "[--image_size 16 --attention_resolutions 8] or" in err
    ), err
    copied = shlex.split(err[err.index("it needs ") + 9 : err.index(" (now")])
    copied += shlex.split(re.search(r"\[(--image_size 8 [^]]*)\]", err)[1])
    code, said, err = run("image_sample", *common, str(tmp_path / "a"), *copied, **tools)
    assert code == 0, err
    notes = [line for line in said.splitlines() if line.startswith("note:")]
    assert (
        len(notes) == 1
        and "assumed: null_class False, num_heads 4, use_new_attention_order False, diffusion_steps 1000, "
        "noise_schedule linear, predict_xstart False, rescale_timesteps False ("
        in notes[0]
    ), said
    everything = flags(
        **{
            **TINY,
            "noise_schedule": "linear",
            "num_heads": 4,
            "num_head_channels": -1,
            "class_cond": True,
            "num_classes": 3,
            "null_class": False,
            "use_new_attention_order": False,
            "diffusion_steps": 1000,
            "predict_xstart": False,
            "rescale_timesteps": False,
        }
    )
    code, said, err = run("image_sample", *common, str(tmp_path / "b"), *everything, **tools)
    assert code == 0 and "note:" not in said, said + err
    with (
        np.load(tmp_path / "a" / "samples_2x8x8x1.npz") as a,
        np.load(tmp_path / "b" / "samples_2x8x8x1.npz") as b,
    ):
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])


@pytest.mark.parametrize("size, channels", [("8x16", 3), ("16x8", 4)])
def test_other_shapes_train_and_sample(size, channels, images, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    tiny = flags(**{**TINY, "image_size": size, "in_channels": channels})
    code, said, err = run(
        "image_train",
        *tiny,
        "--data_dir",
        images,
        "--out_dir",
        str(out),
        "--max_steps",
        "1",
        "--batch_size",
        "2",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    height, width = map(int, size.split("x"))
    assert code == 0 and f"[{channels}, {height}, {width}]" in said, err
    code, _, err = run(
        "image_sample",
        "--model_path",
        str(out / "model000001.pt"),
        "--num_samples",
        "3",
        "--batch_size",
        "2",
        "--timestep_respacing",
        "2",
        "--out_dir",
        str(tmp_path / "s"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0 and (tmp_path / "s" / f"samples_3x{height}x{width}x{channels}.npz").exists(), (
        err
    )


def test_published_lambda(trained, tmp_path, capsys, monkeypatch):
    out, _ = trained
    config = tmp_path / "c.yaml"
    config.write_text("paper:\n  eps_scaler: {2: 1.017}\n")
    common = [
        "--config",
        str(config),
        "--model_path",
        str(out / "model000002.pt"),
        "--num_samples",
        "1",
        "--eps_scaler",
        "published",
        "--out_dir",
        str(tmp_path / "out"),
    ]
    code, said, err = run(
        "image_sample", *common, "--timestep_respacing", "2", capsys=capsys, monkeypatch=monkeypatch
    )
    assert code == 0 and "lambda 1.017" in said, err
    code, _, err = run(
        "image_sample", *common, "--timestep_respacing", "3", capsys=capsys, monkeypatch=monkeypatch
    )
    assert code == 2 and "there is one for 2" in err


def test_an_interrupted_sampling_run_continues(trained, tmp_path):
    """kill -9 in the middle; the same command ends with what an uninterrupted run gives."""
    out, _ = trained
    command = [
        sys.executable,
        "scripts/image_sample.py",
        "--model_path",
        str(out / "model000002.pt"),
        "--num_samples",
        "40",
        "--batch_size",
        "4",
        "--timestep_respacing",
        "10",
        "--out_dir",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        [*command, str(tmp_path / "a")], cwd=ROOT, stderr=subprocess.DEVNULL, env=environment
    )
    shards = tmp_path / "a" / "shards"
    while killed.poll() is None and not (shards.exists() and list(shards.glob("shard-*"))):
        pass
    killed.kill()
    killed.wait()
    assert list(shards.glob("shard-*")) and not list((tmp_path / "a").glob("*.npz")), (
        "killed too late for this test"
    )
    for folder in "ab":
        subprocess.run(
            [*command, str(tmp_path / folder)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            env=environment,
        )
    name = "samples_40x8x8x1.npz"
    with np.load(tmp_path / "a" / name) as a, np.load(tmp_path / "b" / name) as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
        np.testing.assert_array_equal(a["arr_1"], b["arr_1"])


def test_an_interrupted_sampling_run_says_how_to_go_on(trained, tmp_path):
    out, _ = trained
    process = subprocess.Popen(
        [
            sys.executable,
            "scripts/image_sample.py",
            "--model_path",
            str(out / "model000002.pt"),
            "--num_samples",
            "4000",
            "--batch_size",
            "4",
            "--timestep_respacing",
            "10",
            "--out_dir",
            str(tmp_path),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    while process.poll() is None and not list(tmp_path.glob("shards/shard-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=120)[1]
    done = 4 * len(list(tmp_path.glob("shards/shard-*")))
    assert process.returncode == 130 and 0 < done < 4000
    assert (
        err.splitlines()[-1]
        == f"interrupted: the same command continues; {done} of 4000 images are done"
    )


def one_line(err):
    """Only one line on stderr (but for progress bars), and no traceback."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    return len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err


class Evil:
    """A pickle that would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def corrupt_folder(folder, source):
    folder.mkdir()
    (folder / "good.png").write_bytes(next(Path(source).rglob("*.png")).read_bytes())
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:60])
    return folder


BAD_TRAINING = {
    "no data": (["--data_dir="], "give --data_dir"),
    "missing folder": (["--data_dir", "{tmp}/nowhere"], "nowhere"),
    "empty folder": (["--data_dir", "{tmp}/empty"], "empty"),
    "corrupt image": (["--data_dir", "{tmp}/corrupt"], "broken.png"),
    "unknown flag": (["--learning_rate", "1"], "--learning_rate"),
    "nearest flag": (["--batchsize", "4"], "Did you mean --batch_size?"),
    "not a number": (["--batch_size", "many"], "whole number"),
    "unknown config key": (["--config", "{tmp}/bad_key.yaml"], "Did you mean num_channels?"),
    "unknown config section": (["--config", "{tmp}/bad_section.yaml"], "Did you mean model?"),
    "config value": (["--config", "{tmp}/bad_value.yaml"], "model.num_channels"),
    "no such config": (["--config", "{tmp}/none.yaml"], "none.yaml does not exist"),
    "image size": (["--image_size", "28", "--channel_mult="], "24 or 32"),
    "channels": (["--in_channels", "2"], "1, 3, 4"),
    "class count": (["--class_cond", "True", "--num_classes", "2"], "--num_classes 3"),
    "linear": (["--noise_schedule", "linear", "--diffusion_steps", "10"], "--timestep_respacing"),
    "gamma": (["--input_perturbation", "-0.1"], "0 switches it off"),
    "two gammas": (["--input_perturbation", "0.1", "--input_pertub", "0.2"], "two spellings"),
    "norm groups": (["--num_channels", "20"], "32"),
    "ema": (["--ema_rate", "1.5"], "0.9999 is usual"),
    "resume": (["--resume_checkpoint", "{tmp}/model000009.pt"], "model000009.pt"),
    "remote results": (["--out_dir", "gs://bucket/runs"], "folder of this machine"),
    "sampler": (["--schedule_sampler", "best"], "loss-second-moment"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_input_for_training(case, images, tmp_path, capsys, monkeypatch):
    argv, hint = BAD_TRAINING[case]
    (tmp_path / "empty").mkdir()
    corrupt_folder(tmp_path / "corrupt", images)
    (tmp_path / "bad_key.yaml").write_text("model:\n  num_channel: 3\n")
    (tmp_path / "bad_section.yaml").write_text("modell:\n  num_channels: 3\n")
    (tmp_path / "bad_value.yaml").write_text("model:\n  num_channels: lots\n")
    out = tmp_path / "out"
    argv = [word.replace("{tmp}", str(tmp_path)) for word in argv]
    code, _, err = run(
        "image_train",
        *flags(**TINY),
        "--data_dir",
        images,
        "--max_steps",
        "1",
        "--out_dir",
        str(out),
        *argv,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err) and hint in err, err
    assert not out.exists(), "nothing half-written is left behind"


BAD_SAMPLING = {
    "no checkpoint": (["--model_path="], "--model_path"),
    "missing checkpoint": (["--model_path", "{run}/none.pt"], "none.pt"),
    "truncated checkpoint": (["--model_path", "{tmp}/truncated.pt"], "truncated.pt"),
    "malicious pickle": (["--model_path", "{tmp}/evil.pt"], "evil.pt"),
    "malicious torch file": (["--model_path", "{tmp}/evil_zip.pt"], "evil_zip.pt"),
    "no state_dict": (["--model_path", "{run}/opt000002.pt"], "model or ema file"),
    "other architecture": (["--num_channels", "64"], "trained with num_channels 32"),
    "other process": (["--noise_schedule", "linear"], "trained with noise_schedule 'cosine'"),
    "ddim37": (["--timestep_respacing", "ddim37"], "possible near it"),
    "respacing": (["--timestep_respacing", "2000"], "give 1 to 1000"),
    "respacing text": (["--timestep_respacing", "fast"], "ddim25"),
    "lambda 0": (["--eps_scaler", "0"], "lambda(t) > 0"),
    "lambda < 0 at the end": (["--eps_scaler", "1", "--eps_scaler_k", "-1"], "lambda("),
    "lambda per step": (["--eps_scaler", "1.0,1.1,1.2"], "one value per step"),
    "lambda text": (["--eps_scaler", "big"], "published"),
    "no published lambda": (["--eps_scaler", "published"], "needs a table"),
    "eta without ddim": (["--eta", "0.5"], "--use_ddim True"),
    "eta < 0": (["--use_ddim", "True", "--eta", "-1"], "at least 0"),
    "classes": (["--class_ids", "0-9"], "knows 0 to 2"),
    "number of images": (["--num_samples", "0"], "at least 1"),
}


@pytest.mark.parametrize("case", BAD_SAMPLING)
def test_bad_input_for_sampling(case, trained, tmp_path, capsys, monkeypatch):
    run_dir, _ = trained
    argv, hint = BAD_SAMPLING[case]
    config = run_dir / "config.yaml"
    (tmp_path / "config.yaml").write_text(config.read_text())
    (tmp_path / "truncated.pt").write_bytes((run_dir / "model000002.pt").read_bytes()[:1000])
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(str(tmp_path / "pwned"))))
    with zipfile.ZipFile(tmp_path / "evil_zip.pt", "w") as archive:
        archive.writestr(
            "archive/data.pkl", pickle.dumps(Evil(str(tmp_path / "pwned")), protocol=2)
        )
        archive.writestr("archive/version", "3\n")
    out = tmp_path / "out"
    argv = [word.replace("{tmp}", str(tmp_path)).replace("{run}", str(run_dir)) for word in argv]
    code, _, err = run(
        "image_sample",
        "--model_path",
        str(run_dir / "model000002.pt"),
        "--num_samples",
        "2",
        "--timestep_respacing",
        "2",
        "--out_dir",
        str(out),
        *argv,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err) and hint in err, err
    assert not out.exists() and not (tmp_path / "pwned").exists()


def test_bad_input_ends_a_real_process_with_code_2(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "scripts/image_train.py",
            "--data_dir",
            str(tmp_path / "nowhere"),
            *flags(**TINY),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and one_line(done.stderr) and "nowhere" in done.stderr


def test_help_lists_the_flags(capsys, monkeypatch):
    code, said, _ = run("image_sample", "--help", capsys=capsys, monkeypatch=monkeypatch)
    assert (
        code == 0 and "--eps_scaler_k" in said and io.StringIO(said).readline().startswith("usage:")
    )
