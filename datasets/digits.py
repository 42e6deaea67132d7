"""Write scikit-learn's handwritten digits as a small training set with ten classes.

    python datasets/digits.py --out digits

1,797 real digits (UCI, Alpaydin and Kaynak 1998), grey, 8 x 8 with values 0..16, enlarged to
16 x 16 and 0..255: digits/0/0000.png and so on. No download; takes a few seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from guided_diffusion_ip.preparation.writers import count_images, write_image_folder
from guided_diffusion_ip.settings.config import command

SIZE = 16
COUNT = 1797
RECORD = f"digits-8x8 > crop=none resize=bicubic {SIZE}x{SIZE}x1"


def digits() -> Iterator[tuple[np.ndarray, str]]:
    """Pairs of uint8 [16, 16, 1] and class name "0" .. "9", in scikit-learn's order.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    for image, label in zip(data.images, data.target):
        small = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
        # Pillow clips the slight overshoot of bicubic to 0..255.
        large = small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        yield np.asarray(large)[..., None], str(label)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; a finished set is left as it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    out = parser.parse_args(argv).out
    if count_images(out) == COUNT:
        print(f"{out}: {COUNT} digits are already there")
        return
    count = write_image_folder(out, digits(), preprocessing=RECORD)
    print(f"{out}: wrote {count} digits, {SIZE} x {SIZE}, grey, 10 classes")


if __name__ == "__main__":
    command(main)
