"""Images -> a file with their statistics: what evaluations/make_reference.py runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import dist_util
from ..data.image_set import Images
from ..data.npz_io import NpzWriter
from ..features.space import FeatureSpace
from ..metrics.entry import MOMENTS, SPATIAL_MOMENTS, SetFeatures
from .opening import FeatureChoice, GivenImages, choose_device, open_side
from .reference import statistics_arrays
from .set_features import extract


@dataclass(frozen=True)
class ReferenceRequest:
    """Which images, and where their statistics go.

    Args:
        out: the .npz to write.
        keep_images: so many of the images, spread evenly, are stored as arr_0; -1: all.
        image_size: (H, W) to which the images of files are scaled and cropped as for training;
            None: as they are.
        device: auto, cpu or cuda.

    Raises:
        ValueError: `out` is not the name of an .npz file, or batch_size is below 1.
    """

    data: GivenImages
    out: str
    features: FeatureChoice = FeatureChoice()
    keep_images: int = 0
    batch_size: int = 64
    image_size: tuple[int, int] | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.out.endswith(".npz") or os.path.isdir(self.out):
            raise ValueError(f"--out {self.out} must be the name of an .npz file")
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} must be at least 1")


def make_reference(request: ReferenceRequest, say: Callable[[str], object] = print) -> None:
    """Measure the images and write the file; a collective.

    Raises:
        ValueError: no images, or only one; features that cannot be opened.
    """
    images = open_side(request.data, "data", request.image_size)
    if images.n < 2:
        name = images.path
        raise ValueError(f"{name} holds {images.n} image: a covariance needs at least 2")
    space = request.features.open(choose_device(request.device), say)
    say(
        f"{images.path}: {images.n} images {images.shape}; features: {space.name}, "
        f"{request.features.precision}"
    )
    features = extract(
        images, space, {MOMENTS, SPATIAL_MOMENTS}, batch_size=request.batch_size, what="reference"
    )
    for warning in space.warnings:
        say(f"warning: {warning}")
    if dist_util.is_main():
        say(_write(request, images, features, space))
    dist_util.barrier()


def _write(
    request: ReferenceRequest, images: Images, features: SetFeatures, space: FeatureSpace
) -> str:
    """Returns what was written, in a line."""
    arrays = statistics_arrays(features, space)
    if images.preprocessing:
        arrays["preprocessing"] = np.array([images.preprocessing])
    keep = images.n if request.keep_images < 0 else min(request.keep_images, images.n)
    with NpzWriter(request.out) as out:
        if keep:
            # Spread evenly over the set, whose order often is that of classes.
            chosen = [k * images.n // keep for k in range(keep)]
            some = (images.rows(i, i + 1) for i in chosen)
            out.write("arr_0", (keep, *images.shape), np.uint8, some)
        for name, array in arrays.items():
            out.write(name, array.shape, array.dtype, [array])
    kept = f", and {keep} of them as arr_0" if keep else ""
    return f"{request.out}: {', '.join(arrays)} of {images.n} images{kept}"
