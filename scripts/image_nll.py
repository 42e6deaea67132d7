"""Measure the likelihood of images: bits per dimension, and each term of the variational bound.

    python scripts/image_nll.py --model_path runs/NAME/ema_0.9999_100000.pt --data_dir DIR \\
        --num_samples 1000 --batch_size 50
    mpiexec -n 4 python scripts/image_nll.py ...    (or torchrun --nproc_per_node 4 ...)

The first --num_samples images in the order of their names (an npz: of its rows), at most all of
them, unmirrored. The result depends on --seed, but for rounding not on batch size or number of
processes. It goes to --out_dir: bpd.json, total_bpd.npz (each image), and the mean of each term at
each t, from T-1 down to 0: vb_terms.npz, mse_terms.npz, xstart_mse_terms.npz. The same command
again continues an interrupted run.
"""

from guided_diffusion_ip import dist_util
from guided_diffusion_ip.api import measure_likelihood
from guided_diffusion_ip.settings.command import command
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.likelihood import request_from


def main() -> None:
    measure_likelihood(request_from(parse("image_nll", __doc__)))
    dist_util.cleanup()


if __name__ == "__main__":
    command(main)
