"""A run that goes wrong stops by itself, says where, and leaves nothing bad behind: in weights,
averages, history or files.
"""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from test_resume import TRAIN, command, make_loop, rows, same

from guided_diffusion_ip import logger
from guided_diffusion_ip.training.banner import warn_about_ema
from guided_diffusion_ip.training.checkpoint import SavePolicy, complete_steps
from guided_diffusion_ip.training.ema import EMA
from guided_diffusion_ip.training.guards import (
    Diverged,
    cheaper,
    check_batch,
    is_out_of_memory,
    memory_advice,
)
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.stopping import Limits, Wishes

ROOT = Path(__file__).resolve().parent.parent
PATHS = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (24, 10, 10, 1), dtype=np.uint8))
    return str(path)


@pytest.fixture(autouse=True)
def close_logs():
    yield
    logger.reset()


class Spoiled:
    """The batches of a stream, with one value replaced in image 1 of those of the given numbers
    (from 1).
    """

    def __init__(self, data, steps, value=math.nan):
        self.data, self.steps, self.value, self.number = data, steps, value, 0

    def __next__(self):
        batch, cond = next(self.data)
        self.number += 1
        if self.number in self.steps:
            batch = batch.clone()
            batch[1, 0, 3, 3] = self.value
        return batch, cond


def said(folder):
    return (Path(folder) / "log.txt").read_text()


def assert_files_finite(folder):
    files = list(Path(folder).glob("*.pt"))
    for path in files:
        check_finite(torch.load(path, weights_only=True), path.name)
    return files


def check_finite(x, where):
    if isinstance(x, torch.Tensor):
        assert torch.isfinite(x.double()).all(), where
    elif isinstance(x, dict):
        for key, value in x.items():
            check_finite(value, f"{where} {key}")
    elif isinstance(x, (list, tuple)):
        for value in x:
            check_finite(value, where)


def snapshot(loop):
    parts = {
        "model": loop.model.state_dict(),
        "emas": [ema.state_dict() for ema in loop.emas],
        "opt": loop.opt.state_dict(),
        "updates": [ema.updates for ema in loop.emas],
        "sampler": loop.schedule_sampler.state_dict(),
        "statistics": loop.statistics.state_dict(),
    }
    return copied(parts)


def copied(x):
    if isinstance(x, torch.Tensor):
        return x.clone()
    if isinstance(x, dict):
        return {key: copied(value) for key, value in x.items()}
    return [copied(value) for value in x] if isinstance(x, (list, tuple)) else x


# ---- not finite ----


def test_nan_in_the_data_ends_the_run_at_once_and_says_where(images, tmp_path):
    loop = make_loop(images, tmp_path, 10, sampler="loss-second-moment", saving=SavePolicy(2))
    loop.data = Spoiled(loop.data, [4])
    with pytest.raises(Diverged) as error:
        loop.run_loop()
    text = str(error.value)
    assert "the loss is not finite at step 4" in text and "the images are not finite" in text
    assert re.search(r"mse, vb at t = \d+ \(quartile q[0-3]; q0 is the clean end\)", text), text
    assert re.search(r"first output that is not finite: input_blocks\.0\S* \(\w+\)", text), text
    assert str(tmp_path / "model000002.pt") in text
    assert complete_steps(str(tmp_path)) == [2] and assert_files_finite(tmp_path)


def test_the_named_timestep_is_that_of_the_bad_image(images, tmp_path):
    loop = make_loop(images, tmp_path, 10)
    loop.data = Spoiled(loop.data, [2])
    with pytest.raises(Diverged) as error:
        loop.run_loop()
    t = int(loop.gradients.draw_t(4, loop.step)[0][1])
    assert f"at t = {t} (quartile q{4 * t // 1000};" in str(error.value)


@pytest.mark.parametrize("precision, steps", [("fp32", 1), ("bf16", 1), ("fp16", 5)])
def test_nan_in_the_weights_ends_the_run_and_is_never_saved(precision, steps, images, tmp_path):
    loop = make_loop(images, tmp_path, 20, precision=precision, max_skipped=5)
    loop.run_step(*next(loop.data))
    loop.save()
    with torch.no_grad():
        loop.model.middle_block[0].in_layers[2].weight[0, 0] = math.nan
    before = snapshot(loop)
    with pytest.raises(Diverged) as error:
        for _ in range(steps):
            loop.run_step(*next(loop.data))
    for words in (
        "the weights middle_block.0.in_layers.2.weight are not finite",
        "mse",
        "quartile q",
        "first output that is not finite: middle_block.0.in_layers.2 (",
        str(tmp_path / "model000001.pt"),
        "--lr",
    ):
        assert words in str(error.value), error.value
    assert ("--precision fp32" in str(error.value)) == (precision != "fp32")
    check_finite([before["emas"], before["opt"], before["sampler"]], "state")
    assert same(
        {k: v for k, v in before.items() if k != "model"},
        {k: v for k, v in snapshot(loop).items() if k != "model"},
    )
    with pytest.raises(
        ValueError,
        match=r"model has values that are not finite in middle_block.0.in_layers.2.weight.*"
        r"The last complete one is .*model000001.pt",
    ):
        loop.step += 1
        loop.save()
    assert complete_steps(str(tmp_path)) == [1] and assert_files_finite(tmp_path)


def test_save_refuses_averages_that_are_not_finite(images, tmp_path):
    loop = make_loop(images, tmp_path, 1)
    loop.emas[1].weights["out.2.bias"][0] = math.inf
    with pytest.raises(
        ValueError,
        match="ema_0.99 has values that are not finite in out.2.bias.*The last complete one is none",
    ):
        loop.save()
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_left_out_changes_nothing(precision, images, tmp_path):
    """A gradient that overflows where the loss does not: forgiven in every format."""
    loop = make_loop(images, tmp_path, 20, precision=precision, sampler="loss-second-moment")
    for _ in range(2):
        loop.run_step(*next(loop.data))
    before, drawn = snapshot(loop), loop.gradients.draw_t(4, loop.step)[0]
    hook = next(loop.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    loop.run_step(*next(loop.data))
    hook.remove()
    assert same(before, snapshot(loop)) and (
        loop.step,
        loop.progress.skipped,
        loop.progress.skipped_in_a_row,
    ) == (3, 1, 1)
    assert "step 3 left out: its gradients are not finite" in said(tmp_path)
    assert not torch.equal(drawn, loop.gradients.draw_t(4, loop.step)[0]), (
        "the same batch of t again"
    )
    loop.run_step(*next(loop.data))
    assert loop.progress.skipped_in_a_row == 0 and not same(
        before["model"], loop.model.state_dict()
    )


def test_gradients_that_stay_bad_end_the_run_after_so_many(images, tmp_path):
    loop = make_loop(images, tmp_path, 20, max_skipped=3)
    next(loop.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        Diverged,
        match="no finite gradient in 3 steps in a row, the last of them step 3: all losses are",
    ):
        loop.run_loop()
    assert loop.step == 2 and not list(tmp_path.glob("*.pt"))


# ---- fp16 ----


def set_scale(loop, scale):
    loop.precision.load_state_dict({**loop.precision.state_dict(), "scale": scale})


def test_an_overflow_halves_the_scale_and_the_message_does_not_frighten(images, tmp_path):
    loop = make_loop(images, tmp_path, 4, precision="fp16")
    set_scale(loop, 2.0**30)
    before, scales = snapshot(loop), []
    while loop.progress.skipped_in_a_row or not loop.step:
        assert loop.progress.skipped < 24
        scales.append(loop.precision.scaler.get_scale())
        loop.run_step(*next(loop.data))
        if loop.progress.skipped_in_a_row:
            assert same(before, snapshot(loop))
    assert scales == [2.0 ** (30 - n) for n in range(len(scales))] and loop.progress.skipped > 3
    text = said(tmp_path)
    assert (
        "step 1 left out" in text
        and "loss scale 1.07374e+09 -> 5.36871e+08 (usual in the first steps of fp16" in text
    )
    assert not re.search("error|warning|diverge|nan", text, re.I), text


def test_the_scale_has_a_floor_and_hope_an_end(images, tmp_path):
    loop = make_loop(images, tmp_path, 40, precision="fp16", max_skipped=6)
    set_scale(loop, 8.0)
    loop.data = Spoiled(loop.data, range(2, 100))
    with pytest.raises(
        Diverged, match="no finite gradient in 6 steps in a row.*the images are not finite"
    ):
        loop.run_loop()
    assert loop.precision.scaler.get_scale() == 1.0 and "loss scale stays at its least, 1" in said(
        tmp_path
    )
    assert loop.step == 6 and not list(tmp_path.glob("*.pt"))


def test_the_scale_grows_only_after_a_full_interval_of_good_steps(images, tmp_path):
    loop = make_loop(images, tmp_path, 20, precision="fp16", fp16_scale_growth=1 / 4)
    scale = loop.precision.scaler.get_scale

    def run(n):
        for _ in range(n):
            loop.run_step(*next(loop.data))

    run(3)
    hook = next(loop.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    run(1)
    hook.remove()
    assert scale() == 2.0**15
    run(3)
    assert scale() == 2.0**15, "good steps from before the overflow were counted"
    run(1)
    assert scale() == 2.0**16


# ---- two processes ----

DRIVER = """
import math, sys, torch
from guided_diffusion_ip import dist_util, logger
from guided_diffusion_ip.settings.config import command
from guided_diffusion_ip.training.checkpoint import SavePolicy
from test_guards import Spoiled
from test_resume import make_loop

def main():
    torch.set_num_threads(1)
    images, out, precision, what = sys.argv[1:]
    dist_util.setup_dist()
    loop = make_loop(images, out, 30, precision=precision, sampler="loss-second-moment", max_skipped=4,
                     saving=SavePolicy(2))
    logger.configure(out, ["log", "stdout"], rank=dist_util.get_rank())
    if dist_util.get_rank() == 1 and what == "data":
        loop.data = Spoiled(loop.data, range(6, 100))
    if dist_util.get_rank() == 1 and what == "first batch":
        loop.data = Spoiled(loop.data, [1])
    if dist_util.get_rank() == 1 and what == "weights":
        step = loop.run_step
        def spoil(*batch):
            if loop.step == 5:
                with torch.no_grad():
                    loop.model.out[2].bias[0] = math.nan
            step(*batch)
        loop.run_step = spoil
    loop.run_loop()

command(main)
"""


@pytest.mark.parametrize(
    "what, precision, saved",
    [
        ("data", "fp32", [2, 4]),
        ("first batch", "fp32", []),
        pytest.param("data", "fp16", [2, 4, 6, 8], marks=pytest.mark.slow),
        pytest.param("weights", "bf16", [2, 4], marks=pytest.mark.slow),
    ],
)
def test_one_bad_rank_ends_both_and_both_know_which(what, precision, saved, images, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    out = tmp_path / "run"
    done = launch.torchrun(
        2, [str(driver), images, str(out), precision, what], timeout=100, PYTHONPATH=PATHS
    )
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert re.search(r"exitcode\s*: 2 ", text) and not re.search(r"exitcode\s*: 0 ", text), text
    if saved:
        assert re.search(
            r"mse, vb at t = .*\(rank 1\)\. Nothing of this step has been kept; the last checkpoint is \S*model00000"
            + str(saved[-1]),
            text,
        ), text
        assert "(rank 0)" not in text.split("Nothing of this step")[0], text
    else:
        assert "values that are not finite" in text and "rank 1" in text, text
    assert "guided_diffusion_ip/training/" not in text, (
        text
    )  # tracebacks of ours; torchrun shows its own
    assert complete_steps(str(out)) == saved
    assert bool(assert_files_finite(out)) == bool(saved)


# ---- the first batch ----

NETWORK = torch.nn.Conv2d(1, 1, 1)  # has in_channels


@pytest.mark.parametrize(
    "batch, words",
    [
        (
            torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8),
            r"is uint8 \[4, 1, 8, 8\]; expected float",
        ),
        (torch.rand(4, 1, 8, 8) * 255, "with values from .*divide uint8 by 127.5 and subtract 1"),
        (torch.zeros(4, 8, 8, 1), r"float32 \[4, 8, 8, 1\], but the network takes 1 channels"),
        (torch.zeros(4, 3, 8, 8), "but the network takes 1 channels"),
        (torch.zeros(4, 8, 8), r"\[4, 8, 8\]; expected"),
        (torch.zeros(3, 1, 8, 8), "with N = 4"),
        (torch.full((4, 1, 8, 8), math.nan), "not finite"),
        (torch.full((4, 1, 8, 8), -math.inf), "not finite"),
    ],
)
def test_images_that_the_network_is_not_for_are_an_error(batch, words):
    with pytest.raises(ValueError, match=words):
        check_batch(batch, {}, NETWORK, 4)
    check_batch(torch.linspace(-1, 1, 256).reshape(4, 1, 8, 8), {}, NETWORK, 4)


def test_low_resolution_partners_count_as_channels():
    network = torch.nn.Conv2d(2, 1, 1)
    check_batch(torch.zeros(4, 1, 8, 8), {"low_res": torch.zeros(4, 1, 4, 4)}, network, 4)
    with pytest.raises(ValueError, match="takes 2 channels"):
        check_batch(torch.zeros(4, 3, 8, 8), {"low_res": torch.zeros(4, 3, 4, 4)}, network, 4)


def test_the_loop_looks_before_the_first_step_and_hints_at_another_range(images, tmp_path):
    loop = make_loop(images, tmp_path / "bad", 2)
    loop.data = iter([(torch.full((4, 1, 8, 8), 2.0), {})])
    start = snapshot(loop)
    with pytest.raises(ValueError, match="values from 2 to 2"):
        loop.run_loop()
    assert same(start, snapshot(loop)) and not list((tmp_path / "bad").glob("*.pt"))
    loop = make_loop(images, tmp_path / "half", 1)
    loop.data = iter([(torch.rand(4, 1, 8, 8), {})])
    loop.run_loop()
    assert "warning: no value of the first batch is below 0: images in [0, 1]?" in said(
        tmp_path / "half"
    )


# ---- memory ----

MEMORY = """
import resource, sys, torch
from dataclasses import replace
from guided_diffusion_ip.settings.config import command
from guided_diffusion_ip import logger
from test_resume import make_loop

def main():
    images, out, batch, microbatch = sys.argv[1:]
    loop = make_loop(images, out, 5)
    loop.data = iter([(torch.zeros(int(batch), 1, 8, 8), {})] * 5)
    loop.settings = replace(loop.settings, batch_size=int(batch), microbatch=int(microbatch))
    loop.gradients.settings = loop.settings
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
    loop.run_loop()

command(main)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is obeyed by Linux")
@pytest.mark.parametrize(
    "microbatch, option",
    [(-1, "--microbatch 8192 (the gradient stays"), (4096, "--microbatch 2048")],
)
def test_out_of_memory_names_what_to_try(microbatch, option, images, tmp_path):
    done = launch.run(
        [sys.executable, "-c", MEMORY, images, str(tmp_path), "16384", str(microbatch)],
        PYTHONPATH=PATHS,
    )
    now = 16384 if microbatch < 0 else microbatch
    assert done.returncode == 2, done.stderr
    assert (
        f"error: out of memory on cpu with batch_size 16384, microbatch {now}, precision fp32, "
        f"use_checkpoint False: try {option}"
    ) in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    "microbatch, precision, checkpointing, device, option",
    [
        (1, "fp32", False, "cpu", "--use_checkpoint True"),
        (1, "fp32", True, "cpu", "a smaller network"),
        (8, "fp32", False, "cuda", "--precision bf16 (or fp16 on a V100)"),
        (8, "fp16", False, "cuda", "--microbatch 4 "),
        (3, "bf16", False, "cuda", "--microbatch 1 "),
    ],
)
def test_the_next_option_is_one_that_is_left(microbatch, precision, checkpointing, device, option):
    assert option in cheaper(microbatch, precision, checkpointing, torch.device(device)) + " "
    settings = TrainSettings(batch_size=8, microbatch=microbatch, precision=precision)
    text = f"batch_size 8, microbatch {microbatch}, precision {precision}"
    assert text in memory_advice(settings, NETWORK)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# ---- notes, limits ----


def test_waiting_for_data_is_told_once(images, tmp_path):
    class Slow:
        def __init__(self, data):
            self.data = data

        def __next__(self):
            time.sleep(0.15)
            return next(self.data)

    for name, wrap in (("slow", Slow), ("fast", iter)):
        loop = make_loop(images, tmp_path / name, 12, random_crop=False)
        loop.data = wrap(loop.data)
        loop.run_loop()
    note = r"note: \d+% of the time is spent waiting for images: raise --num_workers"
    assert len(re.findall(note, said(tmp_path / "slow"))) == 1 and not re.search(
        note, said(tmp_path / "fast")
    )


@pytest.mark.parametrize(
    "limits, told",
    [
        (Limits(), True),
        (Limits(max_hours=1), False),
        (Limits(max_images=8), False),
        (Limits(max_steps=2), False),
    ],
)
def test_a_run_without_an_end_says_so(limits, told, images, tmp_path):
    loop = make_loop(images, tmp_path, 0, limits=limits)
    step = loop.run_step

    def stop_after_two(*batch):
        step(*batch)
        loop._agreed = Wishes(stop=loop.step == 2)

    loop.run_step = stop_after_two
    loop.run_loop()
    assert ("nothing ends this run but a signal" in said(tmp_path)) == told
    assert complete_steps(str(tmp_path)) == [2]


@pytest.mark.parametrize(
    "limits, steps", [((0, 9, 0), 3), ((0, 8, 0), 2), ((2, 100, 0), 2), ((7, 9, 0), 3)]
)
def test_the_nearest_limit_counts(limits, steps):
    assert Limits(*limits).last_step(4) == steps


def test_minutes_between_saves(images, tmp_path):
    run = launch.run(
        [
            sys.executable,
            TRAIN,
            *command(images, tmp_path, "--max_images", "16", "--save_minutes", "1e-9"),
        ]
    )
    assert run.returncode == 0, run.stderr
    assert complete_steps(str(tmp_path)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "steps, rate, words",
    [
        (
            100,
            "0.9999",
            "99% of the weights averaged with rate 0.9999.*--ema_rate 0.95 or --ema_warmup True",
        ),
        (100_000, "0.99999", "37% .*--ema_rate 0.99995 "),
        (200_000, "0.99999", "14% .*--ema_rate 0.9999[78] "),
        (40_000, "0.9999", ""),
        (3, "0.9999", "--ema_rate 0 "),
    ],
)
def test_an_average_that_remembers_its_start_is_told_with_a_better_rate(steps, rate, words):
    settings = TrainSettings(batch_size=1, ema_rates=(float(rate),))
    text = warn_about_ema(settings, steps)
    assert re.search(words, text) if words else not text, text
    if words:
        better = float(re.search(r"--ema_rate (\S+)", text)[1])
        assert 0 <= better < 1 and better**steps < 0.05, "the advice does not help"
    assert not warn_about_ema(dataclasses.replace(settings, ema_warmup=True), steps)


def test_the_first_averages_with_warmup():
    """Rates 1/10, 2/11, 3/12, ... until the given rate is smaller."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    ema, expected = EMA(model, 0.25, warmup=True), float(model.weight.detach())
    for rate in (1 / 10, 2 / 11, 3 / 12, 0.25, 0.25):
        with torch.no_grad():
            model.weight.add_(1)
        ema.update(model)
        expected = rate * expected + (1 - rate) * float(model.weight.detach())
        assert float(ema.weights["weight"]) == pytest.approx(expected, rel=1e-6)
    start = EMA(model, 0.9999, warmup=True)
    share = 1.0
    for n in range(100):
        start.update(model)
        share *= (1 + n) / (10 + n)
    assert share < 1e-11 and start.updates == 100


# ---- signals ----

SECOND_SIGNAL = """
import os, signal, sys
from guided_diffusion_ip.settings.config import command
from guided_diffusion_ip.training import checkpoint
from test_resume import make_loop

def main():
    loop = make_loop(sys.argv[1], sys.argv[2], 0)
    step, write = loop.run_step, checkpoint._write
    def told(*batch):
        step(*batch)
        if loop.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
    def again(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*args)
    loop.run_step, checkpoint._write = told, again
    loop.run_loop()

command(main)
"""


def test_a_second_signal_does_not_break_the_last_save(images, tmp_path):
    """Ctrl-C under a launcher: SIGINT from the terminal, then SIGTERM from the launcher, while the
    rank is saving.
    """
    done = launch.run(
        [sys.executable, "-c", SECOND_SIGNAL, images, str(tmp_path)], PYTHONPATH=PATHS
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert len(complete_steps(str(tmp_path))) == 1 and not list(tmp_path.glob("*.tmp"))


def test_ctrl_c_under_torchrun_saves(images, tmp_path):
    process = subprocess.Popen(
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
            *command(images, tmp_path, "--save_interval", "100000"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=launch.clean_env(),
    )
    while not (tmp_path / "progress.csv").exists() or len(rows(tmp_path)) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the launcher and both ranks
    out, _ = process.communicate(timeout=60)
    assert "SIGINT: stopped after step" in out and len(complete_steps(str(tmp_path))) == 1, out
    assert "KeyboardInterrupt" not in out.split("Traceback")[0], out
