"""Unbiased distances between finished images and real ones, with errors by leaving out groups.

The squared maximum mean discrepancy of two sets, for a kernel k,

    D = E k(x, x') + E k(y, y') - 2 E k(x, y),

over pairs of different images (Gretton et al. 2012, Eq. 3), has no bias: 0 on average if the sets
have one distribution, for any number of images, where a Frechet distance has a floor that falls
with their number. With k = -|x - y| it is the energy distance (Szekely & Rizzo 2013), with
k = (x.y / D + 1)^3 the kernel distance that KID averages over subsets.

Every distance is an array of replicates: from all images, then with each group of chains left out,
then with each group of real images left out. A function of several distances that is computed
replicate by replicate thereby has a jackknife error, which counts what they have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ENTRIES = 2**22  # of a double precision copy at a time: 32 MB
Replicates = np.ndarray  # float64 [1 + groups of chains + groups of real images]


@dataclass(frozen=True)
class Kernel:
    """A kernel as a function of x.y, |x|^2, |y|^2 (which broadcast to [n, m]) and D."""

    title: str
    of: Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _minus_distance(dots: Tensor, x_squares: Tensor, y_squares: Tensor, dim: int) -> Tensor:
    return -(x_squares + y_squares - 2 * dots).clamp_(min=0).sqrt_()


def _cubic(dots: Tensor, x_squares: Tensor, y_squares: Tensor, dim: int) -> Tensor:
    return (dots / dim).add_(1).pow_(3)


KERNELS = {
    "energy": Kernel("energy distance", _minus_distance),
    "kid": Kernel("kernel distance (KID's)", _cubic),
}


@dataclass(frozen=True)
class PairSums:
    """Sums of k over pairs, and how many pairs, by the groups of the two images: [G, H] each."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())

    def without_rows(self) -> np.ndarray:
        """The mean without each group of the first set, [G]."""
        sums, counts = (part.sum() - part.sum(axis=1) for part in (self.sums, self.counts))
        return sums / counts

    def without_columns(self) -> np.ndarray:
        """The mean without each group of the second set, [H]."""
        return PairSums(self.sums.T, self.counts.T).without_rows()

    def without_both(self) -> np.ndarray:
        """The mean without each group of a set that is compared with itself, [G]."""
        sums, counts = (
            part.sum() - part.sum(axis=1) - part.sum(axis=0) + np.diag(part)
            for part in (self.sums, self.counts)
        )
        return sums / counts


def group_of(index: np.ndarray, groups: int) -> np.ndarray:
    """The group of each image: neighbours, which may be of one class, are in different ones."""
    return index % groups


def pair_sums(
    kernel: Kernel, x: Tensor, y: Tensor, groups: tuple[int, int], paired: bool = False
) -> PairSums:
    """Over x [n, D] and y [m, D], float32.

    Args:
        groups: into how many groups each set is divided.
        paired: row i of both is one chain (or one image): such pairs are left out.
    """
    y_groups = torch.from_numpy(group_of(np.arange(len(y)), groups[1])).to(y.device)
    x_squares, y_squares = (_squares(rows) for rows in (x, y))
    sums = np.empty(groups)
    for g in range(groups[0]):
        rows = torch.arange(g, len(x), groups[0], device=x.device)
        values = kernel.of(_dots(x[rows], y), x_squares[rows, None], y_squares[None, :], x.shape[1])
        if paired:
            values[torch.arange(len(rows), device=x.device), rows] = 0
        columns = torch.zeros(groups[1], dtype=torch.float64, device=x.device)
        sums[g] = columns.index_add_(0, y_groups, values.sum(dim=0)).cpu().numpy()
    sizes = [
        np.bincount(group_of(np.arange(len(rows)), count), minlength=count)
        for rows, count in ((x, groups[0]), (y, groups[1]))
    ]
    counts = np.outer(*sizes).astype(np.float64)
    if paired:
        counts -= np.diag(sizes[0])
    return PairSums(sums, counts)


def _squares(rows: Tensor) -> Tensor:
    """|x|^2 of each row, float64."""
    step = max(1, _ENTRIES // rows.shape[1])
    return torch.cat([part.double().square().sum(dim=1) for part in rows.split(step)])


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """x . y in float64, [n, m], without a double precision copy of all of both."""
    dots = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    step = max(1, _ENTRIES // (len(x) + len(y)))
    for a, b in zip(x.split(step, dim=1), y.split(step, dim=1)):
        dots += a.double() @ b.double().T
    return dots


def jackknife_error(replicates: Replicates, chains: int, left_to_chance: float) -> float:
    """Of the first entry: delete-a-group jackknife (Efron & Tibshirani 1993, chapter 11).

    Args:
        chains: so many entries after the first are without a group of chains, the others without a
            group of real images; the two parts are independent.
        left_to_chance: factor on the variance of the latter.
    """
    parts = replicates[1 : 1 + chains], replicates[1 + chains :]
    of_chains, of_real = ((len(part) - 1) * part.var() for part in parts)
    return float(np.sqrt(of_chains + left_to_chance * of_real))


class Distance:
    """To a set of real images, of sets of chains that have equal noise.

    Args:
        real: features [m, D], float32.
        num_chains: in each set; chain i is row i.
        groups: into how many groups the chains, and the real images, are divided.
        of_all: the real images are some of so many, which are what is to be matched: all of them
            leave nothing to chance. 0: of infinitely many.
    """

    def __init__(
        self, kernel: Kernel, real: Tensor, num_chains: int, groups: int, of_all: int = 0
    ) -> None:
        self.kernel, self.real = kernel, real
        self._left_to_chance = 1 - len(real) / of_all if of_all else 1.0
        self.groups = (min(groups, num_chains // 2), min(groups, len(real) // 2))
        within = pair_sums(kernel, real, real, (self.groups[1],) * 2, paired=True)
        self._real_mean, self._real_without = within.mean, within.without_both()

    def __call__(self, rows: Tensor) -> Replicates:
        """D of the chains with these features [n, D]."""
        own = pair_sums(self.kernel, rows, rows, (self.groups[0],) * 2, paired=True)
        cross = pair_sums(self.kernel, rows, self.real, self.groups)
        return np.concatenate(
            [
                [own.mean + self._real_mean - 2 * cross.mean],
                own.without_both() + self._real_mean - 2 * cross.without_rows(),
                own.mean + self._real_without - 2 * cross.without_columns(),
            ]
        )

    def of_chains(self, rows: Tensor, groups: int) -> np.ndarray:
        """D of all rows [n, D], and without each of so many groups of them, [1 + groups]."""
        own = pair_sums(self.kernel, rows, rows, (groups, groups), paired=True)
        cross = pair_sums(self.kernel, rows, self.real, (groups, 1))
        whole = own.mean + self._real_mean - 2 * cross.mean
        without = own.without_both() + self._real_mean - 2 * cross.without_rows()
        return np.append(whole, without)

    def standard_error(self, replicates: Replicates) -> float:
        """Of the first entry, with the correction for a finite number of real images."""
        return jackknife_error(replicates, self.groups[0], self._left_to_chance)

    def downhill(self, here: Tensor, others: list[Tensor], step: float) -> np.ndarray:
        """A Gauss-Newton step [P] of P parameters: D is the squared length of what separates the
        means of two sets in the kernel's space, and that moves about linearly.

        Args:
            here: features of the chains at the current parameters.
            others: the same with one parameter after another raised by `step`.
        """

        def mean(x: Tensor, y: Tensor) -> float:
            return pair_sums(self.kernel, x, y, (1, 1), paired=True).mean

        def to_real(x: Tensor) -> float:
            return pair_sums(self.kernel, x, self.real, (1, 1)).mean

        own, own_real = mean(here, here), to_real(here)
        with_here = np.array([mean(rows, here) for rows in others])
        slope = np.array(
            [with_here[j] - own - to_real(rows) + own_real for j, rows in enumerate(others)]
        )
        curvature = np.array(
            [
                [mean(a, b) - with_here[i] - with_here[j] + own for j, b in enumerate(others)]
                for i, a in enumerate(others)
            ]
        )
        # Directions in which nothing moves beyond the noise are left alone.
        curvature += 1e-3 * np.trace(curvature) / len(others) * np.eye(len(others))
        return -step * np.linalg.solve(curvature, slope)
