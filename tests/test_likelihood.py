"""Likelihoods: closed forms of the bound, and scripts/image_nll.py as a user runs it."""

import json
import math
import os
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from golden_tools import seeded_checkpoint
from test_scripts import flags, one_line, run

from guided_diffusion_ip.data.image_set import open_image_set
from guided_diffusion_ip.diffusion.losses import discretized_gaussian_log_likelihood
from guided_diffusion_ip.noise import NormalStream, Stream
from guided_diffusion_ip.runs.likelihood import LikelihoodRun
from guided_diffusion_ip.script_util import create_gaussian_diffusion, create_model_and_diffusion

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    learn_sigma=True,
    noise_schedule="cosine",
    num_head_channels=32,
    diffusion_steps=10,
    class_cond=True,
    num_classes=3,
)
COUNT = 7
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(
        path,
        arr_0=rng.integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8),
        arr_1=rng.integers(0, 3, COUNT),
    )
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return seeded_checkpoint(
        tmp_path_factory.mktemp("run") / "model.pt", create_model_and_diffusion(**TINY)[0]
    )


def process(steps, **more):
    return create_gaussian_diffusion(
        **{
            **dict(steps=steps, predict_xstart=True, sigma_small=True, noise_schedule="cosine"),
            **more,
        }
    )


def noise(n):
    return NormalStream(0, Stream.LIKELIHOOD, torch.arange(n))


# ---- the bound itself ----


def test_a_network_that_knows_x_0_pays_for_the_last_step_only():
    """With x_0 known, q and p are the same Gaussian: every KL is 0. The decoder remains, whose mean
    is x_0 itself.
    """
    diffusion = process(20)
    x = torch.randint(0, 256, (3, 1, 8, 8)).float() / 127.5 - 1
    result = diffusion.calc_bpd_loop(lambda x_t, t: x, x, randn_like=noise(3))
    assert result["vb"].shape == (3, 20)
    torch.testing.assert_close(result["vb"][:, :-1], torch.zeros(3, 19), atol=1e-6, rtol=0)
    assert float(result["mse"].max()) < 1e-6 and float(result["xstart_mse"].max()) == 0
    # P(the right one of 256 values) under N(x_0, var), var that of the first posterior; open bins
    # at the ends.
    deviation = math.exp(0.5 * diffusion.posterior_log_variance_clipped[0])
    inside = math.erf(1 / 255 / deviation / math.sqrt(2))
    chance = torch.where(x.abs() > 0.999, (1 + inside) / 2, inside)
    torch.testing.assert_close(
        result["vb"][:, -1], -chance.log2().mean((1, 2, 3)), atol=2e-3, rtol=0.02
    )
    torch.testing.assert_close(result["total_bpd"], result["vb"].sum(1) + result["prior_bpd"])


@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.3, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("log_scale", [-6.0, -2.0, 0.0])
def test_the_256_levels_have_probability_1_together(mean, log_scale):
    """The outermost cells reach to infinity, so that nothing is left over wherever the Gaussian
    lies.
    """
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretized_gaussian_log_likelihood(
        levels, means=torch.full_like(levels, mean), log_scales=torch.full_like(levels, log_scale)
    )
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_gaussian_data_have_a_closed_form():
    """x_0 ~ N(0, s^2), the exact E[x_0 | x_t]: its error is the posterior variance v, and the KL at
    t is c^2 v / (2 var), c being the weight of x_0 in the posterior mean of x_{t-1}.
    """
    s, steps, n, side = 0.5, 20, 16, 48
    diffusion = process(steps)
    ab = torch.as_tensor(diffusion.alphas_cumprod)

    def exact(x_t, t):
        a = ab[t].float()[:, None, None, None]
        return a.sqrt() * s**2 / (a * s**2 + 1 - a) * x_t

    x = s * torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(0))
    result = diffusion.calc_bpd_loop(exact, x, clip_denoised=False, randn_like=noise(n))
    v = s**2 * (1 - ab) / (ab * s**2 + 1 - ab)
    c, var = (
        torch.as_tensor(a) for a in (diffusion.posterior_mean_coef1, diffusion.posterior_variance)
    )
    kl = (c**2 * v / (2 * var) / math.log(2))[1:]
    got = {
        name: result[name].double().mean(0).flip(0) for name in ("vb", "xstart_mse", "mse")
    }  # index = t
    torch.testing.assert_close(got["xstart_mse"], v, rtol=0.03, atol=0)
    torch.testing.assert_close(got["vb"][1:], kl, rtol=0.03, atol=0)
    torch.testing.assert_close(
        got["mse"], ab * v / (1 - ab), rtol=0.03, atol=0
    )  # eps = (x_t - sqrt(ab) x_0) / sqrt(1 - ab)
    last = ab[-1]  # KL(N(sqrt(ab) x_0, 1 - ab) || N(0, 1)), averaged over x_0
    prior = 0.5 * (last * s**2 + (1 - last) - 1 - torch.log1p(-last)) / math.log(2)
    assert abs(float(result["prior_bpd"].mean()) - float(prior)) < 1e-6


# ---- the run ----


def likelihoods(out, images, checkpoint, batch_size, model=None, **changed):
    """A LikelihoodRun in this process: what it returns."""
    network, diffusion = create_model_and_diffusion(**TINY)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    data = open_image_set(images, (8, 8), 1, num_classes=3)
    work = LikelihoodRun(
        diffusion,
        COUNT,
        lambda index: (data.images(index), data.cond(index)),
        str(out),
        {"seed": 0, **changed},
    )
    return work(model(network) if model else network, batch_size, CPU)


def arrays(out):
    found = {}
    for name in ("total_bpd", "vb_terms", "mse_terms", "xstart_mse_terms"):
        with np.load(Path(out) / f"{name}.npz") as npz:
            found[name] = npz["arr_0"]
    return found


@pytest.fixture(scope="module")
def reference(images, checkpoint, tmp_path_factory):
    """Images measured one at a time: (summary, arrays)."""
    out = tmp_path_factory.mktemp("reference")
    return likelihoods(out, images, checkpoint, 1), arrays(out)


def assert_equal_but_for_rounding(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


def test_the_result_is_what_the_process_says(images, checkpoint, reference):
    summary, found = reference
    network, diffusion = create_model_and_diffusion(**TINY)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    with np.load(images) as npz:
        x = torch.from_numpy(npz["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
        y = torch.from_numpy(npz["arr_1"])
    result = diffusion.calc_bpd_loop(network, x, model_kwargs={"y": y}, randn_like=noise(COUNT))
    total = result["total_bpd"].double()
    assert summary["num_images"] == COUNT and summary["timesteps"] == 10
    assert summary["total_bpd"] == pytest.approx(float(total.mean()), rel=1e-5)
    assert summary["standard_error"] == pytest.approx(float(total.std()) / COUNT**0.5, rel=1e-4)
    assert_equal_but_for_rounding(
        found,
        {
            "total_bpd": total,
            **{f"{name}_terms": result[name].mean(0) for name in ("vb", "mse", "xstart_mse")},
        },
    )
    assert found["vb_terms"].shape == (10,)
    other = diffusion.calc_bpd_loop(
        network, x, model_kwargs={"y": (y + 1) % 3}, randn_like=noise(COUNT)
    )
    assert not torch.allclose(other["total_bpd"], result["total_bpd"]), "the labels matter"


def test_an_interrupted_run_continues_with_another_batch_size(
    images, checkpoint, reference, tmp_path
):
    calls = []

    def breaks_off(network):
        def call(x, t, **cond):
            calls.append(len(x))
            if len(calls) > 25:  # in the third batch
                raise KeyboardInterrupt
            return network(x, t, **cond)

        return call

    with pytest.raises(KeyboardInterrupt):
        likelihoods(tmp_path, images, checkpoint, 2, breaks_off)
    assert (
        sorted(os.listdir(tmp_path)) == ["settings.yaml", "shards"]
        and len(os.listdir(tmp_path / "shards")) == 2
    )
    calls.clear()

    def counting(network):
        return lambda x, t, **cond: calls.append(len(x)) or network(x, t, **cond)

    summary = likelihoods(tmp_path, images, checkpoint, 3, counting)
    assert sum(calls) == 10 * (COUNT - 4), "what was there is not measured again"
    assert_equal_but_for_rounding(arrays(tmp_path), reference[1])
    assert summary["total_bpd"] == pytest.approx(reference[0]["total_bpd"], rel=1e-6)
    calls.clear()
    assert likelihoods(tmp_path, images, checkpoint, 3, counting) == summary and not calls
    assert not (tmp_path / "shards").exists()
    with pytest.raises(ValueError, match="holds likelihoods made with seed 0 instead of 1"):
        likelihoods(tmp_path, images, checkpoint, 3, seed=1)


def test_a_diverged_network_is_named(images, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="likelihood of image 0 is nan"):
        likelihoods(
            tmp_path,
            images,
            checkpoint,
            2,
            lambda network: lambda x, t, **_: torch.full((len(x), 2, 8, 8), math.nan),
        )


# ---- the script ----


def test_the_script_on_one_process_and_on_two(
    images, checkpoint, reference, tmp_path, capsys, monkeypatch
):
    common = [*flags(**TINY), "--model_path", checkpoint, "--data_dir", images]
    code, said, err = run(
        "image_nll",
        *common,
        "--num_samples",
        "1000",
        "--batch_size",
        "3",
        "--out_dir",
        str(tmp_path / "one"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0, err
    assert f"1000 images were asked for, but there are {COUNT}" in said
    assert (
        f"bits per dimension: {reference[0]['total_bpd']:.4f} +- "
        f"{reference[0]['standard_error']:.4f}" in said
    )
    assert_equal_but_for_rounding(arrays(tmp_path / "one"), reference[1])

    done = launch.mpiexec(
        2,
        [
            str(ROOT / "scripts" / "image_nll.py"),
            *common,
            "--num_samples",
            str(COUNT),
            "--batch_size",
            "2",
            "--out_dir",
            str(tmp_path / "two"),
        ],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per dimension") == 1
    assert_equal_but_for_rounding(arrays(tmp_path / "two"), reference[1])
    assert json.loads((tmp_path / "two" / "bpd.json").read_text())["num_images"] == COUNT


BAD = {
    "no checkpoint": (["--model_path="], "--model_path"),
    "missing checkpoint": (["--model_path", "{tmp}/none.pt"], "none.pt"),
    "truncated checkpoint": (["--model_path", "{tmp}/truncated.pt"], "truncated.pt"),
    "other architecture": (["--num_channels", "64"], "--num_channels 32 (now 64)"),
    "no data": (["--data_dir="], "--data_dir"),
    "missing data": (["--data_dir", "{tmp}/nowhere"], "nowhere"),
    "no labels": (["--data_dir", "{tmp}/unlabelled.npz"], "arr_1"),
    "labels too large": (["--data_dir", "{tmp}/labels.npz"], "10 classes, but the model knows 3"),
    "floats": (["--data_dir", "{tmp}/floats.npz"], "must be uint8"),
    "truncated data": (["--data_dir", "{tmp}/truncated.npz"], "truncated.npz"),
    "broken image": (["--data_dir", "{tmp}/broken"], "a_1.png"),
    "lambda": (["--eps_scaler", "1.01"], "--eps_scaler"),
    "no images": (["--num_samples", "0"], "at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, images, checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "truncated.pt").write_bytes(Path(checkpoint).read_bytes()[:3000])
    (tmp_path / "truncated.npz").write_bytes(Path(images).read_bytes()[:300])
    pixels = np.zeros((2, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "unlabelled.npz", arr_0=pixels)
    np.savez(tmp_path / "labels.npz", arr_0=pixels, arr_1=np.array([0, 9]))
    np.savez(tmp_path / "floats.npz", arr_0=pixels / 255, arr_1=np.array([0, 1]))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a_1.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    argv, hint = BAD[case]
    out = tmp_path / "out"
    code, _, err = run(
        "image_nll",
        *flags(**TINY),
        "--model_path",
        checkpoint,
        "--data_dir",
        images,
        "--out_dir",
        str(out),
        *(word.replace("{tmp}", str(tmp_path)) for word in argv),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2 and one_line(err) and hint in err, err
    assert not out.exists(), "nothing half-written is left behind"
