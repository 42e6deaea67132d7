"""Density and coverage: by hand, in expectation, over ranks, in an evaluation."""

import math
import re
import sys
from pathlib import Path

import launch
import numpy as np
import pytest

from guided_diffusion_ip.evaluation.evaluate import EvaluationRequest, evaluate
from guided_diffusion_ip.evaluation.report import table
from guided_diffusion_ip.metrics import METRICS, precision_recall
from guided_diffusion_ip.metrics.density_coverage import K, density_coverage

EVALUATOR = str(Path(__file__).resolve().parent.parent / "evaluations" / "evaluator.py")


def features(n, seed, d=6):
    return np.random.default_rng([3, seed]).normal(size=(n, d)).astype(np.float32)


def by_hand(ref, sample, k):
    """From whole matrices of distances, float64."""
    ref, sample = ref.astype(np.float64), sample.astype(np.float64)
    own = np.linalg.norm(ref[:, None] - ref, axis=2)
    radii = np.sort(own, axis=1)[:, k]
    inside = np.linalg.norm(ref[:, None] - sample, axis=2) <= radii[:, None]
    return inside.sum() / (k * len(sample)), inside.any(axis=1).mean()


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("block_mb", [64, 1e-3])
def test_by_hand(k, block_mb):
    ref, sample = features(70, 0), features(50, 1) * 1.2 + 0.3
    found = density_coverage(ref, sample, k, arithmetic="float64", block_mb=block_mb)
    assert found == pytest.approx(by_hand(ref, sample, k), rel=1e-12)


def test_on_one_distribution_both_are_what_theory_says():
    """Among the N - 1 other reference points and M samples around a reference point, all orders are
    equally likely.
    """
    n, m, repeats = 60, 40, 300
    values = np.array(
        [density_coverage(features(n, 2 * r), features(m, 2 * r + 1)) for r in range(repeats)]
    )
    expected = 1, 1 - math.comb(n - 1, K) / math.comb(n + m - 1, K)
    for column, mean in zip(values.T, expected):
        assert column.mean() == pytest.approx(mean, abs=4 * column.std() / repeats**0.5)


def test_collapsed_samples_are_dense_and_cover_little():
    ref = features(200, 0)
    density, coverage = density_coverage(ref, np.repeat(ref[:3], 40, axis=0))
    assert density > 0.5 and coverage < 0.1
    assert density_coverage(ref, features(200, 1) + 50) == (0, 0)


def test_two_outliers_of_the_reference_make_precision_1_but_hardly_cover_anything():
    ref, sample = features(200, 0), features(200, 1) + 3
    with_outliers = np.concatenate([ref, np.full((2, 6), 6, np.float32)])
    assert precision_recall(ref, sample)[0] == 0 and precision_recall(with_outliers, sample)[0] == 1
    assert density_coverage(ref, sample) == (0, 0)
    assert density_coverage(with_outliers, sample) == (2 / K, 2 / 202)


def test_in_an_evaluation_they_are_computed_once():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, 2, 2, 3)).astype(np.uint8) for n in (60, 50)]
    request = EvaluationRequest(*images, "pixels", metrics=("density", "coverage"))
    said = []
    evaluation = evaluate(request, said.append)
    assert said.count("density and coverage: 50 samples, 60 reference images") == 1
    rows = [x.reshape(len(x), -1).astype(np.float32) / 255 for x in images]
    assert tuple(evaluation.values.values()) == density_coverage(*rows)
    assert "Density (float32)" in table(evaluation) and METRICS["coverage"].short == "coverage"


def test_two_processes_give_the_same(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("ref", 60), ("samples", 50)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, 256, (n, 4, 4, 3), np.uint8))
    argv = [
        EVALUATOR,
        str(tmp_path / "ref.npz"),
        str(tmp_path / "samples.npz"),
        "--features",
        "pixels",
        "--metrics",
        "density,coverage",
    ]
    one = launch.run([sys.executable, *argv], timeout=120)
    two = launch.torchrun(2, argv, timeout=120)
    rows = [re.findall(r"^(?:Density|Coverage) .*", done.stdout, re.M) for done in (one, two)]
    assert len(rows[0]) == 2 and rows[0] == rows[1], one.stderr + two.stderr


def test_too_few_images_are_named():
    images = np.zeros((5, 2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="density and coverage need at least 6"):
        request = EvaluationRequest(images, images, "pixels", metrics=("density",))
        evaluate(request, lambda text: None)
