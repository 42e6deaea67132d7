"""From settings to objects: networks and processes under the factory names that existing scripts
call.

The factories take flags by name; which flags exist, and their defaults, is declared in config.py
alone.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from . import files
from .diffusion.kinds import LossType, ModelMeanType, ModelVarType
from .diffusion.loss_weighting import LossWeighting
from .diffusion.noise_schedule import get_named_beta_schedule
from .diffusion.respace import SpacedDiffusion, space_timesteps
from .interop.adm_checkpoint import load_for_sampling
from .interop.diffusers_models import ddpm_unet
from .interop.edm_networks import create_edm_denoiser  # noqa: F401 (its known place is here)
from .networks.trunk import require_divisible
from .networks.unet import (
    EncoderUNetModel,
    SuperResModel,
    UNetModel,
    attention_downsample_rates,
    default_channel_mult,
    parse_channel_mult,
)
from .settings.config import (
    Config,
    adopt_checkpoint_config,
    config_beside,
    nearest,
    published_lambda,
)
from .settings.edm import edm_denoiser
from .settings.flag import str2bool
from .settings.flags import SECTIONS
from .settings.lambda_file import check_origin, read_schedule
from .settings.sampling import sampler_kind, sampling_precision
from .sizes import parse_size as parse_image_size

NUM_CLASSES = 1000  # what existing scripts import, and the default of num_classes below; ours have --num_classes

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


def _channel_mult(
    text: str | Sequence[float], size: tuple[int, int], super_resolution: bool = False
) -> tuple[float, ...]:
    if not text:
        return default_channel_mult(size, super_resolution=super_resolution)
    mult = parse_channel_mult(text)
    require_divisible(size, len(mult))
    return mult


def _labels(class_cond: bool, num_classes: int, null_class: bool) -> int | None:
    """How many labels the network knows; None if it is unconditional."""
    if null_class and not class_cond:
        raise ValueError(
            "null_class is a label for 'no class', but the network has no labels: add "
            "--class_cond True, or leave --null_class out"
        )
    return num_classes + null_class if class_cond else None


def create_model(
    image_size: int | str | Sequence[int],
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str | Sequence[float] = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0.0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    num_classes: int = NUM_CLASSES,
    in_channels: int = 3,
    null_class: bool = False,
) -> UNetModel:
    """ADM's U-Net for images [N, in_channels, H, W]; 2 * in_channels outputs if learn_sigma.

    With null_class, label num_classes stands for "no class" (classifier-free guidance): one more
    row in label_emb.
    """
    size = parse_image_size(image_size)
    return UNetModel(
        image_size=size,
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention_downsample_rates(size, attention_resolutions),
        dropout=dropout,
        channel_mult=_channel_mult(channel_mult, size),
        num_classes=_labels(class_cond, num_classes, null_class),
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    resblock_updown: bool,
    use_fp16: bool,
    num_classes: int = NUM_CLASSES,
    in_channels: int = 3,
    channel_mult: str | Sequence[float] = "",
    use_new_attention_order: bool = False,
    null_class: bool = False,
) -> SuperResModel:
    """The U-Net that also sees a low-resolution image. small_size is not needed: the model
    upsamples what it is given.
    """
    size = parse_image_size(large_size)
    return SuperResModel(
        image_size=size,
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention_downsample_rates(size, attention_resolutions),
        dropout=dropout,
        channel_mult=_channel_mult(channel_mult, size, super_resolution=True),
        num_classes=_labels(class_cond, num_classes, null_class),
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )


def create_classifier(
    image_size: int | str | Sequence[int],
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    num_classes: int = NUM_CLASSES,
    in_channels: int = 3,
) -> EncoderUNetModel:
    """The downsampling half of the U-Net with a pooled head: logits [N, num_classes]."""
    size = parse_image_size(image_size)
    return EncoderUNetModel(
        image_size=size,
        in_channels=in_channels,
        model_channels=classifier_width,
        out_channels=num_classes,
        num_res_blocks=classifier_depth,
        attention_resolutions=attention_downsample_rates(size, classifier_attention_resolutions),
        channel_mult=default_channel_mult(size),
        use_fp16=classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
    input_perturbation: float = 0.0,
    eps_scaler: float | Sequence[float] = 1.0,
    eps_scaler_k: float = 0.0,
    loss_weighting: str = "uniform",
    p2_k: float = 1.0,
    p2_gamma: float = 1.0,
    min_snr_gamma: float = 5.0,
    weight_clamp: float = 0.0,
    input_pertub: float | None = None,
) -> SpacedDiffusion:
    """The process that the published flags describe; see GaussianDiffusion for gamma, lambda and
    errors, LossWeighting for loss_weighting to weight_clamp.
    """
    if learn_sigma:
        var_type = ModelVarType.LEARNED_RANGE
    else:
        var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        input_perturbation=input_perturbation,
        eps_scaler=eps_scaler,
        eps_scaler_k=eps_scaler_k,
        loss_weighting=LossWeighting(loss_weighting, p2_k, p2_gamma, min_snr_gamma, weight_clamp),
        input_pertub=input_pertub,
    )


def settle_lambda(cfg: Config) -> None:
    """Turn `--eps_schedule FILE` and `--eps_scaler published` into the eps_scaler and eps_scaler_k
    that they stand for.

    Raises:
        ValueError: both a schedule and another lambda are given, or the file or the table of
            published values does not fit; a schedule that was calibrated for another checkpoint is
            a warning.
    """
    if cfg.eps_schedule:
        if cfg.eps_scaler != 1.0 or cfg.eps_scaler_k != 0.0:
            raise ValueError(
                f"--eps_schedule {cfg.eps_schedule} says what lambda(t) is, but --eps_scaler "
                f"{cfg.eps_scaler} --eps_scaler_k {cfg.eps_scaler_k} says something else: give one "
                "of them"
            )
        if cfg.values.get("solver") in ("heun", "euler"):
            steps = cfg.edm_steps
        else:
            steps = len(
                space_timesteps(
                    cfg.diffusion_steps, cfg.timestep_respacing or [cfg.diffusion_steps]
                )
            )
        cfg.values["eps_scaler"], cfg.values["eps_scaler_k"] = read_schedule(
            cfg.eps_schedule, steps
        )
        for note in check_origin(
            cfg.eps_schedule,
            sampler_kind(cfg),
            {
                "eta": cfg.eta,
                "diffusion_steps": cfg.diffusion_steps,
                "timestep_respacing": cfg.timestep_respacing,
                "model_sha256": files.sha256(cfg.model_path)
                if files.exists(cfg.model_path)
                else "",
                "clip_denoised": cfg.clip_denoised,
                "guidance_scale": cfg.guidance_scale,
            },
        ):
            warnings.warn(note)
    elif cfg.eps_scaler == "published":
        cfg.values["eps_scaler"], cfg.values["eps_scaler_k"] = published_lambda(cfg)


def complete_settings(cfg: Config) -> None:
    """What a script that studies a checkpoint needs besides its flags: the config beside it, and
    lambda(t) settled.

    Raises:
        ValueError: no checkpoint is given, or its settings contradict the flags.
    """
    if not cfg.model_path:
        raise ValueError("no checkpoint: give --model_path, such as runs/NAME/ema_0.9999_100000.pt")
    if beside := config_beside(cfg.model_path):
        adopt_checkpoint_config(cfg, beside)
    if "eps_schedule" in cfg.values:
        settle_lambda(cfg)


def create_for_sampling(cfg: Config) -> tuple[nn.Module, Any]:
    """The network that the flags describe, without weights, and what samples it: a process that is
    respaced and knows lambda(t); for --sampler heun and euler the whole process, since these choose
    noise levels and scale epsilon themselves. EDM's models have no process: the second is the
    network, a denoiser.

    Raises:
        ValueError: an EDM model for a script that needs a process.
    """
    if cfg.framework == "edm":
        if "edm_steps" not in cfg.values:
            raise ValueError(
                f"{cfg.script} works on a process with T steps, and EDM's models (--framework edm) "
                "have none: image_sample samples them"
            )
        model = edm_denoiser(
            cfg, use_fp16=False
        )  # load_for_sampling converts it, to what sampling_precision says
        return model, model
    lambdas = {
        "timestep_respacing": cfg.timestep_respacing,
        "eps_scaler": cfg.values.get("eps_scaler", 1.0),
        "eps_scaler_k": cfg.values.get("eps_scaler_k", 0.0),
    }
    if cfg.values.get("solver") in ("heun", "euler"):
        lambdas = {}
    return create_model_and_diffusion(**cfg.section("model"), **cfg.sampling_process(), **lambdas)


def load_model_and_diffusion(cfg: Config) -> tuple[nn.Module, SpacedDiffusion]:
    """The network in --model_path, ready to be called, and the process to sample it by; after
    setup_dist.
    """
    model, diffusion = create_for_sampling(cfg)
    load_for_sampling(
        model, cfg.model_path, cfg.section("model"), sampling_precision(cfg), cfg.given
    )
    return model, diffusion


def create_model_and_diffusion(
    *, framework: str = "adm", **flags: Any
) -> tuple[nn.Module, SpacedDiffusion]:
    """Network and process from flags; those left out have their defaults.

    Args:
        framework: adm, or ddpm for DDPM's U-Net from diffusers.

    Raises:
        TypeError: a flag that neither knows.
        ValueError: input_pertub and input_perturbation given with different values, EDM (which has
            no such process), or what the factories refuse.
    """
    if framework == "adm":
        return _create_both("create_model_and_diffusion", create_model, ("model",), flags)
    if framework != "ddpm":
        raise ValueError(
            f"framework {framework!r} has no process with T steps: adm and ddpm have; see "
            "create_edm_denoiser"
        )
    refused = [
        name for name, without in _NOT_IN_DDPM.items() if flags.get(name, without) != without
    ]
    if refused:
        raise ValueError(
            f"--framework ddpm has no {' and no '.join(refused)}: its network is that of Ho et al. "
            "(2020), which --framework adm extends"
        )
    # Half precision is for load_for_sampling; the others have values that nobody gave.
    ignored = (
        "num_heads",
        "num_head_channels",
        "num_heads_upsample",
        "use_scale_shift_norm",
        "use_fp16",
    )
    return _create_both(
        "create_model_and_diffusion",
        ddpm_unet,
        ("model",),
        {name: value for name, value in flags.items() if name not in (*_NOT_IN_DDPM, *ignored)},
    )


# What ADM's U-Net added to DDPM's, and the value that means "not".
_NOT_IN_DDPM = {"resblock_updown": False, "use_new_attention_order": False}


def sr_create_model_and_diffusion(**flags: Any) -> tuple[SuperResModel, SpacedDiffusion]:
    """As create_model_and_diffusion, with large_size and small_size instead of image_size."""
    return _create_both(
        "sr_create_model_and_diffusion", sr_create_model, ("model", "super_res"), flags
    )


def create_classifier_and_diffusion(**flags: Any) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """As create_model_and_diffusion, for a classifier."""
    return _create_both(
        "create_classifier_and_diffusion", create_classifier, ("model", "classifier"), flags
    )


def _create_both(
    name: str, create: Callable[..., nn.Module], sections: Sequence[str], flags: dict[str, Any]
) -> tuple[Any, SpacedDiffusion]:
    """create(...) with the flags that it takes, and the process with the others; learn_sigma
    belongs to both.
    """
    declared = _defaults(flag.name for section in sections for flag in SECTIONS[section])
    network_flags = {
        key: flags.get(key, declared[key])
        for key in inspect.signature(create).parameters
        if key in declared
    }
    process_names = [flag.name for flag in SECTIONS["diffusion"]] + [
        "learn_sigma",
        "timestep_respacing",
        "eps_scaler",
        "eps_scaler_k",
        "input_pertub",
    ]
    for key in flags:
        if key not in network_flags and key not in process_names:
            raise TypeError(
                f"{name} got an unknown flag {key!r}."
                + nearest(key, [*network_flags, *process_names])
            )
    process_flags = {key: flags[key] for key in process_names if key in flags}
    process_flags["steps"] = process_flags.pop("diffusion_steps", 1000)
    return create(**network_flags), create_gaussian_diffusion(**process_flags)


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
