"""The size of images, as flags, functions and files write it."""

from __future__ import annotations

from collections.abc import Sequence

ImageSize = int | str | Sequence[int]


def parse_size(size: ImageSize) -> tuple[int, int]:
    """(height, width) of 64, "64", "64x96" or (64, 96).

    Raises:
        ValueError: not one or two positive sides.
    """
    words: Sequence[int | str]
    if isinstance(size, str):
        words = size.lower().split("x")
        words = words * 2 if len(words) == 1 else words
    else:
        words = [size, size] if isinstance(size, int) else size
    try:
        sides = [int(word) for word in words]
    except ValueError:
        sides = []
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"image_size={size}: give one positive side, or (height, width)")
    return sides[0], sides[1]


def size_text(size: tuple[int, int]) -> str:
    """(64, 64) as it is written: 64, or HEIGHTxWIDTH."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
