"""Two diagnostics: lambda(t) step by step, from what a chain looks like on its way.

From the noisy end to the clean end, lambda(t) is chosen such that x_{t-1}, which the step at t
makes, has the mean raw epsilon norm (or the variance) that training inputs have at t - 1. The chain
up to t uses the lambdas found so far. This tells where a chain leaves its training inputs. It is no
calibration: what is right for x_{t-1} is often wrong for the finished image, and with DDIM in 10
steps the norm rule has been seen to double every distance (docs/exposure_bias.md).

Ratio = mean norm of epsilon_theta in the chain / mean norm on training inputs, both raw.

All chains are kept in memory, as x_t and the network's output at x_t: at most 4 images' worth of
float32 each, so that 10,000 CIFAR-10 chains take half a gigabyte. Cost in network calls per chain:
for the norm, T' on training inputs and about 6 T' along the chain (each trial lambda is one call at
t - 1); for the variance T' in all. Re-running the chain for each trial instead would take memory
for one batch only, and T'/2 times as many calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import dist_util
from ..diffusion.epsilon_scaling import EpsilonScaling
from ..diffusion.process import Network
from ..diffusion.solvers import SOLVERS
from ..diffusion.solvers.paths import SamplingPath, Step, with_output
from ..runs.sample_batch import Sampler
from .measure_run import ImagesFor
from .walks import Batch, noised, step_noise

BRACKET = (0.95, 1.05)
SATURATED = 0.9  # share of clipped numbers in x_0_hat above which lambda has nothing to act on
RESPONSE = 5.0  # standard errors that the ratio must move by across the bracket
_TOLERANCE = 1e-4  # of lambda
_TRIALS = 12

# What became of a step.
SOLVED, EDGE = "solved", "edge of the bracket"
CLIPPED, NOISE, LAST = (
    "neighbour's: x_0_hat is clipped",
    "neighbour's: response below noise",
    "neighbour's: last step",
)


@dataclass
class StepByStep:
    """lambda(t), and how each was found; lists of T' entries, index 0 = last, clean step.

    Args:
        error: standard error of lambda(t) from the number of chains; NaN where it was inherited.
        ratio: chain / target at t - 1 with lambda(t); NaN where it was inherited.
        response: change of that ratio across the bracket; NaN where it was not looked at.
        clipped: share of the numbers in x_0_hat that the clip changes.
    """

    lambdas: np.ndarray
    error: np.ndarray
    ratio: np.ndarray
    response: np.ndarray
    clipped: np.ndarray
    how: list[str] = field(default_factory=list)

    def fit(self) -> dict[str, float]:
        """b, and (k, b) of a line: least squares over the steps that were found, with weights
        1 / error^2.

        With fewer than two such steps the line is the constant; with none, b = 1.
        """
        found = np.array([how in (SOLVED, EDGE) for how in self.how])
        if not found.any():
            return {"b": 1.0, "line_k": 0.0, "line_b": 1.0}
        t, lam = np.flatnonzero(found).astype(float), self.lambdas[found]
        weight = 1 / np.maximum(self.error[found], 1e-4) ** 2
        b = float(np.average(lam, weights=weight))
        if len(t) < 2:
            return {"b": b, "line_k": 0.0, "line_b": b}
        k, line_b = np.polyfit(t, lam, 1, w=np.sqrt(weight))
        return {"b": b, "line_k": float(k), "line_b": float(line_b)}

    def check(self, out: str) -> list[str]:
        """Warnings about lambdas that are but the bracket's end; `out` would hold them.

        Raises:
            ValueError: the target was met at no step.
        """
        tried = len(self.how) - 1  # the last step is never looked at
        edge, noise, clipped = (self.how.count(how) for how in (EDGE, NOISE, CLIPPED))
        low, high = BRACKET
        if SOLVED not in self.how:
            raise ValueError(
                f"nothing was solved, and {out} is not written: of {tried} steps {edge} need a "
                f"lambda outside of {low} to {high}, {noise} show no response above the noise "
                f"(more --num_images help) and at {clipped} x_0_hat is clipped; is it the "
                "checkpoint's own data, and enough steps?"
            )
        if not edge:
            return []
        return [
            f"warning: {edge} of {tried} lambdas are at the edge of {low} to {high}, where they do "
            "not meet the target: the chain's norm (or variance) is off by more than lambda can "
            "make up for"
        ]

    def table(self) -> str:
        """A line per step, noisy end first, and the fits."""
        lines = ["   t    lambda     error  how"]
        for t in range(len(self.lambdas) - 1, -1, -1):
            error = f"{self.error[t]:.4f}" if np.isfinite(self.error[t]) else "-"
            lines.append(f"{t:4d}  {self.lambdas[t]:.5f}  {error:>8}  {self.how[t]}")
        fit = self.fit()
        line = f"line k = {fit['line_k']:.6f}, b = {fit['line_b']:.5f}"
        return "\n".join([*lines, f"uniform b = {fit['b']:.5f}; {line}"])

    def content(self) -> dict[str, Any]:
        """What goes into the YAML; see lambda_file for the keys that samplers read."""
        fit = self.fit()

        def listed(values: np.ndarray, digits: int) -> list[float | None]:
            return [round(float(value), digits) if np.isfinite(value) else None for value in values]

        return {
            "steps": len(self.lambdas),
            "use": "lambda",
            "lambda": listed(self.lambdas, 6),
            "b": round(fit["b"], 6),
            "kb": {"k": round(fit["line_k"], 8), "b": round(fit["line_b"], 6)},
            "standard_error": listed(self.error, 6),
            "how": list(self.how),
            "ratio": listed(self.ratio, 6),
            "response": listed(self.response, 6),
            "clipped_share": listed(self.clipped, 4),
        }


@dataclass(frozen=True)
class Mean:
    """A mean over all chains of all processes, and its standard error."""

    value: float
    error: float


def over_ranks(values: np.ndarray) -> np.ndarray:
    """The sum of an array over processes, on each; a collective."""
    return (
        dist_util.all_gather_rows(np.asarray(values, dtype=np.float64).reshape(1, -1))
        .sum(axis=0)
        .reshape(np.shape(values))
    )


class _Statistic(Protocol):
    """What the chain is compared with training inputs by."""

    needs_network: bool

    def of(self, path: SamplingPath, x: Tensor, output: Tensor | None, t: int) -> Mean:
        """Over chains x [n, C, H, W] at t; `output` is the network's there, if it is needed."""
        ...


class _Norm:
    """Mean Frobenius norm of the raw epsilon."""

    needs_network = True

    def of(self, path: SamplingPath, x: Tensor, output: Tensor | None, t: int) -> Mean:
        assert output is not None, "this statistic needs the network's output"
        epsilon = path.raw_epsilon(output, x, path.level(t, x))
        norms = epsilon.flatten(1).double().norm(dim=1)
        n, first, second = over_ranks(
            np.array([len(norms), float(norms.sum()), float(norms.square().sum())])
        )
        mean = first / n
        return Mean(mean, float(np.sqrt(max(second / n - mean**2, 0) / max(n - 1, 1))))


class _Variance:
    """Variance over the chains at each pixel, averaged over pixels."""

    needs_network = False

    def of(self, path: SamplingPath, x: Tensor, output: Tensor | None, t: int) -> Mean:
        flat = x.flatten(1).double()  # [n, D]
        n = float(over_ranks(np.array(len(flat))))
        centre = torch.from_numpy(over_ranks(flat.sum(dim=0).cpu().numpy()) / n).to(flat)
        squares = (flat - centre).square().mean(dim=1)
        first, second = over_ranks(np.array([float(squares.sum()), float(squares.square().sum())]))
        mean = first / n
        return Mean(first / (n - 1), float(np.sqrt(max(second / n - mean**2, 0) / (n - 1))))


STATISTICS: dict[str, type[_Statistic]] = {"norm": _Norm, "variance": _Variance}


@torch.no_grad()
def step_by_step(
    sampler: Sampler,
    model: Network,
    images_for: ImagesFor,
    num_chains: int,
    batch_size: int,
    device: torch.device,
    by: str = "norm",
    bracket: tuple[float, float] = BRACKET,
) -> StepByStep:
    """Find lambda(t) for this sampler; a collective: processes share the chains by number.

    Args:
        sampler: its process's own lambda is not used.
        images_for: real images, as of MeasureRun: for the training norms (or Var(x_0)), and for the
            chains' classes.
        by: "norm" (measure 1) or "variance" (measure 3).

    Raises:
        ValueError: fewer than 2 chains per process, an unknown `by`, or norms that are not finite.
    """
    if by not in STATISTICS:
        raise ValueError(f"--by {by}: allowed are {', '.join(STATISTICS)}")
    rank, world = dist_util.get_rank(), dist_util.get_world_size()
    if num_chains < 2 * world:
        raise ValueError(
            f"--num_images {num_chains} is too few: calibration needs 2 per process at least, "
            "better hundreds"
        )
    mine = list(range(num_chains * rank // world, num_chains * (rank + 1) // world))
    parts = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    solver = SOLVERS[sampler.solver]
    if sampler.network_calls != sampler.num_steps:
        raise ValueError(
            f"--by {by} tries each step by itself, by one network call, but the steps of "
            f"{solver.title} need more: use --solver ddpm, ddim or euler"
        )
    return _StepByStep(sampler, model, images_for, parts, device, STATISTICS[by](), bracket).run()


class _StepByStep:
    """The chains of this process, in batches, and the search at each step."""

    def __init__(
        self,
        sampler: Sampler,
        model: Network,
        images_for: ImagesFor,
        parts: list[list[int]],
        device: torch.device,
        statistic: _Statistic,
        bracket: tuple[float, float],
    ) -> None:
        self.sampler, self.model = sampler, model
        self.levels = sampler.bind(model, device=device)  # for what does not depend on images
        self.images_for, self.parts, self.device = images_for, parts, device
        self.statistic, self.bracket = statistic, bracket
        self.kwargs: list[dict[str, Tensor]] = []
        self.previous: Step | None = None  # that led to the chains' current x

    def run(self) -> StepByStep:
        steps = self.sampler.num_steps
        target, x = self._targets_and_starts()
        lambdas, error, ratio, response, clipped = np.full((5, steps), np.nan)
        found = StepByStep(lambdas, error, ratio, response, clipped, how=[LAST] * steps)
        output = self._call(x, steps - 1)
        lam = 1.0
        for t in tqdm(
            range(steps - 1, 0, -1),
            desc="calibrating",
            unit="step",
            disable=None if dist_util.is_main() else True,
        ):
            found.clipped[t] = self._clipped_share(x, output, t)
            if found.clipped[t] > SATURATED:
                found.how[t], best = CLIPPED, self._try(x, output, t, lam, target)
            else:
                best = self._solve(x, output, t, target, found, lam)
            if found.how[t] in (SOLVED, EDGE):
                lam = found.lambdas[t] = best.lam
                found.ratio[t] = 1 + best.excess
            self.previous, x = best.step, best.step.x
            output = best.output if best.output is not None else self._call(x, t - 1)
        found.clipped[0] = self._clipped_share(x, output, 0)
        _inherit(found.lambdas)
        return found

    def _targets_and_starts(self) -> tuple[list[Mean], Tensor]:
        """The statistic at each t on training inputs, and the chains' start [n, C, H, W]."""
        steps, real, starts = self.sampler.num_steps, [], []
        for index in self.parts:
            images, cond = self.images_for(index)
            real.append(images)
            noise = step_noise(self.sampler, index, steps)(images.to(self.device))
            starts.append(self.levels.start(noise))
            self.kwargs.append({name: value.to(self.device) for name, value in cond.items()})
        x_start = torch.cat(real)
        if not self.statistic.needs_network:
            data = self.statistic.of(self.levels, x_start, None, 0)
            return [
                Mean(alpha**2 * data.value + sigma**2, alpha**2 * data.error)
                for alpha, sigma in zip(self.levels.alphas, self.levels.sigmas)
            ], torch.cat(starts)
        targets = []
        for t in tqdm(
            range(steps),
            desc="training norms",
            unit="step",
            disable=None if dist_util.is_main() else True,
        ):
            x_t = torch.cat(
                [
                    noised(self.sampler, self.levels, Batch(index, images.to(self.device), {}), t)
                    for index, images in zip(self.parts, real)
                ]
            )
            targets.append(self.statistic.of(self.levels, x_t, self._call(x_t, t), t))
        return targets, torch.cat(starts)

    def _call(self, x: Tensor, t: int) -> Tensor:
        """The network's output at x [n, ...], a batch at a time."""
        outputs = []
        parts = x.split([len(index) for index in self.parts])
        for part, kwargs in zip(parts, self.kwargs):
            path = self.sampler.bind(self.model, kwargs, self.device)
            outputs.append(path.call(part, path.level(t, part)))
        return torch.cat(outputs)

    def _clipped_share(self, x: Tensor, output: Tensor, t: int) -> float:
        if not self.sampler.along.clip_denoised:
            return 0.0
        epsilon = self.levels.raw_epsilon(output, x, self.levels.level(t, x))
        free = (x - self.levels.sigmas[t] * epsilon) / self.levels.alphas[t]  # x_0_hat
        outside, count = over_ranks(np.array([float((free.abs() > 1).sum()), free.numel()]))
        return outside / count

    def _try(self, x: Tensor, output: Tensor, t: int, lam: float, target: list[Mean]) -> _Trial:
        """x_{t-1} made with lambda(t) = lam, and how far it is from the target."""
        lambdas = np.ones(self.sampler.num_steps)
        lambdas[t] = lam
        path = self.sampler.with_scaling(EpsilonScaling.of(lambdas)).bind(
            self.model, device=self.device
        )
        path = with_output(path, output)
        index = [i for part in self.parts for i in part]
        noise = step_noise(self.sampler, index, t)
        step = self.sampler.step(path, x, t, noise, self.previous)
        before = step.x
        new_output = self._call(before, t - 1) if self.statistic.needs_network else None
        mean, wanted = self.statistic.of(self.levels, before, new_output, t - 1), target[t - 1]
        if not (np.isfinite(mean.value) and mean.value > 0 and wanted.value > 0):
            raise ValueError(
                f"the chain's mean at t = {t - 1} is {mean.value:g}, on training inputs "
                f"{wanted.value:g}: the model has diverged, overflows in half precision (try "
                "--use_fp16 False), or needs --clip_denoised True"
            )
        ratio = mean.value / wanted.value
        spread = ratio * float(np.hypot(mean.error / mean.value, wanted.error / wanted.value))
        return _Trial(lam, ratio - 1, spread, step, new_output)

    def _solve(
        self,
        x: Tensor,
        output: Tensor,
        t: int,
        target: list[Mean],
        found: StepByStep,
        neighbour: float,
    ) -> _Trial:
        """The trial that meets the target, by bracketing; sets how, error and response of t."""

        def trial(lam: float) -> _Trial:
            return self._try(x, output, t, lam, target)

        low, high = (trial(end) for end in self.bracket)
        found.response[t] = high.excess - low.excess
        if abs(found.response[t]) < RESPONSE * max(low.noise, high.noise):
            found.how[t] = NOISE
            return trial(neighbour)
        slope = abs(found.response[t]) / (high.lam - low.lam)
        found.error[t] = max(low.noise, high.noise) / slope
        if low.excess * high.excess > 0:
            found.how[t] = EDGE
            return min(low, high, key=lambda end: abs(end.excess))
        found.how[t] = SOLVED
        return _bracket_root(trial, low, high, slope * _TOLERANCE)


@dataclass(frozen=True)
class _Trial:
    lam: float
    excess: float  # ratio - 1
    noise: float  # its standard error
    step: Step
    output: Tensor | None


def _bracket_root(
    trial: Callable[[float], _Trial], low: _Trial, high: _Trial, small: float
) -> _Trial:
    """The trial with |excess| <= small between two whose excesses differ in sign: regula falsi,
    Illinois variant.
    """
    ends, values = [low, high], [low.excess, high.excess]
    best = min(ends, key=lambda end: abs(end.excess))
    last = -1
    for _ in range(_TRIALS):
        if abs(best.excess) <= small:
            break
        (a, b), (fa, fb) = (end.lam for end in ends), values
        middle = trial((a * fb - b * fa) / (fb - fa))
        best = min(best, middle, key=lambda end: abs(end.excess))
        side = 0 if middle.excess * values[0] > 0 else 1
        ends[side], values[side] = middle, middle.excess
        if side == last:
            # The other end has stood still twice: let the line lean towards it.
            values[1 - side] /= 2
        last = side
    return best


def _inherit(lambdas: np.ndarray) -> None:
    """Fill gaps (NaN) from the noisier neighbour; the noisiest ones from the first that was found;
    1 if none was.
    """
    known = 1.0 if np.isnan(lambdas).all() else lambdas[~np.isnan(lambdas)][-1]
    for t in range(len(lambdas) - 1, -1, -1):
        known = lambdas[t] = known if np.isnan(lambdas[t]) else lambdas[t]
