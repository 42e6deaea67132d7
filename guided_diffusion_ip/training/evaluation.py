"""Metrics while training: samples from the averaged weights, always from the same noise, against a
reference.

Fewer images than a paper's 50,000 make FID larger: FID@n compares only with FID@n. Its use is that
a rising curve is seen early.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from .. import dist_util, logger
from ..data.image_set import in_memory, open_images
from ..evaluation.compare import Reference, compare, unavailable
from ..evaluation.reference import has_images, has_statistics, read_statistics
from ..features.spaces import FeatureSpace, open_features
from ..metrics.registry import parse_metrics
from ..runs.sample_batch import ImagesWithNaN, Sampler, draw_images

_MOST_REFERENCE_IMAGES = 50_000  # as in published tables


class Evaluation:
    """A hook, called as evaluation(network, step): {"fid@1000": ...}, the same on all ranks; {} if
    samples have a NaN. A collective.

    The reference is measured once, in the first call.

    Args:
        sampler: its process is respaced, or this takes long.
        count: samples.
        reference: path of a reference (images, statistics or both), or of training images.
        image_shape: (H, W, C) of samples; images of a folder or zip are brought to it as in
            training.
        kwargs_for: model_kwargs (y, low_res, ...) of the samples numbered [n].

    Raises:
        ValueError: nothing usable at `reference`, or metrics that it or the features do not allow.
    """

    def __init__(
        self,
        sampler: Sampler,
        count: int,
        reference: str,
        space: FeatureSpace,
        metrics: str,
        *,
        image_shape: tuple[int, int, int],
        batch_size: int,
        kwargs_for: Callable[[list[int]], dict[str, Tensor]],
        say: Callable[[str], Any] = print,
    ) -> None:
        self.sampler, self.count, self.space, self.batch_size, self._say = (
            sampler,
            count,
            space,
            batch_size,
            say,
        )
        self.metrics, self.kwargs_for = parse_metrics(metrics), kwargs_for
        for name in self.metrics:
            if why := unavailable(name, space, has_images(reference)):
                raise ValueError(f"--eval_metrics {name} cannot be had: {why}")
        # A size that the features do not take is an error now, not at the first evaluation.
        space(np.zeros((1, *image_shape), np.uint8))
        self._reference = _open_reference(reference, space, image_shape)

    def __call__(self, model: Callable[..., Tensor], step: int) -> dict[str, float]:
        self._reference = self._reference.measured(self.metrics, self.space, self.batch_size)
        try:
            images = draw_images(self.sampler, model, self.count, self.batch_size, self.kwargs_for)
        except ImagesWithNaN as error:
            self._say(f"warning: step {step}: not evaluated: {error}; training goes on")
            return {}
        result = compare(
            self._reference,
            in_memory(images),
            self.space,
            self.metrics,
            batch_size=self.batch_size,
            say=lambda text: None,
        )
        numbers = {f"{name}@{self.count}": metric.value for name, metric in result.metrics.items()}
        self._say(
            f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        )
        return numbers


def _open_reference(path: str, space: FeatureSpace, image_shape: tuple[int, int, int]) -> Reference:
    stored = read_statistics(path, space, image_shape) if has_statistics(path) else None
    if not has_images(path):
        return Reference(stored=stored)
    images = open_images(path, "--eval_ref", image_shape[:2])
    if images.n > _MOST_REFERENCE_IMAGES:
        index = np.arange(_MOST_REFERENCE_IMAGES) * images.n // _MOST_REFERENCE_IMAGES
        images = images.subset(index)
    return Reference(images, stored)


def make_evaluation(
    sampler: Sampler,
    kwargs_for: Callable[[list[int]], dict[str, Tensor]],
    *,
    count: int,
    reference: str,
    features: str,
    metrics: str,
    batch_size: int,
    inception_weights: str = "",
) -> Evaluation:
    """An Evaluation whose features are named (inception, pixels, or a FILE.onnx) and that reports
    to the log; the other arguments are Evaluation's.
    """
    space = open_features(
        features, device=dist_util.dev(), inception_weights=inception_weights, log=logger.log
    )
    channels, height, width = sampler.image_shape
    return Evaluation(
        sampler,
        count,
        reference,
        space,
        metrics,
        image_shape=(height, width, channels),
        batch_size=batch_size,
        kwargs_for=kwargs_for,
        say=logger.log,
    )
