"""Statistics of a data set, once, for evaluator.py: mu, sigma, mu_s, sigma_s of the features, and
how the images were prepared.

    python evaluations/make_reference.py DATA --out cifar10_reference.npz --inception_weights ...
    torchrun --nproc_per_node 4 evaluations/make_reference.py DATA --out ...

DATA: a folder, a zip, or an npz with arr_0. Precision, recall and KID need images of the reference
too: --keep_images 10000 stores so many as arr_0. Without --image_size the images are taken as they
are; with it they are scaled and cropped exactly as training does, and the file says so
(`preprocessing`), so that evaluator.py can warn if the samples' model saw other pixels.
"""

from __future__ import annotations

import os

import numpy as np

from guided_diffusion_ip import dist_util
from guided_diffusion_ip.data.image_set import open_images
from guided_diffusion_ip.data.npz_io import NpzWriter
from guided_diffusion_ip.evaluation.reference import statistics_arrays
from guided_diffusion_ip.evaluation.set_features import extract
from guided_diffusion_ip.script_util import parse_image_size
from guided_diffusion_ip.settings.config import command, parse
from guided_diffusion_ip.settings.evaluation import open_space
from guided_diffusion_ip.settings.sampling import say


def main() -> None:
    cfg = parse("make_reference", __doc__)
    if not cfg.data or not cfg.out:
        raise ValueError(
            "give the images and the file to write: make_reference.py DATA --out reference.npz "
            "(see --help)"
        )
    if not cfg.out.endswith(".npz") or os.path.isdir(cfg.out):
        raise ValueError(f"--out {cfg.out} must be the name of an .npz file")
    dist_util.setup_dist()
    size = parse_image_size(cfg.image_size) if cfg.image_size else None
    images = open_images(cfg.data, "data", size, remedy="give --image_size to scale and crop all")
    if images.n < 2:
        raise ValueError(f"{cfg.data} holds {images.n} image: a covariance needs at least 2")
    space = open_space(cfg, say)
    say(f"{cfg.data}: {images.n} images {images.shape}; features: {space.name}, {cfg.precision}")
    features = extract(images, space, batch_size=cfg.batch_size, what="reference")
    for warning in space.warnings:
        say(f"warning: {warning}")
    if dist_util.is_main():
        arrays = statistics_arrays(features.pool, features.spatial, space)
        if images.preprocessing:
            arrays["preprocessing"] = np.array([images.preprocessing])
        keep = images.n if cfg.keep_images < 0 else min(cfg.keep_images, images.n)
        with NpzWriter(cfg.out) as out:
            if keep:
                # Spread evenly over the set, whose order often is that of classes.
                some = images.subset(np.arange(keep) * images.n // keep)
                out.write(
                    "arr_0", (keep, *images.shape), np.uint8, some.batches(0, keep, cfg.batch_size)
                )
            for name, array in arrays.items():
                out.write(name, array.shape, array.dtype, [array])
        say(
            f"{cfg.out}: {', '.join(arrays)} of {images.n} images"
            + (f", and {keep} of them as arr_0" if keep else "")
        )
    dist_util.barrier()
    dist_util.cleanup()


if __name__ == "__main__":
    command(main)
