"""Measuring runs: interrupted, continued, shared by processes; and the scripts as a
user runs them.
"""

import json
import sys
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
import yaml
from golden_tools import seeded_checkpoint
from test_likelihood import TINY
from test_scripts import flags, one_line, run

from guided_diffusion_ip.data.image_set import open_image_set
from guided_diffusion_ip.exposure_bias.greedy import EDGE, LAST, SOLVED, StepByStep
from guided_diffusion_ip.exposure_bias.measure_run import MeasureRun, spread_over
from guided_diffusion_ip.exposure_bias.measures import NAMES, create_measures
from guided_diffusion_ip.features.spaces import PixelSpace
from guided_diffusion_ip.runs.sample_batch import process_sampler
from guided_diffusion_ip.script_util import create_model_and_diffusion
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.lambdas import settle_lambda
from guided_diffusion_ip.settings.solver import settle_sampler

ROOT = Path(__file__).resolve().parent.parent
COUNT, SET = 7, 15
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(
        path, arr_0=rng.integers(0, 256, (SET, 8, 8, 1), dtype=np.uint8), arr_1=np.arange(SET) // 5
    )
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return seeded_checkpoint(
        tmp_path_factory.mktemp("run") / "model.pt", create_model_and_diffusion(**TINY)[0]
    )


def measuring(out, images, checkpoint, batch_size, model=None, **settings):
    """A MeasureRun in this process: what it returns."""
    network, diffusion = create_model_and_diffusion(**TINY, timestep_respacing="5", eps_scaler=1.01)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    real = open_image_set(images, (8, 8), 1, num_classes=3).subset(spread_over(SET, COUNT))
    work = MeasureRun(
        create_measures(NAMES, (2, 5), PixelSpace()),
        process_sampler(diffusion, (1, 8, 8)),
        COUNT,
        real,
        str(out),
        {"seed": 0, **settings},
    )
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
    assert (
        content["num_images"] == COUNT
        and content["num_timesteps"] == 5
        and content["lambda"] == [1.01] * 5
    )
    assert set(content["measures"]) == set(NAMES) and content["timestep_map"] == [0, 2, 4, 7, 9]
    np.testing.assert_allclose(content["measures"]["norm"]["ratio"], found["norm.ratio"])
    assert content["measures"]["accumulation"]["features"] == "pixels" and found[
        "accumulation.frechet"
    ].shape == (2,)
    measuring(tmp_path, images, checkpoint, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "measures.json",
        "measures.npz",
        "settings.yaml",
    ]


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


def test_an_interrupted_run_is_continued_and_measures_no_image_twice(
    images, checkpoint, reference, tmp_path
):
    per_image = (
        5 + 5 + 5 + (2 + 2) + (5 + 5) - 5 + 9
    )  # inputs, chain, data; accumulation's K = 5 shares the data walk; twice as many steps
    for limit in (
        2 * per_image + 3,
        1 * per_image + 1,
    ):  # dies in the third batch, then in the second of a new start
        with pytest.raises(Dies):
            measuring(tmp_path, images, checkpoint, 1, counting([], limit))
    assert [p.name for p in sorted((tmp_path / "partial").iterdir())] == [
        "sums-0000-0000.npz",
        "sums-0001-0000.npz",
    ]
    calls = []
    measuring(tmp_path, images, checkpoint, 3, counting(calls))
    assert sum(calls) == (COUNT - 3) * per_image
    assert_equal_but_for_rounding(arrays(tmp_path), reference[1])
    assert not (tmp_path / "partial").exists()
    calls.clear()
    assert measuring(tmp_path, images, checkpoint, 3, counting(calls)) == json.loads(
        (tmp_path / "measures.json").read_text()
    )
    assert calls == [], "a finished run is not computed again"


def test_another_setting_is_refused(images, checkpoint, tmp_path):
    with pytest.raises(Dies):
        measuring(tmp_path, images, checkpoint, 1, counting([], 3))
    with pytest.raises(ValueError, match="holds measures made with seed 0 instead of 1"):
        measuring(tmp_path, images, checkpoint, 1, seed=1)


def arguments(images, checkpoint, **more):
    return flags(
        **{
            **TINY,
            "model_path": checkpoint,
            "data_dir": images,
            "num_images": COUNT,
            "timestep_respacing": 5,
            "batch_size": 2,
            **more,
        }
    )


def test_two_processes_measure_what_one_does(images, checkpoint, reference, tmp_path):
    out = tmp_path / "two"
    done = launch.mpiexec(
        2,
        [
            "scripts/exposure_bias.py",
            *arguments(
                images,
                checkpoint,
                out_dir=out,
                eps_scaler=1.01,
                accumulation_steps="2,5",
                plots=False,
            ),
        ],
    )
    assert done.returncode == 0, done.stderr
    assert_equal_but_for_rounding(arrays(out), reference[1])
    assert done.stdout.count("result:") == 1


def test_the_script_draws_every_measure(images, checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    code, out, err = run(
        "exposure_bias",
        *arguments(images, checkpoint, out_dir=tmp_path),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    for name in NAMES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (
            "</svg>" in (tmp_path / f"{name}.svg").read_text()
            and f"{name}.png" in out
            and f"\n{name}:" in out
        )
    assert "images: 7 spread over" in out and "DDPM, steps 5, lambda 1" in out


def test_ddim_a_subset_of_measures_and_the_set_is_covered_evenly(
    images, checkpoint, tmp_path, capsys, monkeypatch
):
    code, out, err = run(
        "exposure_bias",
        *arguments(
            images, checkpoint, out_dir=tmp_path, solver="ddim", measures="variance", plots=False
        ),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    content = json.loads((tmp_path / "measures.json").read_text())
    assert set(content["measures"]) == {"variance"} and content["settings"]["use_ddim"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "measures.json",
        "measures.npz",
        "settings.yaml",
    ]
    with np.load(images) as npz:
        x = npz["arr_0"][[0, 2, 4, 6, 8, 10, 12]] / 127.5 - 1
    assert content["measures"]["variance"]["final_expected"] == pytest.approx(
        x.var(axis=0, ddof=1).mean(), rel=1e-5
    )


LARGER = {**TINY, "image_size": 16, "attention_resolutions": "8"}


@pytest.fixture(scope="module")
def black_and_white(tmp_path_factory):
    """300 images of pixels -1 and 1."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(
        path,
        arr_0=255 * rng.integers(0, 2, (300, 16, 16, 1), dtype=np.uint8),
        arr_1=np.arange(300) % 3,
    )
    return str(path)


def linear_checkpoint(path, factor):
    """A network whose epsilon is factor times x, brought to mean 0 and variance 1, at every t:
    lambda acts on all of it.

    The stem puts x and -x on its channels, the decoder's last block takes them from there, and
    SiLU(a) - SiLU(-a) = a.
    """
    model, _ = create_model_and_diffusion(**LARGER)
    state = model.state_dict()
    sign = torch.tensor([1.0, -1.0]).repeat(16)
    for name, value in state.items():
        if name.endswith(("out_layers.3.weight", "proj_out.weight", "bias")):
            value.zero_()
    for name in (
        "input_blocks.0.0.weight",
        "output_blocks.3.0.skip_connection.weight",
        "out.2.weight",
    ):
        state[name].zero_()
    state["input_blocks.0.0.weight"][:, 0, 1, 1] = sign
    state["output_blocks.3.0.skip_connection.weight"][:, 32:, 0, 0] = torch.eye(32)
    state["out.0.weight"].fill_(1)
    state["out.2.weight"][0, :, 1, 1] = factor * sign / 16
    torch.save(state, path)
    return str(path)


def calibrating(images, checkpoint, **changes):
    return flags(
        **{
            **LARGER,
            "model_path": checkpoint,
            "data_dir": images,
            "num_images": 300,
            "batch_size": 300,
            "timestep_respacing": 5,
            "by": "variance",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def calibrated(black_and_white, tmp_path_factory):
    """(checkpoint, schedule, stdout) of a calibration in which one step is solved."""
    folder = tmp_path_factory.mktemp("calibrated")
    checkpoint, schedule = linear_checkpoint(folder / "model.pt", 0.9), folder / "eps.yaml"
    done = launch.run(
        [
            sys.executable,
            "scripts/calibrate_eps.py",
            *calibrating(black_and_white, checkpoint, out=schedule),
        ],
        300,
    )
    assert done.returncode == 0, done.stderr
    return checkpoint, schedule, done.stdout


def test_calibrate_then_sample(calibrated, tmp_path, capsys, monkeypatch):
    checkpoint, schedule, out = calibrated
    assert f"schedule: {schedule}" in out and "uniform b = " in out
    content = yaml.safe_load(schedule.read_text())
    assert (
        content["steps"] == 5
        and len(content["lambda"]) == 5
        and content["settings"]["by"] == "variance"
    )
    assert (
        content["settings"]["num_images"] == 300
        and len(content["how"]) == 5
        and content["how"].count("solved") == 1
    )

    content["lambda"] = [1.0, 1.01, 1.02, 1.03, 1.04]
    (tmp_path / "eps.yaml").write_text(yaml.safe_dump(content))
    sampling = flags(**LARGER, model_path=checkpoint, num_samples=2, timestep_respacing=5)

    def sample(out_dir, *more):
        code, said, err = run(
            "image_sample",
            *sampling,
            *flags(out_dir=out_dir),
            *more,
            capsys=capsys,
            monkeypatch=monkeypatch,
        )
        assert code == 0, err
        assert "warning" not in err
        with np.load(out_dir / "samples_2x16x16x1.npz") as npz:
            return (
                said,
                npz["arr_0"],
                yaml.safe_load((out_dir / "settings.yaml").read_text())["eps_scaler"],
            )

    said, by_file, recorded = sample(
        tmp_path / "file", "--eps_schedule", str(tmp_path / "eps.yaml")
    )
    _, by_hand, _ = sample(tmp_path / "hand", "--eps_scaler", "1.0,1.01,1.02,1.03,1.04")
    _, plain, _ = sample(tmp_path / "plain")
    assert np.array_equal(by_file, by_hand) and not np.array_equal(by_file, plain)
    assert recorded == content["lambda"] and "lambda 1 to 1.04, one per step" in said


def test_a_calibration_that_solves_nothing_writes_no_schedule(
    black_and_white, images, checkpoint, tmp_path, capsys, monkeypatch
):
    wild = linear_checkpoint(tmp_path / "wild.pt", 1.05)
    out = tmp_path / "eps.yaml"
    for argv, reason in (
        (
            calibrating(black_and_white, wild, out=out),
            "of 4 steps 1 need a lambda outside of 0.95 to 1.05, 2",
        ),
        (
            arguments(images, checkpoint, by="variance", out=out),
            "0 need a lambda outside of 0.95 to 1.05, 3",
        ),
    ):
        code, said, err = run("calibrate_eps", *argv, capsys=capsys, monkeypatch=monkeypatch)
        assert (
            code == 2
            and "error: nothing was solved" in err
            and reason in err
            and f"{out} is not written" in err
        )
        assert "uniform b = " in said and "schedule:" not in said and not out.exists()


@pytest.mark.parametrize(
    "how, said",
    [
        ([LAST, SOLVED, SOLVED], ""),
        ([LAST, EDGE, SOLVED, SOLVED], "warning: 1 of 3 lambdas are at"),
    ],
)
def test_lambdas_at_the_edge_are_counted(how, said):
    numbers = [np.ones(len(how)) for _ in range(5)]
    warnings = StepByStep(*numbers, how).check("eps.yaml")
    assert len(warnings) == bool(said) and "".join(warnings).startswith(said)


@pytest.mark.parametrize(
    "more, complaint",
    [
        (
            ["--use_ddim", "True", "--timestep_respacing", "5"],
            "was calibrated for DDPM, and DDIM is asked for",
        ),
        (
            ["--sampler", "heun", "--edm_steps", "5", "--timestep_respacing="],
            "was calibrated for DDPM, and HEUN is asked for",
        ),
        (
            ["--timestep_respacing", "ddim5"],
            "calibrated for --timestep_respacing 5, which are other steps than ddim5",
        ),
        (["--timestep_respacing", "4"], "made for 5 steps, but sampling has 4"),
    ],
)
def test_a_schedule_of_another_sampler_is_refused(more, complaint, calibrated):
    checkpoint, schedule, _ = calibrated
    with pytest.raises(ValueError, match=complaint):
        settle(checkpoint, schedule, *more)


def test_a_schedule_of_another_eta_is_refused(calibrated, tmp_path):
    content = yaml.safe_load(calibrated[1].read_text())
    content["settings"].update(use_ddim=True, eta=0.0, timestep_respacing="ddim5")
    (tmp_path / "eps.yaml").write_text(yaml.safe_dump(content))
    ddim = ["--use_ddim", "True", "--timestep_respacing", "ddim5"]
    settle(calibrated[0], tmp_path / "eps.yaml", *ddim)
    with pytest.raises(
        ValueError, match="calibrated for DDIM with --eta 0.0, and --eta 1 is asked for"
    ):
        settle(calibrated[0], tmp_path / "eps.yaml", *ddim, "--eta", "1")
    with pytest.raises(ValueError, match="calibrated for DDIM, and DDPM is asked for"):
        settle(calibrated[0], tmp_path / "eps.yaml", "--timestep_respacing", "ddim5")


def test_a_schedule_of_another_checkpoint_or_clip_is_warned_about(calibrated, tmp_path, recwarn):
    checkpoint, schedule, _ = calibrated
    settle(checkpoint, schedule, "--timestep_respacing", "5")
    (tmp_path / "by_hand.yaml").write_text("b: 1.01")
    settle(
        linear_checkpoint(tmp_path / "other.pt", 0.95),
        tmp_path / "by_hand.yaml",
        "--use_ddim",
        "True",
    )
    assert not list(recwarn)
    settle(str(tmp_path / "other.pt"), schedule, "--timestep_respacing", "5")
    assert "calibrated for another checkpoint (model.pt, of another content)" in str(
        recwarn.pop().message
    )
    settle(checkpoint, schedule, "--timestep_respacing", "5", "--clip_denoised", "False")
    assert "calibrated with --clip_denoised True, and False is asked for" in str(
        recwarn.pop().message
    )


def settle(checkpoint, schedule, *more):
    """What image_sample does with its flags before it builds anything."""
    cfg = parse(
        "image_sample", "", [*flags(**LARGER, model_path=checkpoint, eps_schedule=schedule), *more]
    )
    cfg = settle_lambda(settle_sampler(cfg))
    assert cfg.eps_scaler != 1


@pytest.mark.parametrize(
    "script, change, text",
    [
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
        ("calibrate_eps", dict(by="is"), "expected one of energy, kid, fid, final_variance, norm"),
        ("calibrate_eps", dict(by="norm", num_chains=9), "--num_chains 9 means nothing for --by"),
        ("calibrate_eps", dict(by="norm", form="kb"), "it is for energy, kid, fid; leave it out"),
        ("calibrate_eps", dict(groups=4), "--groups 4 is for --form groups"),
        ("calibrate_eps", dict(features="typo"), "no features called 'typo'"),
        ("calibrate_eps", dict(out="."), "give the name of a file"),
        ("calibrate_eps", dict(eps_scaler=1.01), "unknown argument --eps_scaler"),
    ],
)
def test_wrong_input_is_one_line(
    script, change, text, images, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = dict(TINY, model_path=checkpoint, timestep_respacing=5)
    if script != "image_sample":
        given.update(data_dir=images, num_images=COUNT)
    code, _, err = run(
        script, *flags(**{**given, **change}), capsys=capsys, monkeypatch=monkeypatch
    )
    assert code == 2 and text in err and one_line(err), err
    assert not list(tmp_path.iterdir())
