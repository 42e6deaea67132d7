"""The factories under the names that existing scripts call, and the flags that they pass on.

Which flags exist, and their defaults, is declared in settings/; the factories are there too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from torch import nn

from .diffusion.respace import SpacedDiffusion
from .interop.edm_networks import create_edm_denoiser  # noqa: F401 (its known place is here)
from .networks.unet import EncoderUNetModel, SuperResModel
from .settings import models
from .settings.factories import (  # noqa: F401 (likewise)
    create_classifier,
    create_gaussian_diffusion,
    create_model,
    sr_create_model,
)
from .settings.flag import str2bool
from .settings.flags import SECTIONS
from .sizes import parse_size as parse_image_size  # noqa: F401 (likewise)

# What existing scripts import, and the default of num_classes below; ours have --num_classes.
NUM_CLASSES = 1000

# The published process flags; input_pertub is their spelling of gamma.
_PROCESS = (
    "learn_sigma",
    "diffusion_steps",
    "noise_schedule",
    "timestep_respacing",
    "use_kl",
    "predict_xstart",
    "rescale_timesteps",
    "rescale_learned_sigmas",
)
_UNET = (
    "image_size",
    "num_channels",
    "num_res_blocks",
    "num_heads",
    "num_heads_upsample",
    "num_head_channels",
    "attention_resolutions",
    "channel_mult",
    "dropout",
    "class_cond",
    "use_checkpoint",
    "use_scale_shift_norm",
    "resblock_updown",
    "use_fp16",
    "use_new_attention_order",
)


def _defaults(names: Iterable[str]) -> dict[str, Any]:
    sections = ("model", "classifier", "super_res", "diffusion", "sample")
    declared = {flag.name: flag.default for section in sections for flag in SECTIONS[section]}
    declared["num_classes"] = NUM_CLASSES  # read here, so that a script may set it
    return {name: declared[name] for name in names}


def diffusion_defaults() -> dict[str, Any]:
    """The published process flags."""
    return _defaults(_PROCESS)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The published flags of a U-Net and its process, and eps_scaler, eps_scaler_k, num_classes."""
    return {
        **_defaults(_UNET),
        "input_pertub": 0.0,
        **diffusion_defaults(),
        **_defaults(("eps_scaler", "eps_scaler_k", "num_classes")),
    }


def classifier_defaults() -> dict[str, Any]:
    """The published flags of a classifier."""
    return _defaults(("image_size", *(flag.name for flag in SECTIONS["classifier"])))


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """The published flags of a classifier and its process, and num_classes."""
    return {**classifier_defaults(), **diffusion_defaults(), **_defaults(("num_classes",))}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """The published flags of a super-resolution U-Net and its process, and eps_scaler,
    eps_scaler_k, num_classes.
    """
    not_there = ("image_size", "channel_mult", "use_new_attention_order", "input_pertub")
    flags = {
        name: value
        for name, value in model_and_diffusion_defaults().items()
        if name not in not_there
    }
    return {**flags, **_defaults(("large_size", "small_size"))}


def create_model_and_diffusion(**flags: Any) -> tuple[nn.Module, SpacedDiffusion]:
    """Network and process from flags; those left out have their defaults. See
    settings/models.py.
    """
    return models.create_model_and_diffusion(**{"num_classes": NUM_CLASSES, **flags})


def sr_create_model_and_diffusion(**flags: Any) -> tuple[SuperResModel, SpacedDiffusion]:
    """As create_model_and_diffusion, with large_size and small_size instead of image_size."""
    return models.sr_create_model_and_diffusion(**{"num_classes": NUM_CLASSES, **flags})


def create_classifier_and_diffusion(**flags: Any) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """As create_model_and_diffusion, for a classifier."""
    return models.create_classifier_and_diffusion(**{"num_classes": NUM_CLASSES, **flags})


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """One option for each entry, typed like its default; a None default takes text."""
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The named entries of a namespace."""
    return {key: getattr(args, key) for key in keys}


def parameter_count(model: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in model.parameters())
