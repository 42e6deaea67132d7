"""Pairs of a large image and the small one that a super-resolution model sees of it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from ..sizes import size_text
from .image_datasets import ImageStream


def check_sizes(large: tuple[int, int], small: tuple[int, int]) -> None:
    """Each side of a small pixel must cover a whole number of large ones: only then is area
    averaging a plain mean.

    Raises:
        ValueError: it does not, or the large images are no larger.
    """
    if all(a % b == 0 for a, b in zip(large, small)) and large != small:
        return
    shown = f"large_size is {size_text(large)} and small_size {size_text(small)}"
    if large == small:
        raise ValueError(
            f"{shown}: there is nothing to enlarge; give a small_size that divides large_size"
        )
    factors = [max(2, round(a / b)) for a, b in zip(large, small)]
    better = (small[0] * factors[0], small[1] * factors[1])
    raise ValueError(
        f"{shown}, but large_size must be a multiple of small_size, such as --large_size "
        f"{size_text(better)}"
    )


def area_average(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, C, H, W] -> [N, C, *size]: each small pixel is the mean of the large ones that it covers
    (as published).
    """
    return F.interpolate(images, size, mode="area")


class SuperResolutionStream(Iterator[tuple[Tensor, dict[str, Tensor]]]):
    """An ImageStream of large images, each batch with its small images as `low_res`.

    Seeks, tells and closes like the stream that it wraps.

    Raises:
        ValueError: sizes that do not fit; see check_sizes.
    """

    def __init__(
        self, large: ImageStream, large_size: tuple[int, int], small_size: tuple[int, int]
    ) -> None:
        check_sizes(large_size, small_size)
        self._large = large
        self.small_size = small_size
        self.num_images = large.num_images
        self.classes = large.classes
        self.class_dropout = large.class_dropout
        self.source = large.source
        self.preprocessing = large.preprocessing
        self.value_range = large.value_range

    def __next__(self) -> tuple[Tensor, dict[str, Tensor]]:
        """float32 [b, C, H, W] in [-1, 1]; {"low_res": float32 [b, C, h, w], and "y": int64 [b]
        with classes}.
        """
        return self._pair(*next(self._large))

    @property
    def step(self) -> int:
        """Number of the next batch."""
        return self._large.step

    def seek(self, step: int) -> None:
        """Make `step` the next batch."""
        self._large.seek(step)

    def close(self) -> None:
        """Stop workers and close files."""
        self._large.close()

    def examples(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`count` images drawn by the seed, the same on every rank, neither cropped at random nor
        mirrored.
        """
        return self._pair(*self._large.examples(count))

    def _pair(self, images: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return images, {"low_res": area_average(images, self.small_size), **cond}
