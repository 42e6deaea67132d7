"""The folder of a training run: which one, and what a new run there would damage."""

from __future__ import annotations

import os
import time

import yaml

from .. import dist_util, files
from ..training.checkpoint import complete_steps, without_state
from ..training.resume import compare_settings
from .config import Config


def choose_out_dir(cfg: Config) -> str:
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
