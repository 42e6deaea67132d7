"""The bar of a sampling or likelihood run: it moves with the network's calls, also where stderr is
a file.
"""

import io
import re
import sys

import numpy as np
import pytest
import torch
from test_scripts import TINY, flags, run

from guided_diffusion_ip import script_util
from guided_diffusion_ip.data.npz_io import write_npz
from guided_diffusion_ip.runs import progress
from guided_diffusion_ip.runs.progress import ImageBar


def states(err):
    """[(images done, step, steps)] of every state that a bar left on stderr."""
    found = re.findall(r"\| ([\d.]+)/\d+ img \[[^\]]*, step (\d+)/(\d+)\]", err)
    return [(float(n), int(step), int(steps)) for n, step, steps in found]


@pytest.fixture
def shows_all(monkeypatch):
    monkeypatch.setattr(progress, "_FILE_S", 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    model, _ = script_util.create_model_and_diffusion(**TINY)
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize(
    "more, steps",
    [
        (["--timestep_respacing", "7"], 7),
        (["--use_ddim", "True", "--timestep_respacing", "ddim5"], 5),
        (["--sampler", "heun", "--edm_steps", "4"], 7),
        (["--sampler", "euler", "--edm_steps", "4"], 4),
    ],
)
def test_each_step_of_each_sampler_is_shown(
    more, steps, checkpoint, shows_all, tmp_path, capsys, monkeypatch
):
    code, _, err = run(
        "image_sample",
        *flags(**TINY),
        "--model_path",
        checkpoint,
        "--num_samples",
        "6",
        "--batch_size",
        "4",
        "--out_dir",
        str(tmp_path),
        *more,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    seen = states(err)
    for start, count in ((0, 4), (4, 2)):
        for step in range(1, steps + 1):
            wanted = start + count * step / steps
            assert any(abs(n - wanted) < 0.01 and (a, b) == (step, steps) for n, a, b in seen), (
                wanted,
                step,
                err,
            )
    assert max(n for n, _, _ in seen) == 6


def test_each_step_of_a_likelihood_is_shown(checkpoint, shows_all, tmp_path, capsys, monkeypatch):
    write_npz(tmp_path / "images.npz", {"arr_0": np.zeros((3, 8, 8, 1), np.uint8)})
    code, _, err = run(
        "image_nll",
        *flags(**TINY),
        "--model_path",
        checkpoint,
        "--data_dir",
        str(tmp_path / "images.npz"),
        "--timestep_respacing",
        "5",
        "--batch_size",
        "2",
        "--out_dir",
        str(tmp_path / "out"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    assert {(step, steps) for _, step, steps in states(err)} == {(k, 5) for k in range(1, 6)}
    assert max(n for n, _, _ in states(err)) == 3


def test_a_file_gets_few_states_and_the_last_one():
    """At once, not at the end of a batch: but a log keeps every state, so that there must not be
    one per call.
    """
    sys.stderr, stderr = io.StringIO(), sys.stderr
    try:
        with ImageBar("sampling", 4, 0, 1000) as bar, bar.batch(lambda x: x, 4) as model:
            for i in range(1000):
                assert model(i) == i
        text = sys.stderr.getvalue()
    finally:
        sys.stderr = stderr
    assert 1 <= len(states(text)) <= 3 and states(text)[-1] == (4, 1000, 1000)


def test_a_network_that_is_called_more_or_less_often_does_not_move_the_bar_beyond_its_batch(
    shows_all, capsys
):
    with ImageBar("sampling", 8, 0, 10) as bar:
        for calls in (3, 25):
            with bar.batch(lambda: None, 4) as model:
                for _ in range(calls):
                    model()
    seen = [n for n, _, _ in states(capsys.readouterr().err)]
    assert seen == sorted(seen) and seen[-1] == 8 and max(seen) <= 8
    assert sum(n == 4 for n in seen) == 1
