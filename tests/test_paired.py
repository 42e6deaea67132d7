"""Samples with equal noise, compared: the distances are the evaluator's, the error is that of the
difference.
"""

import sys

import launch
import numpy as np
import pytest

from guided_diffusion_ip.data.npz_io import write_npz
from guided_diffusion_ip.evaluation.evaluate import EvaluationRequest, evaluate
from guided_diffusion_ip.evaluation.paired import Against, changes


def rows(n, seed, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal((n, 4)).astype(np.float32)


def against(seed=99, n=300):
    real = rows(n, seed)
    return Against(real.mean(axis=0), np.cov(real.T), real)


def test_the_error_is_the_spread_of_the_difference_over_repetitions():
    reference, found = against(), []
    for seed in range(120):
        noise = rows(200, seed)
        two = [reference.replicates(part) for part in (noise, 1.2 * noise)]
        found.append(changes(*two))
    for name in ("fid", "kid"):
        spread = np.std([one[name].value for one in found])
        errors = np.sqrt(np.mean([one[name].error ** 2 for one in found]))
        assert errors == pytest.approx(spread, rel=0.25), name
        # Both distances by themselves scatter more than their difference is uncertain.
        assert np.std([one[name].after for one in found]) > 1.1 * errors
    assert "->" in found[0]["fid"].text


def pictures(path, scale, seed=0):
    noise = np.random.default_rng(seed).standard_normal((60, 6, 6, 1))
    write_npz(str(path), {"arr_0": np.clip(128 + scale * noise, 0, 255).astype(np.uint8)})
    return str(path)


def test_the_script_says_what_the_evaluator_says_and_the_change(tmp_path):
    ref = pictures(tmp_path / "ref.npz", 30, seed=1)
    a, b = pictures(tmp_path / "a.npz", 45), pictures(tmp_path / "b.npz", 31)
    command = [sys.executable, "evaluations/compare.py", ref, a, b, "--features", "pixels"]
    done = launch.run(command)
    assert done.returncode == 0, done.stderr
    for name in ("fid", "kid"):
        before, after = (
            evaluate(EvaluationRequest(ref, one, "pixels", (name,)), lambda line: None).values[name]
            for one in (a, b)
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"{name}:"))
        assert f"{before:.4g} -> {after:.4g}: {after - before:+.4g} (" in line
    few = tmp_path / "few.npz"
    write_npz(str(few), {"arr_0": np.zeros((7, 6, 6, 1), np.uint8)})
    done = launch.run([*command[:4], str(few), *command[5:]])
    assert done.returncode == 2 and "must be equally many" in done.stderr
    done = launch.run(command[:4])
    assert done.returncode == 2 and "three arguments are needed" in done.stderr


def test_too_few_images_are_refused(tmp_path):
    few = pictures(tmp_path / "few.npz", 1.0)
    with np.load(few) as npz:
        write_npz(few, {"arr_0": npz["arr_0"][:30]})
    done = launch.run(
        [sys.executable, "evaluations/compare.py", few, few, few, "--features", "pixels"]
    )
    assert done.returncode == 2 and "holds 30 images: 40 or more are needed" in done.stderr
