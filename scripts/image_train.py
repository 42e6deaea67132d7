"""Train a diffusion model on images.

    python scripts/image_train.py --data_dir DIR --config configs/cifar10_ip.yaml
    mpiexec -n 4 python scripts/image_train.py ...        torchrun --nproc_per_node 4 scripts/image_train.py ...

Checkpoints, logs, sample grids and the merged settings (config.yaml) go to --out_dir. batch_size is per process.
"""
import os
import time

import torch

from guided_diffusion_ip import dist_util, logger, script_util
from guided_diffusion_ip.config import Config, command, parse, write_config
from guided_diffusion_ip.data.image_datasets import ImageStream, load_data
from guided_diffusion_ip.generation.sample_batch import Sampler
from guided_diffusion_ip.training.banner import banner, warn_about_ema
from guided_diffusion_ip.training.preview import Preview
from guided_diffusion_ip.training.timestep_samplers import create_named_schedule_sampler
from guided_diffusion_ip.training.train_loop import TrainLoop


def main() -> None:
    cfg = parse("image_train", __doc__)
    if not cfg.data_dir:
        raise ValueError("no training images: give --data_dir, a folder, a zip or an npz of images")
    dist_util.setup_dist()
    # Everything that wrong input can break comes before anything is written.
    model, diffusion = create(cfg)
    preview_diffusion = create(cfg, timestep_respacing=cfg.sample_respacing)[1] if cfg.sample_interval else None
    messages: list[str] = []
    data = open_data(cfg, messages.append)
    out_dir = dist_util.broadcast_object(choose_out_dir(cfg))
    model.to(device=dist_util.dev(), memory_format=torch.channels_last)
    shape = (cfg.in_channels, *script_util.parse_image_size(cfg.image_size))
    loop = TrainLoop(
        model=model, diffusion=diffusion, data=data, batch_size=cfg.batch_size, microbatch=cfg.microbatch, lr=cfg.lr,
        ema_rate=cfg.ema_rate, log_interval=cfg.log_interval, save_interval=cfg.save_interval,
        resume_checkpoint=cfg.resume_checkpoint, use_fp16=cfg.use_fp16, fp16_scale_growth=cfg.fp16_scale_growth,
        schedule_sampler=create_named_schedule_sampler(cfg.schedule_sampler, diffusion),
        weight_decay=cfg.weight_decay, lr_anneal_steps=cfg.lr_anneal_steps, max_steps=cfg.max_steps, seed=cfg.seed,
        sample_interval=cfg.sample_interval,
        preview=preview_diffusion and Preview(
            Sampler(preview_diffusion, shape, cfg.seed), cfg.sample_count, out_dir, cfg.batch_size,
            list(range(len(data.classes))) if cfg.class_cond else None))

    logger.configure(out_dir, ["stdout", "log", "csv", "json", "tensorboard"], rank=dist_util.get_rank())
    logger.log(f"results go to {out_dir}")
    if dist_util.is_main():
        write_config(cfg, os.path.join(out_dir, "config.yaml"))
    for message in filter(None, [*messages, warn_about_ema(loop)]):
        logger.log(message)
    logger.log(banner(loop, out_dir, shape))
    loop.run_loop()
    logger.log(f"training ended after {loop.step} steps; results are in {out_dir}")
    dist_util.cleanup()


def create(cfg: Config, **process):
    """The network, in float32 (half precision is the loop's business), and the process."""
    torch.manual_seed(cfg.seed)
    flags = {**cfg.section("model"), **cfg.section("diffusion"), "timestep_respacing": cfg.timestep_respacing}
    return script_util.create_model_and_diffusion(**{**flags, **process, "use_fp16": False})


def open_data(cfg: Config, log) -> ImageStream:
    """The training images, with a hint if the network has more classes than they have."""
    data = load_data(
        data_dir=cfg.data_dir, batch_size=cfg.batch_size,
        image_size=script_util.parse_image_size(cfg.image_size), class_cond=cfg.class_cond,
        random_crop=cfg.random_crop, random_flip=cfg.random_flip, channels=cfg.in_channels, seed=cfg.seed,
        num_workers=None if cfg.num_workers < 0 else cfg.num_workers, cache_mb=cfg.cache_mb, log=log,
        num_classes=cfg.num_classes if cfg.class_cond else None)
    if cfg.class_cond and len(data.classes) < cfg.num_classes:
        log(f"note: the images have {len(data.classes)} classes, the network {cfg.num_classes}: train with --num_classes "
            f"{len(data.classes)}, or sample with --class_ids 0-{len(data.classes) - 1}")
    return data


def choose_out_dir(cfg: Config) -> str:
    """--out_dir, else OPENAI_LOGDIR, else runs/<time>-<name of the config or of the images>."""
    if cfg.out_dir or os.environ.get("OPENAI_LOGDIR"):
        return cfg.out_dir or os.environ["OPENAI_LOGDIR"]
    name = os.path.splitext(os.path.basename(cfg.config_path or os.path.normpath(cfg.data_dir)))[0]
    return os.path.join("runs", f"{time.strftime('%Y-%m-%d-%H-%M-%S')}-{name}")


if __name__ == "__main__":
    command(main)
