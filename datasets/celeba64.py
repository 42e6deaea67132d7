"""CelebA at 64 x 64: all 202,599 aligned images, and 50,000 of them as reference.

    python datasets/celeba64.py --source img_align_celeba.zip --out datasets/celeba64

The aligned images are 178 wide and 218 high. Two ways to 64 x 64 are in use, and Frechet distances between one and the
other are meaningless:

--crop center  (default) what the training loader makes of the originals: halved with a box filter to 89 x 109, scaled with
               bicubic to 64 x 78, rows 7 to 70 kept. That is the middle 178 x 178, faces keep their shape.
--crop none    what a plain resize makes, as the published script for reference images does: the whole image squeezed to
               64 x 64 by one bicubic step, faces 18 % too flat. (Which filter the published script takes is not known to us.)

Writes DIR/train.npz and DIR/reference.npz (50,000 random images, always the same). An interrupted run goes on if started
again.
"""
from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from guided_diffusion_ip.config import command
from guided_diffusion_ip.data.dataset_prep import render_npz, write_reference
from guided_diffusion_ip.data.image_io import center_crop_arr
from guided_diffusion_ip.data.preprocessing import of_loader
from guided_diffusion_ip.data.published import Published
from guided_diffusion_ip.data.sources import open_source

SET = Published("CelebA (align and crop)", "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
                ("img_align_celeba", "img_align_celeba.zip"), 202_599)
ALIGNED = (178, 218)
SIZE = 64
REFERENCE_COUNT = 50_000


def center(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [64, 64, 3] as the training loader makes it."""
    return center_crop_arr(_aligned(image, name), SIZE)


def squeezed(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [64, 64, 3], nothing cut off."""
    return np.asarray(_aligned(image, name).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _aligned(image: Image.Image, name: str) -> Image.Image:
    if image.size != ALIGNED:
        raise ValueError(f"{name} is {image.width} x {image.height}, but the aligned images are {ALIGNED[0]} x {ALIGNED[1]}: "
                         "take img_align_celeba, not the images in the wild")
    return image


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; what is finished is left as it is."""
    parser = SET.parser(__doc__)
    parser.add_argument("--crop", choices=("center", "none"), default="center", help="see above (default center)")
    args = parser.parse_args(argv)
    source = SET.open(args.source, lambda path: open_source(path, class_cond=False))
    n = SET.check(len(source), args.allow_partial)
    # jpg and png copies of the set are in use, and their pixels differ.
    kind = os.path.splitext(source.names[0])[1].lower().lstrip(".")
    origin = f"celeba-align-{kind}"
    record = (of_loader(origin, (SIZE, SIZE), 3) if args.crop == "center"
              else f"{origin} > crop=none resize=bicubic {SIZE}x{SIZE}x3")
    render_npz(args.out, source, center if args.crop == "center" else squeezed, (SIZE, SIZE), record)
    print(f"{args.out}: {n:,} training images ({record})")
    print(write_reference(args.out, REFERENCE_COUNT, record))


if __name__ == "__main__":
    command(main)
