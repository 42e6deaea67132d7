"""A folder of PNGs for the loader, where no data set is at hand."""

from __future__ import annotations

import os

import numpy as np

from guided_diffusion_ip.data.image_io import save_png

COUNT = 2000


def make_pictures(folder: str, side: int, count: int = COUNT) -> None:
    """Write `count` RGB pictures of side x side: slopes with some noise, which compress about as
    photographs do.
    """
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 1, side)
    for number in range(count):
        a, b, c = rng.uniform(-100, 100, (3, 3))
        pixels = (
            128
            + slope[:, None, None] * a
            + slope[None, :, None] * b
            + slope[:, None, None] * slope[None, :, None] * c
        )
        pixels = pixels + rng.normal(0, 8, (side, side, 3))
        save_png(pixels.clip(0, 255).astype(np.uint8), os.path.join(folder, f"{number:06d}.png"))
