"""What measuring and calibrating have in common: from merged settings to a sampler, a model and
real images.

`cfg` is the merged settings of a script (config.Config): an object that has the flags as
attributes.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from .. import files
from ..data.image_set import ImageSet, open_image_set
from ..exposure_bias.measure_run import spread_over

_DECIDES = (
    "seed",
    "use_ddim",
    "eta",
    "timestep_respacing",
    "clip_denoised",
    "guidance_scale",
    "use_fp16",
)


def open_real_images(cfg: Any, size: tuple[int, int]) -> ImageSet:
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


def what_decides(cfg: Any, real: ImageSet, **more: Any) -> dict[str, Any]:
    """All that the result depends on, as plain values."""
    precision = {"precision": cfg.precision} if cfg.precision else {}
    return {
        **precision,
        "model_path": os.path.basename(cfg.model_path),
        "model_sha256": files.sha256(cfg.model_path),
        "data_dir": os.path.basename(os.path.normpath(cfg.data_dir)),
        "data_sha256": real.digest(),
        "num_images": len(real),
        **{name: getattr(cfg, name) for name in _DECIDES},
        **more,
        **{
            name: value
            for section in ("model", "diffusion")
            for name, value in cfg.section(section).items()
        },
    }


def place_beside(model_path: str, folder: str, settings: dict[str, Any]) -> str:
    """A folder beside the checkpoint named after the settings: the same command finds what it had
    begun.
    """
    stem = os.path.splitext(os.path.basename(model_path))[0]
    key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
    return os.path.join(
        files.folder_beside(model_path), folder, f"{stem}-n{settings['num_images']}-{key}"
    )


def parse_numbers(text: str, flag: str) -> list[int]:
    """[5, 10] from "5,10"; [] from "".

    Raises:
        ValueError: not of this form.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise ValueError(
            f"--{flag} {text}: expected whole numbers separated by commas, such as 5,10,20"
        )
    return [int(part) for part in parts]
