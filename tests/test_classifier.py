"""Classifiers of noised images: their objective, their training on the common loop, and guidance by
them, script to script.
"""

import math
import pickle
import sys
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_scripts import ROOT, Evil, flags, one_line, run

from guided_diffusion_ip import logger, script_util
from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.diffusion.guidance import classifier_gradient
from guided_diffusion_ip.interop.adm_checkpoint import (
    infer_architecture,
    infer_classifier,
    is_classifier,
)
from guided_diffusion_ip.runs.sample_batch import process_sampler
from guided_diffusion_ip.training.classifier_objective import (
    ClassifierObjective,
    CleanSampler,
    Validation,
    in_top_k,
    require_same_classes,
)
from guided_diffusion_ip.training.hooks import Hook
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.stopping import Limits
from guided_diffusion_ip.training.train_loop import TrainLoop

# Attention needs widths that are multiples of 64: only the lower levels (64, 64) have it.
CLASSIFIER = dict(classifier_width=32, classifier_depth=1, classifier_attention_resolutions="4")
PROCESS = dict(image_size=8, in_channels=1, learn_sigma=True, noise_schedule="cosine")
UNET = dict(
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    num_head_channels=32,
)


@pytest.fixture(autouse=True)
def close_logs():
    """A run inside this process leaves its log files open."""
    yield
    logger.reset()


def tiny(**changed):
    """A classifier of 3 classes whose outputs are not zero from the start, and its process."""
    torch.manual_seed(0)
    classifier, process = script_util.create_classifier_and_diffusion(
        **{**PROCESS, **CLASSIFIER, "num_classes": 3, **changed}
    )
    with torch.no_grad():
        for p in classifier.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return classifier, process


# ---- the objective ----


def test_loss_and_accuracy_of_known_logits():
    """logits = log of probabilities that are written down: the loss is -log of the right one."""
    _, process = tiny()
    p = torch.tensor([[0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.03]])
    y = torch.tensor([0, 1, 4, 5, 6])
    out = ClassifierObjective(process)(
        lambda x, t: p.log().expand(5, -1),
        torch.zeros(5, 1, 8, 8),
        torch.arange(5),
        {"y": y},
        torch.zeros(5, 1, 8, 8),
    )
    torch.testing.assert_close(out["loss"], -p[0].log()[y])
    assert out["acc@1"].tolist() == [1, 0, 0, 0, 0] and out["acc@5"].tolist() == [1, 1, 1, 0, 0]


def test_fewer_classes_than_five_are_all_among_the_best_five():
    assert in_top_k(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]), 5).tolist() == [1]
    assert in_top_k(torch.zeros(8, 4), torch.arange(4).repeat(2), 1).sum() == 2, (
        "equal logits are no better than chance"
    )


@pytest.mark.parametrize("noised", [True, False])
def test_the_classifier_sees_x_t_and_t_as_guidance_will_show_them(noised):
    _, process = tiny(rescale_timesteps=True, diffusion_steps=100, timestep_respacing="10")
    images, epsilon, t = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 6, 9])
    seen = []

    def model(x, time):
        seen.extend([x, time])
        return torch.zeros(4, 3)

    out = ClassifierObjective(process, noised)(
        model, images, t, {"y": torch.tensor([0, 1, 2, 0])}, epsilon
    )
    ab = torch.from_numpy(process.alphas_cumprod)[t].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(
        seen[0], ab.sqrt() * images + (1 - ab).sqrt() * epsilon if noised else images
    )
    assert seen[1].tolist() == [10 * process.timestep_map[k] for k in t], (
        "original step, times 1000 / T"
    )
    torch.testing.assert_close(out["loss"], torch.full((4,), math.log(3)))


def test_clean_training_has_t_0_and_weight_1():
    t, weights = CleanSampler().sample(3, "cpu")
    assert t.tolist() == [0, 0, 0] and weights.tolist() == [1, 1, 1]


# ---- the loop ----


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes that a classifier can tell apart: dark, bright above, bright below."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(30):
        pixels = rng.integers(0, 80, (8, 8), dtype=np.uint8)
        if i % 3:
            pixels[slice(0, 4) if i % 3 == 1 else slice(4, 8)] += 150
        (folder / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(i % 3) / f"{i}.png")
    return str(folder)


def tiny_loop(images, out_dir, *, noised=True, validated=False, **options):
    logger.configure(str(out_dir), format_strs=["csv"])
    classifier, process = tiny()
    objective = ClassifierObjective(process, noised)
    hooks = options.pop("hooks", [])
    settings = TrainSettings(
        batch_size=6,
        ema_rates=(),
        log_interval=2,
        limits=Limits(options.pop("max_steps", 4)),
        **{"lr": 1e-3, **options},
    )
    if validated:
        val_data = load_data(
            data_dir=images,
            batch_size=6,
            image_size=8,
            channels=1,
            class_cond=True,
            deterministic=True,
        )
        hooks = [Hook(2, Validation(objective, val_data, 2, 4), averaged=False)]
    return TrainLoop(
        classifier,
        process,
        load_data(data_dir=images, batch_size=6, image_size=8, channels=1, class_cond=True),
        settings,
        objective=objective,
        schedule_sampler=None if noised else CleanSampler(),
        hooks=hooks,
    )


def weights_of(loop):
    return torch.cat([p.detach().flatten() for p in loop.model.parameters()])


@pytest.mark.parametrize("noised", [True, False])
@pytest.mark.parametrize("microbatch", [1, 4])
def test_microbatches_give_the_gradient_of_the_batch(images, tmp_path, microbatch, noised):
    def gradient(micro):
        loop = tiny_loop(images, tmp_path, microbatch=micro, noised=noised)
        loop.forward_backward(*next(loop.data))
        return torch.cat([p.grad.double().flatten() for p in loop.model.parameters()])

    whole = gradient(-1)
    assert whole.norm() > 0 and (gradient(microbatch) - whole).norm() < 1e-5 * whole.norm()


def test_the_loop_minimises_the_mean_cross_entropy(images, tmp_path):
    """Its gradient is that of F.cross_entropy on the x_t that the addressed noise gives, written
    out here.
    """
    from guided_diffusion_ip import noise
    from guided_diffusion_ip.noise import Stream

    loop = tiny_loop(images, tmp_path)
    x, cond = next(loop.data)
    loop.forward_backward(x, cond)
    t = (noise.uniform(0, Stream.TIMESTEP, torch.arange(6), 0).double() * 1000).long()
    x_t = loop.process.q_sample(
        x, t, noise.normal(0, Stream.EPSILON, torch.arange(6), 0, x.shape[1:])
    )
    loss = torch.nn.functional.cross_entropy(loop.model(x_t, t), cond["y"])
    expected = torch.autograd.grad(loss, list(loop.model.parameters()))
    for p, wanted in zip(loop.model.parameters(), expected):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-7)


def test_validation_changes_nothing_and_a_continued_run_repeats_it(images, tmp_path):
    plain = tiny_loop(images, tmp_path / "plain")
    plain.run_loop()
    straight = tiny_loop(images, tmp_path / "a", validated=True)
    straight.run_loop()
    assert torch.equal(weights_of(plain), weights_of(straight))
    tiny_loop(images, tmp_path / "b", validated=True, max_steps=2).run_loop()
    rest = tiny_loop(
        images, tmp_path / "b", validated=True, resume=str(tmp_path / "b" / "model000002.pt")
    )
    rest.run_loop()
    assert torch.equal(weights_of(straight), weights_of(rest))
    last = [csv_rows(tmp_path / run)[-1] for run in "ab"]
    for name in ("val_loss", "val_acc@1", "val_acc@5", "loss"):
        assert last[0][name] == last[1][name] != "", name
    assert not list(tmp_path.rglob("ema*")), "a classifier is not averaged"


def test_validation_is_called_in_eval_mode_without_gradients_and_its_numbers_are_averaged(
    images, tmp_path
):
    seen = []

    def validate(network, step):
        seen.append((step, loop.model.training, torch.is_grad_enabled()))
        return {"val_loss": float(step)}

    loop = tiny_loop(images, tmp_path, hooks=[Hook(1, validate, averaged=False)])
    loop.run_loop()
    assert seen == [(step, False, False) for step in (1, 2, 3, 4)] and loop.model.training
    assert [row["val_loss"] for row in csv_rows(tmp_path)] == ["1.0", "2.0", "3.5"], (
        "lines after steps 1, 2 and 4"
    )


def test_validation_does_not_depend_on_microbatches(images):
    classifier, process = tiny()
    data = load_data(
        data_dir=images, batch_size=6, image_size=8, channels=1, class_cond=True, deterministic=True
    )
    with torch.no_grad():
        whole, parts = (
            Validation(ClassifierObjective(process), data, 1, size)(classifier.eval(), 1)
            for size in (6, 4)
        )
    assert whole.keys() == parts.keys() and whole == pytest.approx(parts, rel=1e-5)


def csv_rows(folder):
    lines = [line.split(",") for line in (Path(folder) / "progress.csv").read_text().splitlines()]
    return [dict(zip(lines[0], line)) for line in lines[1:]]


class Classes:
    def __init__(self, classes, source="images"):
        self.classes, self.source = classes, source


def test_labels_mean_the_same_in_training_and_validation():
    require_same_classes(Classes(["a", "b"]), Classes(["a", "b"]))
    require_same_classes(Classes(["0", "1"]), Classes(["0"]))
    for other in (["a", "c"], ["b"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="label k must mean the same"):
            require_same_classes(Classes(["a", "b"]), Classes(other))


# ---- guidance ----


def test_the_gradient_is_that_of_log_softmax():
    """Against central differences in float64, and linear in the scale."""
    classifier = tiny()[0].double()
    x, t, y = (
        torch.randn(2, 1, 8, 8, dtype=torch.float64),
        torch.tensor([3, 700]),
        torch.tensor([2, 0]),
    )

    def log_prob(x):
        return torch.log_softmax(classifier(x, t), dim=1)[torch.arange(2), y].sum()

    direction, h = torch.randn_like(x), 1e-2
    with torch.no_grad():
        slope = (
            8 * (log_prob(x + h * direction) - log_prob(x - h * direction))
            - (log_prob(x + 2 * h * direction) - log_prob(x - 2 * h * direction))
        ) / (12 * h)
        gradient = classifier_gradient(classifier, 1.0)(x, t, y=y)
        # The embedding of t and the logits are float32, which limits the differences, not the
        # gradient.
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(classifier_gradient(classifier, 3.0)(x, t, y=y), 3 * gradient)


@pytest.mark.parametrize("use_ddim", [False, True])
def test_lambda_divides_epsilon_once_and_never_the_gradient(use_ddim):
    """One step from a known network and a constant gradient, against the formulas (clip_denoised =
    False).
    """
    lam, g = 1.25, 0.3
    process = script_util.create_gaussian_diffusion(
        steps=50, noise_schedule="cosine", eps_scaler=lam
    )
    x, t, epsilon = torch.randn(2, 1, 8, 8), torch.tensor([20, 20]), torch.randn(2, 1, 8, 8)
    step = process.ddim_sample if use_ddim else process.p_sample
    out = step(
        lambda x, t: epsilon,
        x,
        t,
        clip_denoised=False,
        cond_fn=lambda x, t, **_: g * torch.ones_like(x),
        randn_like=torch.zeros_like,
    )["sample"]
    ab, before = (float(process.alphas_cumprod[k]) for k in (20, 19))
    eps = epsilon / lam
    if use_ddim:
        eps = eps - math.sqrt(1 - ab) * g
    x_0 = (x - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
    if use_ddim:
        expected = math.sqrt(before) * x_0 + math.sqrt(1 - before) * eps
    else:
        beta = 1 - ab / before
        mean = (
            math.sqrt(before) * beta / (1 - ab) * x_0
            + math.sqrt(1 - beta) * (1 - before) / (1 - ab) * x
        )
        expected = mean + beta * g  # sigma^2 = beta: the variance is not learned
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_the_sampler_hands_the_labels_to_network_and_classifier():
    process = script_util.create_gaussian_diffusion(steps=4, noise_schedule="cosine")
    y, seen = torch.tensor([2, 1]), []

    def network(x, t, y=None):
        seen.append(y)
        return torch.zeros_like(x)

    def cond_fn(x, t, y=None):
        seen.append(y)
        return torch.zeros_like(x)

    process_sampler(process, (1, 8, 8), cond_fn=cond_fn)(network, [0, 1], {"y": y})
    assert len(seen) == 8 and all(torch.equal(got, y) for got in seen)


# ---- checkpoints ----


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"classifier_pool": "adaptive"},
        {"classifier_pool": "spatial"},
        {"classifier_pool": "spatial_v2"},
        {"classifier_resblock_updown": False, "classifier_use_scale_shift_norm": False},
        {"classifier_depth": 3},
        {"image_size": 32, "classifier_width": 64, "classifier_attention_resolutions": "16,8"},
        {"image_size": 64},
        {"num_classes": 7, "in_channels": 3},
    ],
    ids=str,
)
def test_shapes_give_away_the_flags_of_a_classifier(changed):
    wanted = {
        **PROCESS,
        **CLASSIFIER,
        "classifier_pool": "attention",
        "num_classes": 3,
        "classifier_resblock_updown": True,
        "classifier_use_scale_shift_norm": True,
        **changed,
    }
    state = tiny(**wanted)[0].state_dict()
    found = infer_classifier(state)
    assert is_classifier(state) and infer_architecture(state) == {}
    assert {
        "classifier_width",
        "classifier_depth",
        "classifier_pool",
        "num_classes",
        "in_channels",
    } <= found.keys()
    if wanted["classifier_pool"] == "attention":
        assert {"image_size", "classifier_attention_resolutions"} <= found.keys()
    if wanted["image_size"] == 64:  # 4 is no level of it, hence no attention
        wanted["classifier_attention_resolutions"] = ""
    assert found == {name: wanted[name] for name in found}


# ---- the scripts ----


@pytest.fixture(scope="module")
def guided(images, tmp_path_factory):
    """Folders of an unconditional and of a conditional diffusion model, and of a classifier, from
    real processes.
    """
    out = tmp_path_factory.mktemp("runs")
    common = [*flags(**PROCESS), "--data_dir", images, "--batch_size", "6", "--log_interval", "5"]
    train = [*common, *flags(**UNET), "--max_steps", "2", "--ema_rate", "0.5", "--num_classes", "3"]
    for name, class_cond in (("uncond", "False"), ("cond", "True")):
        check(
            launch.run(
                [
                    sys.executable,
                    "scripts/image_train.py",
                    *train,
                    "--class_cond",
                    class_cond,
                    "--out_dir",
                    str(out / name),
                ]
            )
        )
    done = launch.run(
        [
            sys.executable,
            "scripts/classifier_train.py",
            *common,
            *flags(**CLASSIFIER),
            "--num_classes",
            "3",
            "--val_data_dir",
            images,
            "--iterations",
            "10",
            "--anneal_lr",
            "True",
            "--random_flip",
            "False",
            "--out_dir",
            str(out / "classifier"),
        ]
    )
    check(done)
    return out, done.stdout


def check(done):
    assert done.returncode == 0, done.stdout + done.stderr


def test_training_a_classifier_tells_and_leaves_what_is_needed(guided):
    out, said = guided[0] / "classifier", guided[1]
    for fact in (
        "30, [1, 8, 8]",
        "3 classes from sub-folder names",
        "validation data",
        "lr falling to 0",
        "after 10 steps",
    ):
        assert fact in said, fact
    rows = csv_rows(out)
    assert [row["step"] for row in rows] == ["1", "5", "10"]
    assert {"loss", "acc@1", "acc@5", "val_loss", "val_acc@1", "val_acc@5"} <= set(rows[-1])
    assert (
        any(name in rows[-1] for name in ("acc@1_q0", "acc@1_q1")) and float(rows[-1]["acc@5"]) == 1
    )
    assert rows[0]["val_loss"] == "" and rows[1]["val_loss"] != "", "every eval_interval = 5 steps"
    assert float(rows[-1]["lr"]) == pytest.approx(3e-4 / 10)
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["classifier"]["classifier_width"] == 32 and saved["model"]["num_classes"] == 3
    assert (
        saved["classifier_train"]["iterations"] == 10
        and saved["classifier_train"]["noised"] is True
    )


def test_the_same_settings_from_the_saved_config(guided, images, tmp_path, capsys, monkeypatch):
    """config.yaml of the run, given as --config, trains the same classifier again; resumed, it goes
    on to more iterations.
    """
    again = tmp_path / "again"
    config = str(guided[0] / "classifier" / "config.yaml")
    code, _, err = run(
        "classifier_train",
        "--config",
        config,
        "--out_dir",
        str(again),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    a, b = (
        torch.load(folder / "model000010.pt", weights_only=True)
        for folder in (again, guided[0] / "classifier")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    code, said, err = run(
        "classifier_train",
        "--config",
        config,
        "--out_dir",
        str(again),
        "--resume_checkpoint",
        str(again / "model000010.pt"),
        "--iterations",
        "11",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0 and "10 steps done" in said and (again / "model000011.pt").exists(), err


def test_clean_training_and_more_classes_than_images_have(images, tmp_path, capsys, monkeypatch):
    code, said, err = run(
        "classifier_train",
        *flags(**PROCESS, **CLASSIFIER),
        "--data_dir",
        images,
        "--noised",
        "False",
        "--num_classes",
        "1000",
        "--iterations",
        "2",
        "--log_interval",
        "1",
        "--out_dir",
        str(tmp_path),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    assert "the images have 3 classes, the network 1000" in said
    row = csv_rows(tmp_path)[-1]
    assert "acc@1_q0" in row and "acc@1_q1" not in row, "all at t = 0"
    assert (
        torch.load(tmp_path / "model000002.pt", weights_only=True)["out.2.c_proj.weight"].shape[0]
        == 1000
    )


def test_two_processes_train_a_classifier(images, tmp_path):
    check(
        launch.mpiexec(
            2,
            [
                str(ROOT / "scripts" / "classifier_train.py"),
                *flags(**PROCESS, **CLASSIFIER),
                "--num_classes",
                "3",
                "--data_dir",
                images,
                "--val_data_dir",
                images,
                "--batch_size",
                "3",
                "--iterations",
                "2",
                "--eval_interval",
                "1",
                "--log_interval",
                "1",
                "--out_dir",
                str(tmp_path),
            ],
        )
    )
    rows = csv_rows(tmp_path)
    assert len(rows) == 2 and rows[0]["val_acc@1"] != "", "one rank writes"


def sampled(script, tmp_path, name, *argv, capsys, monkeypatch):
    """Pixels and labels (None without) of a run of a sampling script."""
    code, _, err = run(
        script,
        *argv,
        "--num_samples",
        "6",
        "--timestep_respacing",
        "5",
        "--out_dir",
        str(tmp_path / name),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    assert "step 5/5" in err, "the bar moves with the steps"
    with np.load(tmp_path / name / "samples_6x8x8x1.npz") as npz:
        return npz["arr_0"], npz["arr_1"] if "arr_1" in npz else None


@pytest.mark.parametrize(
    "sampler", [[], ["--use_ddim", "True", "--eps_scaler", "1.05"]], ids=["ddpm", "ddim"]
)
@pytest.mark.parametrize("kind", ["uncond", "cond"])
def test_scale_0_is_no_guidance_bitwise_and_others_guide(
    kind, sampler, guided, tmp_path, capsys, monkeypatch
):
    model = ["--model_path", str(guided[0] / kind / "ema_0.5_000002.pt"), *sampler]
    guide = [
        *model,
        "--classifier_path",
        str(guided[0] / "classifier" / "model000010.pt"),
        "--classifier_scale",
    ]
    tools = dict(capsys=capsys, monkeypatch=monkeypatch)
    plain, labels = sampled("image_sample", tmp_path, "plain", *model, **tools)
    zero, zero_labels = sampled("classifier_sample", tmp_path, "zero", *guide, "0", **tools)
    strong, strong_labels = sampled("classifier_sample", tmp_path, "strong", *guide, "200", **tools)
    np.testing.assert_array_equal(plain, zero)
    np.testing.assert_array_equal(zero_labels, strong_labels)
    assert (labels is None) == (kind == "uncond") and set(strong_labels) <= {0, 1, 2}
    if kind == "cond":
        np.testing.assert_array_equal(labels, zero_labels)
    assert (zero != strong).any()


def test_guided_samples_depend_on_seed_and_number_only_and_a_folder_on_its_settings(
    guided, tmp_path, capsys, monkeypatch
):
    argv = [
        "--model_path",
        str(guided[0] / "uncond" / "ema_0.5_000002.pt"),
        "--classifier_path",
        str(guided[0] / "classifier" / "model000010.pt"),
        "--classifier_scale",
        "20",
        "--class_ids",
        "1,2",
    ]
    tools = dict(capsys=capsys, monkeypatch=monkeypatch)
    one = sampled("classifier_sample", tmp_path, "one", *argv, "--batch_size", "6", **tools)
    two = sampled("classifier_sample", tmp_path, "two", *argv, "--batch_size", "4", **tools)
    assert np.abs(one[0].astype(int) - two[0]).max() <= 1 and set(one[1]) <= {1, 2}
    code, _, err = run(
        "classifier_sample",
        *argv,
        "--num_samples",
        "6",
        "--timestep_respacing",
        "5",
        "--out_dir",
        str(tmp_path / "one"),
        "--classifier_scale",
        "3",
        **tools,
    )
    assert code == 2 and one_line(err) and "classifier_scale 20.0 instead of 3.0" in err


def test_bare_checkpoints_are_sampled_by_flags(guided, tmp_path, capsys, monkeypatch):
    for name, source in (
        ("model.pt", "uncond/ema_0.5_000002.pt"),
        ("classifier.pt", "classifier/model000010.pt"),
    ):
        (tmp_path / name).write_bytes((guided[0] / source).read_bytes())
    bare = [
        "--model_path",
        str(tmp_path / "model.pt"),
        "--classifier_path",
        str(tmp_path / "classifier.pt"),
        "--num_samples",
        "2",
        "--timestep_respacing",
        "2",
        "--out_dir",
        str(tmp_path / "out"),
        *flags(**PROCESS, **UNET),
    ]
    tools = dict(capsys=capsys, monkeypatch=monkeypatch)
    code, _, err = run(
        "classifier_sample", *bare, *flags(**CLASSIFIER), "--num_classes", "3", **tools
    )
    assert code == 0, err
    code, _, err = run(
        "classifier_sample",
        *bare,
        "--classifier_pool",
        "adaptive",
        "--classifier_width",
        "64",
        **tools,
    )
    assert code == 2 and one_line(err)
    for needed in (
        "--classifier_width 32 ",
        "--classifier_pool attention ",
        "--num_classes 3 ",
        "--classifier_depth 1 ",
        "--classifier_attention_resolutions 4 (now 64, adaptive, 1000, 2, 32,16,8)",
    ):
        assert needed in err, err


# ---- wrong input ----

BAD_TRAINING = {
    "no data": (["--data_dir="], "give --data_dir"),
    "missing folder": (["--data_dir", "{tmp}/nowhere"], "nowhere"),
    "missing validation folder": (
        ["--val_data_dir", "{tmp}/nowhere"],
        "--val_data_dir: {tmp}/nowhere does not exist",
    ),
    "other classes in validation": (["--val_data_dir", "{tmp}/other"], "class 0 is 'x'"),
    "no classes": (["--data_dir", "{tmp}/flat"], "no classes found"),
    "npz without classes": (["--data_dir", "{tmp}/flat.npz"], "arr_1"),
    "class count": (["--num_classes", "2"], "--num_classes 3"),
    "iterations": (["--iterations", "0"], "at least 1"),
    "eval_interval": (["--eval_interval", "0"], "at least 1"),
    "pool": (["--classifier_pool", "max"], "adaptive, attention"),
    "heads": (["--classifier_attention_resolutions", "8"], "64"),
    "another script's flag": (["--eval_samples", "9"], "--eval_samples"),
    "config key": (["--config", "{tmp}/bad.yaml"], "Did you mean iterations?"),
    "resume": (["--resume_checkpoint", "{tmp}/model000009.pt"], "model000009.pt"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_input_for_training(case, images, tmp_path, capsys, monkeypatch):
    argv, hint = BAD_TRAINING[case]
    some = next(Path(images).rglob("*.png")).read_bytes()
    for name in ("flat/1.png", "other/x/1.png", "other/y/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(some)
    np.savez(tmp_path / "flat.npz", arr_0=np.zeros((4, 8, 8, 1), dtype=np.uint8))
    (tmp_path / "bad.yaml").write_text("classifier_train:\n  iteration: 3\n")
    argv = [word.replace("{tmp}", str(tmp_path)) for word in argv]
    code, _, err = run(
        "classifier_train",
        *flags(**PROCESS, **CLASSIFIER),
        "--num_classes",
        "3",
        "--data_dir",
        images,
        "--iterations",
        "1",
        "--out_dir",
        str(tmp_path / "out"),
        *argv,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err) and hint.replace("{tmp}", str(tmp_path)) in err, err
    assert not (tmp_path / "out").exists(), "nothing half-written is left behind"


BAD_SAMPLING = {
    "no model": (["--model_path="], "--model_path"),
    "no classifier": (["--classifier_path="], "--classifier_path"),
    "missing classifier": (["--classifier_path", "{tmp}/none.pt"], "none.pt"),
    "truncated classifier": (["--classifier_path", "{tmp}/truncated.pt"], "truncated.pt"),
    "malicious classifier": (["--classifier_path", "{tmp}/evil.pt"], "evil.pt"),
    "optimizer as classifier": (
        ["--classifier_path", "{runs}/classifier/opt000010.pt"],
        "model or ema file",
    ),
    "diffusion model as classifier": (
        ["--classifier_path", "{tmp}/unet.pt"],
        "it is not a classifier",
    ),
    "classifier as diffusion model": (
        ["--model_path", "{bare}/classifier.pt", *flags(**PROCESS, **UNET)],
        "it is a classifier",
    ),
    "other architecture": (
        ["--classifier_width", "64"],
        "the classifier was trained with classifier_width 32",
    ),
    "class count": (["--num_classes", "4"], "the classifier was trained with num_classes 3"),
    "class count of the model": (
        ["--model_path", "{runs}/cond/model000002.pt", "--num_classes", "4"],
        "the checkpoint was trained with num_classes 3",
    ),
    "two class counts": (
        ["--classifier_path", "{four}/model.pt", "--model_path", "{runs}/cond/model000002.pt"],
        "num_classes 4",
    ),
    "image size": (["--classifier_path", "{size}/model.pt"], "image_size 16"),
    "noise schedule": (["--classifier_path", "{linear}/model.pt"], "noise_schedule 'linear'"),
    "scale": (["--classifier_scale", "-1"], "at least 0"),
    "classes": (["--class_ids", "0-9"], "knows 0 to 2"),
    "eta without ddim": (["--eta", "0.5"], "--use_ddim True"),
}


@pytest.mark.parametrize("case", BAD_SAMPLING)
def test_bad_input_for_sampling(case, guided, tmp_path, capsys, monkeypatch):
    runs = guided[0]
    config = (runs / "classifier" / "config.yaml").read_text()
    classifier = (runs / "classifier" / "model000010.pt").read_bytes()
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "truncated.pt").write_bytes(classifier[:1000])
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(str(tmp_path / "pwned"))))
    (tmp_path / "unet.pt").write_bytes((runs / "uncond" / "model000002.pt").read_bytes())
    for folder, old, new in (
        ("four", "num_classes: 3", "num_classes: 4"),
        ("size", "image_size: 8", "image_size: 16"),
        ("linear", "noise_schedule: cosine", "noise_schedule: linear"),
        ("bare", None, None),
    ):
        (tmp_path / folder).mkdir()
        if old:
            assert old in config
            (tmp_path / folder / "config.yaml").write_text(config.replace(old, new))
        (tmp_path / folder / ("model.pt" if old else "classifier.pt")).write_bytes(classifier)
    argv, hint = BAD_SAMPLING[case]
    for name in ("four", "size", "linear", "bare"):
        argv = [word.replace(f"{{{name}}}", str(tmp_path / name)) for word in argv]
    argv = [word.replace("{tmp}", str(tmp_path)).replace("{runs}", str(runs)) for word in argv]
    code, _, err = run(
        "classifier_sample",
        "--model_path",
        str(runs / "uncond" / "model000002.pt"),
        "--classifier_path",
        str(runs / "classifier" / "model000010.pt"),
        "--num_samples",
        "2",
        "--timestep_respacing",
        "2",
        "--out_dir",
        str(tmp_path / "out"),
        *argv,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err) and hint in err, err
    assert not (tmp_path / "out").exists() and not (tmp_path / "pwned").exists()


def test_a_classifier_of_clean_images_is_pointed_out(guided, tmp_path, capsys, monkeypatch):
    source = guided[0] / "classifier"
    (tmp_path / "config.yaml").write_text(
        (source / "config.yaml").read_text().replace("noised: true", "noised: false")
    )
    (tmp_path / "model.pt").write_bytes((source / "model000010.pt").read_bytes())
    with pytest.warns(UserWarning, match="trained on clean images"):
        code, _, err = run(
            "classifier_sample",
            "--model_path",
            str(guided[0] / "uncond" / "model000002.pt"),
            "--classifier_path",
            str(tmp_path / "model.pt"),
            "--num_samples",
            "1",
            "--timestep_respacing",
            "2",
            "--out_dir",
            str(tmp_path / "out"),
            capsys=capsys,
            monkeypatch=monkeypatch,
        )
    assert code == 0, err
