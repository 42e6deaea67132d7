"""Grids of samples during training, always from the same noise, so that they can be compared."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dist_util
from ..data.image_io import save_grid, to_uint8
from ..generation.sample_batch import Sampler, draw_labels


@dataclass(frozen=True)
class Preview:
    """Called as preview(network, step): writes out_dir/samples_NNNNNN.png. A collective: the ranks share the work.

    Args:
        sampler: its process is respaced, or this takes long.
        class_ids: the classes to show; None for an unconditional network.
        kwargs_for: all model_kwargs of the pictures numbered [n] (low_res, y, ...) instead of drawn classes; the numbers
            may exceed `count` by less than the number of ranks.
    """

    sampler: Sampler
    count: int
    out_dir: str
    batch_size: int
    class_ids: list[int] | None = None
    kwargs_for: Callable[[list[int]], dict[str, Tensor]] | None = None

    def __call__(self, model: Callable[..., Tensor], step: int) -> str:
        """Returns the path of the picture."""
        world, device = dist_util.get_world_size(), dist_util.dev()
        share = -(-self.count // world)  # equal on all ranks; the few too many are cut off below
        mine = range(dist_util.get_rank() * share, (dist_util.get_rank() + 1) * share)
        parts = []
        for start in range(0, share, self.batch_size):
            index = list(mine[start: start + self.batch_size])
            kwargs = {name: value.to(device) for name, value in self._kwargs(index).items()}
            parts.append(to_uint8(self.sampler(model, index, kwargs, device)))
        images = dist_util.all_gather_tensor(torch.cat(parts))[: self.count]
        path = os.path.join(self.out_dir, f"samples_{step:06d}.png")
        if dist_util.is_main():
            save_grid(images.cpu().numpy(), path)
        return path

    def _kwargs(self, index: list[int]) -> dict[str, Tensor]:
        if self.kwargs_for is not None:
            return self.kwargs_for(index)
        return {} if self.class_ids is None else {"y": draw_labels(self.sampler.seed, index, self.class_ids)}
