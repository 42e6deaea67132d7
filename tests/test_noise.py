"""noise.py: the published test vectors, statistics, and that an address means the same anywhere."""

import numpy as np
import pytest
import torch
from scipy import stats

from guided_diffusion_ip.noise import (
    NormalStream,
    Stream,
    integers,
    normal,
    permutation,
    philox4x32,
    uniform,
)

KNOWN_ANSWERS = [  # Random123, kat_vectors: counter, key, output of philox4x32-10
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    scalars = tuple(torch.tensor(word) for word in words(counter))
    assert [int(word) for word in philox4x32(scalars, tuple(words(key)))] == words(expected)


def test_philox_known_answers_in_one_vector():
    columns = [torch.tensor(column) for column in zip(*(words(row[0]) for row in KNOWN_ANSWERS))]
    before = [column.clone() for column in columns]
    keys = tuple(torch.tensor(column) for column in zip(*(words(row[1]) for row in KNOWN_ANSWERS)))
    result = torch.stack(philox4x32(tuple(columns), keys), dim=1)
    assert result.tolist() == [words(row[2]) for row in KNOWN_ANSWERS]
    assert all(torch.equal(*pair) for pair in zip(columns, before)), "the counter was changed"


def test_address_is_the_documented_counter():
    """Number 4 b + w is word w at counter (b, step, index, stream), key (low, high) of the seed."""
    seed, step, index = (0xA4093822 << 32) | 7, 11, 0xFFFFFFFF
    got = uniform(seed, Stream.XI, [3, index], step, (2, 3))[1].flatten()
    for k in range(6):
        counter = tuple(torch.tensor(word) for word in (k // 4, step, index, int(Stream.XI)))
        word = int(philox4x32(counter, (7, 0xA4093822))[k % 4])
        assert float(got[k]) == (word >> 8) / 2**24


def test_stream_numbers_are_frozen():
    assert {stream.name: int(stream) for stream in Stream} == {
        "TIMESTEP": 0,
        "EPSILON": 1,
        "XI": 2,
        "FLIP": 3,
        "CROP": 4,
        "SHUFFLE": 5,
        "LABEL": 6,
        "SAMPLE": 7,
        "CHAIN": 8,
        "LIKELIHOOD": 9,
        "CLASS_DROPOUT": 10,
        "MEASURE_INPUT": 11,
        "MEASURE_STEP": 12,
        "AUGMENT": 13,
    }


def test_values_are_frozen():
    """A change here would break every resumed run and every published sample sheet."""
    assert uniform(1, Stream.FLIP, [0, 5], 2).tolist() == [0.03632843494415283, 0.5594831109046936]
    assert integers(1, Stream.LABEL, [0, 5], 0, 1000).tolist() == [985, 837]
    assert permutation(1, Stream.SHUFFLE, 0, 8).tolist() == [4, 7, 6, 0, 2, 1, 5, 3]
    got = normal(1, Stream.SAMPLE, [0], 0, (4,))[0].tolist()
    assert got == pytest.approx([-0.0129471, -1.9216974, 0.1195314, -0.2478476], abs=1e-6)


def test_normal_is_normal():
    x = normal(5, Stream.EPSILON, range(100), 0, (3, 64, 64)).double().flatten().numpy()
    n = len(x)  # 1.2 million; each bound is 4 standard errors
    assert abs(x.mean()) < 4 / n**0.5
    assert abs((x**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((x**6).mean() - 15) < 4 * (10395 / n) ** 0.5
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert 4.4 < abs(x).max() < 6.8  # the expected maximum is 5.05


def test_extreme_words_make_finite_normals():
    """Word 0 must not reach log(0), and the largest must not exceed log(1)."""
    from guided_diffusion_ip import noise

    out = torch.empty(1, 2, 4)
    low, high = torch.tensor([[0, 0]]), torch.tensor([[0, 2**32 - 1]])
    noise._normal_of_words((low, low, high, high), out)
    assert torch.isfinite(out).all()
    assert out[0, 0, 0] == pytest.approx((2 * 33 * np.log(2)) ** 0.5, rel=1e-6)
    noise._uniform_of_words((high,) * 4, out)
    assert out.max() < 1 and out.min() == 0


def test_uniform_is_uniform():
    u = uniform(5, Stream.CROP, range(1000), 0, (300,)).flatten().numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    "other",
    [
        dict(seed=4),
        dict(seed=3 + 2**32),
        dict(stream=Stream.XI),
        dict(step=1),
        dict(step=2**31),
        dict(index=[1]),
        dict(index=[2**32 - 1]),
    ],
)
def test_neighbouring_addresses_are_independent(other):
    address = dict(seed=3, stream=Stream.EPSILON, index=[0], step=0, shape=(100_000,))
    x, y = normal(**address)[0], normal(**(address | other))[0]
    for a, b in ((x, y), (x.abs(), y.abs()), (x[1:], y[:-1]), (x[:-1], y[1:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 100_000**0.5
    assert not (x == y).sum() > 5


def test_numbers_inside_an_array_are_independent():
    x = normal(3, Stream.EPSILON, [0], 0, (200_000,))[0]
    for lag in (1, 2, 3, 4, 8, 32):
        for f in (lambda v: v, lambda v: v**2):
            assert abs(np.corrcoef(f(x[:-lag]), f(x[lag:]))[0, 1]) < 4.5 / 200_000**0.5


@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (3, 32, 32), (3, 150, 150)])
def test_any_subset_equals_its_rows(shape):
    full = normal(9, Stream.SAMPLE, range(40), 3, shape)
    assert full.shape == (40, *shape) and full.dtype == torch.float32 and full.is_contiguous()
    for index in ([17], [39, 0, 0, 5], list(range(3, 30))):
        assert torch.equal(normal(9, Stream.SAMPLE, index, 3, shape), full[index])
    sequential = torch.tensor([2, 30], dtype=torch.int32)
    assert torch.equal(normal(9, Stream.SAMPLE, sequential, 3, shape), full[[2, 30]])


def test_a_range_names_what_its_numbers_name():
    for index in (range(3, 30), range(30, 3, -3), range(7, 7), range(5, 2)):
        assert torch.equal(normal(9, 0, index, 3, (5,)), normal(9, 0, list(index), 3, (5,)))
        assert torch.equal(
            uniform(9, 0, index, 3), uniform(9, 0, torch.tensor(index, dtype=torch.int64), 3)
        )
    assert uniform(0, 0, range(2**32 - 1, 2**32), 0).shape == (1,)
    for index, text in (
        (range(2**32 - 1, 2**32 + 1), "to 4294967296"),
        (range(3, -2, -1), "from -1 to 3"),
    ):
        with pytest.raises(ValueError, match=text):
            normal(9, 0, index, 3, (5,))


def test_longer_arrays_begin_like_shorter_ones():
    assert torch.equal(normal(9, 0, [4], 3, (11,)), normal(9, 0, [4], 3, (50,))[:, :11])


def test_integers():
    x = integers(2, Stream.LABEL, range(70_000), 0, 7)
    assert x.dtype == torch.int64 and stats.chisquare(torch.bincount(x, minlength=7)).pvalue > 1e-3
    big = integers(2, Stream.LABEL, range(1000), 0, 2**31)
    assert big.min() >= 0 and 2**30 < big.max() < 2**31
    assert integers(2, Stream.LABEL, [0, 1], 0, 1).tolist() == [0, 0]
    # The same as in Python's integers of any size.
    counter = tuple(torch.tensor(word) for word in (0, 5, 123, int(Stream.LABEL)))
    w0, w1, _, _ = (int(word) for word in philox4x32(counter, (2, 0)))
    for high in (10, 999_983, 2**31 - 1):
        assert integers(2, Stream.LABEL, [123], 5, high).item() == ((w0 << 32) | w1) % high


def test_permutation():
    first, second = permutation(1, Stream.SHUFFLE, 0, 1001), permutation(1, Stream.SHUFFLE, 1, 1001)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1001))
    assert (first == second).sum() < 12 and abs(stats.spearmanr(first, second).statistic) < 0.13
    assert torch.equal(first, permutation(1, Stream.SHUFFLE, 0, 1001))
    assert [permutation(1, 5, 0, n).tolist() for n in (0, 1)] == [[], [0]]
    orders = [tuple(permutation(0, Stream.SHUFFLE, epoch, 3).tolist()) for epoch in range(1200)]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-3


def test_normal_stream_counts_and_resumes():
    stream, x = NormalStream(8, Stream.CHAIN, [5, 2]), torch.zeros(2, 3, 4, 4)
    draws = [stream(x) for _ in range(3)]
    assert stream.step == 3
    for step, draw in enumerate(draws):
        assert torch.equal(draw, normal(8, Stream.CHAIN, [5, 2], step, (3, 4, 4)))
    stream.step = 1
    assert torch.equal(stream(x), draws[1])
    assert torch.equal(NormalStream(8, Stream.CHAIN, torch.tensor([2]))(x[:1]), draws[0][1:])
    half = NormalStream(8, Stream.CHAIN, [5, 2])(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, draws[0].bfloat16())
    with pytest.raises(ValueError, match=r"\[3, 2\].*names 2 images"):
        stream(torch.zeros(3, 2))


@pytest.mark.parametrize(
    "bad, text",
    [
        (dict(seed=-1), "seed=-1"),
        (dict(seed=2**64), "seed"),
        (dict(step=-1), "step=-1"),
        (dict(step=2**32), "step"),
        (dict(index=[0, -1]), "index runs from -1"),
        (dict(index=[2**32]), "2\\*\\*32"),
        (dict(index=[0.5]), "integers"),
        (dict(index=torch.zeros(1, 1, dtype=torch.int64)), "one-dimensional"),
    ],
)
def test_addresses_out_of_range(bad, text):
    with pytest.raises(ValueError, match=text):
        uniform(**(dict(seed=0, stream=0, index=[0], step=0) | bad))


def test_limits_are_inclusive():
    top = 2**32 - 1
    assert uniform(2**64 - 1, Stream.CHAIN, [top], top).shape == (1,)
    assert normal(0, 0, [], 0, (2, 2)).shape == (0, 2, 2)
    for high in (0, 2**31 + 1):
        with pytest.raises(ValueError, match="high"):
            integers(0, 0, [0], 0, high)
    with pytest.raises(ValueError, match="n=-1"):
        permutation(0, 0, 0, -1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_the_same():
    for draw, last in ((uniform, (7, 9)), (integers, 999)):
        assert torch.equal(
            draw(3, 0, range(20), 1, last, "cuda").cpu(), draw(3, 0, range(20), 1, last)
        )
    here, there = (normal(3, 0, range(20), 1, (3, 99, 99), device) for device in ("cpu", "cuda"))
    difference = here - there.cpu()
    assert difference.abs().max() < 5e-6
