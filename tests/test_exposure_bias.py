"""The measures of exposure bias on Gaussian data, where every one of them has a closed form.

Data N(0, s^2) and a network that is linear in x make every step linear: x_{t-1} = A_t x_t +
sqrt(v_t) z, so that the chain's variance obeys V_{t-1} = A_t^2 V_t + v_t, whatever lambda, and what
is left of x_0 shrinks by A_t.
"""

import math

import numpy as np
import pytest
import torch
from test_closed_forms import S, eps_slope, exact_network, make

from guided_diffusion_ip.diffusion import ModelMeanType, ModelVarType
from guided_diffusion_ip.diffusion.epsilon_scaling import UNSCALED, EpsilonScaling
from guided_diffusion_ip.diffusion.solvers.sigma_path import AlongSigma, SigmaGrid
from guided_diffusion_ip.exposure_bias.measures import NAMES, create_measures, measure
from guided_diffusion_ip.exposure_bias.walks import CHAIN, Batch, Walk, noised, step_noise, walk
from guided_diffusion_ip.features.spaces import PixelSpace
from guided_diffusion_ip.noise import Stream, normal
from guided_diffusion_ip.runs.sample_batch import Sampler, process_sampler
from guided_diffusion_ip.script_util import create_gaussian_diffusion

T, N, SIDE = 25, 400, 16
NUMBERS = N * SIDE**2  # 102,400: a variance has a standard error of 0.44 %, a norm of 0.22 %
SAMPLERS = {
    "small": (ModelVarType.FIXED_SMALL, None),
    "large": (ModelVarType.FIXED_LARGE, None),
    "ddim": (ModelVarType.FIXED_SMALL, 0.0),
    "ddim_eta": (ModelVarType.FIXED_SMALL, 0.6),
}
LAMBDAS = {"plain": {}, "scaled": {"eps_scaler": 1.02, "eps_scaler_k": -0.001}}


def linear_steps(process, eta=None, c=1.0, s=S):
    """(A_t, v_t, x_0_hat / x_t) of every step when epsilon is c times the exact one, divided by
    lambda(t).
    """
    ab, ab_prev = process.alphas_cumprod, process.alphas_cumprod_prev
    slope = c * eps_slope(process, s) / process.lambdas
    x0_slope = (1 - np.sqrt(1 - ab) * slope) / np.sqrt(ab)
    if eta is None:
        large = process.model_var_type is ModelVarType.FIXED_LARGE
        noise = np.exp(
            process.fixed_large_log_variance if large else process.posterior_log_variance_clipped
        )
        a = process.posterior_mean_coef1 * x0_slope + process.posterior_mean_coef2
    else:
        noise = eta**2 * (1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev)
        a = np.sqrt(ab_prev) * x0_slope + np.sqrt(1 - ab_prev - noise) * slope
    noise = noise.copy()
    noise[0] = 0
    return a, noise, x0_slope


def chain_variances(a, v, start=1.0):
    """Var(x_t) for t = 0 .. T-1, and of the finished image."""
    found = [start]
    for t in range(len(a) - 1, -1, -1):
        found.append(a[t] ** 2 * found[-1] + v[t])
    return np.array(found[-2::-1]), found[-1]


def gaussian_batches(n=N, side=SIDE, s=S, size=100):
    generator = torch.Generator().manual_seed(0)
    x = s * torch.randn(n, 1, side, side, generator=generator)
    return [Batch(list(range(i, min(i + size, n))), x[i : i + size], {}) for i in range(0, n, size)]


def setting(sampler, lam, s=S):
    var_type, eta = SAMPLERS[sampler]
    process = make(var_type=var_type, steps=T, **LAMBDAS[lam])
    return (
        process,
        eta,
        process_sampler(
            process,
            (1, SIDE, SIDE),
            3,
            "ddpm" if eta is None else "ddim",
            eta=eta,
            clip_denoised=False,
        ),
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.filterwarnings("ignore:epsilon scaling without clip_denoised")
def test_norm_delta_and_variance_follow_the_recursion(sampler, lam):
    process, eta, how = setting(sampler, lam)
    found = measure(["norm", "delta", "variance"], how, exact_network(process), gaussian_batches())
    ab, (a, v, _) = process.alphas_cumprod, linear_steps(process, eta)
    perfect = ab * S**2 + 1 - ab
    chain, final = chain_variances(a, v)

    variance = found["variance"]
    np.testing.assert_allclose(variance["chain"], chain, rtol=0.02)
    np.testing.assert_allclose(variance["expected"], perfect, rtol=0.02)
    np.testing.assert_allclose(variance["error"], chain - perfect, atol=0.02)
    assert variance["final"] == pytest.approx(final, rel=0.02) and variance[
        "final_expected"
    ] == pytest.approx(S**2, rel=0.02)
    assert (
        variance["final_error"] == pytest.approx(final - S**2, abs=0.01)
        and abs(final - S**2) > 0.015
    )

    norm, slope = found["norm"], eps_slope(process)
    side = math.sqrt(SIDE**2) * (1 - 1 / (4 * SIDE**2))  # the mean length of a normal vector
    np.testing.assert_allclose(norm["inputs"], slope * np.sqrt(perfect) * side, rtol=0.01)
    np.testing.assert_allclose(norm["chain"], slope * np.sqrt(chain) * side, rtol=0.01)
    np.testing.assert_allclose(norm["ratio"], np.sqrt(chain / perfect), rtol=0.012)
    np.testing.assert_allclose(norm["ratio_published"], norm["ratio"] / process.lambdas)
    assert (np.abs(norm["ratio"] - np.sqrt(chain / perfect)) < 4.5 * norm["ratio_error"]).all()
    # Each norm scatters by 1 / sqrt(2 D), and there are two of them.
    np.testing.assert_allclose(
        norm["ratio_error"] / norm["ratio"], 1 / math.sqrt(NUMBERS), rtol=0.2
    )

    delta = found["delta"]
    kept, noise, multi = math.sqrt(ab[-1]), 1 - ab[-1], []
    for t in range(T - 1, -1, -1):  # x_t = kept x_0 + sqrt(noise) z
        multi.insert(0, math.sqrt((kept - math.sqrt(ab[t])) ** 2 * S**2 + noise))
        kept, noise = a[t] * kept, a[t] ** 2 * noise + v[t]
    single = [
        math.sqrt(
            (a[t] * math.sqrt(ab[t]) - math.sqrt(ab[t - 1])) ** 2 * S**2
            + a[t] ** 2 * (1 - ab[t])
            + v[t]
        )
        for t in range(1, T)
    ] + [math.sqrt(1 - ab[-1])]
    np.testing.assert_allclose(delta["std_multi"], multi, rtol=0.012)
    np.testing.assert_allclose(delta["std_single"], single, rtol=0.012)
    np.testing.assert_allclose(
        delta["delta_multi"], (np.array(multi) - np.sqrt(1 - ab)) ** 2, atol=0.012
    )
    np.testing.assert_allclose(delta["expected_std"], np.sqrt(1 - ab))


def test_delta_of_a_perfect_sampler_is_not_zero():
    """Fixed-large is exact for s = 1: the variance is right at every t, and delta still ends near
    ((sqrt(2) - 0) s)^2.
    """
    process = make(var_type=ModelVarType.FIXED_LARGE, steps=T)
    found = measure(
        ["delta", "variance", "norm"],
        process_sampler(process, (1, SIDE, SIDE), clip_denoised=False),
        exact_network(process, s=1.0),
        gaussian_batches(s=1.0),
    )
    assert np.abs(found["variance"]["error"][1:]).max() < 0.02
    assert np.abs(found["norm"]["ratio"][1:] - 1).max() < 0.01
    assert found["delta"]["delta_multi"][0] > 1.5


@pytest.mark.parametrize("lam", LAMBDAS)
def test_prediction_error_has_a_closed_form_and_knows_no_lambda(lam):
    process, _, how = setting("small", lam)
    found = measure(["prediction"], how, exact_network(process), gaussian_batches())["prediction"]
    ab = process.alphas_cumprod
    _, _, x0 = linear_steps(process.with_scaling(UNSCALED))
    nu = np.sqrt((x0 * np.sqrt(ab) - 1) ** 2 * S**2 + x0**2 * (1 - ab))
    np.testing.assert_allclose(found["nu"], nu, rtol=0.012)
    np.testing.assert_allclose(found["gamma"], nu * np.sqrt(ab / (1 - ab)), rtol=0.012)
    assert np.abs(found["mean"]).max() < 4.5 * S / math.sqrt(NUMBERS)
    assert (found["tested"] == SIDE**2).all()
    # The error is normal: 5 % of 256 tests reject, +- 1.4 %.
    assert np.abs(found["rejected"] - 0.05).max() < 0.06


def test_errors_that_are_not_normal_are_found_and_constant_pixels_left_out():
    process = make(steps=T, mean_type=ModelMeanType.START_X)
    how = process_sampler(process, (1, SIDE, SIDE), clip_denoised=False)

    def network(x, t):
        out = torch.zeros_like(x)
        out[..., :8, :] = x[
            ..., :8, :
        ].sign()  # half of the picture is +-1, the other half is x_0 = 0 exactly
        return out

    batches = [
        Batch(batch.index, torch.zeros_like(batch.x_start), {}) for batch in gaussian_batches()
    ]
    found = measure(["prediction"], how, network, batches)["prediction"]
    assert (found["tested"] == SIDE**2 // 2).all() and (found["rejected"] == 1).all()


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.filterwarnings("ignore:epsilon scaling without clip_denoised")
def test_accumulation_has_a_closed_form(lam):
    s, n, side, lengths = 0.2, 12_000, 2, (5, T)  # 5 s fit into [-1, 1]
    process, _, how = setting("small", lam)
    found = measure(
        ["accumulation"],
        how,
        exact_network(process, s=s),
        gaussian_batches(n, side, s, 4000),
        lengths,
        PixelSpace(),
    )["accumulation"]
    ab, (a, v, x0) = process.alphas_cumprod, linear_steps(process, s=s)
    for row, length in enumerate(lengths):
        start = ab[length - 1] * s**2 + 1 - ab[length - 1]
        final = chain_variances(a[:length], v[:length], start)[1]
        # Pixels are (x + 1) / 2; the distance of two isotropic Gaussians is D times that of the
        # standard deviations, squared.
        assert found["frechet"][row] == pytest.approx(
            side**2 * (math.sqrt(final) - s) ** 2 / 4, rel=0.15
        )
        kept, noise = math.sqrt(ab[length - 1]), 1 - ab[length - 1]
        for t in range(length - 1, -1, -1):
            wrong = math.sqrt((x0[t] * kept - 1) ** 2 * s**2 + x0[t] ** 2 * noise)
            assert found["noise_free"][row, t] == pytest.approx(
                wrong * math.sqrt(2 / math.pi), rel=0.03
            )
            kept, noise = a[t] * kept, a[t] ** 2 * noise
        assert not found["noise_free"][row, length:].any()
        assert found["noise_free_final"][row] == found["noise_free"][row, 0]


def test_one_step_alone_can_be_accumulated():
    """From q(x_0 | x_0) one step to x_0_hat, and the real images beside it."""
    s, n, side = 0.2, 3000, 2
    process, _, how = setting("small", "plain")
    found = measure(
        ["accumulation"],
        how,
        exact_network(process, s=s),
        gaussian_batches(n, side, s, 1000),
        (1,),
        PixelSpace(),
    )["accumulation"]
    ab, (a, _, x0) = process.alphas_cumprod[0], linear_steps(process, s=s)
    final = a[0] ** 2 * (ab * s**2 + 1 - ab)
    assert found["frechet"] == pytest.approx(side**2 * (math.sqrt(final) - s) ** 2 / 4, abs=2e-4)
    wrong = math.sqrt((x0[0] * math.sqrt(ab) - 1) ** 2 * s**2 + x0[0] ** 2 * (1 - ab))
    assert found["noise_free_final"] == pytest.approx(wrong * math.sqrt(2 / math.pi), rel=0.03)


def test_noise_has_the_address_of_its_image_and_step():
    process, index, x = make(steps=T), [5, 2], torch.full((2, 1, 4, 4), 0.3)
    how, batch = process_sampler(process, (1, 4, 4), seed=3), Batch(index, x, {})
    draw = lambda stream, t: normal(3, stream, index, t, (1, 4, 4))  # noqa: E731
    torch.testing.assert_close(
        noised(how, how.bind(None), batch, 7),
        process.q_sample(x, torch.full((2,), 7), draw(Stream.MEASURE_INPUT, 7)),
    )
    assert torch.equal(step_noise(how, index, 7)(x), draw(Stream.MEASURE_STEP, 7))
    first = next(walk(Walk(CHAIN, T), how, exact_network(process), batch))
    assert torch.equal(first.x, draw(Stream.MEASURE_STEP, T)) and first.t == T - 1
    rest = process.p_sample(
        exact_network(process),
        first.x,
        torch.full((2,), T - 1),
        randn_like=lambda x: draw(Stream.MEASURE_STEP, T - 1),
    )["sample"]
    assert torch.equal(first.sample, rest)


@pytest.mark.parametrize("kind", [ModelMeanType.START_X, ModelMeanType.PREVIOUS_X])
def test_other_predictions_have_the_norm_of_their_implied_epsilon(kind):
    batches = gaussian_batches(20, 8)
    norms = []
    for mean_type in (ModelMeanType.EPSILON, kind):
        process = make(mean_type, steps=T, eps_scaler=1.01)
        how = process_sampler(process, (1, 8, 8))
        norms.append(measure(["norm"], how, exact_network(process, mean_type), batches)["norm"])
    for name in ("inputs", "chain", "ratio_published"):
        np.testing.assert_allclose(norms[1][name], norms[0][name], rtol=2e-3)


def test_class_labels_reach_the_network_and_results_do_not_depend_on_batches():
    process = make(steps=T)
    how = process_sampler(process, (1, 8, 8))
    whole = gaussian_batches(24, 8, size=24)[0]
    labels = torch.arange(24) % 3

    def network(x, t, y):
        return (1 + y.view(-1, 1, 1, 1)) * x

    def batches(size):
        for i in range(0, 24, size):
            yield Batch(
                list(range(i, min(i + size, 24))),
                whole.x_start[i : i + size],
                {"y": labels[i : i + size]},
            )

    names = [name for name in NAMES if name != "discretisation"]  # all steps are there already
    one, many = (
        measure(names, how, network, batches(size), (3, T), PixelSpace()) for size in (24, 7)
    )
    for name, figures in one.items():
        for key, value in figures.items():
            if not isinstance(value, str):
                np.testing.assert_allclose(
                    many[name][key], value, rtol=1e-5, atol=1e-7, err_msg=f"{name}.{key}"
                )
    shares = measure(["norm"], how, lambda x, t, y: x, batches(24))["norm"]["inputs"]
    assert (one["norm"]["inputs"] / shares > 1.5).all(), (
        "labels 0, 1, 2 make the mean of the factors 2"
    )


@pytest.mark.parametrize(
    "names, lengths, text",
    [
        (["norms"], (), "norms is no measure; allowed: norm, delta"),
        ([], (), "no measure asked for"),
        (["accumulation"], (0,), r"over \[0\] steps: give numbers from 1 to 25"),
        (["accumulation"], (26,), "give numbers from 1 to 25"),
    ],
)
def test_what_cannot_be_measured_is_refused(names, lengths, text):
    with pytest.raises(ValueError, match=text):
        for kind in create_measures(names, lengths, PixelSpace()):
            kind.walks(T)


def test_one_image_and_a_diverged_network_are_refused():
    process = make(steps=T)
    how = process_sampler(process, (1, SIDE, SIDE))
    with pytest.raises(ValueError, match="1 image is too few"):
        measure(["norm"], how, exact_network(process), gaussian_batches(1))
    with pytest.raises(ValueError, match="'norm' met values that are not finite"):
        measure(["norm"], how, lambda x, t: x * math.nan, gaussian_batches(4))


class ExactDenoiser:
    """D(x, sigma) for data N(0, S^2), its epsilon multiplied by `c`."""

    sigma_min, sigma_max, label_dim = 0.0, math.inf, 0

    def __init__(self, c=1.0):
        self.c = c

    def round_sigma(self, sigma):
        return sigma

    def __call__(self, x, sigma, labels=None, augment_labels=None):
        return x - self.c * sigma**2 / (S**2 + sigma**2) * x


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("c", [1.0, 1.02])
def test_measures_along_noise_levels(solver, order, c):
    """EDM's solvers on Gaussian data: the variance obeys V(sigma) = (S^2 + sigma^2)^c up to the
    solver's own error, and lambda = c undoes c.
    """

    def measured(n, lam=1.0):
        along = AlongSigma(lambda network, kwargs: ExactDenoiser(c), SigmaGrid(n))
        how = Sampler(along.with_scaling(EpsilonScaling(lam)), (1, SIDE, SIDE), solver=solver)
        names = ["norm", "delta", "variance", "prediction"]
        return how.bind(None), measure(names, how, None, gaussian_batches())

    steps, tolerance = (40, 0.25) if order == 1 else (80, 0.015)
    path, found = measured(steps)
    sigma = path.sigmas
    np.testing.assert_allclose(found["delta"]["expected_std"], sigma)
    rows = found["variance"]
    real = rows["final_expected"]
    np.testing.assert_allclose(rows["expected"], real + sigma**2)
    power = ((S**2 + sigma**2) / (S**2 + sigma[-1] ** 2)) ** c * sigma[-1] ** 2
    np.testing.assert_allclose(rows["chain"], power, rtol=tolerance)
    # On training inputs epsilon is c times the exact one.
    norms = found["norm"]["inputs"] / SIDE
    np.testing.assert_allclose(norms, c * sigma / np.sqrt(S**2 + sigma**2), rtol=0.01)
    repaired = measured(steps, lam=c)[1]["variance"]["final"]
    assert repaired == pytest.approx(real, rel=0.02 if order == 2 else 0.2)


# ---- discretisation ----


@pytest.mark.parametrize("factor", [1.0, 1.03])
def test_the_extrapolation_removes_what_finite_steps_contribute_and_nothing_else(factor):
    """An exact network has no exposure bias; one whose epsilon is too large keeps its own."""
    side, found = 64, {}
    for steps in (10, 20, 160):
        process = create_gaussian_diffusion(steps=1000, timestep_respacing=str(steps))
        whole = torch.from_numpy(process.whole().alphas_cumprod).float()

        def model(x, t, whole=whole):
            ab = whole[t].view(-1, 1, 1, 1)
            return factor * (1 - ab).sqrt() * x / (ab * S**2 + 1 - ab)

        how = process_sampler(process, (1, side, side), solver="ddim", clip_denoised=False)
        images = S * torch.randn(100, 1, side, side, generator=torch.Generator().manual_seed(1))
        found[steps] = measure(["discretisation"], how, model, [Batch(range(100), images, {})])[
            "discretisation"
        ]
    coarse, places = found[10], np.arange(1, 8) / 9
    truth = np.interp(places, np.arange(160) / 159, found[160]["ratio"])  # at the same levels
    raw, left = coarse["ratio"][1:8] - truth, coarse["extrapolated"][1:8] - truth
    assert np.abs(left).max() < 0.4 * np.abs(raw).max()
    assert np.abs(truth - 1).max() < 0.01 if factor == 1 else np.abs(truth - 1).max() > 0.03
    assert (coarse["extrapolated_error"] > 0).all() and coarse["share"].shape == (10,)


def test_a_finer_sampler_has_the_levels_of_the_coarse_one():
    process = create_gaussian_diffusion(steps=1000, timestep_respacing="10", eps_scaler=1.02)
    coarse = process_sampler(process, (1, 4, 4), solver="ddim")
    fine = coarse.finer()
    assert fine.num_steps == 19
    assert fine.along.process.timestep_map[::2] == process.timestep_map
    np.testing.assert_allclose(fine.along.process.lambdas, 1.02)
    with pytest.raises(ValueError, match="leave no room for one more between"):
        process_sampler(
            create_gaussian_diffusion(steps=50, timestep_respacing="50"), (1, 4, 4)
        ).finer()


@pytest.mark.parametrize("discretization", ["edm", "vp", "ve"])
def test_finer_noise_levels_contain_the_coarse_ones(discretization):
    grid = SigmaGrid(6, discretization=discretization)
    along = AlongSigma(lambda network, kwargs: NoSigma(), grid)
    levels = [one.bind(None, {}).sigmas for one in (along, along.finer())]
    np.testing.assert_allclose(levels[1][::2], levels[0], rtol=1e-12)
    iddpm = AlongSigma(lambda n, k: NoSigma(), SigmaGrid(6, discretization="iddpm"))
    with pytest.raises(ValueError, match="iDDPM's noise levels"):
        iddpm.finer()


class NoSigma:
    """What a path asks of a denoiser before it is called."""

    sigma_min, sigma_max = 0.0, float("inf")

    @staticmethod
    def round_sigma(sigma):
        return sigma
