"""A diagnostic: the ES paper's quotient of norm ratios, lambda(t) = N(t) / N(t + 1).

N(t) is the mean norm of epsilon_theta in the chain over that on training inputs (measure 1). The
quotient says by how much the ratio grows in one step; it has the right sign in theory, and is 5 to
10 times too small (docs/exposure_bias.md): it motivates epsilon scaling, it does not calibrate it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..diffusion.process import Network
from ..runs.sample_batch import Sampler
from .chains import share
from .greedy import over_ranks
from .measure_run import ImagesFor
from .measures import EpsilonNorm, Sums, figures_of, observe
from .walks import Batch


@dataclass(frozen=True)
class Quotient:
    """ratio: N(t), and its standard error; index 0 = last, clean step."""

    ratio: np.ndarray
    ratio_error: np.ndarray

    @property
    def lambdas(self) -> np.ndarray:
        """1 at the noisiest step, which has no noisier one; at t = 0, where N is that of the last
        call and jumps, the quotient of t = 1.
        """
        quotient = np.append(self.ratio[:-1] / self.ratio[1:], 1.0)
        if len(quotient) > 1:
            quotient[0] = quotient[1]
        return quotient

    def content(self) -> dict[str, Any]:
        """What goes into the YAML; see lambda_file for the keys that samplers read."""
        return {
            "steps": len(self.ratio),
            "use": "lambda",
            "lambda": [round(float(value), 6) for value in self.lambdas],
            "ratio": [round(float(value), 6) for value in self.ratio],
            "ratio_error": [round(float(value), 6) for value in self.ratio_error],
        }

    def table(self) -> str:
        """A line per step, noisy end first."""
        lines = ["   t      N(t)     error    lambda"]
        rows = list(enumerate(zip(self.ratio, self.ratio_error, self.lambdas)))
        lines += [f"{t:4d}  {n:8.5f}  {e:8.5f}  {lam:.5f}" for t, (n, e, lam) in reversed(rows)]
        return "\n".join(lines)


@torch.no_grad()
def by_quotient(
    sampler: Sampler,
    model: Network,
    images_for: ImagesFor,
    num_images: int,
    batch_size: int,
    device: torch.device,
) -> Quotient:
    """Measure N(t) and form the quotients; a collective."""
    measure, sums = EpsilonNorm(), dict[str, Sums]()
    mine = list(share(num_images))
    for first in range(0, len(mine), batch_size):
        index = mine[first : first + batch_size]
        images, cond = images_for(index)
        on_device = {name: value.to(device) for name, value in cond.items()}
        observe([measure], sampler, model, Batch(index, images.to(device), on_device), sums)
    summed = {measure.name: {key: over_ranks(part) for key, part in sums[measure.name].items()}}
    path = sampler.bind(model, device=device)
    found = figures_of([measure], summed, num_images, path)[measure.name]
    return Quotient(found["ratio"], found["ratio_error"])
