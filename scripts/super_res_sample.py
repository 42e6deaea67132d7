"""Enlarge images with a super-resolution model.

    python scripts/super_res_sample.py --model_path runs/NAME/ema_0.9999_100000.pt \\
        --base_samples small.npz --num_samples 64 --timestep_respacing 100

--base_samples holds images of small_size (of another: --resize_base True): an npz (arr_0 uint8 [N,
h, w, C]; arr_1 labels for a class-conditional model), a folder, or a zip. Image i is made from
low-resolution image i mod N, in the order of rows or sorted names; with --num_samples above N, each
is enlarged several times, from other noise. base_images.csv says which belongs to which, and with
--save_png the pictures of files have the files' names. Architecture and process come from the
config.yaml beside the checkpoint; for a bare published .pt, give them as flags or by --config. The
same command again continues an interrupted run.
"""

from guided_diffusion_ip import dist_util
from guided_diffusion_ip.api import sample
from guided_diffusion_ip.settings.command import command
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.sampling import request_from


def main() -> None:
    sample(request_from(parse("super_res_sample", __doc__)))
    dist_util.cleanup()


if __name__ == "__main__":
    command(main)
