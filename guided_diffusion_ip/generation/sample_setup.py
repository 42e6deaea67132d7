"""What the sampling scripts have in common: what was asked for, in words and in settings.yaml, and where the images go.

`cfg` is the merged settings of a script (config.Config): an object that has the flags as attributes.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

from .. import dist_util, files
from .sample_batch import Sampler

# Flags of sampling that the images depend on.
_SAMPLING = ("seed", "num_samples", "use_ddim", "eta", "timestep_respacing", "clip_denoised", "eps_scaler", "eps_scaler_k",
             "class_ids", "guidance_scale", "use_fp16")


def make_sampler(cfg: Any, diffusion: Any, image_size: tuple[int, int]) -> Sampler:
    """The sampler that the flags describe; cond_fn, if any, is the caller's to add.

    Raises:
        ValueError: DDIM's eta for DDPM, or classifier-free guidance of a network that cannot do without a class.
    """
    if cfg.eta and not cfg.use_ddim:
        raise ValueError(f"--eta {cfg.eta} is DDIM's noise and means nothing for DDPM: add --use_ddim True, or leave it out")
    if cfg.guidance_scale != 1 and not cfg.class_cond:
        raise ValueError(f"--guidance_scale {cfg.guidance_scale:g} pushes towards the class, but this model is unconditional "
                         "and knows none: leave it out, or use a model trained with --class_cond True --class_dropout 0.1")
    if cfg.guidance_scale != 1 and not cfg.null_class:
        raise ValueError(
            f"--guidance_scale {cfg.guidance_scale:g} compares the network with class and without, but this checkpoint has no "
            "label for 'no class': train with --class_dropout 0.1 (a bare .pt that was trained so needs --null_class True)")
    return Sampler(diffusion, (cfg.in_channels, *image_size), cfg.seed, cfg.use_ddim, cfg.eta, cfg.clip_denoised,
                   guidance_scale=cfg.guidance_scale, null_label=cfg.num_classes if cfg.null_class else None)


def what_decides_the_images(cfg: Any, sections: Iterable[str] = ("model", "diffusion"), **more: Any) -> dict[str, Any]:
    """All that the images depend on, as plain values: the checkpoint, flags of sampling, sections, and what else is given."""
    values = {"model_path": os.path.basename(cfg.model_path), "model_sha256": files.sha256(cfg.model_path), **more,
              **{name: getattr(cfg, name) for name in _SAMPLING}}
    if cfg.trained_on:
        values["trained_on"] = cfg.trained_on  # decides through the weights; evaluator.py compares it with the reference's
    for section in sections:
        values.update({name: value for name, value in cfg.section(section).items() if name not in _SAMPLING})
    return values


def sampler_text(cfg: Any) -> str:
    """DDPM, steps 100, lambda 1.017."""
    kind = f"DDIM, eta {cfg.eta:g}" if cfg.use_ddim else "DDPM"
    steps = cfg.timestep_respacing or cfg.diffusion_steps
    slope = f" + {cfg.eps_scaler_k:g} t" if cfg.eps_scaler_k else ""
    guidance = f", guidance scale {cfg.guidance_scale:g}" if cfg.guidance_scale != 1 else ""
    b = cfg.eps_scaler
    if isinstance(b, list):
        b = f"{min(b):g} to {max(b):g}, one per step"
    return f"{kind}, steps {steps}, lambda {b}{slope}{guidance}"


def choose_out_dir(cfg: Any, settings: dict[str, Any]) -> str:
    """--out_dir, else OPENAI_LOGDIR, else a folder beside the checkpoint named after the settings.

    Named so that the same command finds what it had begun, and another one does not touch it.
    """
    stem = os.path.splitext(os.path.basename(cfg.model_path))[0]
    kind = "ddim" if cfg.use_ddim else "ddpm"
    key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
    named = os.path.join(files.folder_beside(cfg.model_path), "samples", f"{stem}-{kind}-n{cfg.num_samples}-{key}")
    return files.results_folder(cfg.out_dir, named)


def say(text: str) -> None:
    """Print on one rank."""
    if dist_util.is_main():
        print(text, flush=True)
