"""Calibration by common noise: the distance and its errors, the search, and what it finds where the
answer is known.
"""

import itertools
from functools import partial

import launch
import numpy as np
import pytest
import torch
import yaml
from test_calibrate_eps import exact_chain, images_for, network

from guided_diffusion_ip import dist_util
from guided_diffusion_ip.exposure_bias.calibrate import RULES, calibrate
from guided_diffusion_ip.exposure_bias.calibration_picture import picture
from guided_diffusion_ip.exposure_bias.chains import Chains, TrialStore, in_space, pixels
from guided_diffusion_ip.exposure_bias.common_noise import Gain
from guided_diffusion_ip.exposure_bias.common_noise import by_common_noise as search
from guided_diffusion_ip.exposure_bias.final_variance import by_final_variance
from guided_diffusion_ip.exposure_bias.frechet_rule import FrechetDistance
from guided_diffusion_ip.exposure_bias.line_search import minimise
from guided_diffusion_ip.exposure_bias.plots import save_picture
from guided_diffusion_ip.features.pixels import PixelSpace
from guided_diffusion_ip.metrics import frechet_distance
from guided_diffusion_ip.metrics.kernel import squared_mmd
from guided_diffusion_ip.metrics.replicates import KERNELS, Distance, pair_sums
from guided_diffusion_ip.runs.sample_batch import ImagesWithNaN, process_sampler
from guided_diffusion_ip.settings.lambda_file import read_schedule, write_schedule

CPU = torch.device("cpu")
by_common_noise = partial(search, features=pixels)


def rows(n, seed, shift=0.0, dim=5):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


# ---- the distance ----


def energy(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'| over different rows, pair by pair."""

    def mean(pairs):
        return float(np.mean([float((a - b).norm()) for a, b in pairs]))

    within = [mean(itertools.permutations(z, 2)) for z in (x, y)]
    return 2 * mean(itertools.product(x, y)) - sum(within)


@pytest.mark.parametrize("name", list(KERNELS))
def test_distances_and_their_replicates_are_what_their_definitions_say(name):
    x, y = rows(11, 0).double(), rows(14, 1, 0.5).double()
    by_hand = energy if name == "energy" else squared_mmd
    distance = Distance(KERNELS[name], y, len(x), 3)
    got = distance(x)
    assert distance.groups == (3, 3) and got.shape == (7,)
    assert got[0] == pytest.approx(by_hand(x, y), rel=1e-9)
    for g in range(3):
        some_x, some_y = x[np.arange(11) % 3 != g], y[np.arange(14) % 3 != g]
        assert got[1 + g] == pytest.approx(by_hand(some_x, y), rel=1e-9)
        assert got[4 + g] == pytest.approx(by_hand(x, some_y), rel=1e-9)


def test_equal_distributions_have_a_distance_of_nothing():
    """On average, whatever the numbers: there is no floor."""
    found = [
        Distance(KERNELS["energy"], rows(30, 2 * n), 20, 5)(rows(20, 2 * n + 1))[0]
        for n in range(200)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_the_jackknife_tells_the_spread_over_repetitions():
    """Of the difference of two distances with common noise, which is what a gain is."""
    values, errors = [], []
    for n in range(150):
        distance = Distance(KERNELS["energy"], rows(60, 3 * n), 40, 10)
        noise = rows(40, 3 * n + 1)
        change = distance(1.3 * noise) - distance(noise)
        values.append(change[0])
        errors.append(distance.standard_error(change))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.2)


def test_real_images_that_are_all_of_them_leave_nothing_to_chance():
    x, y = rows(40, 0), rows(60, 1)
    errors = []
    for of_all in (0, 240, 120, 60):
        distance = Distance(KERNELS["energy"], y, 40, 10, of_all)
        errors.append(distance.standard_error(distance(x)) ** 2)
    of_chains = errors[3]
    real = errors[0] - of_chains
    assert 0 < of_chains < errors[0] and real > 0
    assert errors[1] == pytest.approx(of_chains + 0.75 * real)
    assert errors[2] == pytest.approx(of_chains + 0.5 * real)


def test_wide_rows_are_added_up_in_pieces(monkeypatch):
    from guided_diffusion_ip.metrics import replicates

    x, y = rows(6, 0, dim=50), rows(8, 1, dim=50)
    whole = pair_sums(KERNELS["energy"], x, y, (2, 3))
    monkeypatch.setattr(replicates, "_ENTRIES", 20)
    pieces = pair_sums(KERNELS["energy"], x, y, (2, 3))
    np.testing.assert_allclose(pieces.sums, whole.sums, rtol=1e-12)
    assert (pieces.counts == whole.counts).all() and whole.counts.sum() == 48


# ---- the search ----


@pytest.mark.parametrize("lowest", [0.0, 0.007, -0.013, 0.04, -0.11, 0.21])
@pytest.mark.parametrize("cubic", [0.0, 1.5])
def test_the_lowest_point_is_found_in_few_trials(lowest, cubic):
    calls = []

    def curve(place):
        calls.append(place)
        d = place - lowest
        return np.array([d**2 * (1 + cubic * d)] * 2)

    found = minimise(curve, 0.02, (-0.25, 0.3))
    assert found.place[0] == pytest.approx(lowest, abs=1e-3) and not found.edge
    assert len(calls) == len(set(calls)) <= 10
    if abs(lowest) < 0.02:
        assert len(calls) <= 5


def test_a_curve_that_falls_to_the_limit_ends_there():
    found = minimise(lambda place: np.array([-place]), 0.02, (-0.25, 0.3))
    assert found.edge and found.place[0] == 0.3


def test_a_search_may_begin_at_a_limit():
    found = minimise(lambda place: np.array([(place - 0.07) ** 2] * 2), 0.02, (0.0, 0.3))
    assert found.place[0] == pytest.approx(0.07, abs=1e-6)
    assert minimise(lambda place: np.array([place] * 2), 0.02, (0.0, 0.3)).edge


def test_a_line_of_two_parameters_is_gone_down_in_one_step():
    """Means that move linearly: Gauss-Newton in the kernel's space points at the minimum."""
    real, noise = rows(400, 0, dim=4), rows(400, 1, dim=4)
    true = torch.tensor([0.3, -0.2])

    def at(parameters):
        return noise + torch.cat([parameters - true, torch.zeros(2)])

    distance = Distance(KERNELS["energy"], real, 400, 10)
    h = 0.05
    others = [at(h * unit) for unit in torch.eye(2)]
    step = distance.downhill(at(torch.zeros(2)), others, h)
    np.testing.assert_allclose(step, true, atol=0.12)
    small = [float(distance(at(s * torch.from_numpy(step).float()))[0]) for s in (0, 1)]
    assert small[1] < 0.1 * small[0]


# ---- where the answer is known ----


def sampler_of(process, solver="ddpm", side=8, **more):
    return process_sampler(process, (1, side, side), solver=solver, clip_denoised=False, **more)


def test_an_epsilon_that_is_too_large_by_c_gets_lambda_c():
    """On a chain with the true reverse variance, dividing by c undoes it."""
    process = exact_chain()
    found = by_common_noise(sampler_of(process), network(process), images_for(8), 600, 200, CPU)
    assert found.pays and found.verdict.startswith("calibrated: gain")
    assert (
        found.b == pytest.approx(1.02, abs=max(0.005, 2 * found.b_error)) and found.b_error < 0.01
    )
    assert (found.lambdas == found.b).all() and found.held_out.value > 0
    assert found.network_calls == 600 * 10 * (len(found.trials) + 2)


def test_an_exact_chain_has_nothing_to_gain():
    process = exact_chain()
    model = network(process, 1.0)
    found = by_common_noise(sampler_of(process), model, images_for(8), 400, 200, CPU)
    assert not found.pays and (found.lambdas == 1).all()
    assert found.verdict.startswith("lambda = 1: ")
    content = found.content()
    assert content["use"] == "b" and content["b"] == 1.0
    assert content["found"]["b"] == pytest.approx(1, abs=4 * found.b_error)


def test_a_gain_must_be_clear_of_its_error_with_other_noise_too():
    """Both pairs are the study's (docs/study.md): DDIM in 10 steps, gamma = 0.1, whose lambda made
    FD and KID worse; Heun in 18, gamma = 0, where both gained.
    """
    assert not Gain(0.1754, 0.0118, 0.0029).confirmed_by(Gain(0.1629, 0.0047, 0.0061))
    assert Gain(0.1467, 0.0126, 0.0056).confirmed_by(Gain(0.1338, 0.0113, 0.0055))
    assert not Gain(0.1467, 0.0056, 0.0056).confirmed_by(Gain(0.1338, 0.0113, 0.0055))


def test_a_form_that_gains_nothing_over_the_constant_is_not_taken():
    process = exact_chain()
    found = by_common_noise(
        sampler_of(process), network(process), images_for(8), 300, 300, CPU, form="kb"
    )
    assert (found.lambdas == found.lambdas[0]).all() and found.line is None
    assert "so the constant is kept" in found.notes[-1]
    assert read_back(found, 10)[0] == pytest.approx(found.lambdas[0], abs=1e-6)


def read_back(found, steps):
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        write_schedule(file.name, found.content())
        return read_schedule(file.name, steps)


def test_final_variance_finds_the_b_that_spreads_images_as_real_ones():
    process = exact_chain()
    found = by_final_variance(sampler_of(process), network(process), images_for(8), 600, 200, CPU)
    assert found.b == pytest.approx(1.02, abs=max(0.005, 2 * found.b_error))
    assert abs(found.held_out[0]) < 4 * found.held_out[1]
    assert found.verdict.startswith("calibrated: variance off by -")
    exact = by_final_variance(
        sampler_of(process), network(process, 1.0), images_for(8), 300, 300, CPU
    )
    assert exact.b == 1.0 and "less than two standard errors" in exact.verdict


def test_final_variance_says_where_no_b_will_do():
    process = exact_chain(5)
    model = network(process, 1.0)
    with pytest.raises(ValueError, match="no constant b from 0.75 to 1.35 gives finished images"):
        by_final_variance(
            process_sampler(process, (1, 4, 4)),
            model,
            lambda i: (3 * images_for(4)(i)[0], {}),
            200,
            200,
            CPU,
        )


# ---- what it is made of ----


def test_trials_share_their_noise_and_their_classes():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x, t, y):
            seen.append((x.clone(), y.clone()))
            return 0.1 * x

    process = exact_chain(3)
    cond = {"y": torch.arange(6)}
    chains = Chains(sampler_of(process, side=2), Model().eval(), cond, 3, 2, CPU)
    for b in (1.0, 1.1):
        list(chains.finished(np.full(3, b), "test"))
    first, second = seen[0], seen[6]
    assert torch.equal(first[0], second[0]) and first[1].tolist() == [0, 2]
    assert chains.network_calls == 18
    list(chains.with_other_noise().finished(np.ones(3), "test"))
    assert not torch.equal(seen[12][0], first[0])


def test_images_with_nan_are_refused():
    process = exact_chain(3)
    with pytest.raises(ImagesWithNaN, match="4 of 4 images with lambda 1.0000 contain NaN"):
        by_common_noise(
            sampler_of(process), lambda x, t: x * float("nan"), images_for(8), 4, 4, CPU
        )


def test_a_feature_space_of_the_evaluator_can_be_asked():
    """Pixels as numbers and as finished pixels say nearly the same."""
    process = exact_chain(5)
    found = [
        by_common_noise(
            sampler_of(process),
            network(process, 1.05),
            images_for(8, 0.2),
            200,
            100,
            CPU,
            features=features,
        )
        for features in (pixels, in_space(PixelSpace()))
    ]
    assert found[1].b == pytest.approx(found[0].b, abs=0.01)


def test_an_interrupted_search_goes_on_where_it_was(tmp_path):
    process, store = exact_chain(5), TrialStore(str(tmp_path / "trials"))
    calls = []
    plain = network(process)

    def model(x, t):
        calls.append(1)
        if len(calls) == 23:
            raise KeyboardInterrupt
        return plain(x, t)

    def search(store=store):
        return by_common_noise(sampler_of(process), model, images_for(8), 60, 60, CPU, store=store)

    with pytest.raises(KeyboardInterrupt):
        search()
    kept = len(list((tmp_path / "trials").iterdir()))
    assert kept == 4  # of five calls each
    found, made = search(), len(calls)
    whole = search(TrialStore())
    assert made - 23 == len(calls) - made - 5 * kept
    np.testing.assert_array_equal(found.lambdas, whole.lambdas)
    assert found.gain == whole.gain and found.held_out == whole.held_out
    store.remove()
    assert not (tmp_path / "trials").exists()


def test_the_picture_has_the_trials_the_parabola_and_the_other_noise(tmp_path):
    process = exact_chain(5)
    found = by_common_noise(sampler_of(process), network(process), images_for(8), 60, 60, CPU)
    drawn = picture(found, "eps")
    (panel,) = drawn.panels
    assert [len(curve.points) for curve in panel.curves] == [len(found.trials), 61, 2]
    lowest = min(panel.curves[1].points, key=lambda point: point[1])
    assert lowest[0] == pytest.approx(found.b, abs=2e-3)
    pytest.importorskip("matplotlib")
    png, _ = save_picture(drawn, str(tmp_path))
    assert (tmp_path / "eps.png").stat().st_size > 5000 and png.endswith("eps.png")


def test_the_frechet_distance_finds_the_same_and_has_the_values_of_the_evaluator():
    process = exact_chain()
    common = (sampler_of(process, side=4), network(process), images_for(4), 2000, 1000, CPU)
    found = search(*common, "fid", features=pixels)
    assert found.b == pytest.approx(1.02, abs=3 * found.b_error) and found.b_error < 0.02
    x, y = rows(50, 0), rows(70, 1, 0.3)
    distance = FrechetDistance(y, 50, 5)
    by_hand = [
        frechet_distance(*(f(part) for part in pair for f in (mean_of, cov_of)))
        for pair in [(y, x)] + [(y, x[np.arange(50) % 5 != g]) for g in range(5)]
    ]
    np.testing.assert_allclose(distance(x)[:6], by_hand, rtol=1e-9)
    with pytest.raises(ValueError, match="needs 10 chains and real images at least"):
        FrechetDistance(y, 8, 5)
    with pytest.raises(ValueError, match="--by fid finds a constant only"):
        search(*common, "fid", features=pixels, form="kb")


def mean_of(part):
    return part.double().numpy().mean(axis=0)


def cov_of(part):
    return np.cov(part.double().numpy().T)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(by="fidelity"), "--by fidelity: allowed are energy, kid, fid, final_variance, norm"),
        (dict(by="norm", num_chains=3), "--by norm has no option num_chains"),
        (dict(num_images=3, features=pixels), "3 chains and 3 real images are too few"),
        (dict(num_images=3, by="final_variance"), "too few for a variance"),
        (dict(form="spline", features=pixels), "'spline' is not known: allowed are b, kb, groups"),
    ],
)
def test_what_is_not_there_is_refused(arguments, text):
    process = exact_chain(3)
    given = {"num_images": 8, **arguments}
    n = given.pop("num_images")
    with pytest.raises(ValueError, match=text):
        calibrate(sampler_of(process), network(process), images_for(8), n, 4, CPU, **given)


def test_every_rule_returns_what_samplers_can_read(tmp_path):
    process = exact_chain(5)
    for by in RULES:
        found = calibrate(
            sampler_of(process, side=4),
            network(process),
            images_for(4),
            64,
            32,
            CPU,
            by,
            **({"features": pixels} if "features" in RULES[by].options else {}),
        )
        path = tmp_path / f"{by}.yaml"
        write_schedule(path, {**found.content(), "settings": {}})
        b, k = read_schedule(path, 5)
        assert np.asarray(b) + k * np.arange(5) == pytest.approx(found.lambdas, abs=1e-6)
        assert found.table() and found.lambdas.shape == (5,)


def results_of_two_rules():
    process = exact_chain(5)
    common = (sampler_of(process), network(process), images_for(8), 41, 7, CPU)
    energy_rule = by_common_noise(*common, form="groups", num_chains=31)
    return [energy_rule.b, energy_rule.gain.error, by_final_variance(*common).b]


PARALLEL = """
import sys
sys.path.insert(0, "tests")
import test_common_noise
test_common_noise.in_two_processes()
"""


def in_two_processes():
    torch.set_num_threads(1)
    dist_util.setup_dist()
    found = results_of_two_rules()
    if dist_util.is_main():
        print("found:", found)
    dist_util.cleanup()


def test_two_processes_find_what_one_finds():
    done = launch.mpiexec(2, ["-c", PARALLEL])
    assert done.returncode == 0, done.stderr
    two = yaml.safe_load(done.stdout.partition("found:")[2])
    np.testing.assert_allclose(two, results_of_two_rules(), rtol=1e-4)
