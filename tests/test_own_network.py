"""A network of the user's own: --network MODULE:CLASS trains, is sampled, and no file of this
library is touched.
"""

import sys

import numpy as np
import pytest
import torch
import yaml
from test_scripts import one_line, run

from guided_diffusion_ip.api import register_network, sample, sampling_request
from guided_diffusion_ip.networks.protocol import Network
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.models import NETWORKS, create_network

MODULE = """
import torch
from torch import nn


class MyNet(nn.Module):
    def __init__(self, image_size, in_channels, out_channels, dropout, num_classes=None, width=8):
        super().__init__()
        print("MyNet", image_size, in_channels, out_channels, dropout, num_classes, width)
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.labels = nn.Embedding(num_classes, width) if num_classes else None
        self.last = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(width, out_channels, 1))

    def forward(self, x, t, y=None):
        h = self.first(x) + t.float()[:, None, None, None] / 1000
        if self.labels is not None:
            h = h + self.labels(y)[:, :, None, None]
        return self.last(h)
"""
NETWORK = ["--network", "my_module:MyNet"]
SMALL = ["--image_size", "8", "--in_channels", "1", "--diffusion_steps", "30"]


@pytest.fixture
def trained(tmp_path, capsys, monkeypatch):
    """Two steps of training in tmp_path/run, from a folder that has my_module.py."""
    (tmp_path / "my_module.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels, arr_1=np.arange(6) % 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    code, out, err = run(
        "image_train",
        *(*NETWORK, *SMALL, "--network_args", "{width: 6}", "--class_cond", "True"),
        *("--data_dir", "images.npz", "--batch_size", "2", "--max_steps", "2"),
        *("--dropout", "0.1", "--out_dir", "run", "--num_workers", "0"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    assert "MyNet 8 1 1 0.1 3 6" in out
    return tmp_path / "run" / "ema_0.9999_000002.pt"


def test_it_trains_and_is_sampled_when_it_is_named_again(trained, capsys, monkeypatch):
    saved = yaml.safe_load((trained.parent / "config.yaml").read_text())["model"]
    assert (saved["framework"], saved["network_args"]) == ("my_module:MyNet", "{width: 6}")
    command = ["--model_path", str(trained), "--num_samples", "3", "--out_dir", "samples"]
    tools = dict(capsys=capsys, monkeypatch=monkeypatch)
    code, out, err = run("image_sample", *command, *NETWORK, **tools)
    assert code == 0, err
    assert np.load("samples/samples_3x8x8x1.npz")["arr_0"].shape == (3, 8, 8, 1)
    made = yaml.safe_load(open("samples/settings.yaml"))
    assert (made["framework"], made["network_args"]) == ("my_module:MyNet", "{width: 6}")
    code, _, err = run("image_sample", *command, *NETWORK, "--network_args", "{width: 7}", **tools)
    assert code == 2 and "trained with network_args '{width: 6}'" in err
    heun = ["--solver", "heun", "--edm_steps", "2", "--out_dir", "heun"]
    assert run("image_sample", *command[:4], *heun, *NETWORK, **tools)[0] == 0


def test_no_file_can_have_code_run(trained, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    tools = dict(capsys=capsys, monkeypatch=monkeypatch)
    for argv in (
        ["image_sample", "--model_path", str(trained)],
        ["image_sample", "--config", str(trained.with_name("config.yaml")), "--model_path", "x.pt"],
        ["image_train", "--resume", str(trained.parent)],
        ["image_nll", "--model_path", str(trained), "--data_dir", "images.npz"],
    ):
        code, _, err = run(*argv, **tools)
        assert code == 2 and one_line(err) and "give --network my_module:MyNet" in err, err
    assert "my_module" not in sys.modules


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--network", "nowhere:MyNet"], "no module nowhere"),
        (["--network", "my_module:MyNex"], "no MyNex. Did you mean MyNet?"),
        (["--network", "mine"], "MODULE:CLASS"),
        ([*NETWORK, "--network_args", "{widht: 3}"], "no 'widht'. Did you mean width?"),
        ([*NETWORK, "--network_args", "3"], "YAML mapping"),
        (["--network", "collections:UserDict"], "no torch.nn.Module"),
        ([*NETWORK, "--precision", "bf16"], "no method convert_to_bf16"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(trained, argv, words, capsys, monkeypatch):
    command = ["--config", "none.yaml", "--model_path", str(trained), *SMALL, "--class_cond", "1"]
    (trained.parent.parent / "none.yaml").write_text("{}\n")
    (trained.with_name("config.yaml")).unlink()
    for state in trained.parent.glob("state*.pt"):
        state.unlink()
    classes = ["--num_classes", "3"]
    if "--network_args" not in argv:
        argv = [*argv, *(["--network_args", "{width: 6}"] if "MyNet" in argv[1] else [])]
    tools = dict(capsys=capsys, monkeypatch=monkeypatch)
    code, _, err = run("image_sample", *command, *classes, *argv, **tools)
    assert code == 2 and one_line(err) and words in err, err


def test_from_python(tmp_path, monkeypatch):
    def tiny(in_channels, out_channels):
        class Tiny(torch.nn.Conv2d):
            def forward(self, x, t):
                return super().forward(x)

        return Tiny(in_channels, out_channels, 1)

    register_network("tiny", tiny)
    try:
        network = create_network({"framework": "tiny", "in_channels": 1, "learn_sigma": True})
        assert isinstance(network, Network) and network.weight.shape == (2, 1, 1, 1)
        assert parse("image_sample", "", ["--network", "tiny"]).framework == "tiny"
        path = tmp_path / "tiny.pt"
        torch.save(network.state_dict(), path)
        request = sampling_request(
            model_path=str(path),
            network="tiny",
            image_size=8,
            in_channels=1,
            learn_sigma=True,
            diffusion_steps=30,
            num_samples=2,
        )
        assert np.load(sample(request))["arr_0"].shape == (2, 8, 8, 1)
    finally:
        del NETWORKS["tiny"]
