"""Training a diffusion model on images, from the command line and from Python.

    from guided_diffusion_ip.settings.image_training import train
    out_dir = train(data_dir="images.npz", out_dir="runs/one", image_size=32, max_steps=1000)

does what scripts/image_train.py does with flags of these names.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from .. import logger
from ..data.sources import Source
from ..diffusion.denoiser import BoundDenoiser, Denoiser
from ..diffusion.gaussian_diffusion import GaussianDiffusion
from ..diffusion.process import Process
from ..diffusion.solvers.sigma_path import AlongSigma, SigmaGrid
from ..runs.sample_batch import Sampler, process_sampler
from ..sizes import parse_size
from ..training.preview import drawn_classes
from .config import Config, from_values
from .edm import edm_process
from .models import create_model_and_diffusion, create_network, network_flags
from .train_prologue import begin
from .training import (
    diffusion_train_settings,
    make_loop,
    open_data,
    run,
    sampling_hooks,
    to_device,
    where_to_start,
)


def train(config: str = "", **flags: Any) -> str:
    """Train as scripts/image_train.py does with these flags; returns the folder with the results.

    Names, values, defaults and checks are those of the command line (`image_train.py --help`);
    `config` names a YAML file. The same flags give the same checkpoints. torch's global seed is
    set on the way.

    Raises:
        ValueError: what the script would end with in one line.
    """
    try:
        return train_images(from_values("image_train", flags, config))
    finally:
        logger.reset()


def train_images(cfg: Config) -> str:
    """The run that the merged settings of image_train describe; returns its folder."""
    with begin(cfg) as (cfg, out_dir, source):
        _train_images(cfg, out_dir, source)
    return out_dir


def _train_images(cfg: Config, out_dir: str, source: Source | None) -> None:
    messages: list[str] = []
    model, process = create(cfg)
    size = parse_size(cfg.image_size)
    shape = (cfg.in_channels, *size)
    data = open_data(cfg, source, size, messages.append)
    to_device(model)
    hooks = sampling_hooks(
        cfg,
        out_dir,
        lambda respacing: sampler_on_the_way(cfg, model, shape, respacing),
        drawn_classes(cfg.seed, len(data.classes or ())),
        data.classes or (),
    )
    start = where_to_start(cfg, out_dir, model, messages.append)
    settings = diffusion_train_settings(cfg, start)
    loop = make_loop(cfg, model, process, data, settings, hooks=hooks)
    run(loop, cfg, out_dir, shape, messages)


def create(cfg: Config) -> tuple[nn.Module, Process]:
    """The network, in float32 (half precision is the loop's business), and the process."""
    if cfg.framework != "edm":
        return _create_with_steps(cfg)
    torch.manual_seed(cfg.seed)
    process = edm_process(cfg)
    return create_network({**network_flags(cfg), "use_fp16": False}), process


def _create_with_steps(cfg: Config, **process: Any) -> tuple[nn.Module, GaussianDiffusion]:
    """The same for networks whose process has T steps; `process` replaces settings of it."""
    torch.manual_seed(cfg.seed)
    flags = {
        **cfg.section("model"),
        **cfg.section("diffusion"),
        "timestep_respacing": cfg.timestep_respacing,
    }
    return create_model_and_diffusion(**{**flags, **process, "use_fp16": False})


def sampler_on_the_way(
    cfg: Config, model: nn.Module, shape: tuple[int, int, int], respacing: str
) -> Sampler:
    """How pictures and evaluations are made: DDPM in the steps that the flag says, by a process
    that knows no losses; EDM's models by Heun, in 18 steps unless the flag is given.
    """
    if cfg.framework == "edm":
        steps = cfg.values[respacing] if respacing in cfg.given else "18"
        if not steps.isdigit():
            raise ValueError(
                f"--{respacing} {steps}: --framework edm takes a number of Heun steps, such as 18"
            )
        denoiser = cast(Denoiser, model)
        along = AlongSigma(
            lambda network, _: BoundDenoiser(network, denoiser), SigmaGrid(int(steps))
        )
        return Sampler(along, shape, cfg.seed, "heun", rounded=True)
    changed = {"timestep_respacing": cfg.values[respacing], "loss_weighting": "uniform"}
    return process_sampler(_create_with_steps(cfg, **changed)[1], shape, cfg.seed)
