"""FD-infinity on Gaussian features, whose distances and biases are known."""

import json
from dataclasses import replace

import numpy as np
import pytest

from guided_diffusion_ip.evaluation.evaluate import EvaluationRequest, evaluate
from guided_diffusion_ip.evaluation.report import as_json, table
from guided_diffusion_ip.metrics import METRICS, FeatureStatistics, frechet_distance
from guided_diffusion_ip.metrics.frechet_infinity import frechet_distance_infinity, subset_sizes

D, N, S, SHIFT = 8, 500, 1.25, 0.5
REFERENCE = np.zeros(D), np.eye(D)
TRUE = SHIFT**2 + D * (S - 1) ** 2


def samples(seed, n=N):
    """[n, D] from N(SHIFT e_1, S^2 I)."""
    x = np.random.default_rng([7, seed]).normal(size=(n, D)) * S
    x[:, 0] += SHIFT
    return x


@pytest.fixture(scope="module")
def repeats():
    """Of 150 sets of 500 images: plain distances, extrapolated ones, and the errors given."""
    rows = []
    for seed in range(150):
        x = samples(seed)
        statistics = FeatureStatistics()
        statistics.update(x)
        plain = frechet_distance(*REFERENCE, statistics.mean, statistics.cov)
        rows.append((plain, *frechet_distance_infinity(*REFERENCE, x)))
    return np.array(rows).T


def test_the_plain_distance_has_the_known_bias_and_the_limit_has_none(repeats):
    """With covariance S^2 I: the mean adds D S^2 / n, and the square root of a Wishart matrix is
    too small by D (D + 1) S / (8 (n - 1)) to second order.
    """
    bias = D * S**2 / N + D * (D + 1) * S / (4 * (N - 1))
    plain, limit, _ = repeats
    noise = 4 / np.sqrt(len(plain))
    assert plain.mean() - TRUE == pytest.approx(bias, abs=noise * plain.std())
    assert limit.mean() == pytest.approx(TRUE, abs=noise * limit.std())
    assert bias > 2 * noise * plain.std(), "a bias that would be seen"


def test_the_error_is_that_of_repeated_experiments(repeats):
    _, limit, error = repeats
    assert error.mean() == pytest.approx(limit.std(ddof=1), rel=0.2)
    within = np.mean(np.abs(limit - TRUE) < 2 * error)
    assert 0.88 < within < 0.99


def test_equal_seeds_give_equal_numbers_and_others_another_order():
    x = samples(0)
    first, again = (frechet_distance_infinity(*REFERENCE, x, seed=3) for _ in range(2))
    assert first == again
    other, error = frechet_distance_infinity(*REFERENCE, x, seed=4)
    assert other != first[0] and abs(other - first[0]) < 3 * error


def test_sets_of_images_are_the_subsets_of_the_paper():
    sizes = subset_sizes(50_000, 2048, 15)
    assert sizes[0] == 5000 and sizes[-1] == 50_000 and len(sizes) == 15
    assert subset_sizes(6000, 2048, 15)[0] == 3000, "not below half of few images"
    assert subset_sizes(20_000, 2048, 15)[0] == 4096, "twice the dimensions"
    assert len(subset_sizes(20, 2048, 15)) == 11, "each size once"


def test_what_cannot_be_extrapolated_is_refused():
    with pytest.raises(ValueError, match="at least 20 images"):
        frechet_distance_infinity(*REFERENCE, samples(0, 19))
    with pytest.raises(ValueError, match="2 subsets"):
        frechet_distance_infinity(*REFERENCE, samples(0), subsets=1)
    with pytest.raises(ValueError, match="row 4 "):
        x = samples(0)
        x[4, 2] = np.nan
        frechet_distance_infinity(*REFERENCE, x)


def test_a_singular_covariance_has_a_limit_too():
    x = samples(0) * (np.arange(D) < 5)
    value, error = frechet_distance_infinity(*REFERENCE, x)
    assert value == pytest.approx(SHIFT**2 + 5 * (S - 1) ** 2 + 3, abs=4 * error) and error > 0


def test_in_an_evaluation_with_statistics_alone(tmp_path):
    """It needs rows of the samples, of the reference only moments."""
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, top, (n, 2, 2, 1)).astype(np.uint8) for n, top in ((90, 200), (60, 255))
    ]
    rows = images[0].reshape(90, -1) / 255
    np.savez(tmp_path / "ref.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False), n=[90])
    request = EvaluationRequest(tmp_path / "ref.npz", images[1], "pixels", metrics=("fd_inf",))
    said = []
    evaluation = evaluate(request, said.append)
    assert "Frechet distances of subsets of 60 samples, in 4 dimensions" in said
    score = json.loads(as_json(evaluation))["metrics"]["fd_inf"]
    assert score["samples"] == 60 and score["reference"] == 90 and score["standard_deviation"] > 0
    assert "FD-infinity  " in table(evaluation) and not METRICS["fd_inf"].larger_is_better
    few = replace(
        request,
        samples=images[1].reshape(30, 4, 2, 1)[:20],
        reference=images[0].reshape(45, 4, 2, 1),
    )
    assert "FD-infinity@20 extrapolated from too few images" in table(evaluate(few, said.append))
