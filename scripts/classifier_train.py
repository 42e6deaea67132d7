"""Train a classifier of noised images, which then guides a diffusion model
(scripts/classifier_sample.py).

    python scripts/classifier_train.py --data_dir DIR --val_data_dir DIR2 --image_size 64 --num_classes 10 --anneal_lr True
    mpiexec -n 4 python scripts/classifier_train.py ...        torchrun --nproc_per_node 4 scripts/classifier_train.py ...

The process (--noise_schedule, --diffusion_steps) must be that of the model to be guided: --config
with its config.yaml takes over that and the size of the images. Checkpoints, logs (accuracy by
quartile of t; acc@1_q0 is the clean end) and the merged settings (config.yaml) go to --out_dir.
batch_size is per process.
"""

if __name__ == "__main__":
    from guided_diffusion_ip import early_signals

    early_signals.note_signals()  # before PyTorch is imported, which takes seconds

import dataclasses

import torch

from guided_diffusion_ip import dist_util, script_util
from guided_diffusion_ip.data.image_datasets import ImageStream
from guided_diffusion_ip.settings.config import Config, command, parse
from guided_diffusion_ip.settings.training import (
    choose_out_dir,
    loop_options,
    open_data,
    run,
    settle_batch,
    settle_classes,
)
from guided_diffusion_ip.training.classifier_objective import (
    ClassifierObjective,
    CleanSampler,
    Validation,
    require_same_classes,
)
from guided_diffusion_ip.training.stopping import Limits
from guided_diffusion_ip.training.timestep_samplers import create_named_schedule_sampler
from guided_diffusion_ip.training.train_loop import TrainLoop


def main() -> None:
    cfg = parse("classifier_train", __doc__)
    dist_util.setup_dist()
    settle_batch(cfg)
    # Everything that wrong input can break comes before anything is written.
    out_dir = choose_out_dir(cfg)
    settle_classes(cfg, out_dir)
    classifier, diffusion = create(cfg)
    messages: list[str] = []
    size = script_util.parse_image_size(cfg.image_size)
    data = open_data(cfg, size, class_cond=True, log=messages.append)
    val_data = open_validation_data(cfg, size, data, messages.append)
    sampler = (
        create_named_schedule_sampler(cfg.schedule_sampler, diffusion)
        if cfg.noised
        else CleanSampler()
    )
    classifier.to(device=dist_util.dev(), memory_format=torch.channels_last)
    objective = ClassifierObjective(diffusion, cfg.noised)
    loop = TrainLoop(
        model=classifier,
        diffusion=diffusion,
        data=data,
        **loop_options(cfg, classifier, out_dir, messages),
        use_fp16=cfg.classifier_use_fp16,
        precision=cfg.precision,
        schedule_sampler=sampler,
        lr_anneal_steps=cfg.iterations if cfg.anneal_lr else 0,
        limits=Limits(0 if cfg.anneal_lr else cfg.iterations, cfg.max_images, cfg.max_hours),
        objective=objective,
        eval_interval=cfg.eval_interval,
        validate=val_data
        and Validation(
            objective,
            val_data,
            cfg.eval_interval,
            cfg.microbatch if cfg.microbatch > 0 else cfg.batch_size,
            cfg.seed,
        ),
    )
    run(loop, cfg, out_dir, (cfg.in_channels, *size), messages)


def create(cfg: Config):
    """The classifier, in float32 (half precision is the loop's business), and the process, whose
    gamma it never meets.
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
    cfg: Config, size: tuple[int, int], data: ImageStream, log
) -> ImageStream | None:
    """The images in val_data_dir, unflipped and from the centre; None if there are none.

    Raises:
        ValueError: no images there, or classes that are not those of the training images.
    """
    if not cfg.val_data_dir:
        return None
    other = dataclasses.replace(
        cfg,
        values={
            **cfg.values,
            "data_dir": cfg.val_data_dir,
            "random_flip": False,
            "random_crop": False,
        },
    )
    said: list[str] = []
    try:
        val_data = open_data(other, size, class_cond=True, log=said.append)
    except ValueError as error:
        raise ValueError(f"--val_data_dir: {error}") from None
    require_same_classes(data, val_data)
    log(
        f"validation {said[0]}"
    )  # the hint about unused classes has been given for the training images
    return val_data


if __name__ == "__main__":
    command(main)
