"""Train a classifier of noised images, which then guides a diffusion model
(scripts/classifier_sample.py).

    python scripts/classifier_train.py --data_dir DIR --val_data_dir DIR2 --image_size 64 \\
        --num_classes 10 --anneal_lr True
    mpiexec -n 4 python scripts/classifier_train.py ...
    torchrun --nproc_per_node 4 scripts/classifier_train.py ...

The process (--noise_schedule, --diffusion_steps) must be that of the model to be guided: --config
with its config.yaml takes over that and the size of the images. Checkpoints, logs (accuracy by
quartile of t; acc@1_q0 is the clean end) and the merged settings (config.yaml) go to --out_dir.
batch_size is per process.
"""

if __name__ == "__main__":
    from guided_diffusion_ip import early_signals

    early_signals.note_signals()  # before PyTorch is imported, which takes seconds

from collections.abc import Callable

import torch

from guided_diffusion_ip import script_util
from guided_diffusion_ip.data.image_datasets import ImageStream
from guided_diffusion_ip.data.image_source import SourceError
from guided_diffusion_ip.data.sources import Source
from guided_diffusion_ip.settings.config import Config, command, parse
from guided_diffusion_ip.settings.train_prologue import begin
from guided_diffusion_ip.settings.training import (
    make_loop,
    open_data,
    run,
    to_device,
    train_settings,
    where_to_start,
)
from guided_diffusion_ip.training.classifier_objective import (
    ClassifierObjective,
    CleanSampler,
    Validation,
    require_same_classes,
)
from guided_diffusion_ip.training.hooks import Hook
from guided_diffusion_ip.training.precision import resolve
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.stopping import Limits


def main() -> None:
    with begin(parse("classifier_train", __doc__)) as (cfg, out_dir, source):
        train(cfg, out_dir, source)


def train(cfg: Config, out_dir: str, source: Source | None) -> None:
    """The run, with its settings settled and its folder owned."""
    messages: list[str] = []
    classifier, process = create(cfg)
    size = script_util.parse_image_size(cfg.image_size)
    data = open_data(cfg, source, size, messages.append)
    val_data = open_validation_data(cfg, size, data, messages.append)
    to_device(classifier)
    objective = ClassifierObjective(process, cfg.noised)
    settings = settings_of(cfg, where_to_start(cfg, out_dir, classifier, messages.append))
    validation = val_data and Validation(
        objective, val_data, cfg.eval_interval, settings.images_per_pass, cfg.seed
    )
    loop = make_loop(
        cfg,
        classifier,
        process,
        data,
        settings,
        objective=objective,
        schedule_sampler=None if cfg.noised else CleanSampler(),
        hooks=[Hook(cfg.eval_interval, validation, averaged=False)] if validation else (),
    )
    run(loop, cfg, out_dir, (cfg.in_channels, *size), messages)


def settings_of(cfg: Config, start: str) -> TrainSettings:
    """--iterations limit the run, or, with --anneal_lr, are those over which lr falls to 0."""
    return train_settings(
        cfg,
        start,
        precision=resolve(cfg.precision, cfg.classifier_use_fp16),
        lr_anneal_steps=cfg.iterations if cfg.anneal_lr else 0,
        limits=Limits(0 if cfg.anneal_lr else cfg.iterations, cfg.max_images, cfg.max_hours),
    )


def create(cfg: Config):
    """The classifier, in float32 (half precision is the loop's business), and the process, whose
    gamma has no part in its training.
    """
    torch.manual_seed(cfg.seed)
    flags = {
        **cfg.section("model"),
        **cfg.section("classifier"),
        **cfg.section("diffusion"),
        "timestep_respacing": cfg.timestep_respacing,
    }
    return script_util.create_classifier_and_diffusion(
        **{**flags, "input_perturbation": 0.0, "classifier_use_fp16": False}
    )


def open_validation_data(
    cfg: Config, size: tuple[int, int], data: ImageStream, log: Callable[[str], None]
) -> ImageStream | None:
    """The images in val_data_dir, unflipped and from the centre; None if there are none.

    Raises:
        ValueError: no images there, or classes that are not those of the training images.
    """
    if not cfg.val_data_dir:
        return None
    other = cfg.with_values(data_dir=cfg.val_data_dir, random_flip=False, random_crop=False)
    said: list[str] = []
    try:
        val_data = open_data(other, None, size, said.append)
    except ValueError as error:
        # Without the name that load_data has for it.
        what = error.__cause__ if isinstance(error.__cause__, SourceError) else error
        raise ValueError(f"--val_data_dir: {what}") from None
    require_same_classes(data, val_data)
    # The hint about unused classes has been given for the training images.
    log(f"validation {said[0]}")
    return val_data


if __name__ == "__main__":
    command(main)
