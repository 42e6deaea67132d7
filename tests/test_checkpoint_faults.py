"""Disks that are full, read-only or lie, and files that change: what is there stays usable, and the
message says which it is.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import launch
import pytest
import torch
from test_guards import close_logs, images, said  # noqa: F401 (fixtures)
from test_resume import TRAIN, alone, command, make_loop, same
from test_training_evaluation import here

from guided_diffusion_ip import files
from guided_diffusion_ip.dist_util import load_state_dict
from guided_diffusion_ip.training import checkpoint
from guided_diffusion_ip.training.checkpoint import SavePolicy, check_set, complete_steps, save_set


def assert_only_complete_sets(folder, steps):
    """These sets, each readable with hashes that agree, and nothing else of a save."""
    assert complete_steps(str(folder)) == steps
    parts = {
        f"{part}{step:06d}.pt" for part in ("model", "ema_0.9_", "opt", "state") for step in steps
    }
    assert {name for name in os.listdir(folder) if ".pt" in name} == parts
    for step in steps:
        load_set(os.path.join(folder, f"model{step:06d}.pt"), ["ema_0.9"])


def load_set(path, ema_names):
    paths, state = check_set(path, ema_names)
    return {part: load_state_dict(path) for part, path in paths.items()}, state


def assert_save_failed(returncode, err, folder, why, step, last):
    assert returncode == 2, err
    line = err.strip().splitlines()[-1]
    assert (
        line.startswith(f"error: the checkpoint of step {step} could not be saved in {folder}: ")
        and why in line
    ), err
    assert (
        f"The last complete one is {last}; with the cause removed, the same command with --resume "
        "auto continues" in line
    )
    assert "Traceback" not in err


# ---- a full disk ----


def test_a_file_that_may_not_grow_leaves_the_last_checkpoint(images, tmp_path):  # noqa: F811
    """The optimizer's file, of twice the model's size, hits a limit of the system after the model's
    has been written.
    """
    run = tmp_path / "run"
    here(TRAIN, *command(images, run, "--max_steps", "2"))
    between = (os.path.getsize(run / "model000002.pt") + os.path.getsize(run / "opt000002.pt")) // 2
    arguments = command(images, run, "--max_steps", "5", "--save_interval", "3", "--resume", "auto")
    done = launch.run(
        [
            "bash",
            "-c",
            f'ulimit -f {between // 1024}; exec "$@"',
            "_",
            sys.executable,
            TRAIN,
            *arguments,
        ]
    )
    assert_save_failed(
        done.returncode, done.stderr, run, "File too large", 3, run / "model000002.pt"
    )
    assert_only_complete_sets(run, [2])
    here(TRAIN, *command(images, run, "--max_steps", "3", "--resume", "auto"))
    assert_only_complete_sets(run, [2, 3])


@pytest.fixture
def small_disk(tmp_path):
    """An empty disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not let the tests mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_all_earlier_checkpoints(processes, images, small_disk):  # noqa: F811
    run = small_disk / "run"
    arguments = [TRAIN, *command(images, run, "--max_steps", "50", "--save_interval", "1")]
    done = (
        launch.run([sys.executable, *arguments])
        if processes == 1
        else launch.torchrun(2, arguments)
    )
    steps = complete_steps(str(run))
    assert steps and steps[-1] < 50
    if processes == 1:
        assert_save_failed(
            done.returncode,
            done.stderr,
            run,
            "No space left on device",
            steps[-1] + 1,
            run / f"model{steps[-1]:06d}.pt",
        )
    else:
        assert (
            done.returncode
            and "could not be saved" in done.stderr
            and "No space left on device" in done.stderr
        )
        assert "guided_diffusion_ip/" not in done.stderr.replace(str(run), ""), done.stderr
    assert_only_complete_sets(run, steps)


# ---- a read-only folder ----


@pytest.fixture
def locked():
    """locked(folder): nothing can be created in it or removed from it any more."""
    undo = []

    def lock(folder):
        if os.geteuid():
            os.chmod(folder, 0o555)
            undo.append(lambda: os.chmod(folder, 0o755))
        else:  # permissions do not bind root
            if (
                not shutil.which("chattr")
                or subprocess.run(["chattr", "+i", folder], capture_output=True).returncode
            ):
                pytest.skip("root, and a file system without chattr +i")
            undo.append(lambda: subprocess.run(["chattr", "-i", folder], check=True))

    yield lock
    for unlock in undo:
        unlock()


def test_a_folder_that_becomes_read_only_keeps_its_checkpoints(images, tmp_path, locked):  # noqa: F811
    run = tmp_path / "run"
    process = alone(
        images, run, ["--max_steps", "3000", "--save_interval", "60", "--save_minutes", "0"]
    )
    while not complete_steps(str(run)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    locked(str(run))
    out, _ = process.communicate(timeout=60)
    steps = complete_steps(str(run))
    step = steps[-1] + 60
    assert_save_failed(
        process.returncode,
        out,
        run,
        "not permitted" if os.geteuid() == 0 else "denied",
        step,
        run / f"model{steps[-1]:06d}.pt",
    )
    assert_only_complete_sets(run, steps)


def test_a_folder_that_is_read_only_from_the_start_is_one_line(images, tmp_path, locked):  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    locked(str(run))
    done = here(TRAIN, *command(images, run, "--max_steps", "1"), code=2)
    assert str(run) in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


# ---- disks that lie, files that change ----


def test_what_reads_back_differently_is_no_checkpoint(images, tmp_path, monkeypatch):  # noqa: F811
    loop = make_loop(images, tmp_path, 3, saving=SavePolicy(1, keep_last=1))
    loop.run_step(*next(loop.data))
    loop.save()
    real = files.sha256
    monkeypatch.setattr(
        checkpoint.files,
        "sha256",
        lambda path: "0" * 64 if "opt" in os.path.basename(path) else real(path),
    )
    loop.run_step(*next(loop.data))
    with pytest.raises(
        ValueError,
        match="opt000002.pt reads back differently.*The last complete one is .*model000001.pt",
    ):
        loop.save()
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "ema_0.99_000001.pt",
        "ema_0.9_000001.pt",
        "model000001.pt",
        "opt000001.pt",
        "state000001.pt",
    ]


@pytest.mark.parametrize("part", ["model", "opt", "state"])
def test_no_changed_bit_goes_unnoticed(part, tmp_path):
    """torch.load by itself takes nearly all of these for good."""
    parts = {"model": {"w": torch.rand(40)}, "opt": {"state": {0: {"step": torch.tensor(3.0)}}}}
    state = {
        "step": 3,
        "sampler": {"history": torch.rand(50, 10, dtype=torch.float64), "seen": torch.arange(50)},
        "scaler": {"scale": 65536.0},
        "settings": {"train": {"lr": 1e-4, "ema_rate": "0.9"}},
        "ema_updates": [3],
        "pending": {"fid@8": (1.25, 1)},
        "none": None,
        "empty": torch.zeros(0),
    }
    path = Path(save_set(str(tmp_path), 3, parts, state))
    loaded, known = load_set(str(path), [])
    assert same(loaded, parts) and same({k: v for k, v in known.items() if k in state}, state)
    victim = tmp_path / f"{part}000003.pt"
    content, rng, unnoticed = victim.read_bytes(), random.Random(0), 0
    for _ in range(100):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        victim.write_bytes(changed)
        try:
            again, state_again = load_set(str(path), [])
        except ValueError as error:
            assert victim.name in str(error) or "missing" in str(error), error
        else:
            unnoticed += not (same(again, parts) and same(state_again, known))
    assert unnoticed == 0
    for n in (0, 1, len(content) // 2, len(content) - 1):
        victim.write_bytes(content[:n])
        with pytest.raises(ValueError, match=victim.name):
            load_set(str(path), [])


# ---- which ones go ----


def test_a_new_run_in_an_old_folder_keeps_what_it_saves(images, tmp_path):  # noqa: F811
    """Higher steps of an earlier run must not push the new run's checkpoints out."""
    here(TRAIN, *command(images, tmp_path, "--max_steps", "6", "--save_interval", "3"))
    done = here(
        TRAIN,
        *command(
            images,
            tmp_path,
            "--max_steps",
            "2",
            "--save_interval",
            "1",
            "--keep_last",
            "1",
            "--lr",
            "0",
            "--overwrite",
            "True",
        ),
    )
    assert complete_steps(str(tmp_path)) == [2, 3, 6]
    assert "holds checkpoints of later steps (3, 6) than this run starts from (0)" in done.stdout
    group = torch.load(tmp_path / "opt000002.pt", weights_only=True)["param_groups"][0]
    assert group["lr"] == 0, "step 2 is not the new run's"


def test_back_to_an_older_checkpoint_and_on(images, tmp_path):  # noqa: F811
    loop = make_loop(images, tmp_path, 4, saving=SavePolicy(1))
    loop.run_loop()
    make_loop(
        images,
        tmp_path,
        3,
        resume=str(tmp_path / "model000002.pt"),
        saving=SavePolicy(1, keep_last=2),
    ).run_loop()
    assert complete_steps(str(tmp_path)) == [2, 3, 4]
    assert "removed step 1" in said(tmp_path)


def test_a_second_ctrl_c_in_a_save_is_no_fault_of_the_disk(tmp_path, monkeypatch):
    """torch.save makes a RuntimeError of what comes up while it writes."""

    class Interrupted(checkpoint._Hashing):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == 3:
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(checkpoint, "_Hashing", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_set(str(tmp_path), 3, {"model": {"weight": torch.ones(3)}}, {"step": 3})
    assert not os.listdir(tmp_path)
