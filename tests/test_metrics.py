"""The mathematics of evaluation: closed forms, brute force, and one answer from any batches."""

import tracemalloc
import warnings

import numpy as np
import pytest
import torch

from guided_diffusion_ip.metrics import (
    FeatureStatistics,
    InceptionScore,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from guided_diffusion_ip.metrics.frechet import covariance_rank


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def statistics_of(*batches):
    result = FeatureStatistics()
    for batch in batches:
        result.update(batch)
    return result


def closeness(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


# ---- mean and covariance ----


@pytest.mark.parametrize(
    "sizes", [[3000], [1] * 40 + [255, 256, 257, 1, 2151], [1024, 0, 1024, 952], [2999, 1]]
)
def test_streamed_moments_are_those_of_all_rows(sizes):
    x = normal(0, 3000, 40) @ normal(1, 40, 40) + 3
    result = statistics_of(*np.split(x, np.cumsum(sizes)[:-1]))
    assert result.n == 3000
    assert (
        closeness(result.mean, x.mean(axis=0)) < 2e-14
        and closeness(result.cov, np.cov(x, rowvar=False)) < 2e-14
    )
    assert np.array_equal(result.cov, result.cov.T)


def test_an_offset_costs_no_accuracy():
    x = normal(2, 5000, 10) + 1000
    expected = np.cov(
        x - 1000, rowvar=False
    )  # the subtraction is exact; raw moments are off by 1e-9
    first_unlike = np.concatenate([normal(3, 300, 10), x])
    assert closeness(statistics_of(*np.array_split(x, 17)).cov, expected) < 1e-13
    assert (
        closeness(statistics_of(*np.array_split(x, 3)).merge(FeatureStatistics()).cov, expected)
        < 1e-13
    )
    assert closeness(statistics_of(first_unlike).cov, np.cov(first_unlike, rowvar=False)) < 1e-13


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_merging_in_any_order(order):
    parts = [
        normal(i, n, 12) * (i + 1) + offset
        for i, (n, offset) in enumerate([(700, 0), (1, 1000), (1500, -50), (30, 5)])
    ]
    merged = FeatureStatistics()
    for i in order:
        part = statistics_of(parts[i])
        assert merged.merge(part) is merged
        assert part.n == len(parts[i]) and np.array_equal(part.mean, statistics_of(parts[i]).mean)
    whole = np.concatenate(parts)
    assert merged.n == len(whole)
    assert (
        closeness(merged.mean, whole.mean(axis=0)) < 1e-14
        and closeness(merged.cov, np.cov(whole, rowvar=False)) < 1e-14
    )
    merged.update(parts[0])  # and goes on
    assert closeness(merged.cov, np.cov(np.concatenate([whole, parts[0]]), rowvar=False)) < 1e-14


@pytest.mark.parametrize(
    "convert",
    [
        np.float16,
        np.float32,
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: torch.from_numpy(x).requires_grad_(),
        lambda x: np.asfortranarray(x),
        lambda x: torch.from_numpy(x).T.contiguous().T,
    ],
)
def test_any_float_type_is_taken_as_it_is(convert):
    x = convert(normal(4, 400, 6))
    exact = x.detach().double().numpy() if isinstance(x, torch.Tensor) else x.astype(np.float64)
    result = statistics_of(x[:100], x[100:])
    assert (
        closeness(result.mean, exact.mean(axis=0)) < 2e-14
        and closeness(result.cov, np.cov(exact, rowvar=False)) < 2e-14
    )
    assert result.mean.dtype == result.cov.dtype == np.float64


def test_the_caller_may_reuse_its_buffer_and_map_its_files(tmp_path):
    x, buffer, reused = normal(5, 500, 6), np.empty((50, 6)), FeatureStatistics()
    for batch in np.split(x, 10):
        buffer[:] = batch
        reused.update(buffer)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_file = statistics_of(mapped)
        (
            precision_recall(mapped[:50], mapped[50:], device="cpu"),
            kernel_distance(mapped[:50], mapped[50:], subsets=1),
        )
    assert closeness(reused.cov, np.cov(x, rowvar=False)) < 2e-14 and np.array_equal(
        reused.cov, from_file.cov
    )


def test_memory_does_not_grow_with_rows():
    def peak(batches):
        tracemalloc.start()
        result = FeatureStatistics()
        for _ in range(batches):
            result.update(np.ones((500, 64), np.float32))
        result.cov  # noqa: B018 (computed here)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(200) < 1.1 * peak(10) < 3e6


def test_what_statistics_refuse():
    x = normal(6, 2000, 5)
    bad = x.copy()
    bad[1500, 2] = np.nan
    with pytest.raises(ValueError, match=r"row 3500 .*NaN"):
        statistics_of(x, bad)
    with pytest.raises(ValueError, match="4 entries a row, those before them 5"):
        statistics_of(x, x[:, :4])
    with pytest.raises(ValueError, match="4 entries a row, those before them 5"):
        statistics_of(x).merge(statistics_of(x[:, :4]))
    for wrong in (x[0], x[:, None], x.astype(complex), np.array([["a"]])):
        with pytest.raises(ValueError, match="features must be"):
            statistics_of(wrong)
    for few in (statistics_of(), statistics_of(x[:0]), statistics_of(x[:1])):
        with pytest.raises(ValueError, match=f"at least 2 images, there are {few.n}"):
            few.cov  # noqa: B018
    with pytest.raises(ValueError, match="at least 1 images"):
        statistics_of().mean  # noqa: B018


def test_stored_moments_are_compared_but_not_continued():
    whole = statistics_of(normal(7, 100, 4))
    stored = FeatureStatistics.from_moments(whole.mean.astype(np.float32), whole.cov, 100)
    assert (
        stored.n == 100
        and stored.mean.dtype == np.float64
        and np.array_equal(stored.cov, whole.cov)
    )
    assert FeatureStatistics.from_moments(whole.mean, whole.cov).n is None
    assert frechet_distance(stored.mean, stored.cov, whole.mean, whole.cov) == pytest.approx(
        0, abs=1e-10
    )
    for attempt in (
        lambda: stored.update(np.ones((1, 4))),
        lambda: stored.merge(whole),
        lambda: whole.merge(stored),
    ):
        with pytest.raises(ValueError, match="stored statistics cannot"):
            attempt()
    for mean, cov in (
        (whole.mean[:3], whole.cov),
        (whole.mean, whole.cov[:3]),
        (whole.mean, whole.cov * np.nan),
    ):
        with pytest.raises(ValueError, match="stored statistics"):
            FeatureStatistics.from_moments(mean, cov, 100)


# ---- Frechet distance ----


def rotation(d, seed=0):
    return np.linalg.qr(normal(seed, d, d))[0]


def with_spectrum(values, q):
    s = (q * values) @ q.T
    return (s + s.T) / 2


@pytest.mark.parametrize(
    "d, dead1, dead2", [(1, 0, 0), (30, 0, 0), (30, 12, 0), (30, 12, 20), (30, 0, 30), (30, 30, 30)]
)
def test_frechet_of_commuting_gaussians(d, dead1, dead2):
    rng, q = np.random.default_rng(d), rotation(d)
    a, b, mu = rng.uniform(1e-4, 3, d), rng.uniform(1e-4, 3, d), rng.standard_normal((2, d))
    a[:dead1], b[:dead2] = 0, 0
    expected = np.square(mu[0] - mu[1]).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    one, two = (mu[0], with_spectrum(a, q)), (mu[1], with_spectrum(b, q))
    assert frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(*two, *one) == pytest.approx(expected, rel=1e-11)
    assert 0 <= frechet_distance(*one, *one) < 1e-10
    assert covariance_rank(one[1]) == d - dead1 and covariance_rank(two[1]) == d - dead2


@pytest.mark.parametrize("n1, n2", [(60, 50), (400, 50), (200, 200), (201, 201), (400, 300)])
def test_frechet_of_few_images(n1, n2):
    """Against the singular values of the product of the centred data themselves, of which
    covariances are never formed.
    """
    d = 200
    x, y = (
        np.maximum(normal(i, n, d) * np.logspace(0, -2, d), -0.3) for i, n in enumerate((n1, n2))
    )
    moments = [m for z in (x, y) for m in (z.mean(axis=0), np.cov(z, rowvar=False))]
    xc, yc = ((z - z.mean(axis=0)) / np.sqrt(len(z) - 1) for z in (x, y))
    root = np.linalg.svd(xc @ yc.T, compute_uv=False).sum()
    expected = (
        np.square(moments[0] - moments[2]).sum()
        + np.square(xc).sum()
        + np.square(yc).sum()
        - 2 * root
    )
    assert frechet_distance(*moments) == pytest.approx(
        expected, rel=2e-11
    )  # eigenvalues of the product: 1e-8 to 1e-6
    assert covariance_rank(moments[1]) == min(n1 - 1, d)


def test_frechet_where_noise_makes_a_singular_covariance_positive():
    noisy = np.array([[1, 1], [1, 1 + 4e-16]])  # Cholesky succeeds, with a pivot of 2e-8
    np.linalg.cholesky(noisy)
    assert frechet_distance(np.zeros(2), noisy, np.zeros(2), np.eye(2)) == pytest.approx(
        4 - 2 * 2**0.5, rel=1e-12
    )
    assert covariance_rank(noisy) == 1


def test_frechet_agrees_with_sqrtm_where_that_is_accurate():
    from scipy.linalg import sqrtm

    s1, s2 = (
        np.cov(normal(i, 500, 20) * (i + 1) @ normal(i + 5, 20, 20), rowvar=False) for i in range(2)
    )
    expected = 4 * 20 + np.trace(s1) + np.trace(s2) - 2 * np.trace(sqrtm(s1 @ s2)).real
    assert frechet_distance(np.zeros(20), s1, np.full(20, 2.0), s2) == pytest.approx(
        expected, rel=1e-10
    )


@pytest.mark.parametrize("scale", [1e-100, 1e-8, 1e8, 1e100])
def test_frechet_scales_with_the_square_of_the_unit(scale):
    s1, s2 = np.cov(normal(0, 50, 8), rowvar=False), np.cov(normal(1, 6, 8), rowvar=False)
    mu = normal(2, 8)
    unit = frechet_distance(mu, s1, 0 * mu, s2)
    assert frechet_distance(mu * scale, s1 * scale**2, 0 * mu, s2 * scale**2) == pytest.approx(
        unit * scale**2, rel=1e-10
    )


def test_frechet_of_covariances_that_were_stored_in_less_precision():
    deficient = np.cov(normal(0, 30, 60), rowvar=False).astype(np.float32)
    mu = np.zeros(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 <= frechet_distance(mu, deficient, mu, deficient) < 1e-6
    indefinite = with_spectrum(np.linspace(-0.1, 1, 12), rotation(12))
    with pytest.warns(UserWarning, match="negative eigenvalue -0.1"):
        assert frechet_distance(mu[:12], indefinite, mu[:12], np.eye(12)) == pytest.approx(
            np.square(np.sqrt(np.linspace(-0.1, 1, 12).clip(0)) - 1).sum(), rel=1e-10
        )


def test_what_the_frechet_distance_refuses():
    mu, s = np.zeros(3), np.eye(3)
    skew = s + 1e-3 * np.triu(np.ones((3, 3)), 1)
    for arguments, message in [
        ((mu, s, mu[:2], s), "were both made with"),
        ((mu, s, mu, s[:2]), "were both made with"),
        ((mu * np.nan, s, mu, s), "NaN"),
        ((mu, s, mu, np.full((3, 3), np.inf)), "NaN or infinity"),
        ((mu, s, mu, skew), "must be symmetric"),
    ]:
        with pytest.raises(ValueError, match=message):
            frechet_distance(*arguments)


# ---- Inception Score ----


def test_inception_score_closed_forms():
    assert inception_score(np.zeros((100, 10), np.float32)) == pytest.approx(1, abs=1e-12)
    balanced = np.tile(
        np.eye(8) * 200, (25, 1)
    )  # certain, and all classes as often: as many as classes
    assert inception_score(balanced) == pytest.approx(8, rel=1e-12)
    assert inception_score(balanced * 0 + balanced[0]) == pytest.approx(
        1, abs=1e-12
    )  # certain, one class
    # Half of the probability on the own one of K classes, the rest spread evenly.
    k, logits = 5, np.log(np.where(np.eye(5), 0.5, 0.5 / 4))
    assert inception_score(np.tile(logits, (4, 1))) == pytest.approx(
        k * 0.5**0.5 * (0.5 / 4) ** 0.5, rel=1e-12
    )


@pytest.mark.parametrize("split_size", [1, 7, 300, 1000, 5000])
def test_inception_score_is_the_mean_of_consecutive_splits(split_size):
    logits = (
        normal(0, 1000, 12).astype(np.float32) * 4
        + np.linspace(0, 3, 1000)[:, None] * np.eye(12)[3]
    )
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    parts = [p[i : i + split_size] for i in range(0, 1000, split_size)]
    expected = np.mean(
        [np.exp(np.mean(np.sum(q * (np.log(q) - np.log(q.mean(axis=0))), axis=1))) for q in parts]
    )
    assert inception_score(logits, split_size) == pytest.approx(expected, rel=1e-12)
    assert inception_score(torch.from_numpy(logits), split_size) == pytest.approx(
        expected, rel=1e-12
    )
    streamed, scattered = InceptionScore(split_size), InceptionScore(split_size)
    for start, stop in ((0, 1), (1, 450), (450, 450), (450, 1000)):
        streamed.update(logits[start:stop])
    for start, stop in ((600, 1000), (0, 250), (250, 600)):
        scattered.update(logits[start:stop], start)
    assert streamed.value == pytest.approx(
        expected, rel=1e-12
    ) and scattered.value == pytest.approx(expected, rel=1e-12)
    assert streamed.n == scattered.n == 1000


def test_inception_score_is_a_number_where_probabilities_underflow():
    logits = np.zeros((6, 4), np.float32)
    logits[:3, 0] = 1e30
    logits[3:, 1] = 2000
    assert inception_score(logits) == pytest.approx(2, rel=1e-12)  # float32 softmax: 0 log 0


def test_what_the_inception_score_refuses():
    with pytest.raises(ValueError, match="row 2 of the logits"):
        inception_score(np.array([[0.0], [1], [np.inf]]))
    with pytest.raises(ValueError, match="at least one image"):
        inception_score(np.zeros((0, 5)))
    with pytest.raises(ValueError, match="split_size is 0"):
        inception_score(np.zeros((3, 5)), 0)
    score = InceptionScore()
    score.update(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="6 classes, those before them 5"):
        score.update(np.zeros((3, 6)))


# ---- KID ----


def test_kernel_distance_is_the_double_loop():
    x, y = normal(0, 12, 5), normal(1, 9, 5) + 0.5

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    def loop(x, y):
        within = [
            sum(kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j)
            / (len(z) * (len(z) - 1))
            for z in (x, y)
        ]
        return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])

    # A subset is as large as the smaller set, which then is in it whole: with one size, all subsets
    # are the same.
    assert kernel_distance(x[:9], y, subsets=3) == pytest.approx(
        (loop(x[:9], y), 0), rel=1e-12, abs=1e-12
    )
    values = []
    for i in range(4):
        rng = np.random.default_rng([7, i])
        values.append(loop(*(z[rng.choice(len(z), 6, replace=False)] for z in (x, y))))
    found = kernel_distance(x, y, subsets=4, subset_size=6, seed=7)
    assert found == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)
    assert kernel_distance(x, y, subsets=4, subset_size=6, seed=8) != found


def test_kernel_distance_is_unbiased_and_has_its_closed_form():
    def distance(offset, i):
        return kernel_distance(
            normal(2 * i, 400, 1), normal(2 * i + 1, 400, 1) + offset, subsets=1
        )[0]

    same = np.array([distance(0, i) for i in range(100)])
    assert (same < 0).mean() > 0.2 and abs(same.mean()) < 3 * same.std() / 10
    # D = 1: (xy + 1)^3 compares the first three moments, with weights 3, 3, 1.
    m = 0.5
    moments = m, m**2, m**3 + 3 * m
    shifted = np.array([distance(m, i) for i in range(100)])
    assert shifted.mean() == pytest.approx(
        3 * moments[0] ** 2 + 3 * moments[1] ** 2 + moments[2] ** 2, abs=3 * shifted.std() / 10
    )


def test_what_the_kernel_distance_refuses():
    x = normal(0, 10, 3)
    for ref, sample, options, message in [
        (x, x[:, :2], {}, "use the same network"),
        (x, x[:1], {}, "two images a side"),
        (x, x, {"subsets": 0}, "at least one subset"),
        (x, np.where(x > 1, np.nan, x), {}, "of the sample features holds NaN"),
        (
            np.where(np.arange(len(x))[:, None] == 3, np.inf, x),
            x,
            {},
            "row 3 of the reference features holds",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel_distance(ref, sample, **options)
