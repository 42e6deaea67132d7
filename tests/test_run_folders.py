"""A run's folder: not damaged by another run, continued by its name alone; a checkpoint is sampled with its own settings."""
import hashlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_guards import close_logs  # noqa: F401 (a fixture)
from test_training_evaluation import CLASSIFY, SAMPLE, here

import launch
from guided_diffusion_ip.config import adopt_checkpoint_config, config_beside, parse
from guided_diffusion_ip.training.checkpoint import complete_steps

ROOT = Path(__file__).resolve().parent.parent
TRAIN, UPSAMPLE = (str(ROOT / "scripts" / name) for name in ("image_train.py", "super_res_train.py"))
TINY = dict(image_size=8, in_channels=1, num_channels=32, num_res_blocks=1, channel_mult="1,1", attention_resolutions="4",
            num_head_channels=32)


def flags(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve grey pictures of cats and dogs."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(12):
        home = folder / ("cat", "dog")[i % 2]
        home.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(home / f"{i}.png")
    return str(folder)


def train(images, out, *more, script=TRAIN, code=0, **changed):
    network = dict(TINY, noise_schedule="cosine", ema_rate="0.5") | changed
    return here(script, *flags(**network), "--data_dir", images, "--out_dir", str(out), "--batch_size", "4", "--num_workers", "0",
                "--max_steps", "2", *more, code=code)


@pytest.fixture(scope="module")
def begun(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cosine"
    train(images, out)
    return out


@pytest.fixture
def run(begun, tmp_path):
    """A copy of a run of two steps, to do as one likes with."""
    return Path(shutil.copytree(begun, tmp_path / "run"))


def sample(checkpoint, out, *more, code=0):
    return here(SAMPLE, "--model_path", str(checkpoint), "--num_samples", "3", "--timestep_respacing", "4", "--out_dir", str(out),
                *more, code=code)


def pixels(folder):
    with np.load(next(Path(folder).glob("samples_*.npz"))) as file:
        return file["arr_0"]


def contents(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob("*")
            if path.is_file()}


def one_line(err):
    lines = err.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("error: ")


# ---- a folder that holds a run ----

def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(images, run):
    before = contents(run)
    done = train(images, run, noise_schedule="linear", code=2)
    assert one_line(done.stderr) and "config.yaml, progress.csv, progress.json, checkpoints up to step 2" in done.stderr
    assert all(way in done.stderr for way in ("--resume auto", "--out_dir", "--overwrite True"))
    assert contents(run) == before


@pytest.mark.parametrize("left", ["config.yaml", "progress.csv", "ema_0.5_000002.pt"])
def test_each_trace_of_a_run_counts(left, images, begun, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(begun / left, tmp_path / "run")
    done = train(images, tmp_path / "run", code=2)
    assert one_line(done.stderr) and left in done.stderr and os.listdir(tmp_path / "run") == [left]


def test_the_other_training_scripts_refuse_too(images, run):
    before = contents(run)
    small = ["--in_channels", "1", "--data_dir", images, "--out_dir", str(run)]
    for done in (here(CLASSIFY, *small, "--image_size", "8", "--iterations", "1", code=2),
                 here(UPSAMPLE, *small, "--large_size", "8", "--small_size", "4", "--max_steps", "1", code=2)):
        assert one_line(done.stderr) and "holds a run already" in done.stderr
    assert contents(run) == before


def test_two_processes_refuse_together(images, run):
    before = contents(run)
    done = launch.torchrun(2, [TRAIN, *flags(**TINY), "--data_dir", images, "--out_dir", str(run), "--batch_size", "4"], 120)
    assert done.returncode != 0 and done.stderr.count("holds a run already") == 1 and contents(run) == before


def test_other_folders_are_taken(images, run, tmp_path, monkeypatch):
    """An empty one, one with other files, and one that the environment names, as guided-diffusion's scripts do."""
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for name in ("empty", "other"):
        train(images, tmp_path / name, "--max_steps", "1")
        assert complete_steps(str(tmp_path / name)) == [1]
    monkeypatch.setenv("OPENAI_LOGDIR", str(run))
    train(images, "", "--max_steps", "1")
    assert complete_steps(str(run)) == [1, 2]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(images, run):
    for path in run.glob("*.pt"):
        path.unlink()
    assert "starting at step 0" in train(images, run, "--resume", "auto").stdout and complete_steps(str(run)) == [2]


def test_overwrite_and_resume_contradict_each_other(images, run):
    before = contents(run)
    done = train(images, run, "--overwrite", "True", "--resume", "auto", code=2)
    assert one_line(done.stderr) and "give one of them" in done.stderr and contents(run) == before


def test_overwriting_is_for_one_start(images, run, tmp_path):
    """config.yaml of a run that was begun so does not overwrite anything when it is given to another."""
    train(images, run, "--overwrite", "True", "--max_steps", "1")
    assert "overwrite" not in (run / "config.yaml").read_text()
    done = here(TRAIN, "--config", str(run / "config.yaml"), code=2)
    assert "holds a run already" in done.stderr


# ---- a checkpoint's own settings ----

@pytest.mark.parametrize("name", ["ema_0.5_000002.pt", "model000002.pt", "renamed.pt"])
def test_an_old_checkpoint_is_sampled_as_before_after_its_folder_was_overwritten(name, images, run, tmp_path):
    shutil.copy(run / "ema_0.5_000002.pt", run / "renamed.pt")
    said = sample(run / name, tmp_path / "before").stdout
    assert "note:" not in said
    train(images, run, "--overwrite", "True", "--max_steps", "1", noise_schedule="linear")
    assert yaml.safe_load((run / "config.yaml").read_text())["diffusion"]["noise_schedule"] == "linear"
    said = sample(run / name, tmp_path / "after").stdout
    np.testing.assert_array_equal(pixels(tmp_path / "before"), pixels(tmp_path / "after"))
    before, after = (yaml.safe_load((tmp_path / out / "settings.yaml").read_text()) for out in ("before", "after"))
    assert before == after and after["noise_schedule"] == "cosine"
    notes = [line for line in said.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "noise_schedule 'cosine' instead of 'linear'" in notes[0] and "state000002.pt" in notes[0]
    assert "note:" not in sample(run / "ema_0.5_000001.pt", tmp_path / "new").stdout
    assert yaml.safe_load((tmp_path / "new" / "settings.yaml").read_text())["noise_schedule"] == "linear"


def test_measuring_takes_the_checkpoint_s_settings_too(images, run, tmp_path):
    train(images, run, "--overwrite", "True", "--max_steps", "1", noise_schedule="linear", input_perturbation="0.1")
    common = ["--model_path", str(run / "model000002.pt"), "--data_dir", images, "--timestep_respacing", "2"]
    for script, more in (("image_nll", ["--num_samples", "2", "--out_dir", str(tmp_path / "nll")]),
                         ("exposure_bias", ["--num_images", "2", "--measures", "norm", "--plots", "False",
                                            "--out_dir", str(tmp_path / "bias")]),
                         ("calibrate_eps", ["--num_images", "2", "--out", str(tmp_path / "eps.yaml")])):
        # There is nothing to calibrate in a network of two updates: an error, after the note.
        done = here(str(ROOT / "scripts" / f"{script}.py"), *common, *more, code=2 * (script == "calibrate_eps"))
        assert done.stdout.count("noise_schedule 'cosine' instead of 'linear'") == 1, done.stdout
    saved = [yaml.safe_load((tmp_path / name / "settings.yaml").read_text()) for name in ("nll", "bias")]
    assert all(one["noise_schedule"] == "cosine" and one["input_perturbation"] == 0.0 for one in saved)


def test_a_converted_checkpoint_takes_its_own_settings_along(images, run, tmp_path):
    pytest.importorskip("safetensors")
    train(images, run, "--overwrite", "True", "--max_steps", "1", noise_schedule="linear")
    here(str(ROOT / "scripts" / "convert_checkpoint.py"), str(run / "model000002.pt"), str(tmp_path / "one.safetensors"))
    cfg = parse("image_sample", "", [])
    adopt_checkpoint_config(cfg, config_beside(str(tmp_path / "one.safetensors")))
    assert cfg.noise_schedule == "cosine"


def test_only_what_makes_another_model_counts(images, run):
    """A changed limit or speed is no other run, and the state's hash must be that of the file."""
    path, content = run / "config.yaml", yaml.safe_load((run / "config.yaml").read_text())
    content["train"]["max_steps"], content["model"]["use_fp16"] = 9, True
    path.write_text(yaml.safe_dump(content))
    assert config_beside(str(run / "model000002.pt")) == str(path)
    content["diffusion"]["noise_schedule"] = "linear"
    path.write_text(yaml.safe_dump(content))
    assert config_beside(str(run / "model000002.pt")) == str(run / "state000002.pt")
    torch.save({"x": torch.zeros(1)}, run / "model000002.pt")  # no longer the one that the state knows
    assert config_beside(str(run / "model000002.pt")) == str(path)
    path.unlink()
    assert config_beside(str(run / "ema_0.5_000002.pt")) == str(run / "state000002.pt")
    assert config_beside(str(run / "model000002.pt")) == ""


def test_a_new_set_of_a_step_leaves_no_average_of_the_old_one(images, run):
    train(images, run, "--overwrite", "True", noise_schedule="linear", ema_rate="0.9")
    assert sorted(path.name for path in run.glob("*.pt")) == ["ema_0.9_000002.pt", "model000002.pt", "opt000002.pt",
                                                             "state000002.pt"]


@pytest.mark.parametrize("how", [["--overwrite", "True"], ["--resume", "auto"]])
def test_weights_that_only_config_yaml_describes_keep_it(how, images, run):
    for name in ("state000002.pt", "opt000002.pt"):
        (run / name).unlink()
    before = contents(run)
    done = train(images, run, *how, noise_schedule="linear", code=2)
    assert one_line(done.stderr) and "without its state file" in done.stderr and contents(run) == before
    train(images, run, *how)  # the same settings
