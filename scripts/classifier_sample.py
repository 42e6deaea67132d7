"""Sample images of given classes from a diffusion model that a classifier guides.

    python scripts/classifier_sample.py --model_path runs/NAME/ema_0.9999_100000.pt \\
        --classifier_path runs/CLS/model150000.pt \\
        --classifier_scale 2 --timestep_respacing 100 --class_ids 3,5

Each checkpoint brings its settings in the config.yaml beside it; for bare published .pt files, give
them as flags or by --config. An unconditional model leaves the class to the classifier; a
class-conditional one is told it too. Guidance works for DDPM and, with --use_ddim, for DDIM; scale
0 equals image_sample. Image i depends on --seed and i only. The same command again continues an
interrupted run.
"""

from guided_diffusion_ip import dist_util
from guided_diffusion_ip.api import sample
from guided_diffusion_ip.settings.command import command
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.sampling import request_from


def main() -> None:
    sample(request_from(parse("classifier_sample", __doc__)))
    dist_util.cleanup()


if __name__ == "__main__":
    command(main)
