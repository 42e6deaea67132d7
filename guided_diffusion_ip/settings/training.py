"""What the training scripts have in common around their loop: images in, a folder out, and what is
told on the way.

`cfg` is the merged settings of a script (config.Config): an object that has the flags as
attributes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import yaml
from torch import nn

from .. import dist_util, files, logger
from ..data.image_datasets import ImageStream, load_data
from ..data.sources import open_source
from ..training.banner import banner, warn_about_ema
from ..training.checkpoint import (
    SavePolicy,
    complete_steps,
    remove_leftovers,
    states_near,
    without_state,
)
from ..training.resume import compare_settings, find, init_from
from ..training.stopping import Limits
from ..training.timestep_samplers import create_named_schedule_sampler
from ..training.train_loop import TrainLoop


def add_null_class(cfg: Any) -> None:
    """--class_dropout asks for a network with a null class; the saved config.yaml tells sampling
    about it.

    Raises:
        ValueError: the network has no labels to drop, or was to have none for "no class".
    """
    if not cfg.class_dropout:
        return
    if not cfg.class_cond:
        raise ValueError(
            f"--class_dropout {cfg.class_dropout:g} drops class labels, but this model has none: "
            "add --class_cond True, or leave it out"
        )
    # A config file may say False because it was saved by a run without dropout; on the command line
    # it is a contradiction.
    if cfg.given.get("null_class") == "--null_class" and not cfg.null_class:
        raise ValueError(
            f"--class_dropout {cfg.class_dropout:g} needs a label for 'no class', and --null_class "
            "False refuses it: leave one of them out"
        )
    cfg.values["null_class"] = True


def settle_batch(cfg: Any) -> None:
    """--global_batch_size -> batch_size of each process; after setup_dist, before anything reads
    batch_size.

    A batch size on the command line wins over either in a config file.

    Raises:
        ValueError: both are given and contradict each other, or the processes cannot share the
            images evenly.
    """
    on_command_line = {
        name
        for name in ("batch_size", "global_batch_size")
        if cfg.given.get(name, "").startswith("--")
    }
    if on_command_line == {"batch_size"}:
        cfg.values["global_batch_size"] = 0
    if not cfg.global_batch_size:
        return
    world = dist_util.get_world_size()
    each, left = divmod(cfg.global_batch_size, world)
    if left or not each:
        raise ValueError(
            f"--global_batch_size {cfg.global_batch_size} cannot be shared evenly by {world} "
            f"processes: make it a multiple of {world}, or start another number of them"
        )
    if "batch_size" in on_command_line and cfg.batch_size != each:
        raise ValueError(
            f"--batch_size {cfg.batch_size} and --global_batch_size {cfg.global_batch_size} with "
            f"{world} processes contradict each other ({each} per process): give one"
        )
    cfg.values["batch_size"] = each


def open_data(
    cfg: Any,
    image_size: tuple[int, int],
    *,
    class_cond: bool,
    log: Callable[[str], None],
    class_dropout: float = 0.0,
) -> ImageStream:
    """The images in cfg.data_dir, with a hint if the network has more classes than they have.

    Raises:
        ValueError: no images, or (with class_cond) no classes or more than cfg.num_classes.
    """
    if not cfg.data_dir:
        raise ValueError("no training images: give --data_dir, a folder, a zip or an npz of images")
    data = load_data(
        data_dir=cfg.data_dir,
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
        class_dropout=class_dropout,
    )
    if class_cond and len(data.classes) < cfg.num_classes:
        log(
            f"note: the images have {len(data.classes)} classes, the network {cfg.num_classes}: "
            f"sampling draws only those {len(data.classes)} (--num_classes {len(data.classes)} "
            "makes a network for them alone)"
        )
    return data


def settle_classes(cfg: Any, out_dir: str) -> None:
    """num_classes, where neither a flag nor a config says it: that of the run to be continued, else
    as many as the images have. A collective.

    Raises:
        ValueError: no images, or none with classes; a folder to be continued without a checkpoint.
    """
    if "num_classes" in cfg.given or not cfg.values.get("class_cond", True) or not cfg.data_dir:
        return
    path, _ = find(cfg.resume, cfg.resume_checkpoint, out_dir)
    state = next((state for _, state in states_near(path)), None) if path else None
    if state and (known := state.get("settings", {}).get("model", {}).get("num_classes")):
        cfg.values["num_classes"] = known
        return
    source = open_source(cfg.data_dir, class_cond=True)
    cfg.values["num_classes"] = len(source.classes)
    source.close()


def choose_out_dir(cfg: Any) -> str:
    """--out_dir, else OPENAI_LOGDIR, else the folder of the --resume checkpoint, else
    runs/<time>-<name>; the same on all ranks.

    Raises:
        ValueError: --resume auto without a folder to look in, or a folder in which another run
            would be damaged.
    """
    if cfg.overwrite and (cfg.resume or cfg.resume_checkpoint):
        raise ValueError(
            "--overwrite True begins a new run, but "
            + (
                f"--resume {cfg.resume}"
                if cfg.resume
                else f"--resume_checkpoint {cfg.resume_checkpoint}"
            )
            + " continues one: give one of them"
        )
    if cfg.resume == "auto" and not (cfg.out_dir or os.environ.get("OPENAI_LOGDIR")):
        raise ValueError(
            "--resume auto continues what is in --out_dir: give one (without it, every run has a "
            "folder of its own)"
        )
    name = os.path.splitext(os.path.basename(cfg.config_path or os.path.normpath(cfg.data_dir)))[0]
    default = os.path.join("runs", f"{time.strftime('%Y-%m-%d-%H-%M-%S')}-{name}")
    if cfg.resume not in ("", "auto") and not files.is_remote(cfg.resume):
        default = cfg.resume if os.path.isdir(cfg.resume) else os.path.dirname(cfg.resume) or "."
    out_dir = dist_util.broadcast_object(files.results_folder(cfg.out_dir, default))
    # Rank 0 looks, since it also writes. A folder that the environment names is reused, as
    # guided-diffusion's scripts do.
    ours = cfg.out_dir or not os.environ.get("OPENAI_LOGDIR")
    if complaint := dist_util.broadcast_object(_why_not(cfg, out_dir) if ours else ""):
        raise ValueError(complaint)
    return out_dir


def _why_not(cfg: Any, out_dir: str) -> str:
    """What a run with these settings would damage in a local folder; "" if nothing."""
    if not os.path.isdir(out_dir):
        return ""
    continued = cfg.resume or cfg.resume_checkpoint
    folder = continued if os.path.isdir(continued) else os.path.dirname(continued) or "."
    if continued and continued != "auto" and os.path.realpath(folder) == os.path.realpath(out_dir):
        return ""
    steps = complete_steps(out_dir)
    if continued == "auto" and steps:
        return ""
    # From here on the run starts at step 0 in this folder, or brings its checkpoint from another
    # one.
    config, lost = os.path.join(out_dir, "config.yaml"), without_state(out_dir)
    if cfg.overwrite or continued == "auto":
        if lost and os.path.exists(config):
            try:
                with open(config, encoding="utf-8") as file:
                    saved = yaml.safe_load(file)
                compare_settings(
                    {name: keys for name, keys in dict(saved).items() if isinstance(keys, dict)},
                    cfg.sections(),
                )
            except (ValueError, TypeError, yaml.YAMLError) as error:
                return (
                    f"{out_dir} holds {lost[-1]} without its state file, and only the config.yaml "
                    f"there tells what it is: a new run would replace that by its own ({error}): "
                    "move them away, or give another --out_dir"
                )
        return ""
    found = [
        name
        for name in ("config.yaml", "progress.csv", "progress.json")
        if os.path.exists(os.path.join(out_dir, name))
    ]
    if steps or lost:
        found.append(f"checkpoints up to step {steps[-1]}" if steps else lost[-1])
    if not found:
        return ""
    return (
        f"{out_dir} holds a run already ({', '.join(found)}): --resume auto continues it, another "
        "--out_dir leaves it alone, --overwrite True begins a new one in its place"
    )


def loop_options(cfg: Any, model: nn.Module, out_dir: str, messages: list[str]) -> dict[str, Any]:
    """What all training scripts hand to TrainLoop; where the run starts is decided here. A
    collective.

    Raises:
        ValueError: flags that contradict each other, or a checkpoint that cannot be used.
    """
    path, note = find(cfg.resume, cfg.resume_checkpoint, out_dir)
    if note:
        messages.append(note)
    if cfg.init_from and path:
        if cfg.resume != "auto":
            raise ValueError(
                f"--init_from {cfg.init_from} starts at step 0, {path} continues a run: give one"
            )
        messages.append(
            f"note: --init_from {cfg.init_from} has served the run's start; it continues from "
            f"{path}"
        )
    elif cfg.init_from:
        messages.append(init_from(model, cfg.init_from))
    if cfg.keep_every and not cfg.keep_last:
        messages.append(
            "note: --keep_every has no effect without --keep_last: all checkpoints stay"
        )
    return dict(
        batch_size=cfg.batch_size,
        microbatch=cfg.microbatch,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        ema_rate=cfg.ema_rate,
        ema_warmup=cfg.ema_warmup,
        log_interval=cfg.log_interval,
        save_interval=cfg.save_interval,
        resume_checkpoint=path,
        saving=SavePolicy(cfg.save_interval, cfg.save_minutes, cfg.keep_last, cfg.keep_every),
        max_skipped=cfg.max_skipped,
        seed=cfg.seed,
        settings=cfg.sections(),
    )


def make_loop(
    cfg: Any,
    model: nn.Module,
    diffusion: Any,
    data: Iterator,
    preview: Callable[..., Any] | None,
    out_dir: str,
    messages: list[str],
    evaluate: Callable[..., dict[str, float]] | None = None,
) -> TrainLoop:
    """The loop that a diffusion model's training flags describe. Adds to `messages` what is to be
    told before it starts.
    """
    return TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        **loop_options(cfg, model, out_dir, messages),
        use_fp16=cfg.use_fp16,
        precision=cfg.precision,
        fp16_scale_growth=cfg.fp16_scale_growth,
        grad_clip=cfg.grad_clip,
        compile=cfg.compile,
        lr_warmup_steps=cfg.lr_warmup_steps,
        lr_anneal_steps=cfg.lr_anneal_steps,
        schedule_sampler=create_named_schedule_sampler(cfg.schedule_sampler, diffusion),
        limits=Limits(cfg.max_steps, cfg.max_images, cfg.max_hours),
        sample_interval=cfg.sample_interval,
        preview=preview,
        eval_interval=cfg.eval_interval if evaluate else 0,
        evaluate=evaluate,
    )


def run(
    loop: TrainLoop,
    cfg: Any,
    out_dir: str,
    image_shape: tuple[int, int, int],
    messages: Iterable[str],
) -> None:
    """Open the folder, save the settings in it as config.yaml, tell what is about to happen, train.

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
    cfg = replace(
        cfg,
        trained_on=getattr(loop.data, "preprocessing", ""),
        class_names=tuple(getattr(loop.data, "classes", None) or ()),
    )
    if dist_util.is_main():
        remove_leftovers(out_dir)
        with files.atomic_file(os.path.join(out_dir, "config.yaml")) as file:
            file.write(cfg.as_yaml().encode())
        if later := [step for step in complete_steps(out_dir) if step > loop.step]:
            logger.log(
                f"warning: {out_dir} holds checkpoints of later steps "
                f"({', '.join(map(str, later[-3:]))}) than this run starts from ({loop.step}); "
                "they stay until it comes to these steps, and --resume auto takes the highest: "
                "move them away, or use another --out_dir"
            )
    for message in filter(None, [*messages, warn_about_ema(loop)]):
        logger.log(message)
    logger.log(banner(loop, out_dir, image_shape))
    loop.run_loop()
    logger.log(f"training ended after {loop.step} steps; results are in {out_dir}")
    dist_util.cleanup()
