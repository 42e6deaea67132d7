"""What is settled before anything of a training run is made: processes, batch, folder, classes.

Settings are not changed in place: what settles something returns them anew.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from .. import dist_util, files
from ..data.sources import Source, open_source
from ..ownership import owning
from ..training.checkpoint import complete_steps, states_near, without_state
from ..training.resume import compare_settings, find
from ..yaml_text import read_yaml_file
from .config import Config


@contextlib.contextmanager
def begin(cfg: Config) -> Iterator[tuple[Config, str, Source | None]]:
    """Processes, the folder, which this run owns within the block, and settings that depend on
    these and on the images. Gives the settled settings, the folder's path, and the images where it
    took a look at them to settle the number of classes. A collective.

    Raises:
        ValueError: flags that contradict each other, a folder in which another run is at work or
            would be damaged, or images without classes where there should be some.
    """
    dist_util.setup_dist()
    cfg = add_null_class(settle_batch(cfg))
    out_dir = choose_out_dir(cfg)
    with owning(out_dir):
        refuse_damage(cfg, out_dir)
        cfg, source = settle_classes(cfg, out_dir)
        yield cfg, out_dir, source


def add_null_class(cfg: Config) -> Config:
    """--class_dropout brings a null class along; the saved config.yaml says so, for sampling.

    Raises:
        ValueError: the network has no labels to drop, or was to have none for "no class".
    """
    if not cfg.values.get("class_dropout"):
        return cfg
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
    return cfg.with_values(null_class=True)


def settle_batch(cfg: Config) -> Config:
    """--global_batch_size -> batch_size of each process; after setup_dist, before anything reads
    batch_size.

    A batch size on the command line wins over either in a config file.

    Raises:
        ValueError: both are given and contradict each other, or the processes cannot share the
            images evenly.
    """
    on_command_line = {
        name for name in ("batch_size", "global_batch_size") if cfg.on_command_line(name)
    }
    if on_command_line == {"batch_size"}:
        cfg = cfg.with_values(global_batch_size=0)
    if not cfg.global_batch_size:
        return cfg
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
    return cfg.with_values(batch_size=each)


def settle_classes(cfg: Config, out_dir: str) -> tuple[Config, Source | None]:
    """num_classes, where neither a flag nor a config says it: that of the run to be continued, else
    as many as the images have; these are returned if they were opened for it. A collective.

    Raises:
        ValueError: no images, or none with classes; a folder to be continued without a checkpoint.
    """
    if "num_classes" in cfg.given or not wants_classes(cfg) or not cfg.data_dir:
        return cfg, None
    path, _ = find(cfg.resume, cfg.resume_checkpoint, out_dir)
    state = next((state for _, state in states_near(path)), None) if path else None
    if state and (known := state.get("settings", {}).get("model", {}).get("num_classes")):
        return cfg.with_values(num_classes=known), None
    source = open_source(cfg.data_dir, class_cond=True)
    return cfg.with_values(num_classes=len(source.classes or ())), source


def wants_classes(cfg: Config) -> bool:
    """A classifier has no such flag: it always does."""
    return cfg.values.get("class_cond", True)


def choose_out_dir(cfg: Config) -> str:
    """--out_dir, else OPENAI_LOGDIR, else the folder of the --resume checkpoint, else
    runs/<time>-<name>; the same on all ranks.

    Raises:
        ValueError: --resume auto without a folder to look in.
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
    return dist_util.broadcast_object(files.results_folder(cfg.out_dir, default))


def refuse_damage(cfg: Config, out_dir: str) -> None:
    """Raises ValueError, on all ranks, where a run with these settings would damage another one in
    the folder.
    """
    # Rank 0 looks, since it also writes. A folder that the environment names is reused, as
    # guided-diffusion's scripts do.
    ours = cfg.out_dir or not os.environ.get("OPENAI_LOGDIR")
    if complaint := dist_util.broadcast_object(_why_not(cfg, out_dir) if ours else ""):
        raise ValueError(complaint)


def _why_not(cfg: Config, out_dir: str) -> str:
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
                saved = read_yaml_file(config)
                compare_settings(
                    {name: keys for name, keys in dict(saved).items() if isinstance(keys, dict)},
                    cfg.sections(),
                )
            except (ValueError, TypeError) as error:
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
