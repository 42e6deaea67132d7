"""Preconditionings: Table 1 of the EDM paper, noise levels that a network knows, number formats,
labels, and their factory.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edm_tools import BOTH, NCSN, SMALL, TINY, images, small

from guided_diffusion_ip.diffusion.denoiser import (
    BoundDenoiser,
    EDMPrecond,
    VEPrecond,
    VPPrecond,
    iDDPMPrecond,
)
from guided_diffusion_ip.networks.edm_unets import DhariwalUNet, SongUNet
from guided_diffusion_ip.script_util import create_edm_denoiser


class Recorder(torch.nn.Module):
    """A network of known output that remembers its inputs; `outputs` images deep."""

    def __init__(self, outputs=1, label_dim=0):
        super().__init__()
        self.outputs, self.label_dim = outputs, label_dim

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        self.x, self.c_noise, self.class_labels, self.augment_labels = (
            x,
            noise_labels,
            class_labels,
            augment_labels,
        )
        return torch.cat([torch.cos(3 * x), *[x + 5] * (self.outputs - 1)], dim=1)


SIGMAS = (0.02, 0.35, 1.0, 7.5, 79.0)


def check_coefficients(denoiser, c_skip, c_out, c_in):
    """D = c_skip x + c_out F(c_in x) at every sigma; returns what the network was told of the
    noise.
    """
    x, told = images(1), []
    for sigma in SIGMAS:
        got = denoiser(x, torch.tensor(sigma))
        scaled = c_in(sigma) * x.double()
        want = c_skip(sigma) * x.double() + c_out(sigma) * torch.cos(3 * scaled)
        torch.testing.assert_close(denoiser.model.x.double(), scaled, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            got.double(), want, rtol=1e-4, atol=1e-5 * max(1, abs(c_out(sigma)))
        )
        assert (
            denoiser.model.c_noise.shape == (1,) and denoiser.model.c_noise.dtype == torch.float32
        )
        told.append(denoiser.model.c_noise.item())
    return told


@pytest.mark.parametrize("sd", [0.5, 1.3])
def test_edm_follows_table_1(sd):
    denoiser = EDMPrecond(Recorder(), sigma_data=sd)
    told = check_coefficients(
        denoiser,
        lambda s: sd**2 / (s**2 + sd**2),
        lambda s: s * sd / math.sqrt(s**2 + sd**2),
        lambda s: 1 / math.sqrt(s**2 + sd**2),
    )
    assert told == pytest.approx([math.log(s) / 4 for s in SIGMAS], rel=1e-5, abs=1e-7)
    assert (denoiser.sigma_min, denoiser.sigma_max) == (0, math.inf)


def test_vp_follows_table_1_and_knows_sigma_by_time():
    denoiser = VPPrecond(Recorder())
    told = check_coefficients(
        denoiser, lambda s: 1, lambda s: -s, lambda s: 1 / math.sqrt(s**2 + 1)
    )
    back = [math.sqrt(math.expm1(0.5 * 19.9 * t**2 + 0.1 * t)) for t in (c / 999 for c in told)]
    assert back == pytest.approx(SIGMAS, rel=1e-4)
    assert denoiser.sigma_max == pytest.approx(math.sqrt(math.exp(10.05) - 1))
    assert denoiser.sigma_min == pytest.approx(1e-3, rel=1e-3)


def test_ve_follows_table_1():
    denoiser = VEPrecond(Recorder())
    told = check_coefficients(denoiser, lambda s: 1, lambda s: s, lambda s: 1)
    assert told == pytest.approx([math.log(s / 2) for s in SIGMAS], rel=1e-5)
    assert (denoiser.sigma_min, denoiser.sigma_max) == (0.02, 100)


def test_iddpm_follows_table_1_and_knows_its_own_noise_levels_only():
    denoiser = iDDPMPrecond(Recorder(outputs=2))  # what it says of the variance is not part of D
    j = np.arange(1, 1001)
    alpha_bar = np.sin(0.5 * np.pi * j / (1000 * 1.008)) ** 2
    u = np.sqrt(
        alpha_bar[-1] / alpha_bar - 1
    )  # the recursion's product telescopes where C_1 does not interfere
    np.testing.assert_allclose(denoiser.u[1:].numpy(), u, rtol=1e-4, atol=1e-6)
    assert denoiser.u[0] == pytest.approx(math.sqrt((u[0] ** 2 + 1) / 0.001 - 1), rel=1e-5)
    assert denoiser.sigma_min == pytest.approx(
        u[-2], rel=1e-4
    ) and denoiser.sigma_max == pytest.approx(float(denoiser.u[0]))
    told = check_coefficients(
        denoiser, lambda s: 1, lambda s: -s, lambda s: 1 / math.sqrt(s**2 + 1)
    )
    assert told == [999 - (1 + np.abs(u - s).argmin()) for s in SIGMAS]

    between = torch.tensor([[0.0123, 2.0], [80.9, 1e9]], dtype=torch.float64)
    rounded = denoiser.round_sigma(between)
    assert rounded.dtype == torch.float64 and rounded.shape == (2, 2)
    all_levels = denoiser.u.double()
    for got, asked in zip(rounded.flatten(), between.flatten()):
        assert got == all_levels[(all_levels - asked).abs().argmin()]
    assert torch.equal(denoiser.round_sigma(denoiser.u), denoiser.u)
    assert denoiser.round_sigma(torch.tensor(2.0)).shape == ()


@pytest.mark.parametrize("cls", [EDMPrecond, VPPrecond, VEPrecond])
def test_the_others_know_every_noise_level(cls):
    sigma = torch.tensor([0.1234567891, 3.0], dtype=torch.float64)
    assert torch.equal(cls(Recorder()).round_sigma(sigma), sigma)


@pytest.mark.parametrize(
    "cls, tolerance",
    [(EDMPrecond, 2e-4), (VPPrecond, 2e-3), (VEPrecond, 0.03), (iDDPMPrecond, 0.01)],
)
def test_at_the_clean_end_an_image_is_its_own_estimate(cls, tolerance):
    denoiser, x = cls(Recorder(outputs=2)), images()
    distance = (denoiser(x, torch.tensor(denoiser.sigma_min or 1e-4)) - x).abs().max()
    assert 0 < distance < tolerance


def test_a_silent_network_is_the_best_denoiser_of_gaussian_data():
    """F = 0 leaves D = x s^2 / (s^2 + sigma^2), the posterior mean for images of N(0, s^2); at its
    start DhariwalUNet is silent.
    """
    denoiser = EDMPrecond(DhariwalUNet(**{**SMALL, "channel_mult": (2, 2)}), sigma_data=0.8)
    x, sigma = images(), torch.tensor([0.3, 5.0])
    want = x * (0.64 / (0.64 + sigma**2)).view(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser(x, sigma), want)


def test_sigma_may_be_one_number_or_one_per_image():
    denoiser, x = EDMPrecond(small()), images()
    one = denoiser(x, torch.tensor(2.0))
    for same in (
        2.0,
        torch.tensor([2.0]),
        torch.tensor([2.0, 2.0]),
        torch.full((2, 1, 1, 1), 2.0, dtype=torch.float64),
    ):
        assert torch.equal(denoiser(x, same), one)
    with pytest.raises(ValueError, match=r"shape \(3,\) for 2 images"):
        denoiser(x, torch.ones(3))
    assert denoiser(x.double(), torch.tensor(2.0)).dtype == torch.float32


def test_bound_denoiser_has_the_range_of_one_and_the_answers_of_another():
    like, network = iDDPMPrecond(Recorder(label_dim=4)), Recorder()
    bound = BoundDenoiser(lambda x, sigma, labels, **more: (x * sigma, labels, more), like)
    assert (bound.sigma_min, bound.sigma_max, bound.label_dim) == (
        like.sigma_min,
        like.sigma_max,
        4,
    )
    assert torch.equal(bound.round_sigma(torch.tensor(3.0)), like.round_sigma(torch.tensor(3.0)))
    assert bound(3, 2, 1) == (6, 1, {}) and bound(3, 2, 1, 0.5) == (6, 1, {"augment_labels": 0.5})
    assert not hasattr(network, "x")


# ---- number formats ----


@pytest.mark.parametrize(
    "network", [lambda: small(**NCSN), lambda: small(DhariwalUNet, label_dim=3)]
)
def test_under_autocast_the_estimate_is_float32_and_noise_levels_stay_apart(network):
    denoiser = EDMPrecond(network())
    x, sigma, labels = (
        images(),
        torch.tensor([0.5, 2.0]),
        torch.tensor([1, 2]) if denoiser.label_dim else None,
    )
    exact = denoiser(x, sigma, labels)
    seen = []
    hook = next(
        m for name, m in denoiser.named_modules() if name.endswith("in0")
    ).register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.autocast("cpu", torch.bfloat16):
        rough = denoiser(x, sigma, labels)
    hook.remove()
    ((features, emb),) = seen
    assert rough.dtype == torch.float32 and features.dtype == torch.bfloat16
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.05
    assert emb.dtype == torch.float32
    one_hot = denoiser.one_hot(labels, 2)
    assert torch.equal(emb, denoiser.model.embed(sigma.log() / 4, one_hot, None))


def test_use_fp16_changes_nothing_on_a_cpu():
    denoiser, x = EDMPrecond(small()), images()
    plain = denoiser(x, torch.tensor(1.0))
    denoiser.use_fp16 = True
    assert torch.equal(denoiser(x, torch.tensor(1.0)), plain)
    assert (
        create_edm_denoiser("edm", img_resolution=8, use_fp16=True, channel_mult=[1]).use_fp16
        is True
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_use_fp16_halves_the_network_on_a_gpu(cls):
    denoiser = EDMPrecond(small(cls, model_channels=64)).cuda()
    x, sigma = images().cuda(), torch.tensor([0.5, 2.0], device="cuda")
    exact = denoiser(x, sigma)
    denoiser.use_fp16 = True
    for layout in (torch.contiguous_format, torch.channels_last):
        denoiser.to(memory_format=layout)
        half = denoiser(x.to(memory_format=layout), sigma)
        assert half.dtype == torch.float32 and 1e-6 < (half - exact).norm() / exact.norm() < 5e-3


# ---- labels ----


@BOTH
def test_labels_as_numbers_equal_one_hot_rows_and_change_the_output(cls):
    denoiser, x, sigma = (
        EDMPrecond(small(cls, label_dim=4, model_channels=64)),
        images(),
        torch.tensor([0.4, 3.0]),
    )
    labels = torch.tensor([3, 1])
    by_number = denoiser(x, sigma, labels)
    assert torch.equal(by_number, denoiser(x, sigma, F.one_hot(labels, 4).float()))
    assert torch.equal(by_number, denoiser(x, sigma, F.one_hot(labels, 4)))
    other, none = denoiser(x, sigma, torch.tensor([3, 2])), denoiser(x, sigma, torch.zeros(2, 4))
    assert torch.allclose(other[0], by_number[0], atol=1e-5) and not torch.allclose(
        other[1], by_number[1], atol=1e-3
    )
    assert not torch.allclose(none[0], by_number[0], atol=1e-3)


def test_labels_that_do_not_fit():
    conditional, x = EDMPrecond(Recorder(label_dim=4)), images()
    for labels, message in (
        (None, "class-conditional: give int64"),
        (torch.tensor([0, 4]), "range from 0 to 4"),
        (torch.tensor([-1, 0]), "range from -1 to 0"),
        (torch.zeros(2, 5), r"shape \(2, 5\)"),
        (torch.zeros(2), "float32 of shape"),
        (torch.zeros(3, dtype=torch.long), r"shape \(3,\) for 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            conditional(x, torch.tensor(1.0), labels)
    with pytest.raises(ValueError, match=r"unconditional \(label_dim 0\): leave them out"):
        EDMPrecond(Recorder())(x, torch.tensor(1.0), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="sigma_data is 0"):
        EDMPrecond(Recorder(), sigma_data=0)


# ---- the factory ----


def test_the_factory_knows_its_arguments():
    for key, cls, network in (
        ("edm", EDMPrecond, DhariwalUNet),
        ("vp", VPPrecond, SongUNet),
        ("ve", VEPrecond, SongUNet),
        ("iddpm", iDDPMPrecond, DhariwalUNet),
    ):
        by_key, by_class = (
            create_edm_denoiser(key, **TINY),
            create_edm_denoiser(cls.__name__, **TINY),
        )
        assert (
            type(by_key) is type(by_class) is cls
            and type(by_key.model) is type(by_class.model) is network
        )
    given = create_edm_denoiser(
        "ve",
        **TINY,
        sigma_max=50,
        label_dim=2,
        img_channels=1,
        label_dropout=0.1,
        model_type="DhariwalUNet",
    )
    assert (
        given.sigma_max == 50
        and given.label_dim == given.model.label_dim == 2
        and given.model.label_dropout == 0.1
    )
    assert given(torch.ones(1, 1, 8, 8), 1.0, torch.tensor([1])).shape == (1, 1, 8, 8)
    with pytest.raises(
        TypeError,
        match="EDMPrecond of SongUNet has no argument 'model_chanels'. Did you mean model_channels?",
    ):
        create_edm_denoiser("edm", img_resolution=8, model_type="SongUNet", model_chanels=64)
    with pytest.raises(TypeError, match="VPPrecond of SongUNet has no argument 'sigma_data'"):
        create_edm_denoiser("vp", img_resolution=8, sigma_data=0.5)
    with pytest.raises(TypeError, match="no argument 'network'"):
        create_edm_denoiser("vp", img_resolution=8, network=None)
    with pytest.raises(ValueError, match="unknown precond 'eps': use one of edm, vp, ve, iddpm"):
        create_edm_denoiser("eps", img_resolution=8)
    with pytest.raises(
        ValueError, match="unknown model_type 'UNet': use one of SongUNet, DhariwalUNet"
    ):
        create_edm_denoiser("vp", img_resolution=8, model_type="UNet")
