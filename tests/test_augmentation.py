"""EDM's augmentation: transforms that are known exactly, what labels say, how often things happen,
and no aliasing.
"""

import math
from statistics import NormalDist

import pytest
import torch
from golden_tools import seeded_image

from guided_diffusion_ip.diffusion.edm_augmentation import (
    _ANISO,
    _ANISO_AXIS,
    _ROTATE,
    _SCALE,
    _TRANSLATE,
    _XFLIP,
    _YFLIP,
    Augmentation,
    warp,
)

NEVER = 0.999
SHAPE = (2, 3, 16, 16)


def images(shape=SHAPE):
    return seeded_image("augment", shape)


def uniforms(n=2, **columns):
    """Uniforms with which nothing happens, but for the columns given, by number: value."""
    u = torch.full((n, Augmentation.uniforms), NEVER, dtype=torch.float64)
    for column, value in columns.items():
        u[:, int(column[1:])] = value
    return u


def at(column, value=0.0):
    return {f"c{column}": value}


def quantile_of(z):
    return NormalDist().cdf(z)


def test_nothing_happens_bitwise():
    x = images()
    got, labels = Augmentation()(x, uniforms())
    assert torch.equal(got, x) and torch.equal(labels, torch.zeros(2, 9))
    got, labels = Augmentation(p=0.0)(x, torch.zeros(2, 13))
    assert torch.equal(got, x) and torch.equal(labels, torch.zeros(2, 9))


def test_flips_are_exact():
    x = images()
    got, labels = Augmentation()(x, uniforms(**at(_XFLIP)))
    assert torch.equal(got, x.flip(3)) and torch.equal(labels[0], torch.eye(9)[0])
    got, labels = Augmentation()(x, uniforms(**at(_YFLIP)))
    assert torch.equal(got, x.flip(2)) and torch.equal(labels[0], torch.eye(9)[1])
    got, _ = Augmentation()(x, uniforms(**at(_XFLIP), **at(_YFLIP)))
    assert torch.equal(got, x.flip(2, 3))


def test_only_the_image_that_is_meant():
    x, u = images(), uniforms()
    u[1, _ROTATE], u[1, _ROTATE + 1] = 0.0, 0.6
    got, labels = Augmentation()(x, u)
    assert torch.equal(got[0], x[0]) and not labels[0].any()
    assert (got[1] - x[1]).abs().max() > 0.1 and labels[1, 4] == pytest.approx(
        math.sin(0.2 * math.pi), abs=1e-6
    )


@pytest.mark.parametrize("right, down", [(3, 0), (0, -2), (-1, 4)])
def test_whole_pixels_are_exact(right, down):
    x = images((2, 3, 16, 24))
    z = (right / (24 * 0.125), down / (16 * 0.125))
    got, labels = Augmentation()(
        x,
        uniforms(
            **at(_TRANSLATE),
            **at(_TRANSLATE + 1, quantile_of(z[0])),
            **at(_TRANSLATE + 2, quantile_of(z[1])),
        ),
    )
    want = x.roll((down, right), (2, 3))
    inner = (
        slice(None),
        slice(None),
        slice(max(down, 0), 16 + min(down, 0)),
        slice(max(right, 0), 24 + min(right, 0)),
    )
    torch.testing.assert_close(got[inner], want[inner], rtol=0, atol=2e-5)
    if right == 3:  # the edge is a mirror
        torch.testing.assert_close(got[..., :3], x[..., :3].flip(3), rtol=0, atol=2e-5)
    torch.testing.assert_close(labels[0, 7:], torch.tensor(z), rtol=1e-5, atol=1e-6)
    assert not labels[:, :7].any()


@pytest.mark.parametrize("quarters, u", [(1, 0.75), (-1, 0.25), (2, 1 - 1e-12)])
def test_quarter_turns(quarters, u):
    x = images()
    got, labels = Augmentation()(x, uniforms(**at(_ROTATE), **at(_ROTATE + 1, u)))
    torch.testing.assert_close(got, torch.rot90(x, quarters, (2, 3)), rtol=0, atol=1e-4)
    angle = quarters * math.pi / 2
    torch.testing.assert_close(
        labels[0, 3:5], torch.tensor([math.cos(angle) - 1, math.sin(angle)]), rtol=0, atol=1e-6
    )


def blob(size=33):
    """A Gaussian of std 3 pixels in the middle."""
    axis = torch.arange(size) - size // 2
    return torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / 18.0)[None, None].float()


def moments(picture):
    """Standard deviations along x and y, in pixels."""
    axis = torch.arange(picture.shape[-1]) - picture.shape[-1] // 2
    p = picture[0, 0] / picture.sum()
    return math.sqrt((p.sum(0) * axis**2).sum()), math.sqrt((p.sum(1) * axis**2).sum())


@pytest.mark.parametrize("z", [1.5, -1.0])
def test_scale_and_its_label(z):
    got, labels = Augmentation()(
        blob(), uniforms(1, **at(_SCALE), **at(_SCALE + 1, quantile_of(z)))
    )
    factor = 2 ** (0.2 * z)
    assert moments(got) == pytest.approx((3 * factor, 3 * factor), rel=0.03)
    assert (
        labels[0, 2] == pytest.approx(z, abs=1e-5) and not labels[0, [0, 1, 3, 4, 5, 6, 7, 8]].any()
    )


@pytest.mark.parametrize("axis_u, along_x", [(None, True), (0.75, False), (0.5, True)])
def test_stretch_and_its_label(axis_u, along_x):
    z = 2.0
    columns = {**at(_ANISO), **at(_ANISO + 1, quantile_of(z))}
    if axis_u is not None:
        columns |= {**at(_ANISO_AXIS), **at(_ANISO_AXIS + 1, axis_u)}
    got, labels = Augmentation()(blob(), uniforms(1, **columns))
    wide, narrow = 3 * 2 ** (0.2 * z), 3 / 2 ** (0.2 * z)
    assert moments(got) == pytest.approx((wide, narrow) if along_x else (narrow, wide), rel=0.03)
    angle = 0.0 if axis_u is None else (2 * axis_u - 1) * math.pi
    torch.testing.assert_close(
        labels[0, 5:7], torch.tensor([z * math.cos(angle), z * math.sin(angle)]), rtol=0, atol=1e-5
    )


def test_rotation_on_oblong_images_is_a_rotation():
    # In a wide image a round blob stays round.
    x = torch.nn.functional.pad(blob(), (16, 16))
    got, _ = Augmentation()(x, uniforms(1, **at(_ROTATE), **at(_ROTATE + 1, 0.6)))
    torch.testing.assert_close(got, x, rtol=0, atol=0.03)


def test_shrinking_does_not_alias():
    # A checkerboard of single pixels has mean 0; reduced by 1.6 it should turn grey, not into a
    # moire pattern.
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2 - 1).float()[None, None]
    shrink = uniforms(1, **at(_SCALE), **at(_SCALE + 1, quantile_of(math.log2(1 / 1.6) / 0.2)))
    filtered, _ = Augmentation()(board, shrink)
    plain = warp(
        board, 1.6 * torch.eye(2, dtype=torch.float64)[None], torch.zeros(1, 2, dtype=torch.float64)
    )
    assert filtered.std() < 0.1 and plain.std() > 0.4


def test_how_often_and_how_much():
    n, p = 40000, 0.12
    u = torch.rand(n, Augmentation.uniforms, generator=torch.Generator().manual_seed(0))
    _, labels = Augmentation(p=p)(torch.zeros(n, 1, 2, 2), u)
    happens = (labels != 0).double().mean(0)
    expected = torch.tensor(
        [0.5, p / 2, p, p, p, p, p / 2, p, p], dtype=torch.float64
    )  # [6]: the axis turns in half the cases
    torch.testing.assert_close(happens, expected, rtol=0, atol=0.008)
    assert ((labels[:, 7] != 0) == (labels[:, 8] != 0)).all()
    for column in (2, 7, 8):
        z = labels[:, column][labels[:, column] != 0]
        assert z.mean().abs() < 0.06 and z.std().item() == pytest.approx(1, abs=0.04)
    angles = torch.atan2(labels[:, 4], labels[:, 3] + 1)[labels[:, 4] != 0]
    assert (
        angles.min() < -3
        and angles.max() > 3
        and angles.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.03)
    )
    independent = torch.corrcoef((labels[:, [0, 1, 2, 4, 5, 7]] != 0).double().T) - torch.eye(6)
    assert independent.abs().max() < 0.03


def test_transforms_can_be_switched_off_one_by_one():
    u = torch.rand(500, Augmentation.uniforms, generator=torch.Generator().manual_seed(0))
    _, labels = Augmentation(p=1.0, scale=0, rotate_frac=0, aniso=0, translate_frac=0, yflip=0)(
        torch.zeros(500, 1, 4, 4), u
    )
    assert labels[:, 0].mean() == pytest.approx(0.5, abs=0.08) and not labels[:, 1:].any()


def test_an_image_does_not_depend_on_its_neighbours():
    x, u = images((4, 3, 16, 16)), torch.rand(4, 13, generator=torch.Generator().manual_seed(3))
    whole, labels = Augmentation(p=0.9)(x, u)
    for i in range(4):
        one, label = Augmentation(p=0.9)(x[i : i + 1], u[i : i + 1])
        torch.testing.assert_close(one[0], whole[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(label[0], labels[i])


def test_float32_and_autocast():
    x, u = images(), torch.rand(2, 13, generator=torch.Generator().manual_seed(5))
    want, _ = Augmentation(p=1.0)(x, u)
    with torch.autocast("cpu", torch.bfloat16):
        got, labels = Augmentation(p=1.0)(x, u)
    assert got.dtype == labels.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize(
    "options, message",
    [({"p": 1.2}, "probability"), ({"p": -0.1}, "probability"), ({"scale": -1.0}, "scale")],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
