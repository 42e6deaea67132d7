"""EDM's losses: their noise levels and weights, the process that hands them to training, and input
perturbation in EDM's form.
"""

import math

import numpy as np
import pytest
import torch
from golden_tools import seeded_image, seeded_normal
from scipy import stats

from guided_diffusion_ip.diffusion.edm_augmentation import Augmentation
from guided_diffusion_ip.diffusion.edm_losses import EDM_LOSSES, EDMLoss, EDMProcess, VELoss, VPLoss

LOSSES = [EDMLoss(), VPLoss(), VELoss()]
SHAPE = (4, 3, 8, 8)


def quantiles(n=20001):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


class Recorder:
    """A denoiser that remembers what it was called with, and answers with a function of it."""

    def __init__(self, answer=lambda x, sigma: 0.5 * x):
        self.answer = answer

    def __call__(self, x, sigma, labels=None, **more):
        self.x, self.sigma, self.labels, self.more = x, sigma, labels, more
        return self.answer(x, sigma)


def batch(shape=SHAPE):
    return (
        seeded_image("edm/images", shape),
        seeded_normal("edm/n", shape),
        seeded_normal("edm/xi", shape),
    )


def times(n=4, total=1000):
    return torch.linspace(0.15, 0.85, n, dtype=torch.float64) * total


def test_distribution_of_edm_noise_levels():
    log_sigma = EDMLoss().sigma(quantiles()).log().numpy()
    assert stats.kstest(log_sigma, stats.norm(-1.2, 1.2).cdf).statistic < 1e-4
    other = EDMLoss(P_mean=-0.4, P_std=1.0).sigma(quantiles()).log()
    assert other.mean().item() == pytest.approx(
        -0.4, abs=1e-3
    ) and other.std().item() == pytest.approx(1.0, abs=1e-3)


def test_distribution_of_vp_noise_levels():
    # t uniform in [1e-5, 1], and sigma^2 = exp(9.95 t^2 + 0.1 t) - 1.
    sigma = VPLoss().sigma(quantiles()).numpy()
    t = (-0.1 + np.sqrt(0.01 + 4 * 9.95 * np.log1p(sigma**2))) / (2 * 9.95)
    assert stats.kstest(t, stats.uniform(1e-5, 1 - 1e-5).cdf).statistic < 1e-4
    assert sigma[-1] == pytest.approx(math.sqrt(math.exp(10.05) - 1), rel=1e-3)


def test_a_vp_schedule_may_rise_slowly_and_from_nothing():
    # sigma^2 = exp(t^2 / 4) - 1
    t = 1e-5 + quantiles() * (1 - 1e-5)
    torch.testing.assert_close(
        VPLoss(beta_d=0.5, beta_min=0.0).sigma(quantiles()), (t**2 / 4).expm1().sqrt()
    )


def test_distribution_of_ve_noise_levels():
    log_sigma = VELoss().sigma(quantiles()).log().numpy()
    assert (
        stats.kstest(log_sigma, stats.uniform(math.log(0.02), math.log(5000)).cdf).statistic < 1e-4
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_noise_levels_rise_and_are_finite_at_the_ends(loss):
    assert (loss.sigma(quantiles()).diff() > 0).all()
    process = EDMProcess(loss)
    ends = process.sigma(torch.tensor([0.0, 1e-30, 999.99999999999]))  # the last is 1000 in float32
    assert torch.isfinite(ends).all() and (ends > 0).all() and ends[2] > 100 * ends[0]


def test_weights():
    sigma = np.array([0.01, 0.5, 3.0])
    levels = torch.from_numpy(sigma)
    np.testing.assert_allclose(
        EDMLoss().weight(levels), (sigma**2 + 0.25) / (0.5 * sigma) ** 2, rtol=1e-12
    )
    assert (
        EDMLoss().weight(torch.tensor(0.5)) == 8
        and EDMLoss(sigma_data=1.0).weight(torch.tensor(1.0)) == 2
    )
    for loss in LOSSES[1:]:
        np.testing.assert_allclose(loss.weight(levels), 1 / sigma**2, rtol=1e-12)


def test_edm_weight_makes_the_first_loss_one_at_every_level():
    # A preconditioned network that says 0 leaves D = c_skip x, whose weighted error is 1 for data
    # of std sigma_data.
    torch.manual_seed(0)
    y = 0.5 * torch.randn(8, 1, 64, 64)
    process = EDMProcess(EDMLoss())
    c_skip = lambda x, sigma: x * (0.25 / (0.25 + sigma**2)).view(-1, 1, 1, 1)  # noqa: E731
    loss = process.training_losses(Recorder(c_skip), y, times(8))["loss"]
    np.testing.assert_allclose(loss, 1.0, rtol=0.08)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_the_denoiser_sees_and_what_it_costs(loss):
    y, n, _ = batch()
    process, model = EDMProcess(loss, num_timesteps=500), Recorder()
    terms = process.training_losses(
        model, y, times(total=500), noise=n, model_kwargs={"y": torch.arange(4)}
    )
    sigma = loss.sigma(torch.linspace(0.15, 0.85, 4, dtype=torch.float64)).float()
    torch.testing.assert_close(model.sigma, sigma)
    torch.testing.assert_close(model.x, y + sigma.view(-1, 1, 1, 1) * n)
    assert torch.equal(model.labels, torch.arange(4)) and model.more == {}
    mse = ((0.5 * model.x - y) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(terms["mse"], mse)
    torch.testing.assert_close(terms["loss"], mse * loss.weight(sigma))
    assert terms["loss"].dtype == torch.float32


def test_names_and_what_a_training_loop_reads():
    assert {name: type(loss) for name, loss in zip(EDM_LOSSES, LOSSES)} == EDM_LOSSES
    process = EDMProcess(EDMLoss(), input_perturbation=0.1, augment=Augmentation())
    assert (
        process.continuous and process.num_timesteps == 1000 and process.input_perturbation == 0.1
    )
    assert (
        process.augment_uniforms == Augmentation.uniforms
        and EDMProcess(VELoss()).augment_uniforms == 0
    )
    assert "P_mean=-1.2" in str(process.loss)


# ---- input perturbation ----


def test_gamma_zero_is_the_baseline_bitwise_and_draws_nothing():
    y, n, _ = batch()
    draws = []
    plain, zero = Recorder(), Recorder()
    a = EDMProcess(EDMLoss()).training_losses(plain, y, times(), noise=n)
    b = EDMProcess(EDMLoss(), input_perturbation=0.3).training_losses(
        zero, y, times(), noise=n, gamma=0.0, randn_like=draws.append
    )
    assert (
        all(torch.equal(a[k], b[k]) for k in ("loss", "mse"))
        and torch.equal(plain.x, zero.x)
        and not draws
    )


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_input_and_target_under_perturbation(gamma):
    y, n, xi = batch()
    model = Recorder(lambda x, sigma: torch.zeros_like(x))
    draws = iter([n, xi])  # n first, then xi
    terms = EDMProcess(VELoss(), gamma).training_losses(
        model, y, times(), randn_like=lambda z: next(draws)
    )
    sigma = model.sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(model.x, y + sigma * (n + gamma * xi))
    torch.testing.assert_close(
        terms["mse"], ((y + sigma * gamma * xi) ** 2).mean((1, 2, 3)), rtol=1e-5, atol=1e-6
    )
    assert next(draws, None) is None
    # A denoiser that answers x - sigma n, whose implied epsilon is n, has nothing left to learn.
    model, draws = Recorder(lambda x, sigma: x - sigma.view(-1, 1, 1, 1) * n), iter([n, xi])
    terms = EDMProcess(VELoss(), gamma).training_losses(
        model, y, times(), randn_like=lambda z: next(draws)
    )
    torch.testing.assert_close(terms["mse"], torch.zeros(4), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("u", [0.2, 0.6, 0.95])
def test_best_linear_denoiser_under_perturbation(gamma, u):
    # Least squares through training_losses itself: the loss of D = a x is a parabola in a, known
    # from three points.
    s = 0.5
    torch.manual_seed(int(100 * u))
    y = s * torch.randn(16, 1, 128, 128)
    n, xi = torch.randn_like(y), torch.randn_like(y)
    process, t = EDMProcess(EDMLoss(), gamma), torch.full((16,), 1000 * u, dtype=torch.float64)
    model = Recorder()

    def loss(a):
        model.answer = lambda x, sigma: a * x
        return (
            process.training_losses(model, y, t, noise=n, randn_like=lambda z: xi)["mse"]
            .double()
            .mean()
            .item()
        )

    down, centre, up = loss(-1.0), loss(0.0), loss(1.0)
    best = (down - up) / (2 * (down + up - 2 * centre))
    sigma = model.sigma[0].item()
    epsilon_slope = (1 - best) / sigma
    assert epsilon_slope == pytest.approx(sigma / (s**2 + sigma**2 * (1 + gamma**2)), rel=0.02)
    if gamma == 0.5 and u > 0.5:  # the tolerance can tell gamma from none
        assert epsilon_slope != pytest.approx(sigma / (s**2 + sigma**2), rel=0.05)


# ---- augmentation ----


def test_augmented_images_are_the_targets_and_labels_reach_the_denoiser():
    y, n, _ = batch()
    augment = Augmentation(p=0.5)
    uniforms = torch.rand(4, augment.uniforms, generator=torch.Generator().manual_seed(1))
    images, labels = augment(y, uniforms)
    assert not torch.equal(images, y)
    model = Recorder(lambda x, sigma: images)
    process = EDMProcess(EDMLoss(), augment=augment)
    terms = process.training_losses(
        model, y, times(), model_kwargs={"augment_uniforms": uniforms}, noise=n
    )
    assert torch.equal(model.more["augment_labels"], labels) and torch.equal(
        terms["loss"], torch.zeros(4)
    )
    process.training_losses(model, y, times(), noise=n)  # draws its own
    assert model.more["augment_labels"].shape == (4, 9)


# ---- mistakes ----


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EDMLoss(P_std=0.0), "P_std"),
        (lambda: EDMLoss(sigma_data=-1.0), "sigma_data"),
        (lambda: VPLoss(beta_d=0.0), "beta_d"),
        (lambda: EDMLoss(P_std=math.inf), "P_std"),
        (lambda: VPLoss(beta_min=-0.1), "beta_min"),
        (lambda: VPLoss(epsilon_t=0.0), "epsilon_t"),
        (lambda: VELoss(sigma_min=0.0), "sigma_min"),
        (lambda: VELoss(sigma_min=3.0, sigma_max=3.0), "sigma_min"),
        (lambda: VPLoss(epsilon_t=1.0), "epsilon_t"),
        (lambda: VELoss(sigma_min=3.0, sigma_max=2.0), "sigma_min"),
        (lambda: EDMProcess(EDMLoss(), input_perturbation=-0.1), "gamma"),
        (lambda: EDMProcess(EDMLoss(), num_timesteps=0), "num_timesteps"),
        (
            lambda: EDMProcess(EDMLoss()).training_losses(
                Recorder(), *batch()[:1], times(), gamma=math.nan
            ),
            "gamma",
        ),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integer_times_are_refused():
    with pytest.raises(AssertionError, match="continuous"):
        EDMProcess(EDMLoss()).training_losses(Recorder(), batch()[0], torch.arange(4))
