"""How much of the norm's ratio is the sampler's finite steps, and how much is left.

N(t) - 1, the excess of epsilon's norm in the chain over training inputs, contains two errors:
exposure bias (the network meets inputs that its own errors have made) and discretisation (finite
steps miss the distribution even with an exact network). The second falls like 1 / T' at equal noise
level. With a step more between any two it is half as large, so that the line through both,

    N_inf(t) = 2 N_{2T'-1}(t) - N_{T'}(t),

is free of it to first order: what is left is exposure bias, the higher orders, and noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..diffusion.solvers.paths import SamplingPath
from .sums import Figures, Sums, add_moments, mean_and_error
from .walks import CHAIN, FINER, INPUTS, Visit, Walk


@dataclass(frozen=True)
class Discretisation:
    """What it finds, at each level t:

    ratio: N(t), and ratio_error. ratio_finer: N there with 2 T' - 1 steps.
    extrapolated: N_inf(t). extrapolated_error: its standard error if the two chains were
        independent, which is too much: where they have the same levels they have the same noise.
    share: of N - 1, how much the extrapolation removes.
    """

    name = "discretisation"

    def walks(self, steps: int) -> list[Walk]:
        return [Walk(INPUTS, steps), Walk(CHAIN, steps), Walk(FINER, 2 * steps - 1)]

    def see(self, sums: Sums, visit: Visit) -> None:
        kind, t = visit.walk.kind, visit.t
        if kind not in (INPUTS, CHAIN, FINER) or (kind == FINER and t % 2):
            return
        steps = visit.path.num_steps if kind != FINER else (visit.path.num_steps + 1) // 2
        norms = visit.prediction.raw_epsilon.flatten(1).double().norm(dim=1)
        add_moments(sums, kind, steps, t // 2 if kind == FINER else t, norms[:, None])

    def result(self, sums: Sums, n: int, path: SamplingPath) -> Figures:
        means, errors = {}, {}
        for kind in (INPUTS, CHAIN, FINER):
            means[kind], errors[kind] = mean_and_error(sums, kind, n)
        inputs = means[INPUTS]
        ratio, finer = means[CHAIN] / inputs, means[FINER] / inputs
        extrapolated = 2 * finer - ratio
        chains = np.hypot(2 * errors[FINER], errors[CHAIN]) / inputs
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (ratio - extrapolated) / (ratio - 1)
        return {
            "ratio": ratio,
            "ratio_error": np.hypot(errors[CHAIN] / inputs, ratio * errors[INPUTS] / inputs),
            "ratio_finer": finer,
            "extrapolated": extrapolated,
            "extrapolated_error": np.hypot(chains, extrapolated * errors[INPUTS] / inputs),
            "share": share,
        }
