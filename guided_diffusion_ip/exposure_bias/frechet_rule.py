"""The Frechet distance as what calibration goes by: for those whose samples will be judged by it.

It is biased: with n chains it is too large by about c / n. With equal noise the bias is nearly the
same for all lambdas and cancels from their differences, if there are several times as many chains
as features.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..metrics import frechet_distance
from ..metrics.replicates import Replicates, group_of, jackknife_error

_GROUPS = 10  # each costs a distance: D^3 operations


class FrechetDistance:
    """To a set of real images, with replicates as of metrics.replicates.Distance.

    Raises:
        ValueError: fewer than two chains for each feature.
    """

    def __init__(self, real: Tensor, num_chains: int, groups: int, of_all: int = 0) -> None:
        dim = real.shape[1]
        if min(num_chains, len(real)) < 2 * dim:
            raise ValueError(
                f"a Frechet distance of {dim} features needs {2 * dim} chains and real images at "
                f"least, and there are {num_chains} and {len(real)}: give more (--num_chains, "
                "--num_images), or --by energy, which does with hundreds"
            )
        self.groups = (min(groups, _GROUPS),) * 2
        self._left_to_chance = 1 - len(real) / of_all if of_all else 1.0
        self._real = _moments_without_groups(real, self.groups[1])

    def __call__(self, rows: Tensor) -> Replicates:
        """Of the chains with these features [n, D]."""
        chains = _moments_without_groups(rows, self.groups[0])
        found = [frechet_distance(*self._real[0], *moments) for moments in chains]
        found += [frechet_distance(*moments, *chains[0]) for moments in self._real[1:]]
        return np.array(found)

    def standard_error(self, replicates: Replicates) -> float:
        """Of the first entry, with the correction for a finite number of real images."""
        return jackknife_error(replicates, self.groups[0], self._left_to_chance)

    def downhill(self, here: Tensor, others: list[Tensor], step: float) -> np.ndarray:
        raise ValueError("--by fid finds a constant only: leave --form out, or use --by energy")


def _moments_without_groups(rows: Tensor, groups: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean [D] and covariance [D, D] of all rows, and without each group."""
    values = rows.double().cpu().numpy()
    group = group_of(np.arange(len(values)), groups)
    parts = [values, *(values[group != g] for g in range(groups))]
    return [(part.mean(axis=0), np.cov(part.T)) for part in parts]
