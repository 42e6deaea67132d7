"""Epsilon scaling in closed form: Gaussian data with a spectrum, the exact epsilon, every error the
sampler's own; and that calibration finds the best b there (tools/lambda_theory.py).
"""

import numpy as np
import pytest
import torch

from guided_diffusion_ip.diffusion.epsilon_scaling import EpsilonScaling
from guided_diffusion_ip.exposure_bias.chains import pixels
from guided_diffusion_ip.exposure_bias.common_noise import WIDER, by_common_noise
from guided_diffusion_ip.exposure_bias.final_variance import by_final_variance
from tools.lambda_theory import KINDS, STEPS, final_variances, known, real_images

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:epsilon scaling without clip_denoised")
CASES = [(kind, steps) for kind in KINDS for steps in STEPS]
# Where the total variance does not tell the best b to .015: with fixed-large variances in 10 steps
# no b in reach makes up for the noise that is left in the directions of little variance.
NOT_BY_VARIANCE = {("ddpm fixed-large", 10)}


@pytest.fixture(scope="module")
def cases():
    found = {case: known(*case, side=8) for case in CASES}
    return {case: (one, one.best()) for case, one in found.items()}


def test_the_recursion_is_what_the_sampler_does():
    """Variances of 4,000 chains, pixel by pixel, for a stochastic and a deterministic sampler."""
    for kind in ("ddpm fixed-small", "ddim"):
        case = known(kind, 10, side=4)
        sampler = case.sampler.with_scaling(EpsilonScaling.of(np.full(10, 1.05)))
        images = sampler(case.network, range(4000)).flatten(1).double()
        expected = final_variances(case.sampler, case.network, 1.05)
        ratio = images.var(dim=0).numpy() / expected
        assert np.abs(ratio - 1).max() < 5 * np.sqrt(2 / 4000), kind


def test_the_first_step_is_exempt():
    sampler = known("ddim", 10, side=4).sampler
    path = sampler.with_scaling(EpsilonScaling(1.1)).along.process.lambdas
    assert path.tolist() == [1.1] * 9 + [1.0]


@pytest.mark.parametrize("case", CASES)
def test_the_best_b_pays_and_nears_1_with_more_steps(case, cases):
    one, best = cases[case]
    assert one.distance(best) < one.distance(1.0)
    assert best > 1 if case[0] != "ddpm fixed-large" else best < 1
    if case[1] == 50 and case[0] != "ddpm fixed-large":
        assert best < cases[case[0], 20][1] < cases[case[0], 10][1]


@pytest.mark.parametrize("case", CASES)
def test_the_final_variance_tells_the_best_b(case, cases):
    one, best = cases[case]
    root = one.by_variance()
    near = np.isfinite(root) and abs(root - best) < 0.015
    assert near != (case in NOT_BY_VARIANCE), (root, best)


@pytest.mark.parametrize("case", [("ddim", 10), ("ddim", 20), ("ddpm optimal", 20)])
def test_calibration_finds_it(case, cases):
    """The energy distance has its lowest point within .006 of W2's, and 97 % of its gain there."""
    one, best = cases[case]
    common = (one.sampler, one.network, real_images(one.network.variances), 4000, 1000, CPU)
    found = by_common_noise(*common, features=pixels, num_chains=1000)
    assert found.pays and abs(found.b - best) < 0.006 + 2 * found.b_error, (found.b, best)
    assert found.b_error < 0.006
    gained = one.distance(1.0) - one.distance(found.b)
    assert gained > 0.97 * (one.distance(1.0) - one.distance(best))
    by_variance = by_final_variance(*common, num_chains=1000)
    assert abs(by_variance.b - best) < 0.015 + 2 * by_variance.b_error


@pytest.mark.parametrize("form", ["kb", "groups"])
def test_more_parameters_find_what_a_constant_cannot(form):
    """Too large variances in 10 steps: a lambda that changes along the chain comes closer."""
    one = known("ddpm fixed-large", 10, side=8)
    common = (one.sampler, one.network, real_images(one.network.variances), 4000, 1000, CPU)
    found = by_common_noise(*common, features=pixels, num_chains=1000, form=form)
    assert found.pays and np.ptp(found.lambdas) > 0.01, found.notes

    def distance(lambdas):
        stds = np.sqrt(final_variances(one.sampler, one.network, lambdas))
        return float(((stds - one.network.variances.sqrt().flatten().numpy()) ** 2).sum())

    assert distance(found.lambdas) < 0.9 * one.distance(one.best())
    assert (found.lambdas >= WIDER[0] - 1e-9).all() and (found.lambdas <= WIDER[1] + 1e-9).all()
    use = {"kb": "kb", "groups": "lambda"}[form]
    assert found.content()["use"] == use
    if form == "kb":
        k, b = found.line
        np.testing.assert_allclose(found.lambdas, k * np.arange(10) + b, atol=1e-9)
