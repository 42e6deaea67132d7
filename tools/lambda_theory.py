"""Epsilon scaling where everything is known: Gaussian data, the exact epsilon, no exposure bias.

    python tools/lambda_theory.py               # the table of docs/exposure_bias.md

Data are 256 independent directions (pixels) with variances 1/k. The exact epsilon is linear in x,
so that a solver's step is, too, and the variance of finished samples follows step by step: V <-
A^2 V + v, with A and v read off the solver itself. From it the exact distance to the data, W2^2 =
sum (sqrt(V) - s)^2, as a function of a constant lambda b. The first step is exempt from b: nothing
is clipped here, and at alpha_bar ~ 0 any b but 1 would be multiplied by 1 / sqrt(alpha_bar).

Columns: W2^2 at b = 1; the best b and W2^2 there; the b that gives finished samples the data's
total variance, and W2^2 there; with --monte_carlo True, what calibration finds with 1,000 chains.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from guided_diffusion_ip.diffusion.epsilon_scaling import EpsilonScaling
from guided_diffusion_ip.diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion_ip.exposure_bias.chains import pixels
from guided_diffusion_ip.exposure_bias.common_noise import by_common_noise
from guided_diffusion_ip.exposure_bias.final_variance import by_final_variance
from guided_diffusion_ip.noise import NormalStream, Stream
from guided_diffusion_ip.runs.sample_batch import Sampler, process_sampler
from guided_diffusion_ip.script_util import create_gaussian_diffusion

SIDE = 16
BOUNDS = (0.75, 1.35)
STEPS = (10, 20, 50)


def spectrum(side: int = SIDE) -> Tensor:
    """Variances 1/k of the pixels [1, side, side], float64."""
    return (1 / torch.arange(1, side * side + 1, dtype=torch.float64)).view(1, side, side)


@dataclass(frozen=True)
class ExactNetwork:
    """The epsilon of Gaussian data with these variances: sigma x / (alpha^2 s^2 + sigma^2)."""

    process: GaussianDiffusion
    variances: Tensor

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        whole = torch.from_numpy(self.process.whole().alphas_cumprod).to(x)
        ab = whole[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * x / (ab * self.variances.to(x) + 1 - ab)


class FirstStepExempt(Sampler):
    """A sampler whose lambda is 1 at the first step, whatever is asked for."""

    def with_scaling(self, scaling: EpsilonScaling) -> Sampler:
        lambdas = scaling.lambdas(self.num_steps)
        lambdas[-1] = 1.0
        return super().with_scaling(EpsilonScaling.of(lambdas))


def optimal_variance(process: GaussianDiffusion, variances: Tensor) -> None:
    """Give a process of fixed-large variance the best isotropic one instead: posterior variance +
    c1^2 E Var(x_0 | x_t), as a learned variance would have it (Bao et al. 2022).
    """
    ab = process.alphas_cumprod[:, None]
    s2 = variances.flatten().numpy()[None]
    left = (s2 * (1 - ab) / (ab * s2 + 1 - ab)).mean(axis=1)
    process.fixed_large_log_variance = np.log(
        process.posterior_variance + process.posterior_mean_coef1**2 * left
    )


def sampler_of(kind: str, steps: int, variances: Tensor, schedule: str = "cosine") -> Sampler:
    """ddim, ddpm optimal, ddpm fixed-small, ddpm fixed-large, or another solver's name."""
    small = kind == "ddpm fixed-small"
    process = create_gaussian_diffusion(
        noise_schedule=schedule, timestep_respacing=str(steps), sigma_small=small
    )
    if kind == "ddpm optimal":
        optimal_variance(process, variances)
    plain = process_sampler(
        process, tuple(variances.shape), solver=kind.split()[0], clip_denoised=False
    )
    return FirstStepExempt(**vars(plain))


def final_variances(
    sampler: Sampler, network: ExactNetwork, lambdas: float | np.ndarray
) -> np.ndarray:
    """Of finished samples, by pixel, float64, with a constant lambda or one for each step."""
    scaled = sampler.with_scaling(EpsilonScaling.of(np.broadcast_to(lambdas, (sampler.num_steps,))))
    ones = torch.ones(1, *sampler.image_shape, dtype=torch.float64)
    path = scaled.bind(network)
    if sampler.solver != "ddpm":  # deterministic: x stays a multiple of its beginning
        for step in scaled.chain(path, ones, torch.zeros_like):
            x = step.x
        return x.square().flatten().numpy()
    variance = ones.clone()
    for index in range(sampler.num_steps - 1, -1, -1):
        gain = scaled.step(path, ones, index, torch.zeros_like).x
        noise = scaled.step(path, torch.zeros_like(ones), index, torch.ones_like).x
        variance = gain**2 * variance + noise**2
    return variance.flatten().numpy()


@dataclass(frozen=True)
class Known:
    """What is known of one sampler."""

    sampler: Sampler
    network: ExactNetwork

    def distance(self, b: float) -> float:
        """W2^2 of finished samples and data."""
        stds = np.sqrt(final_variances(self.sampler, self.network, b))
        return float(((stds - self._stds) ** 2).sum())

    def excess(self, b: float) -> float:
        """Total variance of finished samples over that of the data, less 1."""
        total = final_variances(self.sampler, self.network, b).sum()
        return float(total / (self._stds**2).sum() - 1)

    @property
    def _stds(self) -> np.ndarray:
        return self.network.variances.sqrt().flatten().numpy()

    def best(self) -> float:
        """The b of the smallest distance."""
        return float(minimize_scalar(self.distance, bounds=BOUNDS, method="bounded").x)

    def by_variance(self) -> float:
        """The b at which the excess is 0; NaN where there is none."""
        low, high = BOUNDS
        if self.excess(low) * self.excess(high) > 0:
            return float("nan")
        return float(brentq(self.excess, low, high))


def known(kind: str, steps: int, side: int = SIDE, schedule: str = "cosine") -> Known:
    variances = spectrum(side)
    sampler = sampler_of(kind, steps, variances, schedule)
    process = sampler.along.process
    return Known(sampler, ExactNetwork(process, variances))


def real_images(variances: Tensor, seed: int = 9) -> Callable:
    """Draws of the data, as calibration takes real images."""

    def images_for(index: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        draw = NormalStream(seed, Stream.SAMPLE, torch.as_tensor(index))
        noise = draw(torch.empty(len(index), *variances.shape))
        return noise * variances.sqrt().float(), {}

    return images_for


KINDS = ("ddpm optimal", "ddpm fixed-small", "ddpm fixed-large", "ddim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--monte_carlo", default="False")
    parser.add_argument("--schedule", default="cosine")
    arguments = parser.parse_args()
    monte_carlo = arguments.monte_carlo == "True"
    print(
        "| sampler | steps | W2^2 at 1 | best b | W2^2 | b by final variance | W2^2 |"
        + (" energy: b (error) | final variance: b (error) |" if monte_carlo else "")
    )
    print("|---" * (9 if monte_carlo else 7) + "|")
    for kind in KINDS:
        for steps in STEPS:
            case = known(kind, steps, schedule=arguments.schedule)
            best, root = case.best(), case.by_variance()
            at_root = case.distance(root) if np.isfinite(root) else float("nan")
            line = f"| {kind} | {steps} | {case.distance(1):.4f} | {best:.4f} "
            line += f"| {case.distance(best):.4f} | {root:.4f} | {at_root:.4f} |"
            print(line + (monte_carlo_columns(case) if monte_carlo else ""), flush=True)


def monte_carlo_columns(case: Known) -> str:
    common = (
        case.sampler,
        case.network,
        real_images(case.network.variances),
        4000,
        500,
        torch.device("cpu"),
    )
    text = ""
    for rule in (partial(by_common_noise, features=pixels), by_final_variance):
        try:
            found = rule(*common, num_chains=1000)
            text += f" {found.b:.4f} ({found.b_error:.4f}) |"
        except ValueError:
            text += " none |"
    return text


if __name__ == "__main__":
    main()
