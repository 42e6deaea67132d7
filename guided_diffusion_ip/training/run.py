"""What the training scripts have in common around their loop: images in, a folder out, and what is told on the way.

`cfg` is the merged settings of a script (config.Config): an object that has the flags as attributes.
"""
from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from .. import dist_util, files, logger
from ..data.image_datasets import ImageStream, load_data
from .banner import banner, warn_about_ema
from .timestep_samplers import create_named_schedule_sampler
from .train_loop import TrainLoop


def open_data(
    cfg: Any, image_size: tuple[int, int], *, class_cond: bool, log: Callable[[str], None],
) -> ImageStream:
    """The images in cfg.data_dir, with a hint if the network has more classes than they have.

    Raises:
        ValueError: no images, or (with class_cond) no classes or more than cfg.num_classes.
    """
    if not cfg.data_dir:
        raise ValueError("no training images: give --data_dir, a folder, a zip or an npz of images")
    data = load_data(
        data_dir=cfg.data_dir, batch_size=cfg.batch_size, image_size=image_size, class_cond=class_cond,
        random_crop=cfg.random_crop, random_flip=cfg.random_flip, channels=cfg.in_channels, seed=cfg.seed,
        num_workers=None if cfg.num_workers < 0 else cfg.num_workers, cache_mb=cfg.cache_mb, log=log,
        num_classes=cfg.num_classes if class_cond else None)
    if class_cond and len(data.classes) < cfg.num_classes:
        log(f"note: the images have {len(data.classes)} classes, the network {cfg.num_classes}: train with --num_classes "
            f"{len(data.classes)}, or sample with --class_ids 0-{len(data.classes) - 1}")
    return data


def choose_out_dir(cfg: Any) -> str:
    """--out_dir, else OPENAI_LOGDIR, else runs/<time>-<name of the config or of the images>; the same on all ranks."""
    name = os.path.splitext(os.path.basename(cfg.config_path or os.path.normpath(cfg.data_dir)))[0]
    stamped = os.path.join("runs", f"{time.strftime('%Y-%m-%d-%H-%M-%S')}-{name}")
    return dist_util.broadcast_object(files.results_folder(cfg.out_dir, stamped))


def make_loop(
    cfg: Any, model: nn.Module, diffusion: Any, data: Iterator, preview: Callable[..., Any] | None
) -> TrainLoop:
    """The loop that a diffusion model's training flags describe."""
    return TrainLoop(
        model=model, diffusion=diffusion, data=data, batch_size=cfg.batch_size, microbatch=cfg.microbatch, lr=cfg.lr,
        ema_rate=cfg.ema_rate, log_interval=cfg.log_interval, save_interval=cfg.save_interval,
        resume_checkpoint=cfg.resume_checkpoint, use_fp16=cfg.use_fp16, fp16_scale_growth=cfg.fp16_scale_growth,
        schedule_sampler=create_named_schedule_sampler(cfg.schedule_sampler, diffusion),
        weight_decay=cfg.weight_decay, lr_anneal_steps=cfg.lr_anneal_steps, max_steps=cfg.max_steps, seed=cfg.seed,
        sample_interval=cfg.sample_interval, preview=preview)


def run(loop: TrainLoop, cfg: Any, out_dir: str, image_shape: tuple[int, int, int], messages: Iterable[str]) -> None:
    """Open the folder, save the settings in it as config.yaml, tell what is about to happen, train.

    The first thing that is written; whatever wrong input can break has been tried by now.
    """
    logger.configure(out_dir, ["stdout", "log", "csv", "json", "tensorboard"], rank=dist_util.get_rank())
    logger.log(f"results go to {out_dir}")
    if dist_util.is_main():
        with open(os.path.join(out_dir, "config.yaml"), "w", encoding="utf-8") as file:
            file.write(cfg.as_yaml())
    for message in filter(None, [*messages, warn_about_ema(loop)]):
        logger.log(message)
    logger.log(banner(loop, out_dir, image_shape))
    loop.run_loop()
    logger.log(f"training ended after {loop.step} steps; results are in {out_dir}")
    dist_util.cleanup()
