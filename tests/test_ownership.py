"""One owner for each folder: two of everything at once are refused or take turns, in real processes;
what a kill leaves behind is removed.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import numpy as np
import pytest
from test_run_folders import TINY, flags

from guided_diffusion_ip import ownership
from guided_diffusion_ip.data.npz_io import write_npz
from guided_diffusion_ip.files import remove_temporaries
from guided_diffusion_ip.ownership import Held, owning, owning_alone
from guided_diffusion_ip.preparation.writers import write_image_npz
from guided_diffusion_ip.runs import shards as shards_module
from guided_diffusion_ip.runs.shards import ShardFolder

OWN = """
import sys, time
from guided_diffusion_ip.ownership import owning_alone
with owning_alone(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process, which owns the folder "held"."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWN, str(tmp_path / "held")], stdout=subprocess.PIPE, cwd=launch.ROOT
    )
    assert process.stdout and process.stdout.readline() == b"mine\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_comer_is_told_who_holds_the_folder(owner, tmp_path):
    words = rf"held is being written by process {owner.pid} on .*: wait for it, stop it, or give"
    with pytest.raises(Held, match=words):
        with owning(str(tmp_path / "held")):
            pass
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with owning(str(tmp_path / "held")):
        pass
    assert not (tmp_path / "held" / ".lock").exists()


def test_the_owner_enters_again_and_leaves_nothing(tmp_path):
    folder = str(tmp_path / "a" / "b")
    with owning(folder), owning(os.path.join(folder, ".", "")):
        assert os.path.exists(os.path.join(folder, ".lock"))
    assert os.listdir(tmp_path) == []


def test_what_has_come_into_it_stays(tmp_path):
    with owning(str(tmp_path / "a" / "b")):
        (tmp_path / "a" / "b" / "result").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["result"]


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    with owning_alone(str(tmp_path / "held")):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
    with owning_alone(str(tmp_path / "held")):
        pass
    child.kill()
    child.join()


def test_where_a_file_system_has_no_locks(owner, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(ownership.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership.fcntl, "flock", unsupported)
    monkeypatch.setattr(ownership, "_GRACE_S", 1.0)
    folder = tmp_path / "net"
    with owning_alone(str(folder)):
        assert (folder / ".lock.exclusive").read_text().startswith(f"process {os.getpid()} on ")
    assert not folder.exists(), "nothing is left"
    folder.mkdir()
    left = folder / ".lock.exclusive"
    left.write_text(f"process {owner.pid} on another-machine (image_sample.py, since long)")
    with pytest.raises(Held, match="on another-machine.*if that is gone, remove .*.lock.exclusive"):
        with owning_alone(str(folder)):
            pass
    left.write_text("")  # made a moment ago, by a process that has yet to say who it is
    with pytest.raises(Held, match="another process"):
        with owning_alone(str(folder)):
            pass
    assert left.exists()
    left.write_text(f"process {owner.pid} on {ownership.socket.gethostname()} (x.py, since long)")
    with pytest.raises(Held, match=f"process {owner.pid}"):
        with owning_alone(str(folder)):
            pass
    owner.kill()
    owner.wait()
    with owning_alone(str(folder)):
        pass


def shard(folder, start, stop):
    folder.write(start, {"arr_0": np.arange(start, stop, dtype=np.uint8)})


def test_overlapping_shards_are_an_error(tmp_path):
    folder = ShardFolder(str(tmp_path / "shards"), 8)
    for start, stop in ((0, 4), (0, 3), (3, 6), (4, 8)):
        shard(folder, start, stop)
    with pytest.raises(ValueError, match="both hold image 0: two runs have written there at once"):
        folder.merge(str(tmp_path / "all.npz"))
    assert not (tmp_path / "all.npz").exists() and len(folder.present()) == 4
    for start, stop in ((0, 3), (3, 6)):
        os.remove(folder._file((start, stop)))
    folder.merge(str(tmp_path / "all.npz"))
    with np.load(tmp_path / "all.npz") as npz:
        assert npz["arr_0"].tolist() == list(range(8))


def test_shards_of_another_number_of_images_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "LISTING_S", 0.0)
    folder = ShardFolder(str(tmp_path / "shards"), 4)
    shard(folder, 0, 8)
    with pytest.raises(ValueError, match="beyond the 4 of this run"):
        folder.files()


def test_temporaries_of_killed_processes_go_and_others_stay(tmp_path):
    write_npz(str(tmp_path / "x.npz"), {"a": np.zeros(1)})
    for name in (".x.npz.abcd1234.tmp", ".evaluation.json.abcd1234.tmp", ".other.tmp", "y.tmp"):
        (tmp_path / name).touch()
    remove_temporaries(str(tmp_path), "(?!evaluation).*")
    left = {".evaluation.json.abcd1234.tmp", ".other.tmp", "x.npz", "y.tmp"}
    assert set(os.listdir(tmp_path)) == left


def test_two_preparations_of_one_file(tmp_path):
    """The second comes while the first is half-way."""

    def images():
        yield np.zeros((2, 2, 3), dtype=np.uint8)
        code = (
            "import sys, numpy as np\n"
            "from guided_diffusion_ip.preparation.writers import write_image_npz\n"
            "try:\n"
            "    write_image_npz(sys.argv[1], [np.ones((2, 2, 3), np.uint8)], (1, 2, 2, 3))\n"
            "except ValueError as error:\n"
            "    print(error)\n"
        )
        second = launch.run([sys.executable, "-c", code, str(tmp_path / "x.npz")])
        assert f"written by process {os.getpid()} on" in second.stdout, second.stderr
        yield np.zeros((2, 2, 3), dtype=np.uint8)

    write_image_npz(str(tmp_path / "x.npz"), images(), (2, 2, 2, 3))
    with np.load(tmp_path / "x.npz") as npz:
        assert npz["arr_0"].sum() == 0
    assert os.listdir(tmp_path) == ["x.npz"]


# ---- two of everything at once, from the command line ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run of two steps, and its images."""
    place = tmp_path_factory.mktemp("base")
    rng = np.random.default_rng(0)
    images = place / "images.npz"
    np.savez(images, arr_0=rng.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8))
    done = launch.run([sys.executable, *training(images, place / "run", 2)])
    assert done.returncode == 0, done.stderr
    return images, place / "run"


def training(images, out, steps, **more):
    return [
        "scripts/image_train.py",
        *flags(**TINY, data_dir=images, out_dir=out, max_steps=steps, batch_size=4),
        *flags(ema_rate=0.9, resume="auto", log_interval=10, **more),
    ]


def sampling(run, out, batch_size):
    return [
        "scripts/image_sample.py",
        *flags(model_path=run / "ema_0.9_000002.pt", num_samples=24, timestep_respacing=12),
        *flags(out_dir=out, batch_size=batch_size),
    ]


def both(first, second, start=(), apart=0.0):
    """Two commands at once, or `apart` seconds apart: (exit code, what it said) of each."""
    program = (str(Path(sys.executable).parent / start[0]), *start[1:]) if start else ()
    processes = []
    for command in (first, second):
        processes.append(
            subprocess.Popen(
                [*(program or [sys.executable]), *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=launch.ROOT,
                env=launch.clean_env(),
            )
        )
        time.sleep(apart)
    said = [process.communicate(timeout=120)[0] for process in processes]
    return list(zip([process.returncode for process in processes], said))


def refused_or_right(outcomes, launcher=False):
    """How many were done; the others must have been refused in one line (torchrun adds its own)."""
    for code, said in outcomes:
        assert code in (0, 1 if launcher else 2), said
        assert launcher or "Traceback" not in said
        if code:
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and "is being written by process" in lines[0], said
    return [code for code, _ in outcomes].count(0)


@pytest.mark.parametrize("sizes", [(4, 3), (4, 4)])
def test_two_samplings_in_one_folder(run, tmp_path, sizes):
    images, folder = run
    alone = launch.run([sys.executable, *sampling(folder, tmp_path / "alone", 4)])
    assert alone.returncode == 0, alone.stderr
    commands = [sampling(folder, tmp_path / "both", size) for size in sizes]
    assert refused_or_right(both(*commands)) >= 1
    with (
        np.load(tmp_path / "alone" / "samples_24x8x8x1.npz") as expected,
        np.load(tmp_path / "both" / "samples_24x8x8x1.npz") as found,
    ):
        difference = expected["arr_0"].astype(int) - found["arr_0"]
        assert abs(difference).max() <= 1, "other batch sizes round otherwise"
    assert not [name for name in os.listdir(tmp_path / "both") if name.startswith(".")]


def test_two_trainings_in_one_folder(run, tmp_path):
    images, _ = run
    outcomes = both(*(training(images, tmp_path / "both", 30, seed=seed) for seed in (1, 2)))
    done = refused_or_right(outcomes)
    if done == 2:  # one was over before the other began, which then found another seed
        pytest.fail(str(outcomes))
    files = set(os.listdir(tmp_path / "both"))
    assert {"model000030.pt", "ema_0.9_000030.pt", "state000030.pt", "progress.csv"} <= files
    log = Path(tmp_path / "both" / "progress.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == ["step", "1", "10", "20", "30"]


def test_a_leftover_shard_of_a_kill_does_not_matter(run, tmp_path):
    images, folder = run
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    (out / "shards" / ".shard-00000000-00000002.npz.abcd1234.tmp").touch()
    (out / ".samples_24x8x8x1.npz.abcd1234.tmp").touch()
    (out / "png").mkdir()
    (out / "png" / ".000000.png.abcd1234.tmp").touch()
    command = [*sampling(folder, out, 24), "--save_png", "True"]
    done = launch.run([sys.executable, *command])
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(out)) == ["grid.png", "png", "samples_24x8x8x1.npz", "settings.yaml"]
    assert len(os.listdir(out / "png")) == 24


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(4))
@pytest.mark.parametrize("kind", ["training", "same batch size", "other batch size", "two ranks"])
def test_many_pairs(run, tmp_path, kind, trial):
    """Pairs at once, with other distances in time: right results or a clear refusal each time."""
    images, folder = run
    out, start = tmp_path / "both", ()
    if kind == "training":
        commands = [training(images, out, 40, seed=seed) for seed in (1, 2)]
    else:
        sizes = (5, 3) if kind == "other batch size" else (4, 4)
        commands = [sampling(folder, out, size) for size in sizes]
    if kind == "two ranks":
        start = ("torchrun", "--standalone", "--nproc_per_node", "2")
    done = refused_or_right(both(*commands, start=start, apart=trial * 0.7), bool(start))
    if kind == "training":
        states = {name for name in os.listdir(out) if name.startswith("state")}
        assert "state000040.pt" in states
        again = launch.run([sys.executable, *training(images, out, 44, seed=1)])
        again = again if not again.returncode else None
        other = launch.run([sys.executable, *training(images, out, 48, seed=2)])
        assert again or other.returncode == 0, "what is there can be continued"
        return
    assert done >= 1
    with np.load(out / "samples_24x8x8x1.npz") as found:
        pictures = found["arr_0"]
    alone = launch.run([sys.executable, *sampling(folder, tmp_path / "alone", 4)])
    assert alone.returncode == 0, alone.stderr
    with np.load(tmp_path / "alone" / "samples_24x8x8x1.npz") as expected:
        assert abs(expected["arr_0"].astype(int) - pictures).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(4))
def test_two_sweeps_at_once(run, tmp_path, trial):
    images, folder = run
    plan = tmp_path / "sweep.yaml"
    plan.write_text(
        f"checkpoints: {{a: {folder / 'ema_0.9_000002.pt'}}}\nreference: {images}\n"
        "features: pixels\nmetrics: [kid]\nnum_samples: 16\nsteps: [3, 4]\n"
    )
    command = ["scripts/sweep.py", str(plan), "--out_dir", str(tmp_path / "out")]
    outcomes = both(command, command, apart=trial * 0.7)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert (tmp_path / "out" / "table.md").read_text().count("|") > 4
    assert len(os.listdir(tmp_path / "out" / "cells")) == 2
