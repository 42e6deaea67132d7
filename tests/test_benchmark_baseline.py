"""The published way that the benchmark compares with: the same losses, weights and samples; and
what has no row of its own.
"""

import sys
import textwrap
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from torch import nn

from guided_diffusion_ip import noise, script_util
from guided_diffusion_ip.networks import AttentionBlock, GroupNorm32
from guided_diffusion_ip.networks.layers import Dropout
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.timestep_samplers import UniformSampler
from guided_diffusion_ip.training.train_loop import TrainLoop
from tools.benchmark.baseline import (
    PublishedStep,
    gather_and_write,
    published_chain,
    published_network,
    published_process,
)
from tools.benchmark.gathering import measure_gathering
from tools.benchmark.pictures import make_pictures
from tools.benchmark.startup import HEAVY, StartUp, import_costs

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = {
    "image_size": 8,
    "in_channels": 3,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8,4",
    "num_head_channels": 16,
    "learn_sigma": True,
    "rescale_learned_sigmas": True,
    "noise_schedule": "cosine",
    "resblock_updown": True,
    "class_cond": True,
    "num_classes": 3,
    "input_perturbation": 0.1,
}


def small(double=False, **more):
    """Network, all of whose parts do something, and process."""
    torch.manual_seed(0)
    network, process = script_util.create_model_and_diffusion(**{**SMALL, **more})
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return (network.double() if double else network), process


class Addressed(PublishedStep):
    """With the numbers that the training loop draws in its step number `steps`."""

    steps = 0

    def draw_t(self, part):
        uniforms = noise.uniform(
            0, noise.Stream.TIMESTEP, torch.arange(part.start, part.stop), self.steps
        )
        self.streams = iter((noise.Stream.EPSILON, noise.Stream.XI))
        return self.sampler.sample(part.stop - part.start, self.device, uniforms)

    def randn_like(self, part, x):
        return noise.normal(
            0, next(self.streams), torch.arange(part.start, part.stop), self.steps, x.shape[1:]
        )

    def __call__(self, batch, cond):
        super().__call__(batch, cond)
        self.steps += 1


def both_ways(double=False, half=False, **more):
    """(the training loop, the published step, images, labels) from the same weights."""
    (ours, process), (theirs, other) = small(double, **more), small(double, **more)
    ours.to(memory_format=torch.channels_last)
    settings = TrainSettings(
        batch_size=6, microbatch=4, lr=1e-2, weight_decay=0.1, ema_rates=(0.9,)
    )
    loop = TrainLoop(ours, process, iter(()), settings)
    step = Addressed(
        published_network(theirs).train(),
        published_process(other),
        UniformSampler(other),
        microbatch=4,
        lr=1e-2,
        weight_decay=0.1,
        ema_rates=(0.9,),
        half=half,
    )
    ours.train()
    return loop, step, torch.rand(6, 3, 8, 8) * 2 - 1, {"y": torch.tensor([0, 1, 2, 0, 1, 2])}


@pytest.mark.parametrize("new_order", [False, True])
def test_the_published_step_gives_the_same_losses_weights_and_averages(new_order):
    # In float64, because AdamW's first updates are the signs of gradients: where these are 0 (the
    # bias of k), rounding decides.
    loop, step, *batch = both_ways(double=True, use_new_attention_order=new_order)
    before = {name: p.clone() for name, p in loop.model.named_parameters()}
    for _ in range(3):
        loop.run_step(*batch)
        step(*batch)
    losses = loop.statistics.reduce()
    assert set(losses) > {"loss", "mse", "vb"}
    for name in set(losses) - {"loss", "mse", "vb"}:
        assert step.logged[name][0] == pytest.approx(losses[name], rel=1e-5)
    theirs = dict(step.network.named_parameters())
    moved = 0.0
    for (name, p), average in zip(loop.model.named_parameters(), step.averages[0][1]):
        torch.testing.assert_close(p, theirs[name], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(
            loop.emas[0].weights[name].double(), average, rtol=1e-5, atol=1e-5
        )
        moved = max(moved, float((p - before[name]).detach().abs().max()))
    assert moved > 0.02


def test_the_published_step_in_half_precision_follows_the_float32_one():
    loop, step, *batch = both_ways(half=True)
    for _ in range(2):
        loop.run_step(*batch)
        step(*batch)
    assert step.network.dtype == torch.float16 and step.log_scale > 10
    assert (
        all(master.dtype == torch.float32 and master.ndim == 1 for master in step.masters)
        and len(step.masters) == 2
    )
    ours = [p.detach() for p in loop.model.parameters()]
    for master, flat in zip(
        step.masters,
        (
            torch.cat([p.flatten() for p in ours if (p.ndim <= 1) == vectors])
            for vectors in (True, False)
        ),
    ):
        assert (master - flat).abs().mean() < 2e-3  # of two updates of 1e-2 each
    parts = [p for p in step.network.parameters() if p.ndim > 1]
    torch.testing.assert_close(
        torch.cat([p.flatten().float() for p in parts]),
        step.masters[1].detach(),
        rtol=1e-3,
        atol=1e-4,
    )


def test_the_published_step_leaves_out_gradients_that_are_not_finite():
    loop, step, *batch = both_ways()
    step.forward_backward(*batch)
    next(step.network.parameters()).grad[0] = float("inf")
    before = [p.detach().clone() for p in step.network.parameters()]
    assert not step.update() and step.log_scale == 9
    assert all(torch.equal(p, old) for p, old in zip(step.network.parameters(), before))


@pytest.mark.parametrize("use_ddim", [False, True])
def test_the_published_way_gives_the_same_samples(use_ddim):
    (ours, process), (theirs, other) = small(timestep_respacing="5"), small(timestep_respacing="5")
    ours.eval().to(memory_format=torch.channels_last)
    cond = {"y": torch.tensor([0, 2])}
    draws = [noise.NormalStream(1, noise.Stream.SAMPLE, [0, 1]) for _ in range(2)]
    loop = process.ddim_sample_loop if use_ddim else process.p_sample_loop
    wanted = loop(ours, (2, 3, 8, 8), model_kwargs=cond, randn_like=draws[0])
    steps = list(
        published_chain(
            published_process(other),
            published_network(theirs).eval(),
            (2, 3, 8, 8),
            CPU,
            cond,
            use_ddim,
            randn_like=draws[1],
        )
    )
    assert len(steps) == 5 and wanted.abs().max() > 0.1
    torch.testing.assert_close(steps[-1]["sample"], wanted, rtol=0, atol=1e-5)


def test_the_published_network_is_what_is_said_of_it():
    network, process = small(dropout=0.5)
    names = list(network.state_dict())
    published = published_network(network)
    kinds = {type(module) for module in published.modules()}
    assert (
        nn.Dropout in kinds
        and not kinds & {GroupNorm32, AttentionBlock, Dropout}
        and list(published.state_dict()) == names
    )
    calls = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Watch():
        published(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert "einsum" in calls and "scaled_dot_product_attention" not in calls
    published_process(process).training_losses(
        published,
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, dtype=torch.int64),
        {"y": torch.zeros(1, dtype=torch.int64)},
    )
    assert not process._on_device  # nothing is kept
    with pytest.raises(ValueError, match="--baseline"):
        published_network(nn.Conv2d(3, 3, 1))


# ---- what has no row ----


def test_gathering_both_ways_writes_the_same_images(tmp_path):
    batches = [np.full((2, 4, 4, 3), n, np.uint8) for n in range(3)]
    gather_and_write(str(tmp_path / "all.npz"), batches)
    with np.load(tmp_path / "all.npz", allow_pickle=False) as file:
        assert np.array_equal(file["arr_0"], np.concatenate(batches))
    found = measure_gathering((3, 64, 64), 100, repeats=1, total_bytes=64 * 64 * 3 * 950)
    assert found.images == 950 and len(found.seconds) == len(found.baseline_seconds) == 1
    assert "950 images" in str(found)


def test_the_published_way_of_gathering_holds_every_image_twice():
    # In a process of its own: this one may have freed memory to use again, which is no growth.
    code = """
        from tools.benchmark.gathering import measure_gathering
        found = measure_gathering((3, 64, 64), 100, repeats=1, total_bytes=64 * 64 * 3 * 950)
        peak = found.baseline_peak_memory_bytes
        assert peak is None or peak > 1.8 * found.pixel_bytes, found
    """
    done = launch.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == 0, done.stderr


def test_pictures_for_the_loader_are_pictures(tmp_path):
    make_pictures(str(tmp_path), 16, count=3)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.png"))]
    assert len(sizes) == 3 and 100 < min(sizes) and max(sizes) < 16 * 16 * 3 + 200


@pytest.mark.parametrize("script", ["image_sample", "image_train"])
def test_scripts_import_nothing_heavy_before_they_know_what_to_do(script):
    libraries = import_costs([str(ROOT / "scripts" / f"{script}.py"), "--help"])
    assert "torch" in libraries and "guided_diffusion_ip" in libraries
    assert not set(HEAVY) & set(libraries)


def test_start_up_sees_what_is_heavy(tmp_path):
    script = tmp_path / "heavy.py"
    script.write_text("import wave\nimport scipy\n")
    costs = import_costs([str(script)])
    assert {"scipy", "wave", "numpy"} <= set(costs) and "torch" not in costs and costs["scipy"] > 0
    found = StartUp(
        "heavy.py", (3.0, 1.0, 2.0), (0.5, 0.75, 1.0), ("scipy",), (("scipy", 30.0), ("wave", 1.0))
    )
    assert (
        found.beyond_torch_s == 1.25
        and "heavy.py --help: 2.00 s, 1.25 s" in str(found)
        and "imported: scipy" in str(found)
    )
