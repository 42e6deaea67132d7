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

from guided_diffusion_ip import dist_util
from guided_diffusion_ip.dist_util import say
from guided_diffusion_ip.evaluation.reference_file import make_reference
from guided_diffusion_ip.settings.config import command, parse
from guided_diffusion_ip.settings.evaluation import reference_request


def main() -> None:
    cfg = parse("make_reference", __doc__)
    request = reference_request(cfg)
    dist_util.setup_dist()
    make_reference(request, say)
    dist_util.cleanup()


if __name__ == "__main__":
    command(main)
