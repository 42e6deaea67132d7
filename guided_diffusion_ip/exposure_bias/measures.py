"""The measures of exposure bias, as running sums over images; definitions of Ning et al. 2023 (IP)
and 2024 (ES).

A measure names the walks it wants to watch, adds what it sees to `sums` (float64 arrays whose size
does not depend on the number of images, and that add over batches and processes), and turns sums
over n images into figures. In short:

    figures = measure(["norm", "variance"], sampler, model, batches)

Every array of a result is indexed by t = 0 .. T'-1, the step (of the respaced process, or the noise
level) at which the network is called: 0 is the last, clean step. What concerns the finished image,
after step 0, is called `final`. "Std" and "variance" are over images at each pixel, with n - 1,
then averaged over pixels. A noisy image is x_t = alpha_t x_0 + sigma_t epsilon; for a process
alpha_t^2 = ab_t and sigma_t^2 = 1 - ab_t.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.image_io import to_uint8
from ..diffusion.process import Network
from ..diffusion.solvers.paths import SamplingPath
from ..metrics import frechet_distance
from ..runs.sample_batch import Sampler
from .discretisation import Discretisation
from .sums import Figures, Sums, add_moments, array_of, mean_and_error, variance_of
from .walks import CHAIN, DATA, INPUTS, NOISE_FREE, Batch, Visit, Walk, walk

if TYPE_CHECKING:
    from ..features.space import Features

PUBLISHED_GAMMA = 0.1
_NORMALITY_IMAGES, _NORMALITY_PIXELS, _ALPHA = 50, 256, 0.05


class Space(Protocol):
    """Images uint8 [n, H, W, C] -> features, of which the vectors `pool` [n, D] are compared."""

    def __call__(self, images: np.ndarray, /) -> Features: ...


class Measure(Protocol):
    """What is measured; one of one's own needs no more than these."""

    @property
    def name(self) -> str: ...

    def walks(self, steps: int) -> list[Walk]:
        """What it wants to watch, of a path with so many steps."""
        ...

    def see(self, sums: Sums, visit: Visit) -> None:
        """Add to `sums` what concerns it in a visit, of its own walks or others."""
        ...

    def result(self, sums: Sums, n: int, path: SamplingPath) -> Figures:
        """What the sums over n images come to."""
        ...


@dataclass(frozen=True)
class EpsilonNorm:
    """Measure 1: the mean Frobenius norm of epsilon_theta per image, along training inputs and
    along the chain (ES, Fig. 6).

    `ratio` is of the raw norms; `ratio_published` has the chain's norm divided by lambda(t), as
    published. Standard errors take the two walks as independent.
    """

    name = "norm"

    def walks(self, steps: int) -> list[Walk]:
        return [Walk(INPUTS, steps), Walk(CHAIN, steps)]

    def see(self, sums: Sums, visit: Visit) -> None:
        if visit.walk.kind in (INPUTS, CHAIN):
            norms = visit.prediction.raw_epsilon.flatten(1).double().norm(dim=1)
            add_moments(sums, visit.walk.kind, visit.path.num_steps, visit.t, norms[:, None])

    def result(self, sums: Sums, n: int, path: SamplingPath) -> Figures:
        inputs, inputs_error = mean_and_error(sums, INPUTS, n)
        chain, chain_error = mean_and_error(sums, CHAIN, n)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = chain / inputs
            error = ratio * np.hypot(chain_error / chain, inputs_error / inputs)
        return {
            "inputs": inputs,
            "chain": chain,
            "ratio": ratio,
            "ratio_published": ratio / path.lambdas,
            "ratio_error": error,
        }


@dataclass(frozen=True)
class Delta:
    """Measure 2: delta_t = (std of (x_t - alpha_t x_0) - sigma_t)^2 (ES, Section 3).

    `multi`: in the chain started at q(x_{T'-1} | x_0); `single`: after one step from
    q(x_{t+1} | x_0). Entry T'-1 of both is the start itself. x_0 is the image that the chain
    started from. A stochastic sampler started near pure noise has forgotten it: even a perfect one
    ends at sqrt(2) times the data's std. So compare values between methods, not with 0.
    """

    name = "delta"

    def walks(self, steps: int) -> list[Walk]:
        return [Walk(INPUTS, steps), Walk(DATA, steps)]

    def see(self, sums: Sums, visit: Visit) -> None:
        steps, t = visit.path.num_steps, visit.t
        if visit.walk == Walk(DATA, steps):
            add_moments(sums, "multi", steps, t, self._residual(visit, visit.x, t))
        elif visit.walk.kind == INPUTS:
            if t == steps - 1:
                add_moments(sums, "single", steps, t, self._residual(visit, visit.x, t))
            if t > 0:
                add_moments(
                    sums, "single", steps, t - 1, self._residual(visit, visit.sample, t - 1)
                )

    @staticmethod
    def _residual(visit: Visit, x: Tensor, t: int) -> Tensor:
        return (x.double() - float(visit.path.alphas[t]) * visit.batch.x_start.double()).flatten(1)

    def result(self, sums: Sums, n: int, path: SamplingPath) -> Figures:
        expected = path.sigmas
        stds = {
            kind: np.sqrt(variance_of(sums, kind, n)).mean(axis=1) for kind in ("single", "multi")
        }
        return {
            "expected_std": expected,
            **{f"std_{kind}": std for kind, std in stds.items()},
            **{f"delta_{kind}": (std - expected) ** 2 for kind, std in stds.items()},
        }


@dataclass(frozen=True)
class Variance:
    """Measure 3: Var(x_t) over the samples of the chain against alpha_t^2 Var(x_0) + sigma_t^2.

    A perfect sampler has equality at every t, whatever it remembers; `error` is the difference.
    """

    name = "variance"

    def walks(self, steps: int) -> list[Walk]:
        return [Walk(CHAIN, steps)]

    def see(self, sums: Sums, visit: Visit) -> None:
        steps = visit.path.num_steps
        if visit.walk.kind != CHAIN:
            return
        add_moments(sums, "x", steps + 1, visit.t, visit.x.flatten(1))
        if visit.t == steps - 1:
            add_moments(sums, "real", 1, 0, visit.batch.x_start.flatten(1))
        if visit.t == 0:
            add_moments(sums, "x", steps + 1, steps, visit.sample.flatten(1))

    def result(self, sums: Sums, n: int, path: SamplingPath) -> Figures:
        chain = variance_of(sums, "x", n).mean(axis=1)
        real = float(variance_of(sums, "real", n).mean())
        expected = path.alphas**2 * real + path.sigmas**2
        return {
            "chain": chain[:-1],
            "expected": expected,
            "error": chain[:-1] - expected,
            "final": float(chain[-1]),
            "final_expected": real,
            "final_error": float(chain[-1]) - real,
        }


@dataclass(frozen=True)
class PredictionError:
    """Measure 4: e_t = x_0_hat - x_0 on noised real images: mean, nu_t (its std) and normality (IP,
    Section 5.3).

    lambda does not enter: this is what training sees. `rejected` is the share of pixels for which a
    Shapiro-Wilk test rejects normality at 0.05, from the first 50 images as in the paper, at up to
    256 pixels spread evenly; pixels at which nothing varies are left out (`tested` counts the
    others). `gamma` is nu_t sqrt(ab / (1 - ab)), the epsilon-error that amounts to nu_t; it is
    derived here, the paper argues for a constant.
    """

    name = "prediction"

    def walks(self, steps: int) -> list[Walk]:
        return [Walk(INPUTS, steps)]

    def see(self, sums: Sums, visit: Visit) -> None:
        if visit.walk.kind != INPUTS:
            return
        steps, t, batch = visit.path.num_steps, visit.t, visit.batch
        error = (visit.prediction.raw_x_start.double() - batch.x_start.double()).flatten(1)
        add_moments(sums, "error", steps, t, error)
        pixels = np.unique(np.linspace(0, error.shape[1] - 1, _NORMALITY_PIXELS).astype(int))
        rows = array_of(sums, "rows", (steps, _NORMALITY_IMAGES, len(pixels)))
        for number, row in zip(batch.index, error[:, pixels].cpu().numpy()):
            if number < _NORMALITY_IMAGES:
                rows[t, number] += row

    def result(self, sums: Sums, n: int, path: SamplingPath) -> Figures:
        snr_root = path.alphas / path.sigmas
        nu = np.sqrt(variance_of(sums, "error", n)).mean(axis=1)
        rejected, tested = zip(
            *(_rejected(rows[: min(n, _NORMALITY_IMAGES)]) for rows in sums["rows"])
        )
        return {
            "mean": sums["error_1"].mean(axis=1) / n,
            "nu": nu,
            "gamma": nu * snr_root,
            "rejected": np.array(rejected),
            "tested": np.array(tested),
            "published_gamma": PUBLISHED_GAMMA,
        }


def _rejected(rows: np.ndarray) -> tuple[float, int]:
    """Share of the columns of [images, pixels] that are not normal, of those that vary, and how
    many these are.
    """
    rows = rows[:, np.ptp(rows, axis=0) > 1e-12]
    if len(rows) < 3 or rows.shape[1] == 0:
        return float("nan"), 0
    try:
        from scipy.stats import shapiro
    except ImportError:
        raise ValueError(
            "the measure 'prediction' tests for normality with scipy, which is not installed: "
            "pip install -e '.[plots]', or leave 'prediction' out of --measures"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns with hardly any range
        values = [shapiro(column).pvalue for column in rows.T]
    return float(np.mean(np.array(values) < _ALPHA)), rows.shape[1]


@dataclass(frozen=True)
class Accumulation:
    """Measure 5: what K steps from q(x_{K-1} | x_0) do to real images (IP, Table 1 and Fig. 5).

    `frechet` [K]: distance between the images that come out and the n real ones, in a feature space
    (uint8 [n, H, W, C] -> .pool [n, D]). `noise_free` [K, T']: mean |x_0_hat - x_0| along the chain
    without noise (0 where there is no step); `noise_free_final` [K]: at its end. Sums of products
    of features are kept, D x D for each K: D up to a few thousand.
    """

    lengths: tuple[int, ...]
    space: Space
    name = "accumulation"

    def walks(self, steps: int) -> list[Walk]:
        if not self.lengths or min(self.lengths) < 1 or max(self.lengths) > steps:
            raise ValueError(
                f"error accumulation over {list(self.lengths)} steps: give numbers from 1 to "
                f"{steps}, the number of steps of this process (--accumulation_steps)"
            )
        return [Walk(kind, k) for k in self.lengths for kind in (DATA, NOISE_FREE)]

    def see(self, sums: Sums, visit: Visit) -> None:
        if visit.walk.kind not in (DATA, NOISE_FREE) or visit.walk.length not in self.lengths:
            return
        row, count = self.lengths.index(visit.walk.length), len(self.lengths)
        if visit.walk.kind == NOISE_FREE:
            error = (
                (visit.prediction.x_start.double() - visit.batch.x_start.double())
                .abs()
                .flatten(1)
                .mean(dim=1)
                .sum()
            )
            array_of(sums, "noise_free", (count, visit.path.num_steps))[row, visit.t] += float(
                error
            )
        elif visit.t == 0:
            self._add_features(sums, count + 1, row, visit.sample)
            if row == 0:
                self._add_features(sums, count + 1, count, visit.batch.x_start)

    def _add_features(self, sums: Sums, count: int, row: int, images: Tensor) -> None:
        features = self.space(to_uint8(images).cpu().numpy()).pool.double().cpu().numpy()  # [n, D]
        array_of(sums, "features_1", (count, features.shape[1]))[row] += features.sum(axis=0)
        array_of(sums, "features_2", (count, features.shape[1], features.shape[1]))[row] += (
            features.T @ features
        )

    def result(self, sums: Sums, n: int, path: SamplingPath) -> Figures:
        means = sums["features_1"] / n
        covs = [
            (square - n * np.outer(mean, mean)) / (n - 1)
            for square, mean in zip(sums["features_2"], means)
        ]
        frechet = [
            frechet_distance(means[-1], covs[-1], mean, cov)
            for mean, cov in zip(means[:-1], covs[:-1])
        ]
        noise_free = sums["noise_free"] / n
        return {
            "steps": np.array(self.lengths),
            "frechet": np.array(frechet),
            "noise_free": noise_free,
            "noise_free_final": noise_free[:, 0],
            "features": getattr(self.space, "name", "given"),
        }


PLAIN: dict[str, Callable[[], Measure]] = {
    kind.name: kind for kind in (EpsilonNorm, Delta, Variance, PredictionError, Discretisation)
}
NAMES = (*PLAIN, Accumulation.name)


def create_measures(
    names: Sequence[str], lengths: Sequence[int] = (), space: Space | None = None
) -> list[Measure]:
    """The measures called so; lengths (the K) and space are those of `accumulation`.

    Raises:
        ValueError: a name that there is not.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(
            f"{unknown[0] + ' is no measure' if unknown else 'no measure asked for'}; "
            f"allowed: {', '.join(NAMES)}, separated by commas (--measures)"
        )
    if Accumulation.name in names and space is None:
        raise ValueError(
            "the measure 'accumulation' compares images in a feature space, and none is given "
            "(--features)"
        )
    made: list[Measure] = []
    for name in dict.fromkeys(names):
        if name in PLAIN:
            made.append(PLAIN[name]())
        elif space is not None:
            made.append(Accumulation(tuple(lengths), space))
    return made


def walks_of(measures: Sequence[Measure], steps: int) -> list[Walk]:
    """Every walk that one of them wants, once."""
    return list(dict.fromkeys(path for measure in measures for path in measure.walks(steps)))


@torch.no_grad()
def observe(
    measures: Sequence[Measure],
    sampler: Sampler,
    model: Network,
    batch: Batch,
    sums: dict[str, Sums],
    tick: Callable[[int], object] = lambda images: None,
) -> None:
    """Add one batch to the sums {measure: {name: array}}. `tick` is told of the images of each
    network call.
    """
    for measure in measures:
        sums.setdefault(measure.name, {})
    for kind in walks_of(measures, sampler.num_steps):
        for visit in walk(kind, sampler, model, batch):
            for measure in measures:
                measure.see(sums[measure.name], visit)
            tick(len(batch.index))


def figures_of(
    measures: Sequence[Measure], sums: dict[str, Sums], n: int, path: SamplingPath
) -> dict[str, Figures]:
    """What the sums over n images come to.

    Raises:
        ValueError: fewer than two images, or values that are not finite.
    """
    if n < 2:
        raise ValueError(
            f"{n} image is too few for a spread over images: give --num_images 2 or more, better "
            "hundreds"
        )
    for measure in measures:
        for name, array in sums[measure.name].items():
            if not np.isfinite(array).all():
                raise ValueError(
                    f"the measure {measure.name!r} met values that are not finite ({name}): the "
                    "model has diverged, or overflows in half precision (try --use_fp16 False)"
                )
    return {measure.name: measure.result(sums[measure.name], n, path) for measure in measures}


def measure(
    names: Sequence[str],
    sampler: Sampler,
    model: Network,
    batches: Iterable[Batch],
    lengths: Sequence[int] = (),
    space: Space | None = None,
) -> dict[str, Figures]:
    """{name: figures} over all batches, in this process; the pure function behind
    scripts/exposure_bias.py.
    """
    measures, n = create_measures(names, lengths, space), 0
    sums: dict[str, Sums] = {}
    for batch in batches:
        observe(measures, sampler, model, batch, sums)
        n += len(batch.index)
    return figures_of(measures, sums, n, sampler.bind(model))
