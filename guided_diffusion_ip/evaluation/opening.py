"""What a user names -> a device, a feature space, the images of one side."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import dist_util
from ..data.image_set import Images, in_memory, open_images
from ..features.space import FeatureSpace, image_tensor
from ..features.spaces import open_features
from ..sizes import size_text

# The path of an npz, folder or zip; an array uint8 [N, H, W, C]; or a set that is open already.
GivenImages = str | os.PathLike | np.ndarray | Tensor | Images
_SCALE = "give --image_size to scale and crop all"


@dataclass(frozen=True)
class FeatureChoice:
    """A feature space by name; the arguments are those of `features.spaces.open_features`."""

    name: str = "inception"
    precision: str = "fp32"
    inception_weights: str = ""
    download: bool = False

    def open(self, device: torch.device, say: Callable[[str], object]) -> FeatureSpace:
        """A collective: rank 0 goes first, so that a download happens once.

        Raises:
            ValueError: on all ranks, as `open_features` does.
        """

        def opened() -> FeatureSpace:
            return open_features(
                self.name,
                device=device,
                precision=self.precision,
                inception_weights=self.inception_weights,
                allow_download=self.download,
                log=say,
            )

        space, complaint = None, ""
        if dist_util.is_main():
            try:
                space = opened()
            except ValueError as error:
                complaint = str(error)
        complaint = dist_util.broadcast_object(complaint)
        if complaint:
            raise ValueError(complaint)
        return opened() if space is None else space


def choose_device(device: str) -> torch.device:
    """The device of this process for auto, cpu or cuda; after setup_dist where there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but PyTorch sees no GPU: use --device auto, or install a CUDA build "
            "of torch"
        )
    return torch.device("cpu") if device == "cpu" else dist_util.dev()


def path_of(images: GivenImages) -> str:
    """The path of a set on disk; '' for one in memory."""
    if isinstance(images, Images):
        return images.path if os.path.exists(images.path) else ""
    if isinstance(images, np.ndarray | Tensor):
        return ""
    return os.fspath(images)


def open_side(images: GivenImages, what: str, image_size: tuple[int, int] | None) -> Images:
    """The images of one side.

    Args:
        what: "reference" or "samples", for messages.
        image_size: (H, W) to which files are scaled and cropped as for training.

    Raises:
        ValueError: no images, of another type or shape, or in memory and not of this size.
    """
    if isinstance(images, str | os.PathLike):
        return open_images(images, what, image_size, remedy=_SCALE)
    if not isinstance(images, Images):
        if len(images) == 0:
            raise ValueError(f"{what}: there are no images")
        try:
            images = in_memory(image_tensor(images).cpu().numpy())
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    if image_size is not None and images.shape[:2] != tuple(image_size):
        raise ValueError(
            f"{what} of {images.shape[0]} x {images.shape[1]} in memory are not scaled to "
            f"{image_size[0]} x {image_size[1]}: pass the path of a file, or scale them before"
        )
    return images


def check_sizes(reference: Images, samples: Images, fixed: bool = False) -> None:
    """Are the images of both sides of one height and width?

    Inception would take them as they are, and measure how they were scaled.

    Args:
        fixed: the reference cannot be scaled, because it has statistics too.

    Raises:
        ValueError: they are not; names the flag that scales.
    """
    (h, w, _), (height, width, _) = reference.shape, samples.shape
    if (h, w) != (height, width):
        # An npz mostly has the size of the model already.
        as_reference = fixed or (_is_npz(reference) and not _is_npz(samples))
        wanted = (h, w) if as_reference else (height, width)
        raise ValueError(
            f"reference images are {h} x {w}, samples {height} x {width} (height x width), "
            "and would differ by their scaling alone: give --image_size "
            f"{size_text(wanted)} to scale and crop as training does"
        )


def _is_npz(images: Images) -> bool:
    return images.path.lower().endswith(".npz")
