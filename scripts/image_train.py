"""Train a diffusion model on images.

    python scripts/image_train.py --data_dir DIR --config configs/cifar10_ip.yaml
    mpiexec -n 4 python scripts/image_train.py ...
    torchrun --nproc_per_node 4 scripts/image_train.py ...

Checkpoints, logs, sample grids and the merged settings (config.yaml) go to --out_dir. batch_size is
per process.
"""

if __name__ == "__main__":
    from guided_diffusion_ip import early_signals

    early_signals.note_signals()  # before PyTorch is imported, which takes seconds

from guided_diffusion_ip.settings.config import command, parse
from guided_diffusion_ip.settings.image_training import train_images


def main() -> None:
    train_images(parse("image_train", __doc__))


if __name__ == "__main__":
    command(main)
