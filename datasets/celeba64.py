"""CelebA at 64 x 64: all 202,599 aligned images, and 50,000 of them as reference.

    python datasets/celeba64.py --source img_align_celeba.zip --out datasets/celeba64

The aligned images are 178 wide and 218 high. Three ways to 64 x 64 are in use, and Frechet
distances between one and another are meaningless:

--crop center  (default) what the training loader makes of the originals: halved with a box filter
               to 89 x 109, scaled with bicubic to 64 x 78, rows 7 to 70 kept. That is the middle
               178 x 178, faces keep their shape.
--crop none    what the IP paper's script for this set makes: the whole image squeezed to 64 x 64,
               faces 18 % too flat, by OpenCV's default, bilinear interpolation between the two
               nearest rows and columns. What lies between is left out, not averaged (no
               antialiasing), so that the images are rougher.
--crop ddim    what DDIM's code makes: the 128 x 128 around column 89, row 121, halved with Pillow's
               bilinear filter.

Writes DIR/train.npz and DIR/reference.npz (50,000 random images, always the same).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from guided_diffusion_ip.data.image_io import center_crop_arr
from guided_diffusion_ip.data.preprocessing import of_loader
from guided_diffusion_ip.data.sources import open_source
from guided_diffusion_ip.preparation.publishers import PublishedSet
from guided_diffusion_ip.preparation.writers import render_npz, write_reference
from guided_diffusion_ip.settings.config import command

SET = PublishedSet(
    "CelebA (align and crop)",
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    ("img_align_celeba", "img_align_celeba.zip"),
    202_599,
)
ALIGNED = (178, 218)
SIZE = 64
REFERENCE_COUNT = 50_000


def center(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [64, 64, 3] as the training loader makes it."""
    return center_crop_arr(_aligned(image, name), SIZE)


def squeezed(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [64, 64, 3], nothing cut off; bit for bit what OpenCV 5.0's resize makes of such an
    image.

    Bilinear with half-pixel centres, without antialiasing, in its fixed point: weights of 11 bits,
    sums that lose 4, 16 and 2 bits on the way, the last by rounding (on average 0.1 grey levels
    darker than exact arithmetic).
    """
    pixels = np.asarray(_aligned(image, name)).astype(np.int64)
    left, right, near, far = _between(pixels.shape[1])
    pixels = (pixels[:, left] * near[:, None] + pixels[:, right] * far[:, None]) >> 4
    upper, lower, near, far = _between(pixels.shape[0])
    sums = (pixels[upper] * near[:, None, None] >> 16) + (pixels[lower] * far[:, None, None] >> 16)
    return (sums + 2 >> 2).astype(np.uint8)


def _between(size: int) -> tuple[np.ndarray, ...]:
    """Of each of 64 places on a side of `size` >= 64 pixels: the pixels around it, their weights in
    1/2048.
    """
    place = ((np.arange(SIZE) + 0.5) * (size / SIZE) - 0.5).astype(np.float32)
    first = place.astype(np.int64)
    far = np.rint((place - first) * 2048).astype(np.int64)
    return first, np.minimum(first + 1, size - 1), 2048 - far, far


def ddim(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [64, 64, 3], the face alone."""
    face = _aligned(image, name).crop((89 - 64, 121 - 64, 89 + 64, 121 + 64))
    return np.asarray(face.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _aligned(image: Image.Image, name: str) -> Image.Image:
    if image.size != ALIGNED:
        raise ValueError(
            f"{name} is {image.width} x {image.height}, but the aligned images are {ALIGNED[0]} x "
            f"{ALIGNED[1]}: take img_align_celeba, not the images in the wild"
        )
    return image


# How each is made, as its record says it; '' for the training loader's own way.
CROPS = {
    "center": (center, ""),
    "none": (squeezed, "crop=none resize=bilinear-without-antialias"),
    "ddim": (ddim, "crop=128-at-89,121 resize=bilinear"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; what is finished is left as it is."""
    parser = SET.parser(__doc__)
    parser.add_argument(
        "--crop", choices=tuple(CROPS), default="center", help="see above (default center)"
    )
    args = parser.parse_args(argv)
    source = SET.open(args.source, lambda path: open_source(path, class_cond=False))
    n = SET.check(len(source), args.allow_partial)
    # jpg and png copies of the set are in use, and their pixels differ.
    kind = os.path.splitext(source.names[0])[1].lower().lstrip(".")
    origin = f"celeba-align-{kind}"
    render, step = CROPS[args.crop]
    record = f"{origin} > {step} {SIZE}x{SIZE}x3" if step else of_loader(origin, (SIZE, SIZE), 3)
    render_npz(args.out, source, render, (SIZE, SIZE), record)
    print(f"{args.out}: {n:,} training images ({record})")
    print(write_reference(args.out, REFERENCE_COUNT, record))


if __name__ == "__main__":
    command(main)
