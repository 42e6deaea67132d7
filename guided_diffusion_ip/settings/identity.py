"""What a run's results depend on, as plain values: its identity, by which its folder is named, and
which is compared when the folder is found again.

By construction: all of the sections that describe the checkpoint, all flags of role images, number
formats, and the content of files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from .. import files
from .config import Config
from .flags import DESCRIBING, SCRIPTS
from .solver import flags_of_solver, sampler_kind, sampling_precision


def of_file(name: str, path: str) -> dict[str, str]:
    """A checkpoint, by its name and content."""
    return {f"{name}_path": os.path.basename(path), f"{name}_sha256": files.sha256(path)}


def deciding_values(cfg: Config) -> dict[str, Any]:
    """All flags that decide what comes out of a checkpoint, and their values: those of role images,
    and number formats.

    The solver's name and flags appear only where use_ddim does not say it all, and a quiet flag
    only where it has not its default: so folders that are older than these flags are continued.
    """
    values = {}
    kind = sampler_kind(cfg) if "solver" in cfg.values else ""
    deciding = SCRIPTS[cfg.script].deciding()
    for flag in deciding:
        if flag.name != "solver" and not flag.solvers and not flag.quiet:
            values[flag.name] = cfg.values[flag.name]
    if "use_fp16" in cfg.values:
        values["use_fp16"] = cfg.use_fp16
    if kind not in ("", "ddpm", "ddim"):
        values["sampler"] = kind
        values |= flags_of_solver(cfg)
    for flag in deciding:
        if flag.quiet and cfg.values[flag.name] != flag.default:
            values[flag.name] = cfg.values[flag.name]
    return values


def described(cfg: Config, sections: Iterable[str]) -> dict[str, Any]:
    """The flags of the sections that describe the checkpoint; quiet ones only if they are set."""
    return {
        flag.name: cfg.values[flag.name]
        for section in sections
        for flag in SCRIPTS[cfg.script].of_section(section)
        if not flag.quiet or cfg.values[flag.name] != flag.default
    }


def what_decides_the_images(cfg: Config, **inputs: Any) -> dict[str, Any]:
    """All that sampled images depend on.

    Args:
        inputs: what other files the script reads, by name and content.
    """
    edm = cfg.values.get("framework") == "edm"
    values = {**of_file("model", cfg.model_path), **inputs, **deciding_values(cfg)}
    if edm:
        # use_fp16 comes with the checkpoint's config, and --precision wins over it: the settings
        # say what was done.
        precision = sampling_precision(cfg)
        values |= {
            "precision": precision,
            "use_fp16": precision == "fp16",
            "quantisation": "rounded",
        }
    if cfg.class_names:
        values["classes"] = list(cfg.class_names)  # label k is classes[k]
    if cfg.trained_on:
        # Decides through the weights; evaluator.py compares it with the reference's.
        values["trained_on"] = cfg.trained_on
    unread = "diffusion" if edm else "edm"
    sections = [name for name in DESCRIBING if name in SCRIPTS[cfg.script].sections]
    about_checkpoint = described(cfg, (name for name in sections if name != unread))
    return values | {name: x for name, x in about_checkpoint.items() if name not in values}


def what_decides_the_likelihood(cfg: Config, **inputs: Any) -> dict[str, Any]:
    """All that likelihoods depend on; `inputs` as for the images."""
    about_checkpoint = described(cfg, ("model", "diffusion"))
    values = {**of_file("model", cfg.model_path), **inputs, **deciding_values(cfg)}
    del values["use_fp16"]  # stands where the model's other flags are
    return values | about_checkpoint


def default_folder(model_path: str, folder: str, words: str, settings: Mapping[str, Any]) -> str:
    """A folder beside the checkpoint named after the settings: the same command finds what it had
    begun, and another one does not touch it.
    """
    stem = os.path.splitext(os.path.basename(model_path))[0]
    key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
    return os.path.join(files.folder_beside(model_path), folder, f"{stem}-{words}-{key}")
