"""lambda(t) for a checkpoint and a sampler: the rules by name.

energy, kid      common_noise: what brings finished images closest to real ones
final_variance   what gives them the variance of real ones
norm, variance   greedy: diagnostics along the chain
quotient         the ES paper's quotient of norm ratios: a diagnostic
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from ..diffusion.process import Network
from ..runs.sample_batch import Sampler
from .common_noise import DISTANCES, by_common_noise
from .final_variance import by_final_variance
from .greedy import step_by_step
from .measure_run import ImagesFor
from .quotient import by_quotient


class Calibrated(Protocol):
    """What every rule returns."""

    @property
    def lambdas(self) -> np.ndarray:
        """lambda(t) to sample with, index 0 = last, clean step."""
        ...

    def content(self) -> dict[str, Any]:
        """What goes into the YAML, but for the settings."""
        ...

    def table(self) -> str:
        """For people."""
        ...


@dataclass(frozen=True)
class Rule:
    """Args:
    find: find(sampler, model, images_for, num_images, batch_size, device, **options).
    worth: one sentence that a user should know.
    options: the keyword arguments of `find`.
    """

    find: Callable[..., Calibrated]
    worth: str
    options: tuple[str, ...] = ()

    @property
    def is_diagnostic(self) -> bool:
        return self.worth.startswith("a diagnostic")


_SEARCH = ("num_chains", "of_all", "form", "groups", "features", "features_name", "store")
_GREEDY = (
    "a diagnostic, not for sampling: what is right for the next x_t is often wrong for the "
    "finished image"
)


RULES = {
    **{
        name: Rule(
            partial(by_common_noise, distance=name),
            f"{title} of finished images to real ones",
            _SEARCH,
        )
        for name, (title, _) in DISTANCES.items()
    },
    "final_variance": Rule(
        by_final_variance, "cheap: tells the sign, sees nothing but the variance", ("num_chains",)
    ),
    "norm": Rule(partial(step_by_step, by="norm"), _GREEDY, ("bracket",)),
    "variance": Rule(partial(step_by_step, by="variance"), _GREEDY, ("bracket",)),
    "quotient": Rule(
        by_quotient, "a diagnostic, not for sampling: the right sign in theory, and far too small"
    ),
}


def calibrate(
    sampler: Sampler,
    model: Network,
    images_for: ImagesFor,
    num_images: int,
    batch_size: int,
    device: torch.device,
    by: str = "energy",
    **options: Any,
) -> Calibrated:
    """Find lambda(t) for this sampler; a collective: processes share the work by number.

    Args:
        sampler: its own lambda(t) is not used.
        images_for: real images and the model_kwargs of their chains, as of MeasureRun.
        by: a name in RULES; options: those of the rule.

    Raises:
        ValueError: an unknown rule, an option that it does not have, or what the rule refuses.
    """
    if by not in RULES:
        raise ValueError(f"--by {by}: allowed are {', '.join(RULES)}")
    rule = RULES[by]
    if unknown := [name for name in options if name not in rule.options]:
        raise ValueError(f"--by {by} has no option {unknown[0]}")
    return rule.find(sampler, model, images_for, num_images, batch_size, device, **options)
