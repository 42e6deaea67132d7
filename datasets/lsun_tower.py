"""LSUN tower at 64 x 64: all 708,264 training images, and 50,000 of them as reference.

    python datasets/lsun_tower.py --source tower_train_lmdb --out datasets/lsun_tower

The source is the LMDB folder of the published zip, unpacked (needs the lmdb package: pip install
lmdb). Each image is made as the IP paper's script makes it: scaled by one step with a box filter
until its shorter side is 64, the middle 64 x 64 cut out. (The training loader, given the originals,
would halve them twice, and round twice: 0.7 grey levels brighter.)

Writes DIR/train.npz (one file rather than 708,264) and DIR/reference.npz (50,000 random images,
always the same).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from guided_diffusion_ip.preparation.lmdb_source import LmdbSource, lmdb_package
from guided_diffusion_ip.preparation.publishers import PublishedSet
from guided_diffusion_ip.preparation.writers import render_npz, write_reference
from guided_diffusion_ip.settings.config import command

SET = PublishedSet("LSUN tower", "https://www.yf.io/p/lsun", ("tower_train_lmdb",), 708_264)
SIZE = 64
REFERENCE_COUNT = 50_000
RECORD = f"lsun-tower > crop=center resize=box {SIZE}x{SIZE}x3"


def render(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    scale = SIZE / min(image.size)
    size = round(scale * image.width), round(scale * image.height)
    image = image.resize(size, Image.Resampling.BOX)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.asarray(image)[top : top + SIZE, left : left + SIZE]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; what is finished is left as it is."""
    args = SET.parser(__doc__).parse_args(argv)
    lmdb_package()
    source = SET.open(args.source, LmdbSource)
    n = SET.check(len(source), args.allow_partial)
    render_npz(args.out, source, render, (SIZE, SIZE), RECORD)
    source.close()
    print(f"{args.out}: {n:,} training images ({RECORD})")
    print(write_reference(args.out, REFERENCE_COUNT, RECORD))


if __name__ == "__main__":
    command(main)
