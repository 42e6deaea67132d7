"""What a classifier for guidance learns: log p(y | x_t), by cross entropy on noised images
(Dhariwal & Nichol 2021, Sec. 4).

The objective goes into TrainLoop, the validation among its hooks; both report accuracy by quartile
of t too, since a classifier sees a clean digit in q0 and little but noise in q3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dist_util, noise
from ..data.image_datasets import ImageStream
from ..diffusion.process import NoisingProcess
from ..noise import Stream
from .loss_statistics import LossStatistics
from .timestep_samplers import ScheduleSampler, UniformSampler

TOP = (1, 5)
# Validation draws from the same streams as training, at positions that no training batch has.
_VALIDATION_POSITION = 1 << 31


@dataclass(frozen=True)
class ClassifierObjective:
    """Called by TrainLoop; see Objective.

    Args:
        diffusion: gives x_t, and t in the form in which guidance will hand it to the classifier.
        noised: train on x_t; otherwise on clean images, for which CleanSampler draws t = 0.
    """

    diffusion: NoisingProcess
    noised: bool = True

    def __call__(
        self,
        model: Callable[..., Tensor],
        images: Tensor,
        t: Tensor,
        cond: dict[str, Tensor],
        epsilon: Tensor,
        xi: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """{"loss": -log p(y | x_t), "acc@1", "acc@5": 1 where y is among the best 1 or 5 logits,
        else 0}, float32 [N] each.

        gamma, and hence xi, has no part in this: guidance shows the classifier the chain's own x_t.
        """
        x_t = self.diffusion.q_sample(images, t, epsilon) if self.noised else images
        logits = model(x_t, self.diffusion._scale_timesteps(t)).float()
        y = cond["y"]
        return {
            "loss": F.cross_entropy(logits, y, reduction="none"),
            **{f"acc@{k}": in_top_k(logits.detach(), y, k) for k in TOP},
        }


def in_top_k(logits: Tensor, y: Tensor, k: int) -> Tensor:
    """1 where the label y, int64 [N], is among the k largest of logits [N, classes], else 0;
    float32 [N].
    """
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == y[:, None]).any(dim=1).float()


class CleanSampler(ScheduleSampler):
    """t = 0 for every image, with weight 1: training on clean images."""

    def sample(
        self, batch_size: int, device: torch.device | str, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros(batch_size, dtype=torch.int64, device=device), torch.ones(
            batch_size, device=device
        )


def require_same_classes(data: ImageStream, val_data: ImageStream) -> None:
    """Label k must mean the same in both sets; the validation set may lack the last classes.

    Raises:
        ValueError: it does not; names the first class that differs.
    """
    classes = data.classes or []
    for k, name in enumerate(val_data.classes or []):
        there = classes[k] if k < len(classes) else "absent"
        if name != there:
            raise ValueError(
                f"--val_data_dir has other classes than --data_dir: class {k} is {name!r} in "
                f"{val_data.source} and {there!r} in {data.source}; label k must mean the same in "
                "both"
            )


@dataclass(frozen=True)
class Validation:
    """A hook, called as validation(network, step): means over the next batch of other images, as
    {"val_loss", "val_acc@1", ...}.

    t is uniform (0 if the objective takes clean images), whatever training prefers; t and epsilon
    depend on (seed, step, position in the global batch). A collective.

    Args:
        interval: steps between calls. Batch number k belongs to step k * interval, so that a
            continued run sees the same.
        microbatch: images per forward pass.
    """

    objective: ClassifierObjective
    data: ImageStream
    interval: int
    microbatch: int
    seed: int = 0

    def __call__(self, model: Callable[..., Tensor], step: int) -> dict[str, float]:
        number = step // self.interval - 1
        if self.data.step != number:
            self.data.seek(number)
        images, cond = next(self.data)
        n, device, process = len(images), dist_util.dev(), self.objective.diffusion
        first = _VALIDATION_POSITION + dist_util.get_rank() * n
        position = range(first, first + n)
        sampler = UniformSampler(process) if self.objective.noised else CleanSampler()
        t, weights = sampler.sample(
            n, device, noise.uniform(self.seed, Stream.TIMESTEP, position, step, device=device)
        )
        statistics = LossStatistics(process.num_timesteps)
        for start in range(0, n, self.microbatch):
            part = slice(start, start + self.microbatch)
            epsilon = noise.normal(
                self.seed, Stream.EPSILON, position[part], step, images.shape[1:], device
            )
            here = {name: value[part].to(device) for name, value in cond.items()}
            losses = self.objective(model, images[part].to(device), t[part], here, epsilon)
            statistics.add(t[part], losses, weights[part])
        return {f"val_{name}": value for name, value in statistics.reduce().items()}
