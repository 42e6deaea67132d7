"""Sample images from a trained model.

    python scripts/image_sample.py --model_path runs/NAME/ema_0.9999_100000.pt --num_samples 64 \\
        --timestep_respacing 100 --eps_scaler 1.017

Architecture and process come from the config.yaml beside the checkpoint; for a bare published .pt,
give them as flags or by --config. Image i depends on --seed and i only. The same command again
continues an interrupted run.
"""

from guided_diffusion_ip import dist_util
from guided_diffusion_ip.api import sample
from guided_diffusion_ip.settings.command import command
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.sampling import request_from


def main() -> None:
    sample(request_from(parse("image_sample", __doc__)))
    dist_util.cleanup()


if __name__ == "__main__":
    command(main)
