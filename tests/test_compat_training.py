"""Subclasses and patches of guided-diffusion's training side: one small case per behaviour."""

import contextlib
import csv
import io
import itertools
import json
import sys
import types

import numpy as np
import pytest
import torch
from launch import torchrun
from PIL import Image
from torch import nn

from guided_diffusion_ip import compat
from guided_diffusion_ip import logger as library_logger
from guided_diffusion_ip.diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion_ip.script_util import create_gaussian_diffusion


@pytest.fixture(scope="module", autouse=True)
def installed():
    before = list(sys.path)
    compat.install()
    yield
    sys.path[:] = before


@pytest.fixture(autouse=True)
def log(tmp_path):
    from guided_diffusion import logger

    logger.configure(str(tmp_path), format_strs=["csv"])
    yield
    library_logger.reset()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x, t):
        return self.conv(x) * self.scale


def cosine():
    return create_gaussian_diffusion(steps=8, noise_schedule="cosine")


def batches():
    for seed in itertools.count():
        noise = torch.Generator().manual_seed(seed)
        yield torch.randn(4, 3, 8, 8, generator=noise).clamp(-1, 1), {}


def make(kind=None, **options):
    from guided_diffusion.train_util import TrainLoop

    torch.manual_seed(0)
    given = dict(
        model=Net(),
        diffusion=cosine(),
        data=batches(),
        batch_size=4,
        microbatch=-1,
        lr=1e-2,
        ema_rate="0.5,0.9",
        log_interval=1,
        save_interval=2,
        resume_checkpoint="",
        lr_anneal_steps=4,
    )
    return (kind or TrainLoop)(**{**given, **options})


def subclass(**methods):
    from guided_diffusion.train_util import TrainLoop

    return type("Own", (TrainLoop,), methods)


def weights(loop):
    return torch.cat([p.detach().flatten() for p in loop.model.parameters()])


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def saved(folder, part="model"):
    return sorted(p.name for p in folder.glob(f"{part}*.pt"))


# ---- attributes ----


def test_published_attributes():
    loop = make(lr_anneal_steps=0, weight_decay=0.1)
    assert loop.ema_rate == [0.5, 0.9] and len(loop.ema_params) == 2
    assert (loop.step, loop.resume_step, loop.resume_checkpoint) == (0, 0, "")
    assert (loop.use_fp16, loop.fp16_scale_growth, loop.use_ddp) == (False, 1e-3, False)
    assert (loop.batch_size, loop.microbatch, loop.global_batch) == (4, 4, 4)
    assert (loop.lr, loop.weight_decay, loop.lr_anneal_steps) == (1e-2, 0.1, 0)
    assert (loop.log_interval, loop.save_interval) == (1, 2)
    assert isinstance(loop.diffusion, GaussianDiffusion) and loop.ddp_model is loop.model
    assert isinstance(loop.opt, torch.optim.AdamW) and isinstance(loop.sync_cuda, bool)
    assert hasattr(loop.schedule_sampler, "sample") and next(loop.data)[0].shape == (4, 3, 8, 8)
    trainer = loop.mp_trainer
    assert all(a is b for a, b in zip(trainer.master_params, loop.model.parameters(), strict=True))
    state = trainer.master_params_to_state_dict(loop.ema_params[0])
    assert list(state) == list(loop.model.state_dict())
    again = trainer.state_dict_to_master_params(state)
    assert all(torch.equal(a, b) for a, b in zip(again, loop.ema_params[0], strict=True))


def test_what_is_set_on_the_loop_counts(tmp_path):
    class Zero:
        num_timesteps = 8

        def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
            return {"loss": 0 * model(x_start, t).mean(dim=(1, 2, 3))}

    class Last:
        def sample(self, batch_size, device):
            return torch.full((batch_size,), 7), torch.ones(batch_size)

    loop = make()
    loop.diffusion, loop.schedule_sampler = Zero(), Last()
    loop.opt = torch.optim.SGD(loop.mp_trainer.master_params, lr=1.0)
    loop.ema_params = [[torch.zeros_like(p) for p in rate] for rate in loop.ema_params]
    before = weights(loop)
    loop.run_step(*next(loop.data))
    assert torch.equal(before, weights(loop)) and loop.step == 1
    assert torch.allclose(loop.ema_params[1][0], 0.1 * next(loop.model.parameters()))
    loop.save()
    content = torch.load(tmp_path / "opt000001.pt", weights_only=True)
    assert "momentum" in content["param_groups"][0]


def test_a_subclass_may_name_its_attributes_as_the_library_does(tmp_path):
    class Own(subclass()):
        def __init__(self, **options):
            super().__init__(**options)
            self.state = self.update = self.progress = self.emas = self.hooks = self.log = "mine"
            self.device = "cpu"
            self.lr_anneal_steps = 3

    loop = make(Own)
    loop.run_loop()
    assert loop.step == 3 and loop.state == "mine"
    assert saved(tmp_path) == ["model000002.pt", "model000003.pt"]


# ---- hooks ----

HOOKS = ["run_step", "forward_backward", "_update_ema", "_anneal_lr", "log_step"]


@pytest.mark.parametrize("hook", [*HOOKS, "save", "run_loop", "_load_and_sync_parameters"])
@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_a_hook_that_calls_the_original_changes_nothing_and_is_called(hook, how, tmp_path):
    from guided_diffusion.train_util import TrainLoop

    plain = make(log_interval=2)
    plain.run_loop()
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    calls, original = [], getattr(TrainLoop, hook)

    def wrapped(self, *args):
        calls.append(hook)
        return original(self, *args)

    loop = make(subclass(**{hook: wrapped}) if how == "subclass" else None, log_interval=2)
    if how == "instance":
        setattr(loop, hook, types.MethodType(wrapped, loop))
    loop.run_loop()
    times = {"save": 2, "run_loop": 1, "_load_and_sync_parameters": int(how == "subclass")}
    assert len(calls) == times.get(hook, 4) and loop.step == 4
    assert saved(tmp_path) == ["model000002.pt", "model000004.pt"]
    # An own _anneal_lr is called where guided-diffusion calls it: a step later than ours acts.
    if hook != "_anneal_lr":
        assert torch.equal(weights(plain), weights(loop))
        assert all(torch.equal(a, b) for a, b in zip(plain.ema_params[0], loop.ema_params[0]))


def own_forward_backward(self, batch, cond):
    from guided_diffusion.train_util import log_loss_dict

    self.mp_trainer.zero_grad()
    for part in batch.split(self.microbatch):
        t, factor = self.schedule_sampler.sample(len(part), part.device)
        losses = self.diffusion.training_losses(self.ddp_model, part, t, model_kwargs=cond)
        log_loss_dict(self.diffusion, t, {name: x * factor for name, x in losses.items()})
        self.mp_trainer.backward((losses["loss"] * factor).mean())


def own_run_step(self, batch, cond):
    self.forward_backward(batch, cond)
    if self.mp_trainer.optimize(self.opt):
        self._update_ema()
    self._anneal_lr()
    self.log_step()


def own_update_ema(self):
    from guided_diffusion.nn import update_ema

    for averages, rate in zip(self.ema_params, self.ema_rate):
        update_ema(averages, self.mp_trainer.master_params, rate=rate)


def own_run_loop(self):
    from guided_diffusion import logger

    while self.step + self.resume_step < self.lr_anneal_steps:
        self.run_step(*next(self.data))
        if self.step % self.log_interval == 0:
            logger.dumpkvs()
        if self.step % self.save_interval == 0:
            self.save()
        self.step += 1


@pytest.mark.parametrize("use_fp16", [False, True])
def test_an_own_forward_and_backward_pass(use_fp16, tmp_path):
    loop = make(subclass(forward_backward=own_forward_backward), microbatch=2, use_fp16=use_fp16)
    before = weights(loop)
    loop.run_loop()
    assert loop.step == 4 and not torch.equal(before, weights(loop))
    lines = rows(tmp_path)
    assert [row["step"] for row in lines] == ["1", "2", "3", "4"]
    assert all(float(row["loss"]) > 0 for row in lines)
    assert not torch.equal(loop.ema_params[0][0], loop.ema_params[1][0])


def test_an_own_loss_on_top_of_ours():
    def more(self, batch, cond):
        assert super(type(self), self).forward_backward(batch, cond) is None
        self.mp_trainer.backward(100 * sum(p.square().sum() for p in self.model.parameters()))

    plain, loop = make(), make(subclass(forward_backward=more))
    for each in (plain, loop):
        each.run_loop()
    assert loop.step == 4 and weights(loop).norm() < weights(plain).norm()


@pytest.mark.parametrize("hook", ["run_step", "_update_ema"])
def test_bodies_of_their_own_do_what_ours_do(hook):
    own = {"run_step": own_run_step, "_update_ema": own_update_ema}[hook]
    plain, loop = make(lr_anneal_steps=0, max_steps=4), None
    plain.run_loop()
    loop = make(subclass(**{hook: own}), lr_anneal_steps=0, max_steps=4)
    loop.run_loop()
    assert loop.step == 4 and torch.equal(weights(plain), weights(loop))
    for a, b in zip(itertools.chain(*plain.ema_params), itertools.chain(*loop.ema_params)):
        torch.testing.assert_close(a, b)


def test_own_averages_and_learning_rate():
    def anneal(self):
        for group in self.opt.param_groups:
            group["lr"] = 0.0

    loop = make(subclass(_update_ema=lambda self: None, _anneal_lr=anneal))
    start = [p.clone() for p in loop.ema_params[0]]
    loop.run_step(*next(loop.data))
    after_one = weights(loop)
    loop.run_step(*next(loop.data))
    assert torch.equal(after_one, weights(loop)), "the rate that they set is used"
    assert all(torch.equal(a, b) for a, b in zip(start, loop.ema_params[0]))


def test_a_copied_run_loop_counts_each_step_once(tmp_path):
    plain, seen = make(), []
    plain.run_loop()
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    (tmp_path / "progress.csv").unlink()
    from guided_diffusion import logger

    logger.configure(str(tmp_path), format_strs=["csv"])

    def run_step(self, batch, cond):
        seen.append(self.step)
        super(type(self), self).run_step(batch, cond)

    loop = make(subclass(run_loop=own_run_loop, run_step=run_step))
    loop.run_loop()
    assert seen == [0, 1, 2, 3] and loop.step == 4
    assert saved(tmp_path) == ["model000000.pt", "model000002.pt"], "as that loop numbers them"
    assert torch.equal(weights(plain), weights(loop)), "the same noise in the same steps"
    lines = rows(tmp_path)
    assert [row["step"] for row in lines] == ["0", "1", "2", "3"]
    assert [row["samples"] for row in lines] == ["4", "8", "12", "16"]
    assert all(float(row["loss"]) > 0 for row in lines)


def test_a_loop_that_counts_nothing_draws_other_noise_in_each_step():
    seen = []

    class Process(GaussianDiffusion):
        def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
            seen.append(noise.sum().item())
            return super().training_losses(model, x_start, t, model_kwargs, noise)

    own = cosine()
    own.__class__ = type("Own", (Process, type(own)), {})
    loop = make(subclass(run_loop=lambda self: [self.run_step(*next(self.data)) for _ in "abc"]))
    loop.diffusion = own
    loop.run_loop()
    assert len(set(seen)) == 3


def test_an_own_save(tmp_path):
    def save(self):
        state = self.mp_trainer.master_params_to_state_dict(self.ema_params[0])
        torch.save(state, tmp_path / f"mine{self.step + self.resume_step}.pt")

    loop = make(subclass(save=save))
    loop.run_loop()
    assert saved(tmp_path, "mine") == ["mine2.pt", "mine4.pt"] and not saved(tmp_path)


def test_helpers_are_looked_up_when_they_are_called(tmp_path, monkeypatch):
    from guided_diffusion import train_util

    make().run_loop()
    folder, calls = tmp_path / "elsewhere", []
    folder.mkdir()
    for name, value in (
        ("get_blob_logdir", lambda: str(folder)),
        ("find_resume_checkpoint", lambda: str(tmp_path / "renamed7.pt")),
        ("parse_resume_step_from_filename", lambda path: 2),
        ("find_ema_checkpoint", lambda main, step, rate: str(tmp_path / "model000004.pt")),
        ("log_loss_dict", lambda diffusion, ts, losses: calls.append(set(losses))),
    ):
        monkeypatch.setattr(train_util, name, value)
    (tmp_path / "model000002.pt").rename(tmp_path / "renamed7.pt")
    expected = torch.load(tmp_path / "model000004.pt", weights_only=True)
    loop = make()
    assert (loop.resume_step, loop.step) == (2, 0)
    assert torch.equal(loop.ema_params[1][1], expected["conv.weight"])
    loop.run_loop()
    assert saved(folder) == ["model000004.pt"] and len(calls) == 2 and "loss" in calls[0]


def test_a_trainer_and_an_optimizer_of_their_own(tmp_path):
    from guided_diffusion import fp16_util, resample

    class Own(subclass()):
        def __init__(self, **options):
            super().__init__(**options)
            self.mp_trainer = fp16_util.MixedPrecisionTrainer(model=self.model)
            self.opt = torch.optim.SGD(self.mp_trainer.master_params, lr=self.lr)

    sampler = resample.LossSecondMomentResampler(cosine())
    loop = make(Own, schedule_sampler=sampler)
    before = weights(loop)
    loop.run_loop()
    assert loop.step == 4 and not torch.equal(before, weights(loop))
    assert all(float(row["loss"]) > 0 and float(row["param_norm"]) > 0 for row in rows(tmp_path))
    sampler.settle()
    assert sampler._seen.sum() == 16


def test_a_constructor_that_never_comes_to_ours_says_so():
    def bare(self, **options):
        self.data = options["data"]

    with pytest.raises(AttributeError, match="Own has no attribute '_loop': call super"):
        make(subclass(__init__=bare))
    assert not hasattr(make(), "nothing")


PAIR = """
import sys
import guided_diffusion_ip.compat
guided_diffusion_ip.compat.install()
import contextlib
import torch
from guided_diffusion import dist_util, logger
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.train_util import TrainLoop

class Own(TrainLoop):
    def forward_backward(self, batch, cond):
        self.mp_trainer.zero_grad()
        for i, part in enumerate(batch.split(self.microbatch)):
            t, factor = self.schedule_sampler.sample(len(part), part.device)
            last = i == len(batch) // self.microbatch - 1
            with contextlib.nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():
                losses = self.diffusion.training_losses(self.ddp_model, part, t)
            self.mp_trainer.backward((losses["loss"] * factor).mean())

    def run_loop(self):
        while self.step < 3:
            self.run_step(*next(self.data))
            self.step += 1
        self.save()

class Net(torch.nn.Conv2d):
    def forward(self, x, t):
        return super().forward(x)

def data():
    while True:
        yield torch.randn(4, 3, 8, 8), {}

dist_util.setup_dist()
logger.configure(sys.argv[1], ["csv"])
rank = torch.distributed.get_rank()
torch.manual_seed(rank)
loop = Own(model=Net(3, 3, 1), data=data(), batch_size=4, microbatch=2, lr=0.1, ema_rate=0.5,
           diffusion=create_gaussian_diffusion(steps=8, noise_schedule="cosine"), log_interval=1,
           save_interval=10, resume_checkpoint="")
assert loop.use_ddp and loop.global_batch == 8
loop.run_loop()
torch.save([*loop.model.state_dict().values(), *loop.ema_params[0]], f"{sys.argv[1]}/rank{rank}")
dist_util.cleanup()
"""


def test_own_gradients_in_two_processes(tmp_path):
    done = torchrun(2, ["-c", PAIR, str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], one[2]) and saved(tmp_path) == ["model000003.pt"]


# ---- loading ----


def test_resuming_counts_from_the_checkpoint_on_and_is_exact(tmp_path):
    through = make()
    through.run_loop()
    data = batches()
    for _ in range(2):
        next(data)
    checkpoint = str(tmp_path / "model000002.pt")
    loads = []

    def load(self):
        super(type(self), self)._load_and_sync_parameters()
        loads.append(self.resume_step)

    for kind in (None, subclass(_load_and_sync_parameters=load)):
        loop = make(kind, data=data, resume_checkpoint=checkpoint)
        assert (loop.resume_step, loop.step) == (2, 0)
        assert len(loop.opt.state) == 3 and loop.resume_checkpoint == checkpoint
    loop.run_loop()
    assert (loop.resume_step, loop.step, loads) == (2, 2, [2])
    assert torch.equal(weights(through), weights(loop))


def test_loading_hooks_of_their_own(tmp_path):
    make().run_loop()
    calls = []

    def load(self):
        calls.append("weights")
        self.resume_step = 4
        self.model.load_state_dict(torch.load(tmp_path / "model000004.pt", weights_only=True))

    def averages(self, rate):
        calls.append(rate)
        return [torch.full_like(p, rate) for p in self.mp_trainer.master_params]

    hooks = {
        "_load_and_sync_parameters": load,
        "_load_ema_parameters": averages,
        "_load_optimizer_state": lambda self: calls.append("optimizer"),
    }
    loop = make(subclass(**hooks), lr_anneal_steps=6)
    assert calls == ["weights", "optimizer", 0.5, 0.9]
    assert [rate[0][0].flatten()[0].item() for rate in loop.ema_params] == pytest.approx([0.5, 0.9])
    assert (loop.resume_step, loop.step, len(loop.opt.state)) == (4, 0, 0)
    loop.run_loop()
    assert loop.step == 2 and "model000006.pt" in saved(tmp_path)


def test_averages_begin_at_weights_that_a_hook_has_loaded():
    def load(self):
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(3.0)

    loop = make(subclass(_load_and_sync_parameters=load))
    assert all(bool((p == 3).all()) for rate in loop.ema_params for p in rate)
    assert loop.resumed == []


# ---- timestep samplers ----


def last_only(self, batch_size, device):
    return torch.full((batch_size,), 7, device=device), torch.ones(batch_size, device=device)


def sampler_kinds():
    from guided_diffusion import resample

    class Uniform(resample.UniformSampler):
        sample = last_only

    class Base(resample.ScheduleSampler):
        sample = last_only

        def weights(self):
            return np.ones(8)

    class Duck:
        sample = last_only

    class Learning(resample.LossSecondMomentResampler):
        sample = last_only

    return {kind.__name__: kind for kind in (Uniform, Base, Duck, Learning)}


@pytest.mark.parametrize("name", ["Uniform", "Base", "Duck", "Learning"])
def test_samplers_of_their_own(name, tmp_path):
    kind = sampler_kinds()[name]
    sampler = kind() if name in ("Base", "Duck") else kind(cosine())
    seen = []

    class Process:
        num_timesteps = 8

        def training_losses(self, model, x_start, t, model_kwargs=None):
            seen.extend(t.tolist())
            return {"loss": model(x_start, t).square().mean(dim=(1, 2, 3))}

    loop = make(schedule_sampler=sampler, diffusion=Process())
    loop.run_loop()
    assert loop.step == 4 and seen == [7] * 16 and loop.schedule_sampler is sampler
    if name == "Learning":
        assert sampler._seen.tolist() == [0] * 7 + [16]
        again = kind(cosine())
        make(schedule_sampler=again, resume_checkpoint=str(tmp_path / "model000002.pt"))
        assert again._seen.tolist() == [0] * 7 + [8]


@pytest.mark.parametrize("duck", [True, False])
def test_samplers_that_learn(duck):
    from guided_diffusion import resample

    learned = []

    class Sampler(object if duck else resample.LossAwareSampler):
        def weights(self):
            return np.ones(8)

        def update_with_local_losses(self, local_ts, local_losses):
            learned.append((local_ts.shape, local_losses.shape))

    if duck:
        Sampler.sample = last_only
    make(schedule_sampler=Sampler()).run_loop()
    assert learned == [((4,), (4,))] * 4


# ---- fp16_util ----


def test_masters_in_two_groups():
    from guided_diffusion import fp16_util

    model = Net()
    groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    assert [[name for name, _ in group] for group, _ in groups] == [
        ["scale", "conv.bias"],
        ["conv.weight"],
    ]
    masters = fp16_util.make_master_params(groups)
    assert [tuple(p.shape) for p in masters] == [(4,), (1, 81)]
    assert all(isinstance(p, nn.Parameter) and p.dtype == torch.float32 for p in masters)
    parts = fp16_util.unflatten_master_params(groups[1][0], masters[1])
    assert torch.equal(parts[0], model.conv.weight)

    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    model.scale.grad = torch.ones_like(model.scale)
    fp16_util.model_grads_to_master_grads(groups, masters)
    assert masters[0].grad.tolist() == [1, 0, 0, 0] and masters[1].grad.sum() == 81
    fp16_util.zero_master_grads(masters)
    assert all(p.grad is None for p in masters)
    assert fp16_util.param_grad_or_zeros(model.conv.bias).tolist() == [0, 0, 0]
    fp16_util.zero_grad(model.parameters())
    assert model.scale.grad.item() == 0 and model.conv.bias.grad is None

    with torch.no_grad():
        for p in masters:
            p.fill_(2.0)
    model.half()
    fp16_util.master_params_to_model_params(groups, masters)
    assert all(p.dtype == torch.float16 and bool((p == 2).all()) for p in model.parameters())
    state = fp16_util.master_params_to_state_dict(model, groups, masters, True)
    assert list(state) == list(model.state_dict())
    assert all(
        value.dtype == torch.float32 and bool((value == 2).all()) for value in state.values()
    )
    again = fp16_util.state_dict_to_master_params(model, state, True)
    assert all(torch.equal(a, b) for a, b in zip(again, masters, strict=True))
    plain = fp16_util.state_dict_to_master_params(model, state, False)
    assert list(fp16_util.master_params_to_state_dict(model, None, plain, False)) == list(state)


def test_overflow_and_the_first_scale():
    from guided_diffusion import fp16_util

    assert fp16_util.INITIAL_LOG_LOSS_SCALE == 20.0
    values = (1.0, float("inf"), -float("inf"), float("nan"))
    assert [fp16_util.check_overflow(x) for x in values] == [False, True, True, True]


def test_the_trainer_calls_the_functions_of_the_module(monkeypatch):
    from guided_diffusion import fp16_util

    calls, original = [], fp16_util.model_grads_to_master_grads

    def patched(groups, masters):
        calls.append(len(masters))
        original(groups, masters)

    monkeypatch.setattr(fp16_util, "model_grads_to_master_grads", patched)
    model = nn.Linear(2, 2)
    trainer = fp16_util.MixedPrecisionTrainer(model=model, use_fp16=True)
    trainer.backward(model(torch.ones(1, 2)).sum())
    assert trainer.optimize(torch.optim.SGD(trainer.master_params, lr=1.0)) and calls == [2]


# ---- logger ----


def test_old_names_and_the_logger_in_use(tmp_path):
    from guided_diffusion import logger

    assert logger.Logger.CURRENT is logger.get_current() and logger.Logger.DEFAULT is None
    logger.record_tabular("a", 1)
    logger.logkvs({"b": 2})
    assert logger.getkvs() == logger.Logger.CURRENT.name2val == {"a": 1, "b": 2}
    assert logger.dump_tabular() == {"a": 1, "b": 2} and rows(tmp_path) == [{"a": "1", "b": "2"}]
    assert logger.get_dir() == logger.Logger.CURRENT.dir == str(tmp_path)
    with logger.profile_kv("x"):
        pass
    assert logger.getkvs()["wait_x"] >= 0
    with logger.scoped_configure(str(tmp_path / "inner"), ["csv"]):
        assert logger.get_dir() == str(tmp_path / "inner")
    assert logger.get_dir() == str(tmp_path)
    logger.reset()
    assert logger.Logger.CURRENT is None


def test_an_output_of_their_own_receives_what_training_logs(tmp_path):
    from guided_diffusion import logger

    taken, said = [], []

    class Mine(logger.KVWriter, logger.SeqWriter):
        def writekvs(self, kvs):
            taken.append(dict(kvs))

        def writeseq(self, seq):
            said.extend(seq)

    logger.Logger.CURRENT.output_formats.append(Mine())
    make().run_loop()
    assert [row["step"] for row in taken] == [1, 2, 3, 4] and any("saved" in text for text in said)
    assert len(rows(tmp_path)) == 4

    logger.Logger.CURRENT = logger.Logger(dir=str(tmp_path), output_formats=[Mine()])
    assert library_logger.get_current() is logger.get_current()
    logger.logkv("x", 5)
    logger.dumpkvs()
    assert taken[-1] == {"x": 5} and len(rows(tmp_path)) == 4


@pytest.mark.parametrize("name", ["stdout", "log", "json", "csv"])
def test_output_formats(name, tmp_path, capsys):
    from guided_diffusion import logger

    output = logger.make_output_format(name, str(tmp_path), log_suffix="_x")
    kinds = {"json": logger.JSONOutputFormat, "csv": logger.CSVOutputFormat}
    assert type(output) is kinds.get(name, logger.HumanOutputFormat)
    assert isinstance(output, logger.KVWriter)
    output.writekvs({"a": 1.5})
    if isinstance(output, logger.SeqWriter):
        output.writeseq(["two", "words"])
    output.close()
    file = {"log": "log_x.txt", "json": "progress_x.json", "csv": "progress_x.csv"}.get(name)
    text = (tmp_path / file).read_text() if file else capsys.readouterr().out
    assert "1.5" in text and ("two words" in text) == (name in ("stdout", "log"))


def test_output_formats_by_their_constructors(tmp_path):
    from guided_diffusion import logger

    text = io.StringIO()
    logger.HumanOutputFormat(text).writekvs({"a": 1})
    assert text.getvalue() == "a 1\n"
    for kind in (logger.HumanOutputFormat, logger.JSONOutputFormat, logger.CSVOutputFormat):
        with contextlib.closing(kind(str(tmp_path / kind.__name__))) as output:
            output.writekvs({"a": 1})
    assert json.loads((tmp_path / "JSONOutputFormat").read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="a file or its name, got 3"):
        logger.HumanOutputFormat(3)


def test_weighted_means():
    from guided_diffusion import logger

    other = {"a": (4.0, 3), "text": ("x", 1)}
    comm = types.SimpleNamespace(rank=0, gather=lambda mine: [mine, other])
    with pytest.warns(UserWarning, match="'text' is no number"):
        assert logger.mpi_weighted_mean(comm, {"a": (0.0, 1)}) == {"a": 3.0}
    comm.rank = 1
    assert logger.mpi_weighted_mean(comm, {"a": (0.0, 1)}) == {}


# ---- image_datasets, dist_util ----


def test_images_and_processes(tmp_path):
    from guided_diffusion import dist_util, image_datasets

    for name in ("b.png", "a/y.JPG", "a/x.jpeg", "c.gif", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name == "notes.txt":
            (tmp_path / name).touch()
        else:
            Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = image_datasets._list_image_files_recursively(str(tmp_path))
    expected = ["a/x.jpeg", "a/y.JPG", "b.png", "c.gif"]
    assert found == [str(tmp_path / name) for name in expected]
    assert len(image_datasets.ImageDataset(8, found)) == 4
    with pytest.raises(ValueError, match="no such folder"):
        image_datasets._list_image_files_recursively(str(tmp_path / "none"))

    world = image_datasets.MPI.COMM_WORLD
    assert (world.Get_rank(), world.Get_size(), world.rank, world.size) == (0, 1, 0, 1)
    assert world.allgather("x") == ["x"] and world.bcast("x") == "x"
    assert (dist_util.GPUS_PER_NODE, dist_util.SETUP_RETRY_COUNT) == (8, 3)
