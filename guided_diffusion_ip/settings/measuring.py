"""What measuring and calibrating have in common: from merged settings to a sampler, a model and
real images.

`cfg` is the merged settings of a script (config.Config): an object that has the flags as
attributes.
"""

from __future__ import annotations

import os
from typing import Any

from ..data.image_set import ImageSet, open_image_set
from ..exposure_bias.measure_run import spread_over
from .config import Config
from .flag import numbers as parse_numbers  # noqa: F401 (its former place)
from .identity import deciding_values, default_folder, described, of_file


def open_real_images(cfg: Config, size: tuple[int, int]) -> ImageSet:
    """--num_images images, evenly spread over --data_dir.

    Raises:
        ValueError: no images, no labels for a class-conditional model, or fewer than two.
    """
    if not cfg.data_dir:
        raise ValueError("no images: give --data_dir, a folder, a zip or an npz of real images")
    images = open_image_set(
        cfg.data_dir,
        size,
        cfg.in_channels,
        num_classes=cfg.num_classes if cfg.class_cond else None,
        what="--data_dir",
    )
    if len(images) < 2:
        raise ValueError(f"{images.text}: one image has no spread: give a --data_dir with more")
    return images.subset(spread_over(len(images), min(cfg.num_images, len(images))))


def what_decides(cfg: Config, real: ImageSet, **more: Any) -> dict[str, Any]:
    """All that the result depends on, as plain values: the checkpoint and the images by content,
    all flags that decide what comes out, and `more`, which stands where it stood in earlier
    folders.
    """
    deciding = deciding_values(cfg)
    precision = {name: deciding.pop(name) for name in ("precision",) if name in deciding}
    return {
        **precision,
        **of_file("model", cfg.model_path),
        "data_dir": os.path.basename(os.path.normpath(cfg.data_dir)),
        "data_sha256": real.digest(),
        "num_images": len(real),
        **{name: value for name, value in deciding.items() if name not in more},
        **more,
        **described(cfg, ("model", "edm" if cfg.framework == "edm" else "diffusion")),
    }


def place_beside(model_path: str, folder: str, settings: dict[str, Any]) -> str:
    """A folder beside the checkpoint named after the settings: the same command finds what it had
    begun.
    """
    return default_folder(model_path, folder, f"n{settings['num_images']}", settings)
