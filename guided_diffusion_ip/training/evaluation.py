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
from ..data.image_set import ImageSet, in_memory, open_images
from ..evaluation.evaluate import evaluate, parse_metrics, unavailable
from ..evaluation.reference import has_images, has_statistics, read_statistics
from ..evaluation.set_features import SetFeatures, extract
from ..features.spaces import FeatureSpace, open_features
from ..runs.sample_batch import ImagesWithNaN, Sampler, SigmaSampler, draw_images

_MOST_REFERENCE_IMAGES = 50_000  # as in published tables


class Evaluation:
    """Called as evaluation(network, step): {"fid@1000": ...}, the same on all ranks; {} if samples
    have a NaN. A collective.

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
        self._stored = (
            read_statistics(reference, space, image_shape) if has_statistics(reference) else None
        )
        self._images: ImageSet | None = (
            open_images(reference, "--eval_ref", image_shape[:2]) if has_images(reference) else None
        )
        if self._images is not None and self._images.n > _MOST_REFERENCE_IMAGES:
            self._images = self._images.subset(
                np.arange(_MOST_REFERENCE_IMAGES) * self._images.n // _MOST_REFERENCE_IMAGES
            )
        self._known: SetFeatures | None = None

    def __call__(self, model: Callable[..., Tensor], step: int) -> dict[str, float]:
        keep = any(name in self.metrics for name in ("prec", "recall", "kid"))
        if self._known is None and self._images is not None and (keep or self._stored is None):
            self._known = extract(
                self._images,
                self.space,
                batch_size=self.batch_size,
                keep_rows=keep,
                what="reference",
                spatial="sfid" in self.metrics,
            )
        try:
            images = draw_images(self.sampler, model, self.count, self.batch_size, self.kwargs_for)
        except ImagesWithNaN as error:
            self._say(f"warning: step {step}: not evaluated: {error}; training goes on")
            return {}
        result = evaluate(
            self._known,
            self._stored,
            in_memory(images),
            self.space,
            metrics=self.metrics,
            batch_size=self.batch_size,
            say=lambda text: None,
        )
        numbers = {f"{name}@{self.count}": metric.value for name, metric in result.metrics.items()}
        self._say(
            f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        )
        return numbers


def make_evaluation(
    cfg: Any, sampler: Sampler | SigmaSampler, kwargs_for: Callable[[list[int]], dict[str, Tensor]]
) -> Evaluation:
    """What the --eval_... flags describe."""
    space = open_features(
        cfg.eval_features,
        device=dist_util.dev(),
        inception_weights=cfg.inception_weights,
        log=logger.log,
    )
    channels, height, width = sampler.image_shape
    return Evaluation(
        sampler,
        cfg.eval_samples,
        cfg.eval_ref or cfg.data_dir,
        space,
        cfg.eval_metrics,
        image_shape=(height, width, channels),
        batch_size=cfg.batch_size,
        kwargs_for=kwargs_for,
        say=logger.log,
    )
