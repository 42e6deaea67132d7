"""Measuring runs: interrupted, continued, shared by processes; and the scripts as a user runs them."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import launch
from golden_tools import seeded_checkpoint
from guided_diffusion_ip.data.image_set import open_image_set
from guided_diffusion_ip.exposure_bias.measure_run import MeasureRun, spread_over
from guided_diffusion_ip.exposure_bias.measures import NAMES, create_measures
from guided_diffusion_ip.exposure_bias.setup import RealImages
from guided_diffusion_ip.generation.sample_batch import Sampler
from guided_diffusion_ip.metrics.features import PixelSpace
from guided_diffusion_ip.script_util import create_model_and_diffusion
from test_likelihood import TINY
from test_scripts import flags, one_line, run

ROOT = Path(__file__).resolve().parent.parent
COUNT, SET = 7, 15
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, arr_0=rng.integers(0, 256, (SET, 8, 8, 1), dtype=np.uint8), arr_1=np.arange(SET) // 5)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return seeded_checkpoint(tmp_path_factory.mktemp("run") / "model.pt", create_model_and_diffusion(**TINY)[0])


def measuring(out, images, checkpoint, batch_size, model=None, **settings):
    """A MeasureRun in this process: what it returns."""
    network, diffusion = create_model_and_diffusion(**TINY, timestep_respacing="5", eps_scaler=1.01)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    real = RealImages(open_image_set(images, (8, 8), 1, num_classes=3), spread_over(SET, COUNT))
    work = MeasureRun(create_measures(NAMES, (2, 5), PixelSpace()), Sampler(diffusion, (1, 8, 8)), COUNT, real, str(out),
                      {"seed": 0, **settings})
    return work(model(network) if model else network, batch_size, CPU)


def arrays(out):
    with np.load(Path(out) / "measures.npz") as npz:
        return {name: npz[name] for name in npz.files}


@pytest.fixture(scope="module")
def reference(images, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    return measuring(out, images, checkpoint, COUNT), arrays(out)


def assert_equal_but_for_rounding(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-6, err_msg=name)


def test_what_a_run_leaves(images, checkpoint, reference, tmp_path):
    content, found = reference
    assert content["num_images"] == COUNT and content["num_timesteps"] == 5 and content["lambda"] == [1.01] * 5
    assert set(content["measures"]) == set(NAMES) and content["timestep_map"] == [0, 2, 4, 7, 9]
    np.testing.assert_allclose(content["measures"]["norm"]["ratio"], found["norm.ratio"])
    assert content["measures"]["accumulation"]["features"] == "pixels" and found["accumulation.frechet"].shape == (2,)
    measuring(tmp_path, images, checkpoint, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["measures.json", "measures.npz", "settings.yaml"]


class Dies(Exception):
    pass


def counting(calls, limit=10**9):
    def wrap(network):
        def model(x, t, **kwargs):
            if len(calls) == limit:
                raise Dies
            calls.append(len(x))
            return network(x, t, **kwargs)
        return model
    return wrap


def test_an_interrupted_run_is_continued_and_measures_no_image_twice(images, checkpoint, reference, tmp_path):
    per_image = 5 + 5 + 5 + (2 + 2) + (5 + 5) - 5  # inputs, chain, data; accumulation's K = 5 shares the data walk
    for limit in (2 * per_image + 3, 1 * per_image + 1):  # dies in the third batch, then in the second of a new start
        with pytest.raises(Dies):
            measuring(tmp_path, images, checkpoint, 1, counting([], limit))
    assert [p.name for p in sorted((tmp_path / "partial").iterdir())] == ["sums-0000-0000.npz", "sums-0001-0000.npz"]
    calls = []
    measuring(tmp_path, images, checkpoint, 3, counting(calls))
    assert sum(calls) == (COUNT - 3) * per_image
    assert_equal_but_for_rounding(arrays(tmp_path), reference[1])
    assert not (tmp_path / "partial").exists()
    calls.clear()
    assert measuring(tmp_path, images, checkpoint, 3, counting(calls)) == json.loads((tmp_path / "measures.json").read_text())
    assert calls == [], "a finished run is not computed again"


def test_another_setting_is_refused(images, checkpoint, tmp_path):
    with pytest.raises(Dies):
        measuring(tmp_path, images, checkpoint, 1, counting([], 3))
    with pytest.raises(ValueError, match="holds measures made with seed 0 instead of 1"):
        measuring(tmp_path, images, checkpoint, 1, seed=1)


def arguments(images, checkpoint, **more):
    return flags(**{**TINY, "model_path": checkpoint, "data_dir": images, "num_images": COUNT, "timestep_respacing": 5,
                    "batch_size": 2, **more})


def test_two_processes_measure_what_one_does(images, checkpoint, reference, tmp_path):
    out = tmp_path / "two"
    done = launch.mpiexec(2, ["scripts/exposure_bias.py", *arguments(
        images, checkpoint, out_dir=out, eps_scaler=1.01, accumulation_steps="2,5", plots=False)])
    assert done.returncode == 0, done.stderr
    assert_equal_but_for_rounding(arrays(out), reference[1])
    assert done.stdout.count("result:") == 1


def test_the_script_draws_every_measure(images, checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    code, out, err = run("exposure_bias", *arguments(images, checkpoint, out_dir=tmp_path), capsys=capsys,
                         monkeypatch=monkeypatch)
    assert code == 0, err
    for name in NAMES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / f"{name}.svg").read_text() and f"{name}.png" in out and f"\n{name}:" in out
    assert "images: 7 spread over" in out and "DDPM, steps 5, lambda 1" in out


def test_ddim_a_subset_of_measures_and_the_set_is_covered_evenly(images, checkpoint, tmp_path, capsys, monkeypatch):
    code, out, err = run("exposure_bias", *arguments(images, checkpoint, out_dir=tmp_path, use_ddim=True, measures="variance",
                                                     plots=False), capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, err
    content = json.loads((tmp_path / "measures.json").read_text())
    assert set(content["measures"]) == {"variance"} and content["settings"]["use_ddim"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["measures.json", "measures.npz", "settings.yaml"]
    with np.load(images) as npz:
        x = npz["arr_0"][[0, 2, 4, 6, 8, 10, 12]] / 127.5 - 1
    assert content["measures"]["variance"]["final_expected"] == pytest.approx(x.var(axis=0, ddof=1).mean(), rel=1e-5)


def test_calibrate_then_sample(images, checkpoint, tmp_path, capsys, monkeypatch):
    schedule = tmp_path / "eps.yaml"
    code, out, err = run("calibrate_eps", *arguments(images, checkpoint, by="variance", out=schedule), capsys=capsys,
                         monkeypatch=monkeypatch)
    assert code == 0, err
    assert f"schedule: {schedule}" in out and "uniform b = " in out
    content = yaml.safe_load(schedule.read_text())
    assert content["steps"] == 5 and len(content["lambda"]) == 5 and content["settings"]["by"] == "variance"
    assert content["settings"]["num_images"] == COUNT and len(content["how"]) == 5

    content["lambda"] = [1.0, 1.01, 1.02, 1.03, 1.04]
    schedule.write_text(yaml.safe_dump(content))
    sampling = flags(**TINY, model_path=checkpoint, num_samples=2, timestep_respacing=5)

    def sample(out_dir, *more):
        code, said, err = run("image_sample", *sampling, *flags(out_dir=out_dir), *more, capsys=capsys, monkeypatch=monkeypatch)
        assert code == 0, err
        with np.load(out_dir / "samples_2x8x8x1.npz") as npz:
            return said, npz["arr_0"], yaml.safe_load((out_dir / "settings.yaml").read_text())["eps_scaler"]

    said, by_file, recorded = sample(tmp_path / "file", "--eps_schedule", str(schedule))
    _, by_hand, _ = sample(tmp_path / "hand", "--eps_scaler", "1.0,1.01,1.02,1.03,1.04")
    _, plain, _ = sample(tmp_path / "plain")
    assert np.array_equal(by_file, by_hand) and not np.array_equal(by_file, plain)
    assert recorded == content["lambda"] and "lambda 1 to 1.04, one per step" in said


@pytest.mark.parametrize("script, change, text", [
    ("exposure_bias", dict(model_path=""), "no checkpoint: give --model_path"),
    ("exposure_bias", dict(data_dir=""), "no images: give --data_dir"),
    ("exposure_bias", dict(measures="norm,typo"), "typo is no measure"),
    ("exposure_bias", dict(accumulation_steps="6"), "give numbers from 1 to 5"),
    ("exposure_bias", dict(accumulation_steps="a"), "expected whole numbers"),
    ("exposure_bias", dict(num_images=1), "must be at least 2"),
    ("exposure_bias", dict(eta=1), "means nothing for DDPM"),
    ("exposure_bias", dict(features="typo"), "no features called 'typo'"),
    ("exposure_bias", dict(eps_schedule="none.yaml"), "there is no such file"),
    ("image_sample", dict(eps_schedule="none.yaml", eps_scaler=1.01), "give one of them"),
    ("calibrate_eps", dict(by="fid"), "expected one of norm, variance"),
    ("calibrate_eps", dict(out="."), "give the name of a file"),
    ("calibrate_eps", dict(eps_scaler=1.01), "unknown argument --eps_scaler")])
def test_wrong_input_is_one_line(script, change, text, images, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(TINY, model_path=checkpoint, timestep_respacing=5)
    if script != "image_sample":
        given.update(data_dir=images, num_images=COUNT)
    code, _, err = run(script, *flags(**{**given, **change}), capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and text in err and one_line(err), err
    assert not list(tmp_path.iterdir())
