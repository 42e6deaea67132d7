"""Scripts written for guided_diffusion: every published name, and small scripts in that style as
real processes.
"""

import csv
import importlib
import inspect
import json
import math
import sys

import numpy as np
import pytest
import torch
from golden_tools import DATA
from launch import ROOT, mpiexec, run
from PIL import Image

from guided_diffusion_ip import compat, logger, script_util

API = json.loads((DATA / "published_api.json").read_text())
SCRIPTS = ROOT / "tests" / "published_style"
# Not provided: how they work inside is ours, or nobody's scripts call them.
EXEMPT = {"nn.CheckpointFunction"}
TINY = dict(
    image_size=8,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    class_cond=True,
    num_classes=2,
    diffusion_steps=20,
    noise_schedule="cosine",
)


@pytest.fixture(scope="module", autouse=True)
def installed():
    before = list(sys.path)
    compat.install()
    yield
    sys.path[:] = before


# ---- the contract: names and parameters ----


def published():
    """(path, parameters without self) of everything in the published API that is not exempt; None
    for classes.
    """
    for module, names in API.items():
        for name, entry in names.items():
            path = f"{module}.{name}"
            if path in EXEMPT:
                continue
            yield (path, None) if isinstance(entry, dict) else (path, entry)
            if isinstance(entry, dict):
                yield from (
                    (f"{path}.{method}", parameters[1:]) for method, parameters in entry.items()
                )


def named(parameters):
    """(those that can be given by position, up to *args; all names)"""
    positional = []
    for name in parameters:
        if name.startswith("*"):
            break
        positional.append(name)
    return positional, [name for name in parameters if not name.startswith("*")]


@pytest.mark.parametrize(
    "path, parameters", [pytest.param(*entry, id=entry[0]) for entry in published()]
)
def test_published_names_and_parameters(path, parameters):
    module, *attributes = path.split(".")
    found = importlib.import_module(f"guided_diffusion.{module}")
    for name in attributes:
        found = getattr(found, name)
    if parameters is None:
        assert inspect.isclass(found)
        return
    ours = list(inspect.signature(found).parameters.values())[1 if len(attributes) == 2 else 0 :]
    names = [p.name for p in ours]
    by_position = [p.name for p in ours if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = {p.kind for p in ours} & {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    positional, wanted = named(parameters)
    if not anything:
        assert set(wanted) <= set(names)
    common = min(len(positional), len(by_position))
    assert by_position[:common] == positional[:common], "another order than published"
    assert anything or common == len(positional)


def test_the_exempt_list_names_only_what_is_published():
    assert all(name in API[module] for module, name in (path.split(".") for path in EXEMPT))
    assert set(API) == set(compat.MODULES)


def test_functions_that_take_anything_take_every_published_keyword():
    from guided_diffusion import script_util as published_names

    classifier = {
        "classifier_width": 64,
        "classifier_depth": 1,
        "classifier_attention_resolutions": "4",
    }
    for factory, defaults, small in (
        ("create_model_and_diffusion", "model_and_diffusion_defaults", TINY),
        (
            "sr_create_model_and_diffusion",
            "sr_model_and_diffusion_defaults",
            {"large_size": 32, "small_size": 8, "num_channels": 32, "num_res_blocks": 1},
        ),
        (
            "create_classifier_and_diffusion",
            "classifier_and_diffusion_defaults",
            {"image_size": 8, **classifier},
        ),
    ):
        flags = getattr(published_names, defaults)()
        known = set(API["script_util"][factory])
        assert known - set(flags) <= {"channel_mult", "use_new_attention_order", "input_pertub"}
        assert set(flags) <= known
        getattr(published_names, factory)(
            **{**flags, **{k: v for k, v in small.items() if k in flags}}
        )
    _, process = published_names.create_model_and_diffusion(**TINY)
    options = dict(
        noise=None,
        clip_denoised=True,
        denoised_fn=lambda x: x,
        cond_fn=lambda x, t, y: -x,
        model_kwargs={"y": torch.zeros(2, dtype=torch.int64)},
        device="cpu",
        progress=False,
    )
    for loop in ("p_sample_loop", "ddim_sample_loop"):
        extra = {"eta": 0.5} if loop.startswith("ddim") else {}
        published_keywords = set(API["gaussian_diffusion"]["GaussianDiffusion"][loop]) - {
            "self",
            "model",
            "shape",
        }
        assert published_keywords == {*options, *extra}
        assert getattr(process, loop)(_zeros, (2, 3, 8, 8), **options, **extra).shape == (
            2,
            3,
            8,
            8,
        )
        assert (
            len(
                list(
                    getattr(process, loop + "_progressive")(
                        _zeros, (2, 3, 8, 8), **options, **extra
                    )
                )
            )
            == 20
        )


def _zeros(x, t, **cond):
    return torch.zeros_like(x)


def test_published_kinship():
    from guided_diffusion import gaussian_diffusion, resample, respace, unet

    for kin, base in (
        (respace.SpacedDiffusion, gaussian_diffusion.GaussianDiffusion),
        (resample.UniformSampler, resample.ScheduleSampler),
        (resample.LossSecondMomentResampler, resample.LossAwareSampler),
        (resample.LossAwareSampler, resample.ScheduleSampler),
        (unet.SuperResModel, unet.UNetModel),
        (unet.TimestepEmbedSequential, unet.TimestepBlock),
        (unet.ResBlock, unet.TimestepBlock),
    ):
        assert issubclass(kin, base)


def test_the_package_and_its_modules_are_found_in_every_way_of_importing():
    import guided_diffusion
    import guided_diffusion.logger as by_path
    from guided_diffusion import logger as by_name

    assert (
        by_path
        is by_name
        is importlib.import_module("guided_diffusion_ip.compat.logger")
        is guided_diffusion.logger
        is sys.modules["guided_diffusion.logger"]
    )
    compat.install()  # again: no harm
    with pytest.raises(ModuleNotFoundError, match="guided_diffusion.nothing"):
        importlib.import_module("guided_diffusion.nothing")


def test_another_guided_diffusion_that_is_in_use_already_is_an_error(monkeypatch):
    other = type(sys)("guided_diffusion")
    other.__file__ = "/elsewhere/guided_diffusion/__init__.py"
    monkeypatch.setitem(sys.modules, "guided_diffusion", other)
    with pytest.raises(ValueError, match="elsewhere.*before the first import"):
        compat.install()


def test_a_script_may_set_num_classes(monkeypatch):
    from guided_diffusion import script_util as published_names

    flags = {name: value for name, value in TINY.items() if name != "num_classes"}
    assert (
        published_names.create_model_and_diffusion(**flags)[0].num_classes
        == published_names.NUM_CLASSES
        == 1000
    )
    monkeypatch.setattr(published_names, "NUM_CLASSES", 7)
    assert published_names.create_model_and_diffusion(**flags)[0].num_classes == 7
    assert published_names.create_classifier(8, False, 64, 1, "4", True, True, "attention")(
        torch.zeros(1, 3, 8, 8), torch.zeros(1)
    ).shape == (1, 7)


def test_checkpoints_are_read_without_running_code(tmp_path):
    from guided_diffusion import dist_util

    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    good = dist_util.load_state_dict(
        str(tmp_path / "good.pt"), map_location=torch.device("cpu"), weights_only=False
    )
    assert torch.equal(good["w"], torch.ones(2))
    with pytest.raises(ValueError, match="refused"):
        dist_util.load_state_dict(str(tmp_path / "evil.pt"), weights_only=False)


class Evil:
    def __reduce__(self):
        return print, ("code has run",)


# ---- MixedPrecisionTrainer ----


def tiny_unet():
    torch.manual_seed(0)
    model, _ = script_util.create_model_and_diffusion(**{**TINY, "class_cond": False})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return model


def loss_of(model, scale=1.0):
    torch.manual_seed(1)
    return scale * model(torch.randn(2, 3, 8, 8), torch.tensor([3, 7])).square().mean()


def test_in_float32_it_is_the_plain_optimizer():
    from guided_diffusion.fp16_util import MixedPrecisionTrainer

    plain, model = tiny_unet(), tiny_unet()
    opt = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    trainer = MixedPrecisionTrainer(model=model)
    theirs = torch.optim.AdamW(trainer.master_params, lr=1e-2)
    for _ in range(3):
        opt.zero_grad()
        trainer.zero_grad()
        for net, back in ((plain, torch.Tensor.backward), (model, trainer.backward)):
            back(loss_of(net) / 4)
            back(loss_of(net) * 3 / 4)
        opt.step()
        assert trainer.optimize(theirs) is True
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("use_fp16", [False, True])
def test_gradients_that_are_not_finite_change_nothing(use_fp16):
    from guided_diffusion.fp16_util import MixedPrecisionTrainer

    trainer = MixedPrecisionTrainer(model=tiny_unet(), use_fp16=use_fp16, initial_lg_loss_scale=10)
    opt = torch.optim.AdamW(trainer.master_params, lr=1e-2)
    before = [p.detach().clone() for p in trainer.master_params]
    trainer.zero_grad()
    trainer.backward(loss_of(trainer.model, scale=math.inf))
    assert trainer.optimize(opt) is False
    assert not opt.state and all(torch.equal(a, b) for a, b in zip(before, trainer.master_params))
    assert trainer.lg_loss_scale == (9 if use_fp16 else 10)
    trainer.zero_grad()
    trainer.backward(loss_of(trainer.model))
    assert trainer.optimize(opt) is True
    assert not torch.equal(before[0], trainer.master_params[0])
    assert trainer.lg_loss_scale == (pytest.approx(9.001) if use_fp16 else 10)


def test_half_weights_follow_float32_masters():
    from guided_diffusion.fp16_util import MixedPrecisionTrainer

    model, reference = tiny_unet(), tiny_unet()
    loss_of(reference).backward()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True, initial_lg_loss_scale=12.0)
    assert model.dtype == torch.float16 and all(
        p.dtype == torch.float32 for p in trainer.master_params
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(trainer.master_params, reference.parameters(), strict=True)
    ), "masters are copied before digits are cut off"
    lr = 1e-4
    start = trainer.master_params_to_state_dict(trainer.master_params)
    start = {name: value.clone() for name, value in start.items()}
    opt = torch.optim.SGD(trainer.master_params, lr=lr)
    trainer.zero_grad()
    trainer.backward(loss_of(model))
    assert trainer.optimize(opt)
    end = trainer.master_params_to_state_dict(trainer.master_params)
    moved = (
        torch.cat([(start[k] - end[k]).flatten() for k, _ in model.named_parameters()]).double()
        / lr
    )
    grads = torch.cat([p.grad.flatten() for p in reference.parameters()]).double()
    # Most steps are below the resolution of half weights (5e-4 of their size): only in the masters
    # does the direction remain.
    assert torch.nn.functional.cosine_similarity(moved, grads, dim=0) > 0.99
    for p, master in zip(model.parameters(), trainer.master_params):
        assert torch.equal(p, master.to(p.dtype))


@pytest.mark.parametrize("use_fp16", [False, True])
def test_state_dicts_there_and_back(use_fp16):
    from guided_diffusion.fp16_util import MixedPrecisionTrainer

    class Shared(torch.nn.Module):  # one weight under two names, and a buffer
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Conv2d(4, 4, 1)
            self.norm = torch.nn.BatchNorm2d(4)
            self.b = self.a

    for model in (tiny_unet(), Shared()):
        names = list(model.state_dict())
        trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16)
        state = trainer.master_params_to_state_dict([p + 1 for p in trainer.master_params])
        assert list(state) == names and not any(value.requires_grad for value in state.values())
        back = trainer.state_dict_to_master_params(state)
        assert all(torch.equal(a, b + 1) for a, b in zip(back, trainer.master_params, strict=True))
        model.load_state_dict(state)


def test_modules_to_half_and_back():
    from guided_diffusion.fp16_util import convert_module_to_f16, convert_module_to_f32

    net = torch.nn.Sequential(
        torch.nn.Conv1d(2, 2, 1), torch.nn.Linear(2, 2), torch.nn.Conv2d(2, 2, 1)
    )
    net.apply(convert_module_to_f16)
    assert [m.bias.dtype for m in net] == [torch.float16, torch.float32, torch.float16]
    net.apply(convert_module_to_f32)
    assert {p.dtype for p in net.parameters()} == {torch.float32}


# ---- train_util ----


def rows_of(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def endless(batch_size=4):
    while True:
        yield torch.randn(batch_size, 3, 8, 8).clamp(-1, 1), {"y": torch.arange(batch_size) % 2}


def make_loop(folder, resume="", **options):
    from guided_diffusion.train_util import TrainLoop

    logger.configure(str(folder), format_strs=["csv"])
    model, process = script_util.create_model_and_diffusion(**TINY)
    if options.get("use_fp16"):
        model.convert_to_fp16()
    return TrainLoop(
        model=model,
        diffusion=process,
        data=endless(),
        batch_size=4,
        microbatch=-1,
        lr=1e-3,
        ema_rate="0.5",
        log_interval=1,
        save_interval=2,
        resume_checkpoint=str(resume),
        weight_decay=0.0,
        **options,
    )


def test_a_half_network_trains_from_float32_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    loop = make_loop(tmp_path, use_fp16=True, fp16_scale_growth=1e-3, schedule_sampler=None)
    assert loop.precision.mode == "fp16" and {p.dtype for p in loop.model.parameters()} == {
        torch.float32
    }
    loop.run_loop()
    assert loop.step == 2, "DIFFUSION_TRAINING_TEST ends it after the first save"
    rows = rows_of(tmp_path)
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    saved = torch.load(tmp_path / "model000002.pt", weights_only=True)
    assert {value.dtype for value in saved.values()} == {torch.float32}


@pytest.mark.parametrize("takes", ["published", "nothing more", "anything"])
def test_a_process_of_their_own_needs_the_published_parameters_only(tmp_path, takes):
    loop, seen = make_loop(tmp_path), {}
    own = type(loop.diffusion).training_losses

    def published(model, x_start, t, model_kwargs=None, noise=None):
        seen["noise"] = noise
        return own(loop.diffusion, model, x_start, t, model_kwargs, noise)

    def nothing_more(model, x_start, t, model_kwargs=None):
        return own(loop.diffusion, model, x_start, t, model_kwargs)

    def anything(*args, **kwargs):
        seen.update(kwargs)
        return own(loop.diffusion, *args, **kwargs)

    loop.diffusion.training_losses = {
        "published": published,
        "nothing more": nothing_more,
        "anything": anything,
    }[takes]
    loop.run_step(*next(loop.data))
    assert (
        loop.step == 1
        and set(seen)
        == {
            "published": {"noise"},
            "nothing more": set(),
            "anything": {"noise", "randn_like", "model_kwargs"},
        }[takes]
    )


def test_resuming_takes_what_lies_beside_a_published_checkpoint(tmp_path, monkeypatch):
    from guided_diffusion import train_util

    first = make_loop(tmp_path)
    for _ in range(3):
        first.run_step(*next(first.data))
    first.save()
    assert "starting afresh" not in make_loop(tmp_path, tmp_path / "model000003.pt").resumed[0]
    (tmp_path / "state000003.pt").unlink()  # guided_diffusion writes none

    def same(state, path):
        saved = torch.load(tmp_path / path, weights_only=True)
        return all(torch.equal(state[name], saved[name]) for name in saved)

    loop = make_loop(tmp_path, tmp_path / "model000003.pt")
    assert (loop.resume_step, loop.step) == (3, 0) and "starting afresh" not in loop.resumed[0]
    assert same(loop.model.state_dict(), "model000003.pt") and same(
        loop.emas[0].state_dict(), "ema_0.5_000003.pt"
    )
    assert len(loop.opt.state) == len(list(loop.model.parameters()))

    (tmp_path / "model000003.pt").rename(tmp_path / "downloaded.pt")
    monkeypatch.setattr(
        train_util, "find_resume_checkpoint", lambda: str(tmp_path / "downloaded.pt")
    )
    loop = make_loop(tmp_path)
    assert loop.step == 0 and "average of rate 0.5, optimizer" in loop.resumed[0]
    assert same(loop.model.state_dict(), "downloaded.pt") and same(
        loop.emas[0].state_dict(), "downloaded.pt"
    )


@pytest.mark.parametrize("fused", ["absent", None])
def test_a_float32_run_of_theirs_goes_on_in_half_precision(fused, tmp_path):
    """Their optimizer is not fused, which the file says (or, from an older PyTorch, does not): ours
    stays so, and scales losses.
    """
    first = make_loop(tmp_path)
    first.run_step(*next(first.data))
    first.save()
    (tmp_path / "state000001.pt").unlink()
    saved = torch.load(tmp_path / "opt000001.pt", weights_only=True)
    for group in saved["param_groups"]:
        group["fused"] = group["foreach"] = None
        if fused == "absent":
            del group["fused"], group["foreach"]
    torch.save(saved, tmp_path / "opt000001.pt")
    loop = make_loop(tmp_path, tmp_path / "model000001.pt", use_fp16=True)
    assert "starting afresh" not in loop.resumed[0] and loop.opt.param_groups[0]["fused"] is True
    while loop.step == loop.skipped:  # the first steps of fp16 look for the scale
        loop.run_step(*next(loop.data))
    assert {int(state["step"]) for state in loop.opt.state.values()} == {2}


def test_moments_in_another_layout_stay_with_their_weights(tmp_path):
    """Fused AdamW on a CPU takes no notice of strides."""
    first = make_loop(tmp_path)
    first.run_step(*next(first.data))
    first.save()
    (tmp_path / "state000001.pt").unlink()
    saved = torch.load(tmp_path / "opt000001.pt", weights_only=True)
    for state in saved["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].ndim == 4:
                state[name] = state[name].contiguous(memory_format=torch.channels_last)
    torch.save(saved, tmp_path / "opt000001.pt")
    second = make_loop(tmp_path, tmp_path / "model000001.pt")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b) and a.is_contiguous() and b.is_contiguous()
        a.grad = torch.randn(a.shape)
        b.grad = a.grad.clone()
    for loop in (first, second):
        loop.opt.step()
    assert all(
        torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters())
    )


def test_the_helpers_of_train_util(tmp_path):
    from guided_diffusion import train_util

    assert train_util.parse_resume_step_from_filename("runs/x/model012000.pt") == 12000
    assert train_util.parse_resume_step_from_filename("64x64_diffusion.pt") == 0
    assert train_util.find_ema_checkpoint(str(tmp_path / "model000001.pt"), 1, 0.9) is None
    (tmp_path / "ema_0.9_000001.pt").touch()
    assert train_util.find_ema_checkpoint(str(tmp_path / "model000001.pt"), 1, 0.9) == str(
        tmp_path / "ema_0.9_000001.pt"
    )
    logger.configure(str(tmp_path), format_strs=[])
    assert train_util.get_blob_logdir() == str(tmp_path)
    _, process = script_util.create_model_and_diffusion(**TINY)
    train_util.log_loss_dict(
        process, torch.tensor([0, 4, 5, 19]), {"mse": torch.tensor([1.0, 3.0, 5.0, 7.0])}
    )
    assert logger.getkvs() == {"mse": 4.0, "mse_q0": 2.0, "mse_q1": 5.0, "mse_q3": 7.0}
    logger.reset()


# ---- the runner ----


def start(script, *args, n=1, **env):
    """A script under `python -m guided_diffusion_ip.compat`, alone or in n processes."""
    words = ["-m", "guided_diffusion_ip.compat", str(script), *map(str, args)]
    return run([sys.executable, *words], 60, **env) if n == 1 else mpiexec(n, words, 60, **env)


def test_bad_calls_are_one_line_and_code_2(tmp_path):
    for words, message in (
        (["no/such.py", "--x", "1"], "no/such.py: no such file"),
        ([str(tmp_path)], "it is a folder"),
        ([], "no script given"),
    ):
        done = run([sys.executable, "-m", "guided_diffusion_ip.compat", *words], 60)
        assert done.returncode == 2 and message in done.stderr and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1


def test_a_script_runs_as_if_by_python_itself(tmp_path):
    """Arguments, path, folder, traceback; and an installed guided_diffusion stays out of it."""
    other = tmp_path / "site" / "guided_diffusion"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('the wrong package')")
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "beside.py").write_text("value = 5")
    script = folder / "script.py"
    script.write_text(
        "import os, pickle, sys\nimport beside\nfrom guided_diffusion.script_util import "
        "NUM_CLASSES\nclass Thing: pass\nassert __name__ == '__main__' and "
        "type(pickle.loads(pickle.dumps(Thing()))) is Thing\nprint(sys.argv[1:], sys.argv[0] == "
        "__file__, sys.path[0] == os.path.dirname(__file__), NUM_CLASSES)\nraise "
        "KeyError('deliberate')\n"
    )
    done = start(
        script, "--num_classes", "12", "--flag=a b", PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}"
    )
    assert done.stdout.splitlines() == ["['--num_classes', '12', '--flag=a b'] True True 12"], (
        done.stderr
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "KeyError: 'deliberate'"
    assert "compat" not in done.stderr.partition("Traceback")[2], "only the script's own frames"
    assert done.stderr.count("is not used") == 1 and str(other) in done.stderr


def test_a_script_keeps_its_exit_code_and_spawned_processes_find_the_package(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from guided_diffusion import logger\n"
        "def child():\n"
        "    sys.exit(0 if logger.__name__ == 'guided_diffusion_ip.compat.logger' else 1)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    process.start()\n"
        "    process.join()\n"
        "    sys.exit(7 + process.exitcode)\n"
    )
    done = start(script)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


# ---- whole scripts, alone and in two processes ----


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            folder / f"{'ab'[i % 2]}_{i:02d}.png"
        )
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "ema_0.9999_000010.pt"
    torch.manual_seed(0)
    torch.save(script_util.create_model_and_diffusion(**TINY)[0].state_dict(), path)
    return path


def flags(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def whole(script, n, folder, *args, **env):
    done = start(SCRIPTS / script, *args, n=n, OPENAI_LOGDIR=str(folder), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_training(images, tmp_path):
    """Alone and in two processes, the same training; --input_pertub reaches it."""
    weights, norms = {}, {}
    for name, n, gamma in (("alone", 1, 0.15), ("pair", 2, 0.15), ("baseline", 1, None)):
        out = whole(
            "train.py",
            n,
            tmp_path / name,
            *flags(
                data_dir=images,
                batch_size=4 // n,
                save_interval=2,
                log_interval=1,
                schedule_sampler="loss-second-moment",
                seed=0,
                **TINY,
                **({"input_pertub": gamma} if gamma else {}),
            ),
            DIFFUSION_TRAINING_TEST="1",
        )
        assert out.splitlines().count(f"gamma is {gamma or 0.0}") == 1, "rank 0 alone prints"
        assert {p.name for p in (tmp_path / name).iterdir()} >= {
            "log.txt",
            "progress.csv",
            *(f"{part}000002.pt" for part in ("model", "ema_0.9999_", "opt", "state")),
        }
        rows = rows_of(tmp_path / name)
        norms[name] = [float(row["grad_norm"]) for row in rows]
        state = torch.load(tmp_path / name / "model000002.pt", weights_only=True)
        weights[name] = torch.cat([value.flatten() for value in state.values()])
    assert norms["alone"] == pytest.approx(norms["pair"], rel=1e-4)
    torch.testing.assert_close(weights["alone"], weights["pair"], rtol=0, atol=2e-5)
    assert abs(norms["alone"][0] / norms["baseline"][0] - 1) > 1e-3


@pytest.mark.parametrize(
    "n, how",
    [
        (1, {"use_fp16": True}),
        (2, {"use_ddim": True, "timestep_respacing": "ddim5", "eps_scaler": 1.01}),
    ],
)
def test_sampling(checkpoint, tmp_path, n, how):
    out = whole(
        "sample.py",
        n,
        tmp_path,
        *flags(model_path=checkpoint, num_samples=6, batch_size=4, **TINY, **how),
    )
    assert out.splitlines()[-1] == "done"
    with np.load(tmp_path / "samples_6x8x8x3.npz") as saved:
        assert saved["arr_0"].shape == (6, 8, 8, 3) and saved["arr_0"].dtype == np.uint8
        assert len(np.unique(saved["arr_0"], axis=0)) == 6, "ranks draw noise of their own"
        assert saved["arr_1"].shape == (6,) and saved["arr_1"].max() <= 1, (
            "labels of --num_classes, not of 1000"
        )


@pytest.mark.parametrize("n", [1, 2])
def test_likelihood(checkpoint, images, tmp_path, n):
    out = whole(
        "nll.py",
        n,
        tmp_path,
        *flags(model_path=checkpoint, data_dir=images, num_samples=4, batch_size=2, **TINY),
    )
    assert 0 < float(out.rpartition("bpd=")[2].split()[0]) < 100
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(tmp_path / f"{name}_terms.npz") as saved:
            assert saved["arr_0"].shape == (20,) and np.isfinite(saved["arr_0"]).all()


@pytest.mark.parametrize("n", [1, 2])
def test_somebodys_own_network(tmp_path, n):
    whole("own_model.py", n, tmp_path, DIFFUSION_TRAINING_TEST="1")
    states = {
        name: torch.load(tmp_path / f"{name}000003.pt", weights_only=True)
        for name in ("model", "ema_0.9_")
    }
    assert states["model"].keys() == states["ema_0.9_"].keys()
    assert (
        "running.running_mean" in states["model"]
        and int(states["ema_0.9_"]["running.num_batches_tracked"]) == 6
    )
    assert not torch.equal(states["model"]["last.weight"], states["ema_0.9_"]["last.weight"])


@pytest.mark.parametrize("n, use_fp16", [(1, True), (2, False)])
def test_a_classifiers_own_loop(images, tmp_path, n, use_fp16):
    shape = dict(
        image_size=8,
        num_classes=2,
        classifier_width=64,
        classifier_depth=1,
        classifier_attention_resolutions="4",
        classifier_use_fp16=use_fp16,
    )
    whole(
        "classifier.py",
        n,
        tmp_path,
        *flags(data_dir=images, iterations=3, batch_size=4, log_interval=1, **shape),
    )
    state = torch.load(tmp_path / "model000003.pt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float32}
    model, _ = script_util.create_classifier_and_diffusion(**shape)
    model.load_state_dict(state)
    rows = rows_of(tmp_path)
    assert len(rows) == 3 and all(math.isfinite(float(row["train_loss"])) for row in rows)
