"""lambda by the variance of finished images: b such that they spread as much as real ones.

A cheap check, which tells the sign: too little variance wants b > 1, too much b < 1. Exact, up to
.015, for Gaussian data with an exact network and nearly every sampler (docs/exposure_bias.md), and
blind to everything but the mean variance of pixels. Memory does not grow with the chains.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import dist_util
from ..diffusion.process import Network
from ..metrics.replicates import group_of
from ..runs.sample_batch import Sampler
from .chains import Chains, read_real_images, share
from .common_noise import GROUPS, LIMITS, STEP
from .measure_run import ImagesFor

_TRIALS = 10
_CLOSE = 1e-3  # of b
ENOUGH = 2.0  # standard errors by which the variance must be off


@dataclass(frozen=True)
class FinalVariance:
    """What a search has come to.

    Args:
        b: where finished images have the variance of real ones; 1 if it is not off by two standard
            errors.
        excess, excess_error: variance over that of real images, less 1, at lambda = 1.
        held_out: the excess at b of chains with other noise, and its error.
        curve: (b, excess, its error) of every trial.
    """

    steps: int
    b: float
    b_error: float
    excess: float
    excess_error: float
    held_out: tuple[float, float]
    curve: list[tuple[float, float, float]]
    num_chains: int
    num_images: int
    network_calls: int
    seconds: float

    @property
    def lambdas(self) -> np.ndarray:
        return np.full(self.steps, self.b)

    @property
    def verdict(self) -> str:
        off = f"variance off by {self.excess:+.2%} +- {self.excess_error:.2%} at lambda = 1"
        if self.b == 1:
            return f"lambda = 1: {off}, less than two standard errors"
        value, error = self.held_out
        return f"calibrated: {off}; with other noise, by {value:+.2%} +- {error:.2%} at b"

    def content(self) -> dict[str, Any]:
        """What goes into the YAML; see lambda_file for the keys that samplers read."""
        return {
            "steps": self.steps,
            "use": "b",
            "b": round(self.b, 6),
            "verdict": self.verdict,
            "standard_error": float(f"{self.b_error:.5g}") if np.isfinite(self.b_error) else None,
            "curve": [
                {"b": round(b, 6), "excess": round(excess, 6), "error": round(error, 6)}
                for b, excess, error in self.curve
            ],
            "cost": {
                "chains": self.num_chains,
                "real_images": self.num_images,
                "network_calls": self.network_calls,
                "seconds": round(self.seconds, 1),
            },
        }

    def table(self) -> str:
        """For people: every trial, and what was found."""
        lines = ["       b  variance of finished images over that of real ones (standard error)"]
        lines += [f"{b:8.4f}  {1 + excess:.4f} ({error:.4f})" for b, excess, error in self.curve]
        if self.b != 1:
            lines.append(f"equal at b = {self.b:.4f} +- {self.b_error:.4f}")
        return "\n".join([*lines, self.verdict])


class _Moments:
    """Sums of x and x^2 by group, from which the mean variance of pixels follows."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.counts = np.zeros(groups)
        self.first: np.ndarray = np.zeros((groups, 1))
        self.second: np.ndarray = np.zeros((groups, 1))

    def add(self, places: list[int], rows: Tensor) -> None:
        """Rows [n, D] of the images numbered so."""
        rows = rows.double()
        group = torch.from_numpy(group_of(np.array(places), self.groups)).to(rows.device)
        self.first = self.first + _by_group(rows, group, self.groups)
        self.second = self.second + _by_group(rows.square(), group, self.groups)
        self.counts += np.bincount(group.cpu().numpy(), minlength=self.groups)

    def variances(self) -> np.ndarray:
        """Of all, and without each group, [1 + G]; a collective."""
        counts, first, second = (
            np.sum(dist_util.all_gather_objects(part), axis=0)
            for part in (self.counts, self.first, self.second)
        )
        return np.array(
            [_mean_variance(counts, first, second)]
            + [
                _mean_variance(*(np.delete(part, g, axis=0) for part in (counts, first, second)))
                for g in range(self.groups)
            ]
        )


def _by_group(rows: Tensor, group: Tensor, groups: int) -> np.ndarray:
    """The sum of the rows [n, D] of each group, [G, D]."""
    sums = torch.zeros(groups, rows.shape[1], dtype=torch.float64, device=rows.device)
    return sums.index_add_(0, group, rows).cpu().numpy()


def _mean_variance(counts: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    n = counts.sum()
    squares = second.sum(axis=0) - first.sum(axis=0) ** 2 / n
    return float(squares.mean() / (n - 1))


def _error(replicates: np.ndarray) -> float:
    """Jackknife, of a function of all and without each group."""
    return float(np.sqrt((len(replicates) - 2) * replicates[1:].var()))


@torch.no_grad()
def by_final_variance(
    sampler: Sampler,
    model: Network,
    images_for: ImagesFor,
    num_images: int,
    batch_size: int,
    device: torch.device,
    *,
    num_chains: int = 0,
) -> FinalVariance:
    """Search; a collective: processes share the chains and the images by number.

    Args:
        as of common_noise.by_common_noise.

    Raises:
        ValueError: too few chains or images, or no b within reach.
        ImagesWithNaN: some images are none.
    """
    begun = time.monotonic()
    num_chains = num_chains or num_images
    if min(num_chains, num_images) < max(4, 2 * dist_util.get_world_size()):
        raise ValueError(
            f"{num_chains} chains and {num_images} real images are too few for a variance: give "
            "hundreds (--num_chains, --num_images)"
        )
    groups = min(GROUPS, max(2, min(num_chains, num_images) // 10))
    of_real, seen = _Moments(groups), iter(share(num_images))

    def moments_of(images: Tensor, rounded: bool) -> Tensor:
        of_real.add([next(seen) for _ in range(len(images))], images.flatten(1))
        return torch.empty(len(images), 0)

    real = read_real_images(images_for, num_images, batch_size, moments_of, device)
    wanted = of_real.variances()
    chains = Chains(sampler, model, real.cond, num_chains, batch_size, device)

    def excess(b: float, chains: Chains = chains) -> np.ndarray:
        """Of all, and without each group of chains and real images at once."""
        moments = _Moments(groups)
        for places, images in chains.finished(np.full(sampler.num_steps, b), f"lambda {b:.4f}"):
            moments.add(places, images.flatten(1))
        return moments.variances() / wanted - 1

    curve = {1.0: excess(1.0)}
    at_one, error = float(curve[1.0][0]), _error(curve[1.0])
    b, b_error = 1.0, float("nan")
    if abs(at_one) >= ENOUGH * error:
        root = _root(excess, curve)
        b, b_error = float(root[0]), _error(root)
    fresh = chains.with_other_noise()
    again = excess(b, fresh)
    return FinalVariance(
        sampler.num_steps,
        b,
        b_error,
        at_one,
        error,
        (float(again[0]), _error(again)),
        [(place, float(values[0]), _error(values)) for place, values in sorted(curve.items())],
        num_chains,
        num_images,
        chains.network_calls + fresh.network_calls,
        time.monotonic() - begun,
    )


def _root(excess: Any, curve: dict[float, np.ndarray]) -> np.ndarray:
    """Where the excess is 0, replicate by replicate: trials on the side to which it falls, twice as
    far until its sign changes, then between.

    Raises:
        ValueError: the sign does not change within LIMITS.
    """
    for b in (1 - STEP, 1 + STEP):
        curve[b] = excess(b)
    rising = curve[1 + STEP][0] > curve[1 - STEP][0]
    towards = -1 if (curve[1.0][0] > 0) == rising else 1
    reach = STEP
    while not _brackets(curve):
        reach *= 2
        b = 1 + towards * reach
        if not LIMITS[0] <= b <= LIMITS[1]:
            raise ValueError(
                f"no constant b from {LIMITS[0]} to {LIMITS[1]} gives finished images the variance "
                f"of real ones (off by {curve[1.0][0]:+.1%} at lambda = 1): lambda does not "
                "repair it for this sampler; use --by energy"
            )
        curve[b] = excess(b)
    for _ in range(_TRIALS):
        low, high = _brackets(curve)[0]
        place = _crossing(low, high, curve)
        nearest = min(curve, key=lambda b: abs(b - place[0]))
        if abs(nearest - place[0]) < _CLOSE or high - low < 2 * _CLOSE:
            break
        curve[float(place[0])] = excess(float(place[0]))
    return place


def _brackets(curve: dict[float, np.ndarray]) -> list[tuple[float, float]]:
    """Neighbouring places at which the excess has different signs, the nearest to 1 first."""
    places = sorted(curve)
    pairs = [(a, b) for a, b in zip(places, places[1:]) if curve[a][0] * curve[b][0] <= 0]
    return sorted(pairs, key=lambda pair: abs(sum(pair) / 2 - 1))


def _crossing(low: float, high: float, curve: dict[float, np.ndarray]) -> np.ndarray:
    below, above = curve[low], curve[high]
    return low - below * (high - low) / (above - below)
