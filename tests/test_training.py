"""The training loop's parts and the loop itself, in one process."""

import math
import os

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion_ip import logger
from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.diffusion.edm_losses import EDMLoss, EDMProcess
from guided_diffusion_ip.script_util import create_model_and_diffusion
from guided_diffusion_ip.training.checkpoint import SavePolicy
from guided_diffusion_ip.training.ema import EMA, parse_rates, update_ema
from guided_diffusion_ip.training.gradients import process_losses
from guided_diffusion_ip.training.hooks import Hook
from guided_diffusion_ip.training.loss_statistics import LossStatistics
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.step_log import duration
from guided_diffusion_ip.training.stopping import Limits
from guided_diffusion_ip.training.timestep_samplers import (
    LossSecondMomentResampler,
    create_named_schedule_sampler,
)
from guided_diffusion_ip.training.train_loop import TrainLoop

TINY = dict(
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    learn_sigma=True,
    noise_schedule="cosine",
    rescale_learned_sigmas=True,
    input_perturbation=0.1,
    resblock_updown=True,
    num_head_channels=32,
)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    np.savez(path, arr_0=rng.integers(0, 256, (24, 8, 8, 1), dtype=np.uint8))
    return str(path)


def tiny_loop(
    images,
    out_dir,
    *,
    max_steps,
    batch_size=8,
    sampler="uniform",
    dropout=0.0,
    seed=0,
    ema_rates=(0.9,),
    hooks=(),
    **options,
):
    logger.configure(str(out_dir), format_strs=["log", "csv"])
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**TINY, dropout=dropout)
    # Zero-initialised outputs would hide most gradients from a short run.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    data = load_data(data_dir=images, batch_size=batch_size, image_size=8, channels=1, seed=seed)
    options = {"log_interval": 2, "saving": SavePolicy(10**6), **options}
    settings = TrainSettings(
        batch_size=batch_size,
        lr=1e-3,
        limits=Limits(max_steps),
        seed=seed,
        ema_rates=ema_rates,
        **options,
    )
    sampler = create_named_schedule_sampler(sampler, diffusion)
    return TrainLoop(model, diffusion, data, settings, schedule_sampler=sampler, hooks=hooks)


def relative(a, b):
    a, b = (torch.cat([x.double().flatten() for x in xs]) for xs in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("microbatch", [1, 3, 5])
def test_microbatches_give_the_gradient_of_the_batch(images, tmp_path, microbatch):
    def gradient(micro):
        loop = tiny_loop(
            images, tmp_path, max_steps=1, microbatch=micro, sampler="loss-second-moment"
        )
        loop.forward_backward(*next(loop.data))
        return [p.grad for p in loop.model.parameters()]

    whole = gradient(-1)
    assert sum(float(g.norm()) for g in whole) > 0
    assert relative(gradient(microbatch), whole) < 1e-5


@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
def test_continued_training_equals_uninterrupted_bitwise(images, tmp_path, sampler):
    options = dict(sampler=sampler, dropout=0.2, microbatch=3, ema_rates=(0.5, 0.9))
    straight = tiny_loop(images, tmp_path / "a", max_steps=6, **options)
    straight.run_loop()
    tiny_loop(images, tmp_path / "b", max_steps=3, **options).run_loop()
    rest = tiny_loop(
        images,
        tmp_path / "b",
        max_steps=6,
        resume=str(tmp_path / "b" / "model000003.pt"),
        **options,
    )
    assert rest.step == 3
    rest.run_loop()
    for name in ("model000006.pt", "ema_0.5_000006.pt", "ema_0.9_000006.pt"):
        a, b = (torch.load(tmp_path / run / name, weights_only=True) for run in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resuming_needs_the_whole_set(images, tmp_path):
    tiny_loop(images, tmp_path, max_steps=1).run_loop()
    os.remove(tmp_path / "ema_0.9_000001.pt")
    with pytest.raises(ValueError, match="ema_0.9_000001.pt is missing"):
        tiny_loop(images, tmp_path, max_steps=2, resume=str(tmp_path / "model000001.pt"))
    with pytest.raises(ValueError, match="modelNNNNNN.pt"):
        tiny_loop(images, tmp_path, max_steps=2, resume=str(tmp_path / "opt000001.pt"))


def test_a_checkpoint_is_named_after_its_completed_updates(images, tmp_path):
    called = []
    hooks = [Hook(2, lambda model, step: called.append(step) or {})]
    loop = tiny_loop(images, tmp_path, max_steps=4, hooks=hooks, saving=SavePolicy(2))
    loop.run_loop()
    assert called == [2, 4]
    assert sorted(n for n in os.listdir(tmp_path) if n.endswith(".pt")) == [
        "ema_0.9_000002.pt",
        "ema_0.9_000004.pt",
        "model000002.pt",
        "model000004.pt",
        "opt000002.pt",
        "opt000004.pt",
        "state000002.pt",
        "state000004.pt",
    ]
    state = torch.load(tmp_path / "state000004.pt", weights_only=True)
    assert state["step"] == 4 and state["images_seen"] == 32


def test_annealing_lowers_the_rate_and_stops(images, tmp_path):
    loop = tiny_loop(images, tmp_path, max_steps=0, lr_anneal_steps=4)
    rates = []
    run_step = loop.run_step
    loop.run_step = lambda *batch: (run_step(*batch), rates.append(loop.opt.param_groups[0]["lr"]))
    loop.run_loop()
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_learning_lowers_the_loss(images, tmp_path):
    loop = tiny_loop(images, tmp_path, max_steps=60, batch_size=8, log_interval=20)
    loop.run_loop()
    rows = (tmp_path / "progress.csv").read_text().splitlines()
    column = rows[0].split(",").index("mse")
    losses = [float(row.split(",")[column]) for row in rows[1:]]
    assert losses[-1] < 0.8 * losses[0], losses


def test_fp16_and_fp32_gradients_agree(images, tmp_path):
    def gradient(fp16):
        loop = tiny_loop(images, tmp_path, max_steps=1, precision="fp16" if fp16 else "fp32")
        loop.forward_backward(*next(loop.data))
        loop.precision.unscale(loop.opt)
        return [p.grad for p in loop.model.parameters()]

    assert relative(gradient(True), gradient(False)) < 0.02


def test_a_bare_iterator_trains_and_says_that_it_cannot_be_moved(images, tmp_path):
    loop = tiny_loop(images, tmp_path, max_steps=2)
    loop.run_loop()
    resumed = tiny_loop(
        images, tmp_path / "again", max_steps=3, resume=str(tmp_path / "model000002.pt")
    )
    resumed.data = iter([next(resumed.data)])
    resumed.run_loop()
    assert resumed.step == 3


class Uploads(TorchDispatchMode):
    """Counts the tensors that are copied from the host to another device while the host waits."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if (
            isinstance(source, torch.Tensor)
            and source.device.type == "cpu"
            and isinstance(result, torch.Tensor)
            and result.device.type != "cpu"
            and not kwargs.get("non_blocking")
        ):
            self.found.append((func, tuple(source.shape)))
        return result


class Dimmed:
    """An augmentation; EDM's own switches autocast off, which "meta" does not know."""

    uniforms = 1

    def __call__(self, images, uniforms):
        return images * uniforms[:, :, None, None], uniforms


@pytest.mark.parametrize("case", ["uniform", "loss-second-moment", "edm"])
def test_a_step_uploads_nothing_from_the_host(case, images, tmp_path):
    """On the device "meta" everything of a step but its numbers is as on a GPU, where each upload
    would be waited for.
    """
    loop = tiny_loop(
        images, tmp_path, max_steps=1, microbatch=3, sampler="uniform" if case == "edm" else case
    )
    if case == "edm":
        process = EDMProcess(EDMLoss(), input_perturbation=0.1, augment=Dimmed())
        loop.gradients.process, loop.gradients.objective = process, process_losses(process)
        loop.gradients.schedule_sampler = create_named_schedule_sampler("uniform", process)
        scale = torch.nn.Parameter(torch.ones((), device="meta"))
        loop.gradients.network = lambda x, sigma, labels, augment_labels: scale * x
    loop.model.to("meta")
    loop.gradients.device = torch.device("meta")
    batch = next(loop.data)[0].to("meta")
    for _ in range(2):  # tables are brought to the device once
        with Uploads() as uploads:
            _, losses, _ = loop.forward_backward(batch, {})
        loop.step += 1
    assert losses["loss"].shape == (8,) and losses["loss"].device.type == "meta"
    assert not uploads.found


def test_tables_follow_the_history_and_the_device():
    sampler = LossSecondMomentResampler(Steps, history_per_term=1, uniform_prob=0.0)
    uniforms = torch.arange(100) / 100
    before = sampler.sample(100, "cpu", uniforms)
    assert torch.equal(before[0], sampler.sample(100, "cpu", uniforms)[0])
    sampler.update_with_all_losses(list(range(5)), [1.0, 2.0, 3.0, 4.0, 10.0])
    after = sampler.sample(100, "cpu", uniforms)
    assert torch.bincount(after[0]).tolist() == [5, 10, 15, 20, 50] and after[1][
        0
    ] == pytest.approx(4)
    other = LossSecondMomentResampler(Steps, history_per_term=1)
    sampler.load_state_dict(other.state_dict())
    assert all(map(torch.equal, sampler.sample(100, "cpu", uniforms), before))
    for name in ("meta", "cpu"):
        device = torch.device(name)
        assert sampler._tables(device).device == device and sampler._tables(
            device
        ) is sampler._tables(device)


def test_ema_is_the_weighted_mean_of_all_weights_so_far():
    model = torch.nn.Linear(2, 2)
    start = model.weight.detach().clone()
    ema, rate = EMA(model, 0.7), 0.7
    expected = start.clone()
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(step)
        ema.update(model)
        expected = rate * expected + (1 - rate) * model.weight.detach()
    torch.testing.assert_close(ema.weights["weight"], expected)
    target = [start.clone()]
    update_ema(target, [model.weight], 0.9)
    torch.testing.assert_close(target[0], 0.9 * start + 0.1 * model.weight.detach())


def test_a_loaded_ema_warms_up_from_as_many_updates_as_are_told():
    model = torch.nn.Linear(1, 1, bias=False)
    start, ema = model.weight.detach().clone(), EMA(model, 0.9, warmup=True)
    for told, rate in (((), 0.1), ((8,), 0.5), ((1000,), 0.9)):
        ema.load_state_dict({"weight": start}, *told)
        with torch.no_grad():
            model.weight.copy_(start + 1)
        ema.update(model)
        torch.testing.assert_close(ema.weights["weight"], start + 1 - rate)


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_ema_rates_out_of_range(rate):
    with pytest.raises(ValueError, match="ema_rate must be"):
        EMA(torch.nn.Linear(1, 1), rate)


def test_several_ema_rates():
    assert (
        parse_rates("0.99, 0.9999") == [0.99, 0.9999]
        and parse_rates(0.5) == [0.5]
        and parse_rates("") == []
    )
    with pytest.raises(ValueError, match="numbers separated by commas"):
        parse_rates("a")


class Steps:
    num_timesteps = 5


def test_timesteps_follow_the_weights_and_the_loss_weights_undo_them():
    sampler = LossSecondMomentResampler(Steps, history_per_term=2, uniform_prob=0.01)
    assert (sampler.weights() == 1).all(), "uniform until every t has a full history"
    for _ in range(2):
        sampler.update_with_all_losses(list(range(5)), [1.0, 2.0, 3.0, 4.0, 0.0])
    expected = np.array([1, 2, 3, 4, 0]) / 10 * 0.99 + 0.01 / 5
    np.testing.assert_allclose(sampler.weights(), expected)
    n = 100_000
    t, weights = sampler.sample(n, "cpu", torch.arange(n) / n)
    np.testing.assert_allclose(np.bincount(t, minlength=5) / n, expected, atol=2e-5)
    np.testing.assert_allclose(weights[t == 1].numpy(), 1 / (5 * expected[1]), rtol=1e-6)


def test_a_ring_of_the_newest_losses_without_those_that_are_not_finite():
    sampler = LossSecondMomentResampler(Steps, history_per_term=2)
    for loss in (100.0, 3.0, math.nan, 4.0, math.inf):
        sampler.update_with_all_losses(list(range(5)), [loss] * 5)
    rms = math.sqrt((3**2 + 4**2) / 2)
    np.testing.assert_allclose(np.sqrt((sampler._history**2).mean(1)), rms)
    assert np.isfinite(sampler.weights()).all()
    other = LossSecondMomentResampler(Steps, history_per_term=2)
    other.load_state_dict(sampler.state_dict())
    np.testing.assert_array_equal(other.weights(), sampler.weights())


def test_losses_count_from_the_next_look_on():
    at_once, later = (
        LossSecondMomentResampler(Steps, history_per_term=1, uniform_prob=0.0) for _ in range(2)
    )
    t, losses = torch.arange(5), torch.tensor([0.1, 0.2, 0.3, 0.4, 1 / 3])
    at_once.update_with_local_losses(t, losses)
    later.update(t, losses)
    np.testing.assert_array_equal(later.state_dict()["history"], at_once.state_dict()["history"])
    later.update(t, 2 * losses)
    later.update(t, 3 * losses)  # nobody looked between them
    np.testing.assert_allclose(later.weights(), at_once.weights())
    assert later.state_dict()["seen"].tolist() == [3] * 5


def test_unknown_sampler():
    with pytest.raises(ValueError, match="uniform, loss-second-moment"):
        create_named_schedule_sampler("lossy", Steps)


def test_statistics_by_quartile():
    statistics = LossStatistics(8)
    t = torch.tensor([0, 1, 7, 7])
    statistics.add(
        t, {"loss": torch.tensor([1.0, 3.0, 5.0, 7.0])}, torch.tensor([1.0, 1.0, 1.0, 2.0])
    )
    assert statistics.reduce() == {"loss": (1 + 3 + 5 + 14) / 4, "loss_q0": 2.0, "loss_q3": 9.5}
    assert statistics.reduce() == {}


@pytest.mark.parametrize(
    "seconds, text", [(12, "12s"), (250, "4m10s"), (11100, "3h05m"), (93600, "1d02h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
