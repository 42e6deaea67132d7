"""Grids of samples during training, always from the same noise, so that they can be compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import dist_util, logger
from ..data.image_io import save_grid
from ..runs.sample_batch import ImagesWithNaN, Sampler, captions, draw_images, draw_labels


@dataclass(frozen=True)
class Preview:
    """A hook, called as preview(network, step): writes out_dir/samples_NNNNNN.png, and the path to
    the log. A collective: the ranks share the work.

    Args:
        sampler: its process is respaced, or this takes long.
        kwargs_for: model_kwargs (y, low_res, ...) of the pictures numbered [n].
        class_names: of the labels y, to be printed below the pictures.
    """

    sampler: Sampler
    count: int
    out_dir: str
    batch_size: int
    kwargs_for: Callable[[list[int]], dict[str, Tensor]] = lambda index: {}
    class_names: Sequence[str] = ()

    def __call__(self, model: Callable[..., Tensor], step: int) -> dict[str, float]:
        """Returns {}. If there is no picture, that is no reason for training to end: the log says
        why.
        """
        path = os.path.join(self.out_dir, f"samples_{step:06d}.png")
        try:
            images = draw_images(self.sampler, model, self.count, self.batch_size, self.kwargs_for)
        except ImagesWithNaN as error:  # on all ranks alike
            return _no_picture(step, error)
        try:
            if dist_util.is_main():
                labels = self.kwargs_for(list(range(self.count))).get("y")
                names = None if labels is None else captions(labels.tolist(), self.class_names)
                save_grid(images, path, captions=names)
        except OSError as error:  # on rank 0; nobody waits for it
            return _no_picture(step, error)
        logger.log(f"step {step}: samples in {path}")
        return {}


def _no_picture(step: int, why: Exception) -> dict[str, float]:
    logger.log(f"warning: step {step}: no picture of samples: {why}; training goes on")
    return {}


def drawn_classes(seed: int, classes: int) -> Callable[[list[int]], dict[str, Tensor]]:
    """A kwargs_for: the class of each image, drawn from 0 .. classes - 1 by (seed, image number);
    {} if there are none.
    """
    return lambda index: {"y": draw_labels(seed, index, range(classes))} if classes else {}
