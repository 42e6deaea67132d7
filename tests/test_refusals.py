"""What the samplers refuse because it means nothing: one line that says why, exit code 2, and
nothing written. And what they allow.

The models are tiny, untrained, and lie bare beside nothing, as published ones do: a YAML says what
they are.
"""

import sys

import launch
import numpy as np
import pytest
import torch
import yaml
from test_scripts import flags, one_line, run

from guided_diffusion_ip.script_util import (
    create_classifier,
    create_model_and_diffusion,
    sr_create_model_and_diffusion,
)
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.sample_checks import check_request

MODEL = dict(
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    num_head_channels=32,
    learn_sigma=True,
    class_cond=True,
    num_classes=3,
)
CLASSIFIER = dict(classifier_width=32, classifier_depth=1, classifier_attention_resolutions="4")
SIZES = dict(large_size=8, small_size=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with bare checkpoints, configs like those of the released models, and five
    low-resolution images.
    """
    folder = tmp_path_factory.mktemp("bare")
    torch.manual_seed(0)
    without_size = {name: value for name, value in MODEL.items() if name != "image_size"}
    networks = {
        "cond": create_model_and_diffusion(**MODEL)[0],
        "uncond": create_model_and_diffusion(**MODEL | {"class_cond": False})[0],
        "free": create_model_and_diffusion(**MODEL, null_class=True)[0],
        "classifier": create_classifier(
            **CLASSIFIER,
            image_size=8,
            in_channels=1,
            num_classes=3,
            classifier_use_fp16=False,
            classifier_use_scale_shift_norm=True,
            classifier_resblock_updown=True,
            classifier_pool="attention",
        ),
        "upsampler": sr_create_model_and_diffusion(**without_size, **SIZES)[0],
    }
    for name, network in networks.items():
        for p in network.parameters():
            p.data.add_(0.02 * torch.randn(p.shape))
        torch.save(network.state_dict(), folder / f"{name}.pt")
    for name, changed in (
        ("cond", {}),
        ("uncond", {"class_cond": False}),
        ("free", {"null_class": True}),
    ):
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump(
                {
                    "model": MODEL | changed,
                    "classifier": CLASSIFIER,
                    "super_res": SIZES,
                    "diffusion": {"diffusion_steps": 1000},
                    "sample": {"num_samples": 2, "timestep_respacing": "4"},
                    "classifier_sample": {"classifier_scale": 1.0},
                    "paper": {"eps_scaler": {4: 1.02}, "classifier_scale": 0.5},
                }
            )
        )
    np.savez(
        folder / "small.npz",
        arr_0=np.arange(80, dtype=np.uint8).reshape(5, 4, 4, 1),
        arr_1=np.array([0, 1, 2, 0, 1]),
    )
    return folder


# Which model each script samples unless the case names another.
USUAL = {
    "image_sample": ["--config", "{home}/cond.yaml", "--model_path", "{home}/cond.pt"],
    "classifier_sample": [
        "--config",
        "{home}/cond.yaml",
        "--model_path",
        "{home}/cond.pt",
        "--classifier_path",
        "{home}/classifier.pt",
    ],
    "super_res_sample": [
        "--config",
        "{home}/cond.yaml",
        "--model_path",
        "{home}/upsampler.pt",
        "--base_samples",
        "{home}/small.npz",
    ],
}
UNCOND = "--config {home}/uncond.yaml --model_path {home}/uncond.pt"
FREE = "--config {home}/free.yaml --model_path {home}/free.pt"
EVERY = tuple(USUAL)
GUIDABLE = ("image_sample", "classifier_sample")

# (scripts, flags, what the line must say)
REFUSED = [
    (EVERY, "--eta 0.5", "means nothing for DDPM: add --use_ddim True"),
    (EVERY, "--use_ddim True --eta nan", "no finite number"),
    (EVERY, "--use_ddim True --eta inf", "no finite number"),
    (EVERY, "--use_ddim True --eta -0.1", "must be at least 0"),
    (EVERY, "--guidance_scale 2", "no label for 'no class'"),
    (EVERY, "--guidance_scale inf", "no finite number"),
    (EVERY, "--guidance_scale -1", "must be at least 0"),
    (GUIDABLE, f"{UNCOND} --guidance_scale 2", "this model is unconditional and knows none"),
    (
        ("image_sample",),
        f"{UNCOND} --class_ids 1",
        "--class_ids 1 asks for classes, but this model is unconditional",
    ),
    (("super_res_sample",), "--class_ids 1", "the labels come with the low-resolution images"),
    (GUIDABLE, "--class_ids 0-3", "asks for class 3, but the model knows 0 to 2"),
    (
        GUIDABLE,
        f"{FREE} --class_ids 3",
        "asks for class 3, but the model knows 0 to 2",
    ),  # 3 is 'no class'
    (GUIDABLE, "--class_ids 2-1", "runs backwards: use 1-2"),
    (GUIDABLE, "--class_ids cat", "use numbers and ranges"),
    (EVERY, "--eps_scaler 1.0,1.1", "one value per step"),
    (EVERY, "--eps_scaler 0", "lambda(t) > 0"),
    (EVERY, "--eps_scaler 1 --eps_scaler_k -0.5", "lambda(t) > 0"),
    (EVERY, "--eps_scaler 1 --eps_scaler_k nan", "no finite number"),
    (
        EVERY,
        "--eps_scaler published --timestep_respacing 5",
        "no lambda was published for 5 steps; there is one for 4",
    ),
    (EVERY, "--eps_scaler published --use_ddim True", "belong to DDPM sampling"),
    (
        EVERY,
        "--eps_scaler published --eps_scaler_k 0.001",
        "adds a slope to it: leave one of them out",
    ),
    (EVERY, "--eps_scaler 1.02 --eps_schedule {home}/none.yaml", "give one of them"),
    (EVERY, "--num_samples 0", "must be at least 1"),
    (EVERY, "--batch_size 0", "must be at least 1"),
    (EVERY, "--timestep_respacing 1001", "give 1 to 1000"),
    (EVERY, "--timestep_respacing 0", "give 1 to 1000"),
    (
        EVERY,
        "--timestep_respacing ddim37",
        "possible near it: ddim36, ddim38, or 37 without 'ddim'",
    ),
    (EVERY, "--clip_denoised maybe", "expected true or false"),
    (EVERY, "--seed -1", "must be at least 0"),
    (("classifier_sample",), "--classifier_scale nan", "no finite number"),
    (("classifier_sample",), "--classifier_scale -2", "must be at least 0"),
    (("classifier_sample",), "--classifier_path=", "no classifier: give --classifier_path"),
    (("image_sample",), "--classifier_scale 2", "unknown argument --classifier_scale"),
    (("super_res_sample",), "--classifier_scale 2", "unknown argument --classifier_scale"),
    (("super_res_sample",), "--large_size 10", "must be a multiple of small_size"),
]
CASES = [(script, text, hint) for scripts, text, hint in REFUSED for script in scripts]


def command_line(script, text, home, out):
    usual = USUAL[script]
    words = text.split()
    if (
        "--config" in words and script == "classifier_sample"
    ):  # the case brings a diffusion model of its own
        words += usual[4:]
    elif "--config" not in words:
        words = [*usual, *words]
    return [word.replace("{home}", str(home)) for word in (*words, "--out_dir", str(out))]


@pytest.mark.parametrize(
    "script, text, hint", CASES, ids=[f"{script[:5]} {text}" for script, text, _ in CASES]
)
def test_refused_with_the_reason(script, text, hint, home, tmp_path, capsys, monkeypatch):
    code, _, err = run(
        script,
        *command_line(script, text, home, tmp_path / "out"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err) and hint in err, err
    assert not (tmp_path / "out").exists()


# What looks odd and has a meaning: (scripts, flags, what the output says).
ALLOWED = [
    (EVERY, "--timestep_respacing ddim4", "DDPM, steps ddim4"),  # DDPM on DDIM's steps
    (EVERY, "--use_ddim True --timestep_respacing 4 --eta 1", "DDIM, eta 1, steps 4"),
    (
        EVERY,
        "--eps_scaler 1.01,1.02,1.03,1.04 --eps_scaler_k 0.001",
        "1.01 to 1.04, one per step + 0.001 t",
    ),
    (EVERY, "--use_ddim True --eps_scaler 1.02", "lambda 1.02"),
    (
        ("image_sample", "super_res_sample"),
        "--eps_scaler published",
        "with scale 0.5 (classifier_sample.py); here it is 0",
    ),
    (
        ("classifier_sample",),
        "--classifier_scale 0",
        "guides nothing; the images are those of image_sample.py",
    ),
    (("classifier_sample",), "--eps_scaler published --classifier_scale 0.5", "lambda 1.02"),
    (
        ("classifier_sample",),
        f"{UNCOND} --class_ids 1",
        "guided by",
    ),  # the classifier alone says which class
    (
        ("classifier_sample",),
        f"{FREE} --guidance_scale 2",
        "guidance scale 2, guided by",
    ),  # both push towards the class
    (("super_res_sample",), "--num_samples 7 --batch_size 3", "each of them 1.4 times"),
]
FINE = [(script, text, said) for scripts, text, said in ALLOWED for script in scripts]


@pytest.mark.parametrize(
    "script, text, said", FINE, ids=[f"{script[:5]} {text}" for script, text, _ in FINE]
)
def test_odd_but_meaningful(script, text, said, home, tmp_path, capsys, monkeypatch):
    code, out, err = run(
        script,
        *command_line(script, text, home, tmp_path / "out"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0 and said in out, out + err
    assert list((tmp_path / "out").glob("samples_*x8x8x1.npz"))


def test_the_usual_gives_no_notes():
    for script in ("image_sample", "classifier_sample"):
        assert check_request(parse(script, "", ["--class_cond", "True"])) == []
    scale = ["--config", "configs/imagenet128.yaml", "--eps_scaler", "published"]
    assert check_request(parse("classifier_sample", "", scale)) == []
    assert "scale 0.5" in check_request(parse("image_sample", "", scale))[0]


@pytest.mark.parametrize(
    "script, text, hint",
    [
        ("image_sample", f"{UNCOND} --class_ids 1", "this model is unconditional"),
        (
            "classifier_sample",
            "--eps_scaler published --eps_scaler_k 0.001",
            "leave one of them out",
        ),
        ("super_res_sample", "--guidance_scale 2", "no label for 'no class'"),
    ],
)
def test_a_real_process_ends_with_one_line_and_code_2(script, text, hint, home, tmp_path):
    done = launch.run(
        [
            sys.executable,
            f"scripts/{script}.py",
            *command_line(script, text, home, tmp_path / "out"),
        ]
    )
    assert done.returncode == 2 and one_line(done.stderr) and hint in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_two_processes_refuse_together(home, tmp_path):
    done = launch.mpiexec(
        2,
        [
            "scripts/classifier_sample.py",
            *command_line("classifier_sample", "--class_ids 2-1", home, tmp_path / "out"),
        ],
    )
    assert (
        done.returncode != 0 and "runs backwards" in done.stderr and not (tmp_path / "out").exists()
    )


def test_bare_checkpoints_need_only_their_config(home, tmp_path, capsys, monkeypatch):
    """The same images come out with every flag on the command line; the wrong config says what the
    checkpoint needs.
    """
    tools = dict(capsys=capsys, monkeypatch=monkeypatch)
    code, _, err = run(
        "classifier_sample",
        *command_line("classifier_sample", "", home, tmp_path / "config"),
        **tools,
    )
    assert code == 0, err
    argv = command_line("classifier_sample", "--config {home}/none", home, tmp_path / "flags")[2:]
    code, _, err = run(
        "classifier_sample",
        *argv,
        "--model_path",
        str(home / "cond.pt"),
        *flags(**MODEL, **CLASSIFIER),
        "--num_samples",
        "2",
        "--timestep_respacing",
        "4",
        "--classifier_scale",
        "1",
        **tools,
    )
    assert code == 0, err
    one, two = (np.load(tmp_path / name / "samples_2x8x8x1.npz") for name in ("config", "flags"))
    assert all((one[key] == two[key]).all() for key in ("arr_0", "arr_1"))
    code, _, err = run(
        "image_sample",
        "--config",
        str(home / "uncond.yaml"),
        "--model_path",
        str(home / "cond.pt"),
        "--out_dir",
        str(tmp_path / "out"),
        **tools,
    )
    assert code == 2 and one_line(err) and "it needs --class_cond True (now False)" in err
