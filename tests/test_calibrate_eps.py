"""lambda(t) step by step: recovered where the answer is known; and the YAML between calibration and
samplers. By common noise: test_common_noise.py.
"""

import launch
import numpy as np
import pytest
import torch
import yaml
from test_closed_forms import S, eps_slope

from guided_diffusion_ip import dist_util
from guided_diffusion_ip.exposure_bias.greedy import (
    CLIPPED,
    EDGE,
    LAST,
    NOISE,
    SOLVED,
    STATISTICS,
    StepByStep,
)
from guided_diffusion_ip.exposure_bias.greedy import step_by_step as calibrate
from guided_diffusion_ip.runs.sample_batch import process_sampler
from guided_diffusion_ip.script_util import create_gaussian_diffusion
from guided_diffusion_ip.settings.lambda_file import read_schedule, write_schedule

CPU = torch.device("cpu")
C = 1.02  # by how much the networks below overrate epsilon
STEPS = 10


def exact_chain(steps=STEPS, s=S, **more):
    """A respaced process whose reverse variance is the true one: posterior variance + c1^2 Var(x_0
    | x_t).
    """
    process = create_gaussian_diffusion(steps=1000, timestep_respacing=str(steps), **more)
    ab = process.alphas_cumprod
    left = s**2 * (1 - ab) / (ab * s**2 + 1 - ab)
    process.fixed_large_log_variance = np.log(
        process.posterior_variance + process.posterior_mean_coef1**2 * left
    )
    return process


def network(process, factor=C, inverse=False):
    """factor times the exact epsilon; `inverse`: the norm falls where the batch grows, and is the
    same for a right x.
    """
    ab = process.alphas_cumprod
    slope, right = torch.zeros(1000), torch.ones(1000)
    slope[process.timestep_map] = torch.from_numpy(factor * eps_slope(process)).float()
    right[process.timestep_map] = torch.from_numpy(ab * S**2 + 1 - ab).float()

    def model(x, t):
        gain = slope[t].view(-1, 1, 1, 1)
        if inverse:
            gain = gain * right[t].view(-1, 1, 1, 1) / x.square().mean()
        return gain * x

    return model


def images_for(side, s=S):
    def images(index):
        rows = [
            s * torch.randn(1, side, side, generator=torch.Generator().manual_seed(i))
            for i in index
        ]
        return torch.stack(rows), {}

    return images


@pytest.mark.parametrize("by, inverse", [("norm", False), ("norm", True), ("variance", False)])
def test_a_network_that_is_too_large_by_c_gets_lambda_c(by, inverse):
    """To 1 %, whether the norm rises or falls with lambda."""
    process = exact_chain()
    how = process_sampler(process, (1, 64, 64), clip_denoised=False)
    found = calibrate(how, network(process, inverse=inverse), images_for(64), 200, 200, CPU, by)
    assert found.how == [LAST] + [SOLVED] * (STEPS - 1)
    np.testing.assert_allclose(found.lambdas[1:], C, rtol=0.01)
    assert found.lambdas[0] == found.lambdas[1]
    assert (np.sign(found.response[1:]) == (-1 if inverse else 1)).all()
    assert (np.abs(found.lambdas[1:] - C) < 4 * found.error[1:]).all() and (
        found.error[1:] < 0.005
    ).all()
    np.testing.assert_allclose(found.ratio[1:], 1, atol=3e-4)
    fit = found.fit()
    assert fit["b"] == pytest.approx(C, abs=0.002)
    assert fit["line_k"] * 5 + fit["line_b"] == pytest.approx(C, abs=0.002)


def test_an_exact_network_on_an_exact_chain_needs_no_lambda_and_ddim_gets_its_discretisation_error():
    process = exact_chain()
    model = network(process, 1.0)
    plain = calibrate(
        process_sampler(process, (1, 32, 32), clip_denoised=False),
        model,
        images_for(32),
        200,
        100,
        CPU,
        "variance",
    )
    np.testing.assert_allclose(plain.lambdas, 1, atol=0.012)
    ddim = calibrate(
        process_sampler(process, (1, 32, 32), solver="ddim", clip_denoised=False),
        model,
        images_for(32),
        200,
        100,
        CPU,
        "variance",
        (0.5, 1.5),
    )
    assert np.abs(ddim.lambdas[1:] - 1).max() > 0.03


def test_what_lambda_cannot_do_is_inherited():
    process = exact_chain(20, noise_schedule="cosine")
    found = calibrate(
        process_sampler(process, (1, 16, 16)), network(process), images_for(16), 100, 50, CPU
    )
    assert found.how[-1] == CLIPPED and found.clipped[-1] > 0.9, (
        "the first cosine step clips almost everything"
    )
    assert found.lambdas[-1] == found.lambdas[-2] or found.how[-2] != SOLVED
    assert np.isfinite(found.lambdas).all() and np.isnan(found.error[-1])
    blind = calibrate(
        process_sampler(process, (1, 2, 2)), network(process), images_for(2), 4, 4, CPU
    )
    assert NOISE in blind.how and SOLVED not in blind.how
    assert (blind.lambdas == 1).all() and blind.fit() == {"b": 1.0, "line_k": 0.0, "line_b": 1.0}


def variance_ratio(process, *lambdas):
    """Variance after the first steps over that of training inputs, for an exact epsilon divided by
    these lambdas; and the share of the data in the latter.
    """
    variance = 1.0
    for t, lam in zip(range(STEPS - 1, 0, -1), lambdas):
        ab, before = process.alphas_cumprod[t], process.alphas_cumprod[t - 1]
        x0_slope = (1 - np.sqrt(1 - ab) * eps_slope(process)[t] / lam) / np.sqrt(ab)
        a = process.posterior_mean_coef1[t] * x0_slope + process.posterior_mean_coef2[t]
        variance = a**2 * variance + np.exp(process.fixed_large_log_variance[t])
    wanted = before * S**2 + 1 - before
    return variance / wanted, before * S**2 / wanted


@pytest.mark.parametrize("errors", [4.2, 5.8])
def test_the_ratio_must_move_by_five_standard_errors(errors):
    """As many chains as make the first step's response so many standard errors, which Gaussians
    have in closed form.
    """
    process, t = exact_chain(), STEPS - 1
    (low, share), (high, _) = (variance_ratio(process, lam) for lam in (0.95, 1.05))
    of_one = max(low, high) * np.sqrt(2) * np.hypot(1, share)  # standard error from one number
    n = round((errors * of_one / (high - low)) ** 2 / 4)
    found = calibrate(
        process_sampler(process, (1, 2, 2), clip_denoised=False),
        network(process, 1.0),
        images_for(2),
        n,
        n,
        CPU,
        "variance",
    )
    assert found.response[t] == pytest.approx(high - low, rel=0.1)
    assert (found.how[t] == NOISE) == np.isnan(found.error[t]) == (errors < 5)
    if errors > 5:
        assert found.error[t] == pytest.approx(0.1 / errors, rel=0.1)


def test_an_answer_outside_the_bracket_stops_at_its_edge():
    process = exact_chain()
    found = calibrate(
        process_sampler(process, (1, 32, 32), clip_denoised=False),
        network(process, 1.12),
        images_for(32),
        100,
        50,
        CPU,
        "variance",
    )
    t = max(t for t in range(STEPS) if found.how[t] == EDGE)
    assert found.lambdas.max() == found.lambdas[t] == 1.05
    before = [1 / 1.12] * (STEPS - 1 - t)  # lambda = 1 until then: the response was below noise
    assert found.how[t + 1 :] == [NOISE] * len(before)
    ratio = variance_ratio(process, *before, 1.05 / 1.12)[0]
    assert found.ratio[t] == pytest.approx(ratio, abs=0.01) and ratio < 0.98


@pytest.mark.parametrize("by", ["norm", "variance"])
def test_the_statistics_and_their_standard_errors(by):
    """Means over three chains, with n - 1 in what they scatter by."""
    process = exact_chain()
    rows = torch.tensor([[3.0, 4.0], [0.0, 1.0], [8.0, 6.0]]).view(3, 1, 1, 2)
    path = process_sampler(process, (1, 1, 2)).bind(None)
    got = STATISTICS[by]().of(path, rows, rows, 4)
    squares = (
        np.array(
            [
                (3 - 11 / 3) ** 2 + (4 - 11 / 3) ** 2,
                (11 / 3) ** 2 + (1 - 11 / 3) ** 2,
                (8 - 11 / 3) ** 2 + (6 - 11 / 3) ** 2,
            ]
        )
        / 2
    )
    each = np.array([5.0, 1.0, 10.0]) if by == "norm" else squares
    assert got.value == pytest.approx(each.sum() / (3 if by == "norm" else 2))
    assert got.error == pytest.approx(each.std(ddof=1) / np.sqrt(3))


@pytest.mark.parametrize("by", ["norm", "variance"])
def test_a_network_that_predicts_x_0_gets_the_lambda_of_its_implied_epsilon(by):
    found = []
    for x_0 in (False, True):
        process = exact_chain(5, predict_xstart=x_0)
        ab = torch.ones(1000)
        ab[process.timestep_map] = torch.from_numpy(process.alphas_cumprod).float()
        eps = network(process)

        def model(x, t):
            a = ab[t].view(-1, 1, 1, 1)
            return (x - (1 - a).sqrt() * eps(x, t)) / a.sqrt() if x_0 else eps(x, t)

        found.append(
            calibrate(
                process_sampler(process, (1, 16, 16), clip_denoised=False),
                model,
                images_for(16),
                100,
                100,
                CPU,
                by,
            )
        )
    assert SOLVED in found[0].how and found[0].how == found[1].how
    np.testing.assert_allclose(found[1].lambdas, found[0].lambdas, atol=1e-3)
    np.testing.assert_allclose(found[1].response[1:], found[0].response[1:], rtol=0.01)


@pytest.mark.parametrize(
    "n, by, text", [(1, "norm", "too few"), (4, "fid", "--by fid: allowed are norm, variance")]
)
def test_bad_calibrations_are_refused(n, by, text):
    process = exact_chain()
    with pytest.raises(ValueError, match=text):
        calibrate(
            process_sampler(process, (1, 2, 2)), network(process), images_for(2), n, 4, CPU, by
        )


def lambdas_by_both():
    process = exact_chain(5)
    return [
        calibrate(
            process_sampler(process, (1, 16, 16), clip_denoised=False),
            network(process),
            images_for(16),
            101,
            30,
            CPU,
            by,
        ).content()["lambda"]
        for by in ("norm", "variance")
    ]


PARALLEL = """
import sys
sys.path.insert(0, "tests")
import test_calibrate_eps
test_calibrate_eps.in_two_processes()
"""


def in_two_processes():
    torch.set_num_threads(1)
    dist_util.setup_dist()
    found = lambdas_by_both()
    if dist_util.is_main():
        print("found:", found)
    dist_util.cleanup()


def test_two_processes_find_what_one_finds():
    done = launch.mpiexec(2, ["-c", PARALLEL])
    assert done.returncode == 0, done.stderr
    two = yaml.safe_load(done.stdout.partition("found:")[2])
    np.testing.assert_allclose(two, lambdas_by_both(), atol=2e-4)


# ---- the YAML ----


def test_what_calibration_writes_is_read(tmp_path):
    nan = np.nan
    found = StepByStep(
        np.array([1.01, 1.01, 1.02, 1.03]),
        np.array([nan, 0.01, 0.01, 0.01]),
        np.full(4, nan),
        np.full(4, nan),
        np.zeros(4),
        [LAST, SOLVED, SOLVED, EDGE],
    )
    path = tmp_path / "eps.yaml"
    write_schedule(path, {**found.content(), "settings": {"seed": 0}}, "two\nlines")
    assert path.read_text().startswith("# two\n# lines\nsteps: 4\n")
    assert read_schedule(path, 4) == ([1.01, 1.01, 1.02, 1.03], 0.0)
    assert found.fit() == {
        "b": pytest.approx(1.02),
        "line_k": pytest.approx(0.01),
        "line_b": pytest.approx(1.0),
    }
    for use, expected in (("b", (1.02, 0.0)), ("kb", (1.0, 0.01))):
        path.write_text(
            path.read_text()
            .replace("use: lambda", f"use: {use}")
            .replace("use: b\n", f"use: {use}\n")
        )
        assert read_schedule(path, 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("b: 1.01", (1.01, 0.0)),
        ("b: 1.0\nk: 0.001", (1.0, 0.001)),
        ("kb: {k: 0.001, b: 0.99}", (0.99, 0.001)),
        ("lambda: [1, 1.02]\nb: 3\nsteps: 2", ([1.0, 1.02], 0.0)),
        ("lambda: [1, 1.02]\nb: 1.5\nuse: b", (1.5, 0.0)),
    ],
)
def test_schedules_written_by_hand(tmp_path, text, expected):
    path = tmp_path / "eps.yaml"
    path.write_text(text)
    assert read_schedule(path, 2) == expected


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "must hold 'key: value' lines"),
        ("- 1", "found list"),
        ("a: [", "not valid YAML"),
        ("k: 1", "has no lambda, b or kb"),
        ("b: 1\nuse: kb", "has no kb"),
        ("b: 1\nsteps: 3", "made for 3 steps, but sampling has 2"),
        ("lambda: [1, 2, 3]", "3 values, but sampling has 2 steps"),
        ("lambda: 1", "lambda has 1, but"),
        ("lambda: [1, x]", "must be made of numbers"),
        ("b: true", "found True"),
        ("b: .nan", "found nan"),
        ("kb: 1", "expected {k: NUMBER, b: NUMBER}"),
    ],
)
def test_bad_schedules_are_refused(tmp_path, text, complaint):
    path = tmp_path / "eps.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        read_schedule(path, 2)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_missing_schedule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_schedule(tmp_path / "none.yaml", 2)
