"""Interrupted and continued equals uninterrupted, bit for bit: in process, in real processes,
killed at any moment.
"""

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import numpy as np
import pytest
import torch

from guided_diffusion_ip import logger
from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.script_util import create_model_and_diffusion
from guided_diffusion_ip.settings.flags import SCRIPTS
from guided_diffusion_ip.training import resume
from guided_diffusion_ip.training.checkpoint import SavePolicy, complete_steps, newest
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.stopping import Limits
from guided_diffusion_ip.training.timestep_samplers import create_named_schedule_sampler
from guided_diffusion_ip.training.train_loop import TrainLoop

ROOT = Path(__file__).resolve().parent.parent
TRAIN = str(ROOT / "scripts" / "image_train.py")
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
    rescale_learned_sigmas=True,
    input_perturbation=0.1,
)
FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
TIMES = {"images/s", "data_wait_%", "eta"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    np.savez(
        folder / "images.npz",
        arr_0=np.random.default_rng(0).integers(0, 256, (24, 10, 10, 1), dtype=np.uint8),
    )
    return str(folder / "images.npz")


def make_loop(
    images,
    out,
    steps,
    *,
    sampler="uniform",
    workers=0,
    random_crop=True,
    layout=torch.contiguous_format,
    hooks=(),
    **options,
):
    logger.configure(str(out), format_strs=["log", "csv"], resume_step=None)
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**TINY, dropout=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(
                0.02 * torch.randn(p.shape)
            )  # zero-initialised outputs would hide most gradients
    model.to(memory_format=layout)
    data = load_data(
        data_dir=images,
        batch_size=4,
        image_size=8,
        channels=1,
        random_crop=random_crop,
        num_workers=workers,
    )
    options = {"limits": Limits(steps), "log_interval": 4, "saving": SavePolicy(10**6), **options}
    settings = TrainSettings(batch_size=4, lr=1e-3, ema_rates=(0.9, 0.99), **options)
    sampler = create_named_schedule_sampler(sampler, diffusion)
    return TrainLoop(model, diffusion, data, settings, schedule_sampler=sampler, hooks=hooks)


def same(a, b):
    """Are two nested containers of tensors and numbers equal bit for bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b, step, files=("model", "ema_0.9_", "ema_0.99_", "opt")):
    for name in files:
        one, two = (
            torch.load(Path(folder) / f"{name}{step:06d}.pt", weights_only=True)
            for folder in (a, b)
        )
        assert same(one, two), f"{name} differs"
    one, two = (
        torch.load(Path(folder) / f"state{step:06d}.pt", weights_only=True) for folder in (a, b)
    )
    for key in ("step", "sampler", "scaler", "statistics", "skipped", "ema_updates"):
        assert same(one[key], two[key]), key


def rows(folder):
    with open(Path(folder) / "progress.csv", newline="") as file:
        return [
            {key: value for key, value in row.items() if key not in TIMES}
            for row in csv.DictReader(file)
        ]


CASES = [
    dict(),
    dict(sampler="loss-second-moment"),
    dict(precision="bf16"),
    dict(precision="fp16"),
    dict(microbatch=3),
    dict(workers=2),
    dict(ema_warmup=True),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()) or "plain"
)
def test_n_and_n_steps_equal_2n(case, images, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make_loop(images, whole, 10, **case).run_loop()
    make_loop(
        images, parts, 5, **case
    ).run_loop()  # between two log lines: unfinished means must survive too
    make_loop(images, parts, 10, resume=str(parts / "model000005.pt"), **case).run_loop()
    assert_same_run(whole, parts, 10)
    by_step = {row["step"]: row for row in rows(parts)}
    assert all(by_step[row["step"]] == row for row in rows(whole)), "logged losses differ"


def train(images, out, *more, check=True, **kwargs):
    done = launch.run([sys.executable, TRAIN, *command(images, out, *more)], timeout=120, **kwargs)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def command(images, out, *more):
    return [
        *FLAGS,
        "--data_dir",
        images,
        "--out_dir",
        str(out),
        "--batch_size",
        "4",
        "--ema_rate",
        "0.9",
        "--log_interval",
        "2",
        "--dropout",
        "0.1",
        "--schedule_sampler",
        "loss-second-moment",
        "--random_crop",
        "True",
        "--num_workers",
        "1",
        *more,
    ]


def killed_and_continued(images, tmp_path, kills, steps, starter):
    """Kill -9 `kills` times at random moments, each time go on with the same command; returns
    (reference, folder, in saves).
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = [
        "--max_steps",
        str(steps),
        "--save_interval",
        "1",
        "--resume",
        "auto",
        "--keep_last",
        "3",
    ]
    starter(images, whole, more).communicate()
    rng, in_save = random.Random(0), 0
    for _ in range(kills):
        process = starter(images, broken, more)
        before = newest(str(broken))
        while newest(str(broken)) == before and process.poll() is None:
            time.sleep(0.005)  # it has come up and saved: from here on, any moment
        time.sleep(rng.random() * 0.3)
        assert process.poll() is None, "it ended before it could be killed: more steps are needed"
        kill_all(broken)
        process.communicate()
        in_save += any(name.endswith(".tmp") for name in os.listdir(broken))
        assert complete_steps(str(broken)), "the last checkpoint is lost"
    out, _ = starter(images, broken, more).communicate()
    assert complete_steps(str(broken))[-1] == steps, out
    return whole, broken, in_save


def kill_all(marker):
    """SIGKILL to every process that has `marker` in its command line: torchrun's ranks are not in
    its process group.
    """
    for pid in [
        int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()
    ]:
        try:
            if str(marker) in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
        except OSError:  # it has ended by itself
            continue


def alone(images, out, more):
    return subprocess.Popen(
        [sys.executable, TRAIN, *command(images, out, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def pair(images, out, more):
    arguments = command(images, out, "--global_batch_size", "4", *more)
    del arguments[arguments.index("--batch_size") : arguments.index("--batch_size") + 2]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            str(launch.free_port()),
            TRAIN,
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    "starter, kills, steps",
    [
        (alone, 2, 60),
        pytest.param(alone, 20, 200, marks=pytest.mark.slow),
        pytest.param(pair, 6, 500, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(
    starter, kills, steps, images, tmp_path
):
    whole, broken, in_save = killed_and_continued(images, tmp_path, kills, steps, starter)
    assert_same_run(whole, broken, steps, ("model", "ema_0.9_", "opt"))
    assert rows(whole) == rows(broken), "the csv of the broken run has other rows"
    assert kills < 20 or in_save, "no kill hit a save: save more often"
    assert not [name for name in os.listdir(broken) if name.endswith(".tmp")]
    assert len(complete_steps(str(broken))) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_end_well(number, images, tmp_path):
    process = alone(
        images, tmp_path / "run", ["--max_steps", "100000", "--save_interval", "100000"]
    )
    while not (tmp_path / "run" / "progress.csv").exists() or len(rows(tmp_path / "run")) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and number.name in out and "--resume auto" in out, out
    step = complete_steps(str(tmp_path / "run"))[-1]
    train(images, tmp_path / "run", "--max_steps", str(step + 2), "--resume", "auto")
    train(images, tmp_path / "whole", "--max_steps", str(step + 2))
    assert_same_run(tmp_path / "whole", tmp_path / "run", step + 2, ("model", "ema_0.9_", "opt"))


def wait_until_signals_are_noted(process):
    """Before it, Python has not come to the script's first line; after it, imports take seconds."""
    bits = 1 << signal.SIGUSR1 - 1 | 1 << signal.SIGTERM - 1
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if int(status.split("SigCgt:")[1].split()[0], 16) & bits == bits:
            break
        if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text():
            break
        time.sleep(0.002)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_pytorch_is_imported_loses_nothing(number, images, tmp_path):
    process = alone(images, tmp_path / "run", ["--max_steps", "100000"])
    with contextlib.suppress(AssertionError):  # without a handler it is killed: to be seen below
        wait_until_signals_are_noted(process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, (process.returncode, out)
    assert f"{number.name}: stopped after step 0" in out and "--resume auto" in out, out
    train(images, tmp_path / "run", "--max_steps", "2", "--resume", "auto")
    train(images, tmp_path / "whole", "--max_steps", "2")
    assert_same_run(tmp_path / "whole", tmp_path / "run", 2, ("model", "ema_0.9_", "opt"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


def test_a_warning_after_training_has_ended_is_no_failure(images, tmp_path):
    process = alone(images, tmp_path / "run", ["--max_steps", "1"])
    for line in process.stdout:
        if "training ended" in line:
            break
    while process.poll() is None:  # also while Python ends, which has no handlers any more
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
    assert process.wait() == 0, process.stdout.read()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into Linux's /proc")
@pytest.mark.parametrize("name", ["image_train", "super_res_train", "classifier_train"])
def test_training_scripts_note_signals_first(name):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py")],
        stderr=subprocess.DEVNULL,
        env=launch.clean_env(),
    )
    try:
        wait_until_signals_are_noted(process)
    finally:
        process.kill()
        process.wait()


def test_a_signal_does_not_wait_for_ranks_that_are_missing(images, tmp_path):
    """SIGTERM ends a rank that waits for others: nothing has begun. SIGUSR1 is noted for later."""
    process = subprocess.Popen(
        [sys.executable, TRAIN, *command(images, tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **launch.clean_env(),
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(launch.free_port()),
            "GUIDED_DIFFUSION_IP_START_TIMEOUT": "25",
        },
    )
    for line in process.stderr:
        if "has been waiting for rank 1" in line:
            process.send_signal(signal.SIGUSR1)
            time.sleep(1)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM, (process.returncode, errors)


def test_one_rank_told_to_stop_stops_both(images, tmp_path):
    done = launch.torchrun(
        2,
        [
            TRAIN,
            *command(images, tmp_path / "run", "--max_hours", "0.002", "--save_interval", "100000"),
        ],
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--max_hours 0.002 are over" in done.stdout and complete_steps(str(tmp_path / "run"))


def test_other_numbers_of_processes_continue(images, tmp_path):
    run = tmp_path / "run"
    train(images, run, "--max_steps", "3", "--global_batch_size", "4")
    done = launch.torchrun(
        2,
        [
            TRAIN,
            *[
                w
                for w in command(
                    images, run, "--max_steps", "6", "--resume", "auto", "--global_batch_size", "4"
                )
            ],
        ],
        timeout=120,
    )
    assert done.returncode == 2 or "contradict" in done.stderr  # --batch_size 4 for each of two
    arguments = command(
        images, run, "--max_steps", "6", "--resume", "auto", "--global_batch_size", "4"
    )
    at = arguments.index("--batch_size")
    done = launch.torchrun(2, [TRAIN, *arguments[:at], *arguments[at + 2 :]], timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 processes before, 2 now" in done.stdout and "dropout" in done.stdout


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("--seed", "1", "seed is 1, but the run to be continued has 0"),
        ("--batch_size", "2", "global batch is 2"),
        ("--num_channels", "64", "num_channels is 64"),
        ("--ema_rate", "0.5", "ema"),
        ("--noise_schedule", "linear", "noise_schedule"),
        ("--input_perturbation", "0", "input_perturbation"),
        ("--schedule_sampler", "uniform", "schedule_sampler|timestep sampler"),
    ],
)
def test_what_may_not_change_is_an_error_with_both_values(flag, value, words, images, tmp_path):
    run = tmp_path / "run"
    if not run.exists():
        train(images, run, "--max_steps", "1")
    done = train(images, run, "--max_steps", "2", "--resume", "auto", flag, value, check=False)
    assert done.returncode == 2 and any(word in done.stderr for word in words.split("|")), (
        done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert complete_steps(str(run)) == [1]


# Those that may change, with a note.
NOTED = {
    "data_dir",
    "microbatch",
    "lr",
    "weight_decay",
    "lr_warmup_steps",
    "lr_anneal_steps",
    "anneal_lr",
    "grad_clip",
    "precision",
    "fp16_scale_growth",
    "random_flip",
    "random_crop",
}


@pytest.mark.parametrize("script", ["image_train", "super_res_train", "classifier_train"])
def test_of_every_flag_it_is_known_whether_it_may_change(script):
    """Each is of one kind and no other; what is listed exists."""
    spec = SCRIPTS[script]
    fixed = {
        flag.name
        for name in resume._FIXED_SECTIONS
        if name in spec.sections
        for flag in spec.of_section(name)
    }
    fixed -= resume._FREE  # speed, in section model
    others = {flag.name for flag in spec.flags()} - fixed
    kinds = (resume._FIXED, resume._FREE, NOTED)
    wrong = {name: count for name in others if (count := sum(name in kind for kind in kinds)) != 1}
    assert not wrong, "neither fixed, free nor noted, or several of these"
    assert not fixed & (resume._FIXED | NOTED)


def test_no_kind_lists_a_flag_that_is_none():
    known = {
        flag.name
        for name in ("image_train", "super_res_train", "classifier_train")
        for flag in SCRIPTS[name].flags()
    }
    assert (resume._FIXED | resume._FREE | NOTED) <= known


def test_what_may_change_is_told(images, tmp_path):
    run = tmp_path / "run"
    train(images, run, "--max_steps", "1")
    done = train(
        images,
        run,
        "--max_steps",
        "2",
        "--resume",
        "auto",
        "--lr",
        "0.01",
        "--num_workers",
        "0",
        "--log_interval",
        "1",
    )
    assert "lr was 0.0001 before, is 0.01" in done.stdout
    group = torch.load(run / "opt000002.pt", weights_only=True)["param_groups"][0]
    assert group["lr"] == 0.01


def test_moments_saved_in_another_layout_stay_with_their_weights(images, tmp_path):
    """A script of one's own may have trained a contiguous model; ours are channels_last, and fused
    AdamW does not look.
    """
    first = make_loop(images, tmp_path / "a", 3)
    first.run_loop()
    second = make_loop(
        images,
        tmp_path / "b",
        3,
        resume=str(tmp_path / "a" / "model000003.pt"),
        layout=torch.channels_last,
    )
    moved = 0
    for a, b in zip(first.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)
        a.grad = torch.randn(a.shape)
        b.grad = torch.empty_like(b).copy_(a.grad)
        moved += a.stride() != b.stride()
    for loop in (first, second):
        loop.opt.step()
    assert moved > 10
    for a, b in zip(first.model.parameters(), second.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_damage_is_named(images, tmp_path):
    run = tmp_path / "run"
    train(images, run, "--max_steps", "2", "--save_interval", "1")
    content = bytearray((run / "opt000002.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "opt000002.pt").write_bytes(content)
    done = train(images, run, "--max_steps", "3", "--resume", "auto", check=False)
    assert done.returncode == 2 and "opt000002.pt is damaged" in done.stderr
    train(images, run, "--max_steps", "3", "--resume", str(run / "model000001.pt"))
    os.remove(run / "ema_0.9_000003.pt")
    done = train(images, run, "--max_steps", "4", "--resume", str(run), check=False)
    assert done.returncode == 2 and "ema_0.9_000003.pt is missing" in done.stderr


def test_old_checkpoints_go_as_told(images, tmp_path):
    make_loop(images, tmp_path, 9, saving=SavePolicy(1, keep_last=2, keep_every=4)).run_loop()
    assert complete_steps(str(tmp_path)) == [4, 8, 9]
    assert sorted(path.name for path in tmp_path.glob("*.pt") if "000004" in path.name) == [
        "ema_0.99_000004.pt",
        "ema_0.9_000004.pt",
        "model000004.pt",
        "opt000004.pt",
        "state000004.pt",
    ]


def test_init_from_takes_what_fits_and_says_so(images, tmp_path):
    train(images, tmp_path / "a", "--max_steps", "2")
    done = train(
        images,
        tmp_path / "b",
        "--max_steps",
        "1",
        "--init_from",
        str(tmp_path / "a" / "ema_0.9_000002.pt"),
        "--lr",
        "0",
    )
    assert "tensors taken" in done.stdout
    a, b = (
        torch.load(path, weights_only=True)
        for path in (tmp_path / "a/ema_0.9_000002.pt", tmp_path / "b/model000001.pt")
    )
    assert same(a, b)
    done = train(
        images,
        tmp_path / "c",
        "--max_steps",
        "1",
        "--init_from",
        str(tmp_path / "a/model000002.pt"),
        "--channel_mult",
        "1,2",
    )
    assert "of another shape, left at their start" in done.stdout
    (tmp_path / "x.pt").write_bytes(b"junk")
    assert (
        train(images, tmp_path / "d", "--init_from", str(tmp_path / "x.pt"), check=False).returncode
        == 2
    )


def test_resume_auto_needs_a_folder_and_starts_where_there_is_nothing(images, tmp_path):
    done = train(images, tmp_path / "new", "--max_steps", "1", "--resume", "auto")
    assert "starting at step 0" in done.stdout
    arguments = [w for w in command(images, "X", "--resume", "auto") if w not in ("--out_dir", "X")]
    done = launch.run([sys.executable, TRAIN, *arguments], cwd=tmp_path)
    assert done.returncode == 2 and "--out_dir" in done.stderr


def test_images_limit_the_run(images, tmp_path):
    make_loop(images, tmp_path, 0, limits=Limits(max_images=10)).run_loop()
    assert complete_steps(str(tmp_path)) == [3]  # 4 images a step
