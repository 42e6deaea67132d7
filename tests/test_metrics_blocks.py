"""Precision and recall against brute force; every metric in two real processes against one."""

import sys

import launch
import numpy as np
import pytest
import torch

from guided_diffusion_ip.ieee_float32 import ieee_float32
from guided_diffusion_ip.metrics import neighbours, precision_recall
from tools.benchmark.machine import PeakMemory


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def differences(u, v):
    return np.square(u[:, None].astype(np.float64) - v[None]).sum(axis=2)


def brute_force(ref, sample, k, distances=differences):
    """From whole matrices of distances."""
    radius_ref, radius_sample = (np.sort(distances(x, x), axis=1)[:, k] for x in (ref, sample))
    across = distances(ref, sample)
    return (across <= radius_ref[:, None]).any(axis=0).mean(), (across <= radius_sample).any(
        axis=1
    ).mean()


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
def test_precision_and_recall_are_those_of_whole_matrices(arithmetic, k):
    ref, sample = normal(0, 230, 8), normal(1, 170, 8) * 0.8 + 0.3
    expected = brute_force(ref, sample, k)
    assert 0.2 < min(expected) and max(expected) < 1 and expected[0] != expected[1]
    # 1 MB: one tile; 1 KB: tiles of 8 x 32 or 5 x 22; the last: single numbers
    for block_mb in (1, 1e-3, 1e-6) if k == 3 else (1e-3,):
        assert (
            precision_recall(ref, sample, k, arithmetic=arithmetic, block_mb=block_mb) == expected
        ), block_mb
    assert (
        precision_recall(
            torch.from_numpy(ref), torch.from_numpy(sample).double(), k, arithmetic=arithmetic
        )
        == expected
    )
    assert precision_recall(sample, ref, k, arithmetic=arithmetic) == expected[::-1]


def test_collapsed_and_foreign_samples():
    ref = normal(0, 1000, 4)
    assert precision_recall(ref, ref) == (1, 1)
    assert precision_recall(ref, ref + 100) == (0, 0)
    # All samples beside one typical image: all are believable, and nothing else is covered.
    precision, recall = precision_recall(
        ref, ref[np.square(ref).sum(axis=1).argmin()] + 0.01 * normal(1, 1000, 4)
    )
    assert precision == 1 and recall < 0.01
    # Twice as wide: much is not believable, but all is covered.
    precision, recall = precision_recall(ref, 2 * normal(2, 1000, 4))
    assert precision < 0.6 and recall > 0.9


@pytest.mark.parametrize("arithmetic", ["float32", "float64", "half"])
def test_a_point_on_the_edge_is_inside_and_a_point_is_not_its_own_neighbour(arithmetic):
    ref = np.arange(0, 40, 2, dtype=np.float32)[:, None]  # neighbours at distance 2
    outside, edge, copies = (
        41.0,
        40.0,
        [[60.0], [60.0]],
    )  # of two equal points, each is the other's neighbour: radius 0
    assert (
        precision_recall(ref, [[outside], [edge], [-2.0], *copies], 1, arithmetic=arithmetic)[0]
        == 0.4
    )
    assert (
        precision_recall([[outside], [edge], [-2.0], *copies], ref, 1, arithmetic=arithmetic)[1]
        == 0.4
    )
    assert (
        precision_recall([[8.0], [8.0]], [[8.0], [8.0], [8.5], [7.5]], 1, arithmetic=arithmetic)[0]
        == 0.5
    )


def test_half_rounds_distances():
    """16 and 16.0039 are one number in half precision, whose steps there are 1/64."""
    ref, sample = (
        np.array([[0], [16], [1000]], np.float32),
        np.array([[-16.0039], [0], [100]], np.float32),
    )
    assert precision_recall(ref[:2], sample, 1)[0] == pytest.approx(1 / 3)
    assert precision_recall(ref[:2], sample, 1, arithmetic="half")[0] == pytest.approx(2 / 3)
    # An overflow anywhere, here of 1000^2, has the block redone in float32.
    assert precision_recall(ref, sample, 1, arithmetic="half") == precision_recall(ref, sample, 1)


@pytest.mark.parametrize("largest", [10, 115, 1000])  # certain not to overflow, possible, happens
def test_half_is_float16_but_for_blocks_that_overflow(largest, monkeypatch):
    """With one entry a row nothing depends on the order of sums: equal to NumPy's float16, block by
    block.
    """
    monkeypatch.setattr(neighbours, "HALF_BLOCK", 50)
    redone = []

    def published(u, v):
        d = np.empty((len(u), len(v)))
        for i in range(0, len(u), 50):
            for j in range(0, len(v), 50):
                for dtype in (np.float16, np.float32):
                    a, b = u[i : i + 50].astype(dtype), v[j : j + 50].astype(dtype)
                    with np.errstate(all="ignore"):
                        block = np.maximum(a * a - 2 * (a * b.T) + (b * b).T, 0)
                    if np.isfinite(block).all():
                        break
                redone.append(dtype is np.float32)
                d[i : i + 50, j : j + 50] = block
        return d

    ref, sample = 5 * normal(0, 120, 1) + 30, 7 * normal(1, 130, 1) + 30
    ref[70:] += largest
    sample[100:] += largest
    expected = brute_force(ref, sample, 3, published)
    assert any(redone) == (largest == 1000) and not all(redone)
    assert expected != precision_recall(ref, sample), "rounding must make a difference"
    for block_mb in (64, 1e-3):
        assert precision_recall(ref, sample, arithmetic="half", block_mb=block_mb) == expected


@pytest.mark.parametrize("arithmetic", ["float32", "half"])
def test_half_is_near_and_independent_of_tiles(arithmetic):
    ref, sample = normal(0, 400, 64), normal(1, 300, 64)
    exact = brute_force(ref, sample, 3)
    values = [precision_recall(ref, sample, arithmetic=arithmetic, block_mb=mb) for mb in (64, 0.1)]
    assert values[0] == values[1] == pytest.approx(exact, abs=0.02)


def test_what_precision_and_recall_refuse():
    x = normal(0, 10, 3)
    assert precision_recall(x[:4], x) == brute_force(x[:4], x, 3)
    for ref, sample, options, message in [
        (x[:3], x, {}, "at least 4 images, the reference features have 3"),
        (x, x[:5], {"k": 5}, "sample features have 5"),
        (x, x[:, :2], {}, "use the same network"),
        (x, np.where(x > 1, np.inf, x), {}, r"row \d of the sample features"),
        (x, x, {"arithmetic": "bf16"}, "not among float32, float64, half"),
        (x, x, {"k": 0}, "k must be at least 1"),
        (x, x, {"block_mb": 0}, "block_mb positive"),
        (x[0], x, {}, "must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            precision_recall(ref, sample, **options)


@pytest.mark.parametrize("arithmetic", ["float32", "float64", "half"])
def test_a_surrounding_autocast_changes_no_distance(arithmetic):
    ref, sample = normal(0, 500, 16), normal(1, 400, 16) + np.float32(0.3)
    expected = precision_recall(ref, sample, arithmetic=arithmetic)
    with torch.autocast("cpu", torch.bfloat16):
        assert precision_recall(ref, sample, arithmetic=arithmetic) == expected
        assert torch.is_autocast_enabled("cpu")


def switches():
    """What stands in each of torch's switches for float32; "contradiction" for one that may not be
    asked.
    """

    def ask(place, name):
        try:
            return getattr(place, name)
        except RuntimeError:
            return "contradiction"

    b = torch.backends
    new = (
        [b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.matmul]
        if hasattr(b.cudnn, "conv")
        else []
    )
    return [
        ask(b.cudnn, "allow_tf32"),
        ask(b.cuda.matmul, "allow_tf32"),
        *(place.fp32_precision for place in new),
    ]


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("new", ["untouched", "ieee", "tf32", "one each"])
def test_programs_that_ask_cudnns_switch_may_run_while_float32_is_float32(old, new):
    cudnn = torch.backends.cudnn
    if new != "untouched" and not hasattr(cudnn, "conv"):
        pytest.skip("this torch has no newer switches")
    before = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = old
        if new != "untouched":
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = (
                ("ieee", "tf32") if new == "one each" else (new, new)
            )
        own = switches()
        with ieee_float32():
            inside = switches()
            with cudnn.flags(enabled=True, benchmark=False):
                pass
        assert switches() == own and inside[:2] == [False, False] and set(inside[2:]) <= {"ieee"}
        if hasattr(cudnn, "conv"):  # also what may not be asked is as it was
            cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if old else "ieee"
            assert cudnn.allow_tf32 is old
    finally:
        cudnn.allow_tf32 = before


@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_float32_products_are_float32_and_the_callers_choice_stands(allowed, monkeypatch):
    before, seen, matmul = torch.get_float32_matmul_precision(), set(), torch.Tensor.__matmul__

    def watched(a, b):
        seen.add(
            torch.get_float32_matmul_precision()
            if not hasattr(torch.backends.cuda.matmul, "fp32_precision")
            else torch.backends.cuda.matmul.fp32_precision
        )
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    try:
        torch.set_float32_matmul_precision(allowed)
        precision_recall(normal(0, 10, 3), normal(1, 10, 3))
        assert torch.get_float32_matmul_precision() == allowed and seen in ({"ieee"}, {"highest"})
        with pytest.raises(ValueError, match="NaN"):
            precision_recall(normal(0, 10, 3), normal(1, 10, 3) * np.float32(np.nan))
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_is_a_few_tiles(capfd):
    ref, sample, memory = normal(0, 7000, 16), normal(1, 7000, 16), PeakMemory(torch.device("cpu"))
    precision_recall(ref[:500], sample[:500], device="cpu", progress=True)
    assert "precision and recall" in capfd.readouterr().err
    memory.start()
    precision_recall(ref, sample, device="cpu", block_mb=4)
    if (growth := memory.growth()) is None:
        pytest.skip("this system does not tell how much memory was in use")
    assert growth < 30e6  # the whole matrix: 196 MB
    assert capfd.readouterr().err == ""


# ---- several processes ----

WORK = """
import sys
import numpy as np, torch
from guided_diffusion_ip import dist_util
from guided_diffusion_ip.metrics import FeatureStatistics, InceptionScore, precision_recall

torch.set_num_threads(1)
dist_util.setup_dist()
rank, world = dist_util.get_rank(), dist_util.get_world_size()
rows = lambda seed, n: np.random.default_rng(seed).standard_normal((n, 24)).astype(np.float32)
ref, sample = rows(0, 601), rows(1, 455) * 0.9
far = ref + np.linspace(1000, 1001, 601)[:, None]  # float64
saved = {}
for name, cut in dict(uneven=317, empty=601, first_empty=0).items():  # rank 0 has the rows before the cut
    part, score = FeatureStatistics(), InceptionScore(100)
    start, stop = [(0, cut), (cut, 601)][rank] if world == 2 else (0, 601)
    for i in range(start, stop, 50):
        part.update(far[i:min(i + 50, stop)])
        score.update(ref[i:min(i + 50, stop)], i)
    part.all_reduce(), score.all_reduce()
    saved |= {f"{name}_mean": part.mean, f"{name}_cov": part.cov, f"{name}_n": part.n, f"{name}_score": score.value,
              f"{name}_score_n": score.n}
for arithmetic in ("float32", "float64", "half"):
    saved[arithmetic] = precision_recall(ref, sample, arithmetic=arithmetic, block_mb=0.03)
saved["overflow"] = precision_recall(ref * 60, sample * 60, arithmetic="half", block_mb=0.03)
nothing = FeatureStatistics()
nothing.all_reduce()
saved["nothing"] = nothing.n
if world == 2:
    differing = FeatureStatistics()
    differing.update(ref[:, :20 + rank])
    try:
        differing.all_reduce()
    except ValueError as error:
        saved["message"] = str(error)
np.savez(f"{sys.argv[1]}/rank{rank}.npz", **saved)
dist_util.cleanup()
"""


def load(folder, rank):
    with np.load(folder / f"rank{rank}.npz") as npz:
        return {key: npz[key] for key in npz.files}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    done = launch.run([sys.executable, "-c", WORK, str(out)])
    assert done.returncode == 0, done.stdout + done.stderr
    return load(out, 0)


@pytest.mark.parametrize("launcher", [launch.mpiexec, launch.torchrun])
def test_two_processes_measure_as_one(launcher, one_process, tmp_path):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    done = launcher(2, [str(script), str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = load(tmp_path, 0), load(tmp_path, 1)
    assert all(np.array_equal(first[key], second[key]) for key in first), "ranks differ"
    assert "different sizes, in rank order: [20, 21]" in str(first.pop("message"))
    for key, value in one_process.items():
        if key.endswith(("mean", "cov", "score")):
            np.testing.assert_allclose(
                first[key], value, rtol=0, atol=1e-13 * max(1, np.abs(value).max()), err_msg=key
            )
        else:
            assert np.array_equal(first[key], value), key
    assert (
        one_process["uneven_n"] == one_process["uneven_score_n"] == 601
        and one_process["nothing"] == 0
    )
    assert 0 < one_process["float32"].min() and one_process["float32"].max() < 1
