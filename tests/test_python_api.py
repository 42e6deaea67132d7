"""A request from Python does what the command line does, bit for bit, and is checked as it is."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from golden_tools import load_seeded_weights
from test_scripts import run

from guided_diffusion_ip.api import likelihood_request, measure_likelihood, sample, sampling_request
from guided_diffusion_ip.script_util import create_model_and_diffusion

MODEL = dict(
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = load_seeded_weights(create_model_and_diffusion(**MODEL)[0])
    torch.save(model.state_dict(), folder / "ema_0.9999_000010.pt")
    sections = {"model": MODEL, "diffusion": {"noise_schedule": "cosine"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return str(folder / "ema_0.9999_000010.pt")


REQUESTS = [
    dict(timestep_respacing="3", eps_scaler=1.01),
    dict(use_ddim=True, timestep_respacing="ddim4", seed=2),
    dict(solver="heun", edm_steps=3),
]


@pytest.mark.parametrize("flags", REQUESTS)
def test_the_images_are_those_of_the_command_line(flags, checkpoint, tmp_path, capsys, monkeypatch):
    shared = dict(flags, model_path=checkpoint, num_samples=3, batch_size=2)
    request = sampling_request(**shared, out_dir=str(tmp_path / "python"))
    path = sample(request)
    argv = [word for name, value in shared.items() for word in (f"--{name}", str(value))]
    out = ["--out_dir", str(tmp_path / "shell")]
    code, _, err = run("image_sample", *argv, *out, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, err
    ours, theirs = (tmp_path / name / "samples_3x8x8x1.npz" for name in ("python", "shell"))
    assert str(ours) == path and ours.read_bytes() == theirs.read_bytes()
    settings = [(tmp_path / name / "settings.yaml").read_text() for name in ("python", "shell")]
    assert settings[0] == settings[1] == yaml.safe_dump(request.identity, sort_keys=False)


def test_likelihoods_likewise(checkpoint, tmp_path, capsys, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    shared = dict(
        model_path=checkpoint, data_dir=str(tmp_path / "images.npz"), timestep_respacing="3"
    )
    result = measure_likelihood(likelihood_request(**shared, out_dir=str(tmp_path / "python")))
    argv = [word for name, value in shared.items() for word in (f"--{name}", str(value))]
    out = ["--out_dir", str(tmp_path / "shell")]
    code, told, err = run("image_nll", *argv, *out, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and f"{result['total_bpd']:.4f}" in told, err
    ours, theirs = (tmp_path / name / "total_bpd.npz" for name in ("python", "shell"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_request_says_what_was_settled_and_stays_so(checkpoint):
    request = sampling_request(model_path=checkpoint, timestep_respacing="5", num_samples=4)
    assert (request.solver, request.steps, request.precision) == ("ddpm", 5, "fp32")
    assert (request.image_size, request.class_ids, request.num_samples) == ((8, 8), None, 4)
    assert request.process["noise_schedule"] == "cosine" and request.network["num_channels"] == 32
    assert "DDPM, steps 5, lambda 1" in request.text
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seed = 1
    with pytest.raises(TypeError):
        request.settled.values["seed"] = 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(num_sample=3), "Did you mean --num_samples"),
        (dict(eta=0.5), "use_ddim"),
        (dict(num_samples=0), "at least 1"),
        (dict(solver="heun", sampler="euler"), "one flag"),
        (dict(num_channels=64), "trained with num_channels 32"),
        (dict(guidance_scale=2), "unconditional"),
    ],
)
def test_the_same_checks(flags, words, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=words):
        sample(sampling_request(model_path=checkpoint, out_dir=str(tmp_path), **flags))
