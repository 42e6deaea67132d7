"""A run's folder: not damaged by another run, continued by its name alone; a checkpoint is sampled
with its own settings.
"""

import hashlib
import os
import shutil
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_guards import close_logs  # noqa: F401 (a fixture)
from test_training_evaluation import CLASSIFY, SAMPLE, here

from guided_diffusion_ip.data.image_io import save_grid
from guided_diffusion_ip.logger import outputs
from guided_diffusion_ip.runs.sample_batch import draw_labels
from guided_diffusion_ip.settings.adopt import adopt_checkpoint_config
from guided_diffusion_ip.settings.beside import config_beside
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.training.checkpoint import complete_steps

ROOT = Path(__file__).resolve().parent.parent
TRAIN, UPSAMPLE = (
    str(ROOT / "scripts" / name) for name in ("image_train.py", "super_res_train.py")
)
TINY = dict(
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    num_head_channels=32,
)


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
    return here(
        script,
        *flags(**network),
        "--data_dir",
        images,
        "--out_dir",
        str(out),
        "--batch_size",
        "4",
        "--num_workers",
        "0",
        "--max_steps",
        "2",
        *more,
        code=code,
    )


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
    return here(
        SAMPLE,
        "--model_path",
        str(checkpoint),
        "--num_samples",
        "3",
        "--timestep_respacing",
        "4",
        "--out_dir",
        str(out),
        *more,
        code=code,
    )


def pixels(folder):
    with np.load(next(Path(folder).glob("samples_*.npz"))) as file:
        return file["arr_0"]


def contents(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def one_line(err):
    lines = err.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("error: ")


# ---- a folder that holds a run ----


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(images, run):
    before = contents(run)
    done = train(images, run, noise_schedule="linear", code=2)
    assert (
        one_line(done.stderr)
        and "config.yaml, progress.csv, progress.json, checkpoints up to step 2" in done.stderr
    )
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
    for done in (
        here(CLASSIFY, *small, "--image_size", "8", "--iterations", "1", code=2),
        here(
            UPSAMPLE, *small, "--large_size", "8", "--small_size", "4", "--max_steps", "1", code=2
        ),
    ):
        assert one_line(done.stderr) and "holds a run already" in done.stderr
    assert contents(run) == before


def test_two_processes_refuse_together(images, run):
    before = contents(run)
    done = launch.torchrun(
        2,
        [TRAIN, *flags(**TINY), "--data_dir", images, "--out_dir", str(run), "--batch_size", "4"],
        120,
    )
    assert done.returncode != 0 and contents(run) == before
    # Whichever rank notices first says it; rank 0 says it in any case.
    assert done.stderr.count("holds a run already") in (1, 2)


def test_other_folders_are_taken(images, run, tmp_path, monkeypatch):
    """An empty one, one with other files, and one that the environment names, as guided-diffusion's
    scripts do.
    """
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
    assert "starting at step 0" in train(images, run, "--resume", "auto").stdout and complete_steps(
        str(run)
    ) == [2]


def test_overwrite_and_resume_contradict_each_other(images, run):
    before = contents(run)
    done = train(images, run, "--overwrite", "True", "--resume", "auto", code=2)
    assert one_line(done.stderr) and "give one of them" in done.stderr and contents(run) == before


def test_overwriting_is_for_one_start(images, run, tmp_path):
    """config.yaml of a run that was begun so does not overwrite anything when it is given to
    another.
    """
    train(images, run, "--overwrite", "True", "--max_steps", "1")
    assert "overwrite" not in (run / "config.yaml").read_text()
    done = here(TRAIN, "--config", str(run / "config.yaml"), code=2)
    assert "holds a run already" in done.stderr


# ---- a checkpoint's own settings ----


@pytest.mark.parametrize("name", ["ema_0.5_000002.pt", "model000002.pt", "renamed.pt"])
def test_an_old_checkpoint_is_sampled_as_before_after_its_folder_was_overwritten(
    name, images, run, tmp_path
):
    shutil.copy(run / "ema_0.5_000002.pt", run / "renamed.pt")
    said = sample(run / name, tmp_path / "before").stdout
    assert "note:" not in said
    train(images, run, "--overwrite", "True", "--max_steps", "1", noise_schedule="linear")
    assert (
        yaml.safe_load((run / "config.yaml").read_text())["diffusion"]["noise_schedule"] == "linear"
    )
    said = sample(run / name, tmp_path / "after").stdout
    np.testing.assert_array_equal(pixels(tmp_path / "before"), pixels(tmp_path / "after"))
    before, after = (
        yaml.safe_load((tmp_path / out / "settings.yaml").read_text())
        for out in ("before", "after")
    )
    assert before == after and after["noise_schedule"] == "cosine"
    notes = [line for line in said.splitlines() if line.startswith("note:")]
    assert (
        len(notes) == 1
        and "noise_schedule 'cosine' instead of 'linear'" in notes[0]
        and "state000002.pt" in notes[0]
    )
    assert "note:" not in sample(run / "ema_0.5_000001.pt", tmp_path / "new").stdout
    assert (
        yaml.safe_load((tmp_path / "new" / "settings.yaml").read_text())["noise_schedule"]
        == "linear"
    )


def test_measuring_takes_the_checkpoint_s_settings_too(images, run, tmp_path):
    train(
        images,
        run,
        "--overwrite",
        "True",
        "--max_steps",
        "1",
        noise_schedule="linear",
        input_perturbation="0.1",
    )
    common = [
        "--model_path",
        str(run / "model000002.pt"),
        "--data_dir",
        images,
        "--timestep_respacing",
        "2",
    ]
    for script, more in (
        ("image_nll", ["--num_samples", "2", "--out_dir", str(tmp_path / "nll")]),
        (
            "exposure_bias",
            [
                "--num_images",
                "2",
                "--measures",
                "norm",
                "--plots",
                "False",
                "--out_dir",
                str(tmp_path / "bias"),
            ],
        ),
        (
            "calibrate_eps",
            ["--num_images", "4", "--features", "pixels", "--out", str(tmp_path / "eps.yaml")],
        ),
    ):
        done = here(str(ROOT / "scripts" / f"{script}.py"), *common, *more)
        assert done.stdout.count("noise_schedule 'cosine' instead of 'linear'") == 1, done.stdout
    saved = [
        yaml.safe_load((tmp_path / name / "settings.yaml").read_text()) for name in ("nll", "bias")
    ]
    assert all(
        one["noise_schedule"] == "cosine" and one["input_perturbation"] == 0.0 for one in saved
    )


def test_a_converted_checkpoint_takes_its_own_settings_along(images, run, tmp_path):
    pytest.importorskip("safetensors")
    train(images, run, "--overwrite", "True", "--max_steps", "1", noise_schedule="linear")
    here(
        str(ROOT / "scripts" / "convert_checkpoint.py"),
        str(run / "model000002.pt"),
        str(tmp_path / "one.safetensors"),
    )
    cfg = parse("image_sample", "", [])
    cfg = adopt_checkpoint_config(cfg, config_beside(str(tmp_path / "one.safetensors")))
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
    torch.save(
        {"x": torch.zeros(1)}, run / "model000002.pt"
    )  # no longer the one that the state knows
    assert config_beside(str(run / "model000002.pt")) == str(path)
    path.unlink()
    assert config_beside(str(run / "ema_0.5_000002.pt")) == str(run / "state000002.pt")
    assert config_beside(str(run / "model000002.pt")) == ""


def test_a_new_set_of_a_step_leaves_no_average_of_the_old_one(images, run):
    train(images, run, "--overwrite", "True", noise_schedule="linear", ema_rate="0.9")
    assert sorted(path.name for path in run.glob("*.pt")) == [
        "ema_0.9_000002.pt",
        "model000002.pt",
        "opt000002.pt",
        "state000002.pt",
    ]


@pytest.mark.parametrize("how", [["--overwrite", "True"], ["--resume", "auto"]])
def test_weights_that_only_config_yaml_describes_keep_it(how, images, run):
    for name in ("state000002.pt", "opt000002.pt"):
        (run / name).unlink()
    before = contents(run)
    done = train(images, run, *how, noise_schedule="linear", code=2)
    assert (
        one_line(done.stderr)
        and "without its state file" in done.stderr
        and contents(run) == before
    )
    train(images, run, *how)  # the same settings


# ---- continued by the folder's name alone ----


def weights(folder, step):
    return [
        torch.load(Path(folder) / name.format(step), weights_only=True)
        for name in ("model{:06d}.pt", "ema_0.5_{:06d}.pt")
    ]


def assert_same(a, b):
    assert all(torch.equal(x[name], y[name]) for x, y in zip(a, b) for name in x)


@pytest.fixture(scope="module")
def four(images, tmp_path_factory):
    """The weights of an uninterrupted run of four steps."""
    out = tmp_path_factory.mktemp("runs") / "four"
    train(images, out, "--max_steps", "4")
    return weights(out, 4)


@pytest.mark.parametrize("what", ["", "model000002.pt"])
def test_resume_alone_brings_the_run_s_own_settings(what, run, four):
    """All but the limit, which is given, comes from the run: data, batch size, network, averages,
    output folder.
    """
    done = here(TRAIN, "--resume", str(run / what), "--max_steps", "4")
    assert "2 steps done" in done.stdout and "note: max" not in done.stdout
    assert_same(weights(run, 4), four)
    saved = yaml.safe_load((run / "config.yaml").read_text())["train"]
    assert saved["max_steps"] == 4 and saved["batch_size"] == 4 and saved["out_dir"] == ""


def test_a_run_that_is_at_its_limit_says_so(run):
    before = contents(run)
    done = here(TRAIN, "--resume", str(run))
    assert (
        "2 steps are done" in done.stdout
        and "--max_steps 2" in done.stdout
        and contents(run) == before
    )


def test_resume_goes_on_to_the_run_s_own_limit(images, tmp_path, four):
    train(images, tmp_path / "run", "--max_steps", "4", "--save_interval", "2")
    for path in (tmp_path / "run").glob("*000004.pt"):
        path.unlink()  # it has been killed
    here(TRAIN, "--resume", str(tmp_path / "run"))
    assert_same(weights(tmp_path / "run", 4), four)


def test_resume_of_an_older_checkpoint_of_an_overwritten_folder_takes_its_own_settings(
    images, run, tmp_path, four
):
    train(images, run, "--overwrite", "True", "--max_steps", "1", noise_schedule="linear")
    here(
        TRAIN,
        "--resume",
        str(run / "model000002.pt"),
        "--max_steps",
        "4",
        "--out_dir",
        str(tmp_path / "out"),
    )
    assert_same(weights(tmp_path / "out", 4), four)


def test_the_command_line_wins_and_what_may_not_change_is_refused(images, run):
    done = here(
        TRAIN, "--resume", str(run), "--max_steps", "3", "--lr", "0.01", "--log_interval", "1"
    )
    assert "lr was 0.0001 before, is 0.01" in done.stdout
    done = here(
        TRAIN, "--resume", str(run), "--max_steps", "4", "--noise_schedule", "linear", code=2
    )
    assert one_line(done.stderr) and "noise_schedule is 'linear'" in done.stderr


def test_flags_of_the_first_start_are_not_repeated(images, run, tmp_path):
    """A run that was begun from other weights does not begin from them again."""
    out = tmp_path / "tuned"
    train(images, out, "--init_from", str(run / "model000002.pt"), "--max_steps", "1")
    here(TRAIN, "--resume", str(out), "--max_steps", "2")
    assert complete_steps(str(out)) == [1, 2]


@pytest.mark.parametrize(
    "path, words",
    [
        ("nowhere", "there is no such file or folder"),
        ("empty", "there is no complete checkpoint"),
        ("killed", "--resume auto --out_dir {} begins at step 0"),
    ],
)
def test_nothing_to_continue(path, words, begun, tmp_path):
    for name in ("empty", "killed"):
        (tmp_path / name).mkdir()
    shutil.copy(begun / "config.yaml", tmp_path / "killed")
    done = here(TRAIN, "--resume", str(tmp_path / path), code=2)
    assert (
        one_line(done.stderr)
        and words.format(tmp_path / path) in done.stderr
        and f"--resume {tmp_path / path}" in done.stderr
    )


def test_a_run_is_continued_by_the_script_that_began_it(run):
    done = here(CLASSIFY, "--resume", str(run), code=2)
    assert one_line(done.stderr) and "continue it by image_train.py" in done.stderr


# ---- files under other names ----


@pytest.mark.parametrize(
    "renamed",
    [
        {"model000002.pt": "best.pt"},
        {
            "model000002.pt": "best.pt",
            "ema_0.5_000002.pt": "best_ema.pt",
            "opt000002.pt": "moments.pt",
            "state000002.pt": "rest.pt",
        },
    ],
)
def test_a_renamed_checkpoint_is_known_by_its_content(renamed, run, four):
    for old, new in renamed.items():
        (run / old).rename(run / new)
    done = here(TRAIN, "--resume", str(run / "best.pt"), "--max_steps", "4")
    assert "best.pt: 2 steps done" in done.stdout
    assert_same(weights(run, 4), four)


@pytest.mark.parametrize("flag", ["--resume", "--resume_checkpoint"])
@pytest.mark.parametrize(
    "name, words",
    [
        ("lonely/best.pt", "no state file beside it knows it by its content"),
        ("ema_0.5_000002.pt", "holds ema_0.5 of step 2, not the weights"),
        ("none.pt", "there is no such file"),
        ("lonely/model000002.pt", "opt000002.pt"),
    ],
)
def test_what_cannot_be_identified_is_explained_by_the_flag_s_name(flag, name, words, images, run):
    (run / "lonely").mkdir()
    for copy in ("best.pt", "model000002.pt"):
        shutil.copy(run / "model000002.pt", run / "lonely" / copy)
    out = run.parent / "out"
    done = train(images, out, flag, str(run / name), code=2)
    assert (
        one_line(done.stderr)
        and words in done.stderr
        and done.stderr.startswith(f"error: {flag} {run / name}")
    ), done.stderr
    assert not out.exists()


# ---- classes ----


@pytest.fixture(scope="module")
def two_classes(images, tmp_path_factory):
    """A run that was not told how many classes there are."""
    out = tmp_path_factory.mktemp("runs") / "classes"
    train(
        images,
        out,
        "--class_cond",
        "True",
        "--sample_interval",
        "2",
        "--sample_count",
        "4",
        "--sample_respacing",
        "2",
    )
    return out


def test_as_many_classes_as_the_images_have(two_classes):
    assert (
        torch.load(two_classes / "model000002.pt", weights_only=True)["label_emb.weight"].shape[0]
        == 2
    )
    saved = yaml.safe_load((two_classes / "config.yaml").read_text())
    assert saved["model"]["num_classes"] == 2 and saved["data"]["classes"] == ["cat", "dog"]
    assert torch.load(two_classes / "state000002.pt", weights_only=True)["data"]["classes"] == [
        "cat",
        "dog",
    ]


def test_names_go_below_the_pictures_and_into_settings(two_classes, tmp_path):
    sample(
        two_classes / "model000002.pt",
        tmp_path / "named",
        "--num_samples",
        "2",
        "--class_ids",
        "dog",
    )
    settings = yaml.safe_load((tmp_path / "named" / "settings.yaml").read_text())
    assert settings["classes"] == ["cat", "dog"]
    with np.load(tmp_path / "named" / "samples_2x8x8x1.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [1, 1]
    save_grid(images, tmp_path / "wanted.png", captions=["dog", "dog"])
    assert (tmp_path / "named" / "grid.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()
    shown = np.asarray(Image.open(two_classes / "samples_000002.png"))
    labels = draw_labels(0, list(range(4)), [0, 1]).tolist()
    save_grid(
        np.zeros((4, 8, 8, 1), np.uint8),
        tmp_path / "names.png",
        captions=[("cat", "dog")[y] for y in labels],
    )
    below = np.asarray(Image.open(tmp_path / "names.png"))
    assert below.shape == shown.shape and (below[66:78] == shown[66:78]).all(), (
        "the names between the rows of a preview"
    )


def test_a_name_that_no_class_has(two_classes, tmp_path):
    done = sample(two_classes / "model000002.pt", tmp_path / "out", "--class_ids", "0,cow", code=2)
    assert one_line(done.stderr) and "or names of its classes (cat, dog)" in done.stderr


def test_the_config_and_the_command_line_say_how_many_classes(images, tmp_path):
    for name, more in (
        ("flag", ["--num_classes", "5"]),
        ("file", ["--config", str(tmp_path / "c.yaml")]),
    ):
        (tmp_path / "c.yaml").write_text("model: {num_classes: 5}\n")
        train(images, tmp_path / name, "--class_cond", "True", *more, "--max_steps", "1")
        assert (
            torch.load(tmp_path / name / "model000001.pt", weights_only=True)[
                "label_emb.weight"
            ].shape[0]
            == 5
        )
    done = sample(
        tmp_path / "flag" / "model000001.pt",
        tmp_path / "samples",
        "--num_samples",
        "32",
        "--batch_size",
        "32",
    )
    assert (
        "note: the network has rows for 5 classes, the training images were of 2: only these are "
        "sampled" in done.stdout
    )
    with np.load(tmp_path / "samples" / "samples_32x8x8x1.npz") as file:
        assert set(file["arr_1"].tolist()) == {0, 1}
    done = sample(tmp_path / "flag" / "model000001.pt", tmp_path / "fourth", "--class_ids", "1,3")
    assert "it has never seen class 3" in done.stdout


@pytest.mark.parametrize("how", ["auto", "alone"])
def test_a_run_begun_with_the_old_default_of_1000_goes_on(how, images, tmp_path):
    """Earlier versions gave a network 1000 rows where nobody said how many: the same command still
    continues it, exactly.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    told = ["--class_cond", "True", "--num_classes", "1000"]
    train(images, whole, *told)
    train(images, parts, *told, "--max_steps", "1")
    if how == "auto":
        train(images, parts, "--class_cond", "True", "--resume", "auto")
    else:
        here(TRAIN, "--resume", str(parts), "--max_steps", "2")
    assert_same(weights(whole, 2), weights(parts, 2))


def test_a_classifier_counts_its_classes_too(images, run, tmp_path):
    """Also with the config of an unconditional model, in which num_classes means nothing."""
    assert "num_classes" not in yaml.safe_load((run / "config.yaml").read_text())["model"]
    here(
        CLASSIFY,
        "--config",
        str(run / "config.yaml"),
        "--data_dir",
        images,
        "--classifier_width",
        "32",
        "--classifier_depth",
        "1",
        "--classifier_attention_resolutions",
        "4",
        "--iterations",
        "1",
        "--out_dir",
        str(tmp_path / "classifier"),
    )
    state = torch.load(tmp_path / "classifier" / "model000001.pt", weights_only=True)
    assert state["out.2.c_proj.weight"].shape[0] == 2
    guided = here(
        str(ROOT / "scripts" / "classifier_sample.py"),
        "--model_path",
        str(run / "model000002.pt"),
        "--classifier_path",
        str(tmp_path / "classifier" / "model000001.pt"),
        "--num_samples",
        "2",
        "--timestep_respacing",
        "2",
        "--out_dir",
        str(tmp_path / "samples"),
    )
    assert guided.returncode == 0
    assert yaml.safe_load((tmp_path / "samples" / "settings.yaml").read_text())["classes"] == [
        "cat",
        "dog",
    ]


def test_other_classes_than_before_are_pointed_out(images, two_classes, tmp_path):
    run = Path(shutil.copytree(two_classes, tmp_path / "run"))
    others = tmp_path / "others"
    shutil.copytree(images, others)
    (others / "cat").rename(others / "cow")
    done = here(TRAIN, "--resume", str(run), "--max_steps", "3", "--data_dir", str(others))
    assert (
        "warning: label 0 is class 'cow' of the training data, before it was 'cat'" in done.stdout
    )


@pytest.mark.parametrize("log", [outputs.CsvFile, outputs.JsonLines])
def test_a_log_that_cannot_be_written_saves_first(images, tmp_path, monkeypatch, log):
    """The disk is full for logs from the second row on."""
    write, rows = log.write_values, []

    def full(self, values):
        rows.append(values)
        if len(rows) == 2:
            self._file = open("/dev/full", "w")
        write(self, values)

    monkeypatch.setattr(log, "write_values", full)
    done = train(images, tmp_path, "--max_steps", "9", "--log_interval", "3", code=2)
    assert one_line(done.stderr) and "the checkpoint of step 4 is saved: make room" in done.stderr
    assert "progress." in done.stderr and "No space left on device" in done.stderr
    assert complete_steps(tmp_path) == [4]
    monkeypatch.undo()
    train(images, tmp_path, "--max_steps", "9", "--log_interval", "3", "--resume", "auto")
    assert complete_steps(tmp_path) == [4, 9]
