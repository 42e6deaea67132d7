"""Pictures out of an npz of images, or an npz out of pictures.

    python scripts/npz_to_png.py samples.npz --out pictures             # pictures/000000.png ...
    python scripts/npz_to_png.py samples.npz --out grid.png --count 64  # the first 64 in one
    python scripts/npz_to_png.py pictures --out images.npz --image_size 64  # and back

With labels (arr_1), pictures go to a folder per class (--classes False: not), and a grid has them
as
captions: by their names, where the npz (`classes`) or the settings.yaml beside it has some, else by
their numbers.

Training on NAME.npz gives what training on the pictures would give, bit for bit, but reads decoded
pixels: they are mapped into memory, once for all processes. Pictures are decoded on all cores and
    need not fit in memory; the file appears when it is whole.
Classes (from file names or sub-folders, see datasets/README.md) become arr_1 and `classes`.
"""

from __future__ import annotations

import os

from tqdm.auto import tqdm

from guided_diffusion_ip.data.image_io import save_grid
from guided_diffusion_ip.data.image_set import ImageSet, open_images
from guided_diffusion_ip.data.npz_io import NpzReader
from guided_diffusion_ip.data.npz_source import CLASSES
from guided_diffusion_ip.data.sources import open_source
from guided_diffusion_ip.evaluation.published import settings_beside
from guided_diffusion_ip.preparation.writers import (
    open_with_classes,
    pack_images,
    write_image_folder,
)
from guided_diffusion_ip.runs.sample_batch import captions
from guided_diffusion_ip.script_util import parse_image_size
from guided_diffusion_ip.settings.config import command, parse

SCALE = "give --image_size to scale and crop all"


def main() -> None:
    cfg = parse("npz_to_png", __doc__)
    if not cfg.data or not cfg.out:
        raise ValueError(
            "give what to read and what to write: npz_to_png.py samples.npz --out pictures (see "
            "--help)"
        )
    if (
        os.path.exists(cfg.out)
        and not cfg.overwrite
        and not (os.path.isdir(cfg.out) and not os.listdir(cfg.out))
    ):
        raise ValueError(
            f"{cfg.out} is there already: choose another name, or --overwrite True for a file"
        )
    by_class = cfg.classes
    size = parse_image_size(cfg.image_size) if cfg.image_size else None
    images = open_images(cfg.data, "images", size, remedy=SCALE)
    count, shape = min(cfg.count or images.n, images.n), images.shape
    if cfg.out.lower().endswith(".npz"):
        if images.source.kind == "npz":
            raise ValueError(
                f"{cfg.data} is an npz already; --out {cfg.out} asks for another: give a folder or "
                "a .png"
            )
        source = (
            open_with_classes(cfg.data) if by_class else open_source(cfg.data, class_cond=False)
        )
        channels = cfg.channels or images.channels
        colours = "" if cfg.channels else "give --channels 3 (or 1, to lose them)"
        wanted = ImageSet(source, size, channels, remedy=SCALE, grey_remedy=colours)
        _, *shape = pack_images(cfg.out, wanted, count)
    elif cfg.out.lower().endswith(".png"):
        save_grid(images.rows(0, count), cfg.out, captions=read_classes(images, count))
    else:
        names = (read_classes(images, count) if by_class else None) or [None] * count
        pictures = (
            (images.rows(i, i + 1)[0], names[i])
            for i in tqdm(range(count), unit="img", disable=None)
        )
        write_image_folder(cfg.out, pictures, digits=6, preprocessing=images.preprocessing)
    print(f"{cfg.out}: {count} of {images.n} images, {' x '.join(map(str, shape))}")


def read_classes(images: ImageSet, count: int) -> list[str] | None:
    """The names of the first `count` images' classes, or their numbers as text; None without
    labels.
    """
    if images.source.kind != "npz":
        return None
    with NpzReader(images.source.path) as reader:
        if "arr_1" not in reader.keys or reader.shape("arr_1") != (images.n,):
            return None
        names = settings_beside(images.source.path).get(CLASSES, [])
        named = CLASSES in reader.keys and reader.dtype(CLASSES).kind == "U"
        if named and len(reader.shape(CLASSES)) == 1:
            names = reader.rows(CLASSES, 0, *reader.shape(CLASSES)).tolist()
        return captions(reader.rows("arr_1", 0, count).tolist(), [str(name) for name in names])


if __name__ == "__main__":
    command(main)
