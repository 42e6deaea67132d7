"""prefetch.py and streams that use it: the same batches in the same order, errors where they
belong, and no thread left behind.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_ip import logger
from guided_diffusion_ip.data import image_datasets, prefetch
from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.data.prefetch import Prefetcher
from guided_diffusion_ip.script_util import create_model_and_diffusion
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.stopping import Limits
from guided_diffusion_ip.training.train_loop import TrainLoop

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def folder(tmp_path):
    for k, image in enumerate(np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)):
        Image.fromarray(image).save(tmp_path / f"{k}_x.png")
    return tmp_path


def stream(folder, **options):
    return load_data(data_dir=folder, batch_size=4, image_size=8, **options)


def test_results_come_in_order_and_two_calls_ahead():
    made = []

    def make():
        made.append(len(made))
        return made[-1]

    numbers = Prefetcher(make)
    assert wait_until(lambda: len(made) == 2)
    time.sleep(0.05)
    assert len(made) == 2
    assert [next(numbers) for _ in range(20)] == list(range(20)) and len(made) <= 22
    numbers.close()
    assert not threads()


def test_an_error_is_raised_where_its_result_was_due():
    results = iter([1, 2, RuntimeError("third"), 4])

    def make():
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    numbers = Prefetcher(make)
    assert next(numbers) == 1 and next(numbers) == 2
    with pytest.raises(RuntimeError, match="third"):
        next(numbers)
    numbers.close()


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(cache_mb=0, num_workers=0, random_crop=True),
        dict(cache_mb=0, num_workers=1),
        dict(rank=1, world=2, class_cond=True, num_classes=10, class_dropout=0.2),
    ],
)
def test_a_stream_is_the_same_with_and_without(folder, options):
    before = torch.random.get_rng_state()
    plain, ahead = (
        stream(folder, prefetch=False, **options),
        stream(folder, prefetch=True, **options),
    )
    for step in (None, None, None, 9, None, 2, None):
        if step is not None:
            plain.seek(step)
            ahead.seek(step)
        (x, c), (y, d) = next(plain), next(ahead)
        assert (
            torch.equal(x, y)
            and c.keys() == d.keys()
            and all(torch.equal(c[name], d[name]) for name in c)
        )
        assert plain.step == ahead.step
    assert len(threads()) == 1 and torch.equal(*(s.examples(6)[0] for s in (plain, ahead)))
    plain.close()
    ahead.close()
    assert not threads() and torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(next(plain)[0], next(ahead)[0]), "closing is not the end"
    plain.close()
    ahead.close()


def test_without_a_gpu_there_is_no_thread(folder):
    images = stream(folder)
    next(images)
    assert not prefetch.uses_gpu() and not threads()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_at_its_step_and_can_be_repaired(folder, workers):
    options = dict(cache_mb=0, num_workers=workers, deterministic=True)
    good = (folder / "5_x.png").read_bytes()
    wanted = [
        next(images)[0] for images in [stream(folder, prefetch=False, **options)] for _ in range(3)
    ]
    (folder / "5_x.png").write_bytes(good[:60])
    images = stream(folder, prefetch=True, **options)
    assert torch.equal(next(images)[0], wanted[0])
    for _ in range(2):
        with pytest.raises(ValueError, match="^[^\n]*5_x.png cannot be read[^\n]*$"):
            next(images)
        assert images.step == 1 and not threads()
    (folder / "5_x.png").write_bytes(good)
    assert torch.equal(next(images)[0], wanted[1]) and torch.equal(next(images)[0], wanted[2])
    images.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("ahead", [False, True])
def test_an_interrupted_wait_skips_no_batch(folder, ahead):
    images = stream(folder, cache_mb=0, num_workers=0, prefetch=ahead)
    wanted = [next(images)[0] for _ in range(3)]
    images.seek(0)
    read, slow = images._maker.source.image, [True]

    def image(i, channels):
        time.sleep(0.1 if slow else 0)
        return read(i, channels)

    images._maker.source.image = image
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.15)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(images)
    finally:
        signal.signal(signal.SIGALRM, old)
    slow.clear()
    assert images.step == 0 and all(torch.equal(next(images)[0], batch) for batch in wanted)
    images.close()


def test_the_thread_ends_with_its_stream(folder):
    images = stream(folder, prefetch=True)
    next(images)
    assert threads()
    del images
    gc.collect()
    assert wait_until(lambda: not threads())


def test_training_is_the_same_and_can_be_resumed(folder, tmp_path_factory):
    """Weights of 3 + 2 steps with the thread, whose batches are ahead when the first part ends, and
    of 5 without.
    """

    def train(out, prefetch, *, max_steps, resume=""):
        logger.configure(str(out), format_strs=["log"])
        torch.manual_seed(0)
        model, diffusion = create_model_and_diffusion(
            image_size=8,
            num_channels=32,
            num_res_blocks=1,
            channel_mult="1,1",
            attention_resolutions="4",
            num_head_channels=32,
        )
        settings = TrainSettings(
            batch_size=4, lr=1e-3, ema_rates=(0.9,), limits=Limits(max_steps), resume=resume
        )
        loop = TrainLoop(model, diffusion, stream(folder, prefetch=prefetch), settings)
        loop.run_loop()
        assert not threads()
        return model.state_dict()

    out = tmp_path_factory.mktemp("runs")
    whole = train(out / "a", False, max_steps=5)
    train(out / "b", True, max_steps=3)
    parts = train(out / "b", True, max_steps=5, resume=str(out / "b" / "model000003.pt"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("workers, ahead", [(0, True), (1, True), (1, False)])
def test_neither_the_end_nor_ctrl_c_hangs(folder, workers, ahead):
    """A script that does not close its stream, ended by its last line and by Ctrl-C."""
    code = (
        "import sys, time\nfrom guided_diffusion_ip.data.image_datasets import load_data\ns = "
        "load_data(data_dir=sys.argv[1], batch_size=4, image_size=8, cache_mb=0, "
        f"num_workers=int(sys.argv[2]), prefetch={ahead})\nnext(s)\nprint('begun', flush=True)\n"
        "while sys.argv[3] == 'forever': next(s)\n"
    )
    # A test run that a shell has put into the background ignores Ctrl-C, and so would its children.
    started = {
        how: subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(workers), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for how in ("end", "forever")
    }
    for how, process in started.items():
        assert process.stdout.readline() == "begun\n"
        if how == "forever":
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(
                timeout=40
            )  # torch's own way with workers that are left is to wait for ever
        finally:
            process.kill()
        assert process.returncode == (-signal.SIGINT if how == "forever" else 0), said
        assert ("KeyboardInterrupt" in said) == (
            how == "forever"
        ) and "Exception ignored" not in said


def test_on_a_gpu_the_thread_is_on_it_and_batches_are_pinned(folder, monkeypatch):
    """A stand-in for the GPU: what is asked of torch, and by which thread."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda gpu: asked.append(("device", gpu, threading.current_thread().name)),
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(
        torch.Tensor,
        "pin_memory",
        lambda x: asked.append(("pin", tuple(x.shape), threading.current_thread().name)) or x,
    )
    images = stream(folder, class_cond=True)
    assert isinstance(images, image_datasets.ImageStream)
    x, _ = next(images)
    images.close()
    assert asked[0][:2] == ("device", 3) and [what[:2] for what in asked[1:3]] == [
        ("pin", (4, 3, 8, 8)),
        ("pin", (4,)),
    ]
    assert all(name.startswith("prefetch") for _, _, name in asked) and x.shape == (4, 3, 8, 8)
