"""LSUN tower at 64 x 64: all 708,264 training images, and 50,000 of them as reference.

    python datasets/lsun_tower.py --source tower_train_lmdb --out datasets/lsun_tower

The source is the LMDB folder of the published zip, unpacked (needs the lmdb package: pip install lmdb). Each image is made
as the training loader makes it: halved with a box filter while it is at least twice as large, scaled with bicubic until its
shorter side is 64, the middle 64 x 64 cut out.

Writes DIR/train.npz (one file rather than 708,264) and DIR/reference.npz (50,000 random images, always the same). An
interrupted run goes on if started again.
"""
from __future__ import annotations

from collections.abc import Sequence

from guided_diffusion_ip.config import command
from guided_diffusion_ip.data.dataset_prep import render_npz, write_reference
from guided_diffusion_ip.data.image_io import center_crop_arr
from guided_diffusion_ip.data.lmdb_source import LmdbSource, lmdb_package
from guided_diffusion_ip.data.preprocessing import of_loader
from guided_diffusion_ip.data.published import Published

SET = Published("LSUN tower", "https://www.yf.io/p/lsun", ("tower_train_lmdb",), 708_264)
SIZE = 64
REFERENCE_COUNT = 50_000


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; what is finished is left as it is."""
    args = SET.parser(__doc__).parse_args(argv)
    lmdb_package()
    source = SET.open(args.source, LmdbSource)
    n = SET.check(len(source), args.allow_partial)
    record = of_loader("lsun-tower", (SIZE, SIZE), 3)
    render_npz(args.out, source, lambda image, name: center_crop_arr(image, SIZE), (SIZE, SIZE), record)
    source.close()
    print(f"{args.out}: {n:,} training images ({record})")
    print(write_reference(args.out, REFERENCE_COUNT, record))


if __name__ == "__main__":
    command(main)
