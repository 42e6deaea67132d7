"""lambda(t) by common noise: the one that brings finished images closest to real ones.

The same chains, with equal noise, are drawn with several lambdas, and each set of finished images
is compared with real images in a feature space, best by an unbiased distance
(metrics/replicates.py). Since nothing else differs, differences between the sets are known far
better than the distances themselves: a few hundred chains find the lowest point of a parabola to
some thousandths. Nothing is assumed about what lambda repairs: exposure bias, discretisation, or a
poor first step.

What is found is kept only if it pays: the gain over lambda = 1 must be two standard errors at
least, on the chains of the search and on chains with other noise; else lambda = 1 is the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import dist_util
from ..diffusion.process import Network
from ..metrics.replicates import KERNELS, Distance, Replicates
from ..runs.sample_batch import Sampler
from .chains import Chains, ImageFeatures, TrialStore, gathered, read_real_images
from .frechet_rule import FrechetDistance
from .line_search import Minimum, minimise
from .measure_run import ImagesFor

FORMS = ("b", "kb", "groups")
# What finished images are compared by: a title, and what makes it from the real images' features.
DISTANCES: dict[str, tuple[str, Callable[..., Distance | FrechetDistance]]] = {
    **{name: (kernel.title, partial(Distance, kernel)) for name, kernel in KERNELS.items()},
    "fid": ("Frechet distance", FrechetDistance),
}
STEP = 0.02  # of b, between the first trials
LIMITS = (0.75, 1.35)  # of b: published and measured values lie in 0.93 to 1.13
WIDER = (0.6, 1.5)  # of lambda(t) at any step, where it has several parameters
GROUPS = 20  # of chains and of real images, one of which is left out at a time
ROUNDS = 2  # of Gauss-Newton steps, where lambda(t) has several parameters
ENOUGH = 2.0  # standard errors that a gain must have


@dataclass(frozen=True)
class Trial:
    """One lambda(t) that was tried; `change` is its distance less that of lambda = 1."""

    b: float
    distance: float
    change: float
    change_error: float


@dataclass(frozen=True)
class Gain:
    """What a lambda(t) is worth on some chains: the distance with lambda = 1, and by how much it
    falls.
    """

    before: float
    value: float
    error: float

    @property
    def pays(self) -> bool:
        return self.value >= ENOUGH * self.error and self.value > 0

    def confirmed_by(self, held_out: Gain) -> bool:
        """Is it to be used? The search has chosen the lambda by its own noise, which flatters it:
        with noise that it has not seen the gain must be clear of its error, too.
        """
        return self.pays and held_out.pays

    def __str__(self) -> str:
        share = f", {self.value / self.before:.0%}" if self.before > 0 else ""
        return f"{self.value:.4g} +- {self.error:.2g} of {self.before:.4g}{share}"


@dataclass(frozen=True)
class CommonNoise:
    """What a search has come to.

    Args:
        lambdas: of each step, index 0 = last, clean step; all 1 if nothing pays.
        best: lambda(t) of the lowest distance, whether it pays or not.
        b, b_error: its constant part (of form b: itself), and the standard error of that.
        line: (k, b) of form kb.
        gain: on the chains that were searched; held_out: on as many with other noise.
        trials: in the order of b, of form b.
        distance: what was measured, for people.
        notes: what else there is to say.
    """

    form: str
    lambdas: np.ndarray
    best: np.ndarray
    b: float
    b_error: float
    line: tuple[float, float] | None
    gain: Gain
    held_out: Gain
    trials: list[Trial]
    distance: str
    num_chains: int
    num_images: int
    network_calls: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def pays(self) -> bool:
        return self.gain.confirmed_by(self.held_out)

    @property
    def verdict(self) -> str:
        """One line: what to use, and why."""
        what = f"gain {self.gain}; with other noise {self.held_out}"
        if self.pays:
            return f"calibrated: {what}"
        if not self.gain.pays:
            return f"lambda = 1: no gain to be had (less than two standard errors): {what}"
        return f"lambda = 1: the gain is not confirmed by other noise: {what}"

    def content(self) -> dict[str, Any]:
        """What goes into the YAML; see lambda_file for the keys that samplers read."""
        use = {"b": "b", "kb": "kb", "groups": "lambda"}[self.form] if self.pays else "b"
        k, line_b = self.line or (0.0, self.b)
        return {
            "steps": len(self.lambdas),
            "use": use,
            "b": round(self.b, 6) if self.pays else 1.0,
            **({"kb": {"k": round(k, 8), "b": round(line_b, 6)}} if use == "kb" else {}),
            "lambda": [round(float(value), 6) for value in self.lambdas],
            "verdict": self.verdict,
            "found": {
                "b": round(self.b, 6),
                "standard_error": _rounded(self.b_error),
                "lambda": [round(float(value), 6) for value in self.best],
            },
            "distance": self.distance,
            "gain": _gain_content(self.gain),
            "held_out": _gain_content(self.held_out),
            "curve": [
                {
                    "b": round(trial.b, 6),
                    "distance": _rounded(trial.distance),
                    "change": _rounded(trial.change),
                    "change_error": _rounded(trial.change_error),
                }
                for trial in self.trials
            ],
            "cost": {
                "chains": self.num_chains,
                "real_images": self.num_images,
                "network_calls": self.network_calls,
                "seconds": round(self.seconds, 1),
            },
            **({"notes": self.notes} if self.notes else {}),
        }

    def table(self) -> str:
        """For people: every trial, what was found, and what it is worth."""
        lines = [f"       b  {self.distance}, change from lambda = 1 (standard error)"]
        for trial in self.trials:
            change = f"{trial.change:+.4g} ({trial.change_error:.2g})" if trial.b != 1 else ""
            lines.append(f"{trial.b:8.4f}  {trial.distance:.5g}  {change}".rstrip())
        lines.append(f"lowest at b = {self.b:.4f} +- {self.b_error:.4f}")
        if self.form != "b":
            lines.append(f"lambda(t), clean end first: {', '.join(f'{v:.4f}' for v in self.best)}")
        return "\n".join([*lines, *self.notes, self.verdict])


def _gain_content(gain: Gain) -> dict[str, float | None]:
    return {
        "before": _rounded(gain.before),
        "value": _rounded(gain.value),
        "error": _rounded(gain.error),
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


@torch.no_grad()
def by_common_noise(
    sampler: Sampler,
    model: Network,
    images_for: ImagesFor,
    num_images: int,
    batch_size: int,
    device: torch.device,
    distance: str = "energy",
    *,
    features: ImageFeatures,
    features_name: str = "features",
    num_chains: int = 0,
    of_all: int = 0,
    form: str = "b",
    groups: int = 3,
    store: TrialStore | None = None,
) -> CommonNoise:
    """Search; a collective: processes share the chains and the images by number.

    Memory: the features of the real images and of one set of chains (of P + 1 sets where lambda(t)
    has P > 1 parameters), float32, on every process.

    Args:
        sampler: any solver along any path; its own lambda is not used.
        images_for: real images and the model_kwargs of the chains, as of MeasureRun.
        distance: a name in DISTANCES.
        features: what is compared: those by which the samples will be judged. Features disagree on
            which lambda is best, even on its sign (docs/study.md).
        num_chains: of each trial; 0: as many as real images.
        of_all: the real images are some of so many; 0: of infinitely many. See Distance.
        form: "b", a constant; "kb", lambda(t) = k t + b; "groups", a constant for each of `groups`
            stretches of the chain.
        store: keeps what trials have come to.

    Raises:
        ValueError: too few chains or images, an unknown distance or form.
        ImagesWithNaN: some images are none.
    """
    if distance not in DISTANCES or form not in FORMS:
        wrong, known = (distance, DISTANCES) if distance not in DISTANCES else (form, FORMS)
        raise ValueError(f"{wrong!r} is not known: allowed are {', '.join(known)}")
    num_chains = num_chains or num_images
    fewest = max(4, 2 * dist_util.get_world_size())
    if min(num_chains, num_images) < fewest:
        raise ValueError(
            f"{num_chains} chains and {num_images} real images are too few: calibration needs "
            f"{fewest} of each at least, better hundreds (--num_chains, --num_images)"
        )
    begun = time.monotonic()
    real = read_real_images(images_for, num_images, batch_size, features, device)
    chains = Chains(sampler, model, real.cond, num_chains, batch_size, device)
    jackknife = min(GROUPS, max(2, num_chains // 10))
    title, create = DISTANCES[distance]
    measure = create(real.all_rows(), num_chains, jackknife, of_all)
    search = _Search(chains, features, measure, store or TrialStore(), form, groups)
    found = search.run()
    fresh = replace(search, chains=chains.with_other_noise())
    held_out = fresh.gain(fresh.distance(search.ones), fresh.distance(found["best"]))
    return CommonNoise(
        form=form,
        lambdas=found["best"] if found["gain"].confirmed_by(held_out) else search.ones,
        held_out=held_out,
        distance=f"{title}, {features_name}",
        num_chains=num_chains,
        num_images=num_images,
        network_calls=chains.network_calls + fresh.chains.network_calls,
        seconds=time.monotonic() - begun,
        **found,
    )


@dataclass(frozen=True)
class _Search:
    chains: Chains
    features: ImageFeatures
    measure: Distance | FrechetDistance
    store: TrialStore
    form: str
    groups: int

    @property
    def steps(self) -> int:
        return self.chains.sampler.num_steps

    @property
    def ones(self) -> np.ndarray:
        return np.ones(self.steps)

    def rows(self, lambdas: np.ndarray) -> Tensor:
        """Features of the finished images of all chains, [n, D]."""
        text = f"lambda {lambdas[0]:.4f}"
        if np.ptp(lambdas):
            text = f"lambda {lambdas.min():.4f} to {lambdas.max():.4f}"

        def compute() -> Tensor:
            made = [
                self.features(images, self.chains.sampler.rounded)
                for _, images in self.chains.finished(lambdas, text)
            ]
            return gathered(torch.cat(made))

        key = f"{self.chains.first} {lambdas.tolist()}"
        return self.store.keep(key, compute, self.chains.device)

    def distance(self, lambdas: np.ndarray) -> Replicates:
        return self.measure(self.rows(lambdas))

    def gain(self, before: Replicates, after: Replicates) -> Gain:
        error = self.measure.standard_error(before - after)
        return Gain(float(before[0]), float(before[0] - after[0]), error)

    def run(self) -> dict[str, Any]:
        """The fields of CommonNoise that the search itself decides."""
        constant = minimise(
            lambda s: self.distance((1 + s) * self.ones), STEP, (LIMITS[0] - 1, LIMITS[1] - 1)
        )
        at_one = constant.points[0.0]
        notes = []
        if constant.edge:
            notes.append(
                f"the distance still falls at b = {1 + constant.place[0]:.2f}, where the search "
                "ends: is it the checkpoint's own data, and enough steps?"
            )
        best = (1 + float(constant.place[0])) * self.ones
        found: dict[str, Any] = {
            "best": best,
            "b": float(best[0]),
            "b_error": self.measure.standard_error(constant.place),
            "line": None,
            "gain": self.gain(at_one, constant.value),
            "trials": self._trials(constant, at_one),
            "notes": notes,
        }
        if self.form == "b":
            return found
        return self._refined(found, constant.value, at_one)

    def _along(self, start: np.ndarray, change: np.ndarray, value: Replicates) -> Minimum:
        """The lowest point of start + s change within WIDER; `value` is the distance at s = 0."""
        moving = np.abs(change) > 1e-12
        room = (np.array(WIDER)[:, None] - start[moving]) / change[moving]
        limits = max(-1.0, float(room.min(axis=0).max())), min(2.0, float(room.max(axis=0).min()))
        return minimise(lambda s: self.distance(start + s * change), 0.5, limits, {0.0: value})

    def _trials(self, searched: Minimum, at_one: Replicates) -> list[Trial]:
        return [
            Trial(
                1 + place,
                float(values[0]),
                float(values[0] - at_one[0]),
                self.measure.standard_error(values - at_one),
            )
            for place, values in sorted(searched.points.items())
        ]

    def _shapes(self) -> np.ndarray:
        """What each parameter adds to lambda(t), [P, T']."""
        t = np.arange(self.steps)
        if self.form == "kb":
            slope = t - t.mean()
            return np.stack([self.ones, slope / max(1.0, slope.max())])
        parts = np.array_split(t, min(self.groups, self.steps))
        return np.stack([np.isin(t, part).astype(float) for part in parts])

    def _refined(
        self, found: dict[str, Any], value: Replicates, at_one: Replicates
    ) -> dict[str, Any]:
        """Gauss-Newton steps from the best constant on, each searched along; the constant stays the
        answer if they do not pay.
        """
        best, shapes, lowest = found["best"], self._shapes(), value
        for _ in range(ROUNDS):
            here = self.rows(best)
            others = [self.rows(best + STEP * shape) for shape in shapes]
            change = self.measure.downhill(here, others, STEP) @ shapes
            size = float(np.abs(change).max())
            if size < STEP / 20:
                break
            change *= min(1.0, 5 * STEP / size)
            along = self._along(best, change, self.measure(here))
            if not along.value[0] < lowest[0]:
                break
            best, lowest = best + float(along.place[0]) * change, along.value
        better = self.gain(value, lowest)
        notes = [*found["notes"], f"over the best constant, lambda(t) gains {better}"]
        if not better.pays:
            notes[-1] += ": less than two standard errors, so the constant is kept"
            return {**found, "notes": notes}
        line = None
        if self.form == "kb":
            k = float((best[-1] - best[0]) / max(1, self.steps - 1))
            line = k, float(best[0])
        gain = self.gain(at_one, lowest)
        return {**found, "best": best, "line": line, "gain": gain, "notes": notes}
