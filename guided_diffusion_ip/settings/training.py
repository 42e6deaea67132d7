"""From the flags of a training script to the values that training takes, and the run itself.

The three scripts do the same in the same order: train_prologue.begin, a network and a process,
`open_data`, hooks, `where_to_start`, `make_loop`, `run`. Whatever wrong input can break is tried
before `run`, which is the first to write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import dist_util, files, logger
from ..data.image_datasets import ImageStream, load_data
from ..data.sources import Source
from ..diffusion.process import Process
from ..runs.sample_batch import Sampler
from ..training.banner import banner, warn_about_ema
from ..training.checkpoint import SavePolicy, complete_steps, remove_leftovers
from ..training.ema import parse_rates
from ..training.evaluation import make_evaluation
from ..training.hooks import Hook
from ..training.precision import resolve
from ..training.preview import Preview
from ..training.protocols import Batches, Objective
from ..training.resume import find, init_from
from ..training.run_state import CannotResume
from ..training.settings import TrainSettings
from ..training.stopping import Limits
from ..training.timestep_samplers import ScheduleSampler, create_named_schedule_sampler
from ..training.train_loop import TrainLoop
from .config import Config
from .train_prologue import wants_classes


def open_data(
    cfg: Config, source: Source | None, image_size: tuple[int, int], log: Callable[[str], None]
) -> ImageStream:
    """The images in cfg.data_dir as batches, with a hint if the network has more classes than they
    have; `source`: the same images, if they are open already.

    Raises:
        ValueError: no images, no classes where there should be some, or more than cfg.num_classes.
    """
    if not cfg.data_dir:
        raise ValueError("no training images: give --data_dir, a folder, a zip or an npz of images")
    class_cond = wants_classes(cfg)
    data = load_data(
        data_dir=source or cfg.data_dir,
        batch_size=cfg.batch_size,
        image_size=image_size,
        class_cond=class_cond,
        random_crop=cfg.random_crop,
        random_flip=cfg.random_flip,
        channels=cfg.in_channels,
        seed=cfg.seed,
        num_workers=None if cfg.num_workers < 0 else cfg.num_workers,
        cache_mb=cfg.cache_mb,
        log=log,
        num_classes=cfg.num_classes if class_cond else None,
        class_dropout=cfg.values.get("class_dropout", 0.0),
    )
    known = len(data.classes or ())
    if class_cond and known < cfg.num_classes:
        log(
            f"note: the images have {known} classes, the network {cfg.num_classes}: sampling draws "
            f"only those {known} (--num_classes {known} makes a network for them alone)"
        )
    return data


def to_device(model: nn.Module) -> None:
    """Bring a network to this process's device, in the memory layout that suits convolutions."""
    layout: Any = {"memory_format": torch.channels_last}  # unknown to PyTorch's own annotations
    model.to(device=dist_util.dev(), **layout)


def where_to_start(cfg: Config, out_dir: str, model: nn.Module, log: Callable[[str], None]) -> str:
    """The checkpoint to continue from, '' for a start at step 0; with --init_from, `model` takes
    its weights. A collective.

    Raises:
        ValueError: flags that contradict each other, or a checkpoint that cannot be used.
    """
    path, note = find(cfg.resume, cfg.resume_checkpoint, out_dir)
    if note:
        log(note)
    if cfg.init_from and path:
        if cfg.resume != "auto":
            raise ValueError(
                f"--init_from {cfg.init_from} starts at step 0, {path} continues a run: give one"
            )
        log(
            f"note: --init_from {cfg.init_from} has served the run's start; it continues from "
            f"{path}"
        )
    elif cfg.init_from:
        log(init_from(model, cfg.init_from))
    return path


def train_settings(cfg: Config, resume: str, **own: Any) -> TrainSettings:
    """What the flags that all training scripts share say, and the fields that a script reads from
    flags of its `own`.

    Raises:
        ValueError: a value outside its range.
    """
    return TrainSettings(
        batch_size=cfg.batch_size,
        microbatch=cfg.microbatch,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        max_skipped=cfg.max_skipped,
        ema_rates=tuple(parse_rates(cfg.ema_rate)),
        ema_warmup=cfg.ema_warmup,
        seed=cfg.seed,
        log_interval=cfg.log_interval,
        saving=SavePolicy(cfg.save_interval, cfg.save_minutes, cfg.keep_last, cfg.keep_every),
        resume=resume,
        record=cfg.sections(),
        **own,
    )


def diffusion_train_settings(cfg: Config, resume: str) -> TrainSettings:
    """The settings of image_train and super_res_train."""
    return train_settings(
        cfg,
        resume,
        lr_warmup_steps=cfg.lr_warmup_steps,
        lr_anneal_steps=cfg.lr_anneal_steps,
        grad_clip=cfg.grad_clip,
        precision=resolve(cfg.precision, cfg.use_fp16),
        fp16_scale_growth=cfg.fp16_scale_growth,
        compile=cfg.compile,
        limits=Limits(cfg.max_steps, cfg.max_images, cfg.max_hours),
    )


def sampling_hooks(
    cfg: Config,
    out_dir: str,
    sampler: Callable[[str], Sampler],
    kwargs_for: Callable[[list[int]], dict[str, Tensor]],
    class_names: Sequence[str],
) -> list[Hook]:
    """Evaluations and pictures on the way, as far as they are asked for.

    Args:
        sampler: makes them; called with the name of the flag that says in how many steps.
        kwargs_for: model_kwargs of the images numbered [n].
    """
    hooks = []
    if cfg.eval_interval:
        evaluation = make_evaluation(
            sampler("eval_respacing"),
            kwargs_for,
            count=cfg.eval_samples,
            reference=cfg.eval_ref or cfg.data_dir,
            features=cfg.eval_features,
            metrics=cfg.eval_metrics,
            batch_size=cfg.batch_size,
            inception_weights=cfg.inception_weights,
        )
        hooks.append(Hook(cfg.eval_interval, evaluation))
    if cfg.sample_interval:
        preview = Preview(
            sampler("sample_respacing"),
            cfg.sample_count,
            out_dir,
            cfg.batch_size,
            kwargs_for,
            class_names,
        )
        hooks.append(Hook(cfg.sample_interval, preview))
    return hooks


def make_loop(
    cfg: Config,
    model: nn.Module,
    process: Process,
    data: Batches,
    settings: TrainSettings,
    *,
    objective: Objective | None = None,
    schedule_sampler: ScheduleSampler | None = None,
    hooks: Sequence[Hook] = (),
) -> TrainLoop:
    """The loop; unless there is a timestep sampler, t is drawn as --schedule_sampler says. A
    collective.

    Raises:
        ValueError: a checkpoint that cannot be continued.
    """
    try:
        return TrainLoop(
            model,
            process,
            data,
            settings,
            objective=objective,
            schedule_sampler=schedule_sampler
            or create_named_schedule_sampler(cfg.schedule_sampler, process),
            hooks=hooks,
        )
    except CannotResume as error:
        flag = "resume" if cfg.resume else "resume_checkpoint"
        raise ValueError(f"--{flag} {cfg.values[flag]}: {error}") from None


def run(
    loop: TrainLoop,
    cfg: Config,
    out_dir: str,
    image_shape: tuple[int, int, int],
    messages: Sequence[str],
) -> None:
    """Open the folder, save the settings in it as config.yaml, log what is about to happen, train.

    The first thing that is written; whatever wrong input can break has been tried by now. Nothing
    is written if nothing is left to do.
    """
    if loop.last_step is not None and loop.step >= loop.last_step:
        limits = [
            f"--{name} {cfg.values[name]}"
            for name in ("max_steps", "max_images", "iterations", "lr_anneal_steps")
            if cfg.values.get(name)
        ]
        logger.log(
            f"{out_dir}: {loop.step} steps are done, and the run's limit is reached "
            f"({', '.join(limits)}): nothing is left to do; a larger limit continues it"
        )
        dist_util.cleanup()
        return
    logger.configure(
        out_dir,
        ["stdout", "log", "csv", "json", "tensorboard"],
        rank=dist_util.get_rank(),
        resume_step=loop.step,
    )
    logger.log(f"results go to {out_dir}")
    if dist_util.is_main():
        _write_config(cfg, out_dir, loop.data)
        if later := [step for step in complete_steps(out_dir) if step > loop.step]:
            logger.log(
                f"warning: {out_dir} holds checkpoints of later steps "
                f"({', '.join(map(str, later[-3:]))}) than this run starts from ({loop.step}); "
                "they stay until it comes to these steps, and --resume auto takes the highest: "
                "move them away, or use another --out_dir"
            )
    for message in [*messages, *_notes(loop.settings, loop.last_step)]:
        logger.log(message)
    logger.log(
        banner(
            loop.model,
            loop.process,
            loop.data,
            loop.settings,
            schedule_sampler=loop.schedule_sampler,
            image_shape=image_shape,
            out_dir=out_dir,
        )
    )
    loop.run_loop()
    logger.log(f"training ended after {loop.step} steps; results are in {out_dir}")
    dist_util.cleanup()


def _notes(settings: TrainSettings, last_step: int | None) -> list[str]:
    """What in the settings may not be meant."""
    notes = []
    if settings.saving.keep_every and not settings.saving.keep_last:
        notes.append("note: --keep_every has no effect without --keep_last: all checkpoints stay")
    if hint := warn_about_ema(settings, last_step):
        notes.append(hint)
    return notes


def _write_config(cfg: Config, out_dir: str, data: Batches) -> None:
    """Write config.yaml, and remove what an interrupted process has left in the folder."""
    remove_leftovers(out_dir)
    cfg = replace(
        cfg,
        trained_on=getattr(data, "preprocessing", ""),
        class_names=tuple(getattr(data, "classes", None) or ()),
    )
    with files.atomic_file(os.path.join(out_dir, "config.yaml")) as file:
        file.write(cfg.as_yaml().encode())
