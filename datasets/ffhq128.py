"""FFHQ at 128 x 128: all 70,000 images.

    python datasets/ffhq128.py --source thumbnails128x128 --out datasets/ffhq128

The source is the folder thumbnails128x128 or images1024x1024, with its sub-folders 00000 to 69000
(a zip of it will do). The thumbnails are taken as they are, as the IP and ES papers' script takes
them: only they give distances that compare with the papers'. The large images are halved three
times with a box filter, as the training loader does it. The two differ by a few grey levels, so use
one of them for training and reference. From a folder that holds both, the thumbnails are taken.

Writes DIR/train.npz and DIR/reference.npz. How many reference images the published FIDs were
computed with is not stated; the paper speaks of whole training sets, hence the default of
--reference_count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from guided_diffusion_ip.data.image_io import center_crop_arr
from guided_diffusion_ip.data.preprocessing import of_loader
from guided_diffusion_ip.data.sources import open_source
from guided_diffusion_ip.preparation.publishers import PublishedSet
from guided_diffusion_ip.preparation.writers import reference_rows, render_npz, write_reference
from guided_diffusion_ip.settings.config import command

SET = PublishedSet(
    "FFHQ",
    "https://github.com/NVlabs/ffhq-dataset",
    ("thumbnails128x128", "images1024x1024"),
    70_000,
)
SIZE = 128
ORIGINS = {1024: "ffhq-images1024x1024", SIZE: f"ffhq-thumbnails128x128 {SIZE}x{SIZE}x3"}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; what is finished is left as it is."""
    parser = SET.parser(__doc__)
    parser.add_argument(
        "--reference_count",
        type=int,
        default=SET.count,
        metavar="N",
        help=f"images in the reference (default {SET.count}: all; fewer are drawn at random, "
        "always "
        "the same)",
    )
    args = parser.parse_args(argv)
    reference_rows(1, args.reference_count)  # a wrong count is an error now, not after an hour
    source = SET.open(args.source, lambda path: open_source(path, class_cond=False))
    n = SET.check(len(source), args.allow_partial)
    side = source.image(0, 3).width
    if side not in ORIGINS:
        raise ValueError(
            f"{source.path}: {source.names[0]} is {side} wide; expected are "
            f"{' or '.join(map(str, ORIGINS))}"
        )
    record = of_loader(ORIGINS[side], (SIZE, SIZE), 3)

    def render(image: Image.Image, name: str) -> np.ndarray:
        """uint8 [128, 128, 3]."""
        if image.size != (side, side):
            raise ValueError(
                f"{name} is {image.width} x {image.height}, but the first image is {side} x {side}"
            )
        return center_crop_arr(image, SIZE)

    render_npz(args.out, source, render, (SIZE, SIZE), record)
    print(f"{args.out}: {n:,} training images ({record})")
    print(write_reference(args.out, args.reference_count, record))


if __name__ == "__main__":
    command(main)
