"""guided_diffusion.script_util: its factories with its signatures, its defaults with its keys.

What the factories need of this module and of gaussian_diffusion (create_model, UNetModel,
SpacedDiffusion, get_named_beta_schedule, ...) is looked up at each call, and may be replaced.

The flags that are new here (NEW_FLAGS, and num_classes) are no keys of the defaults: scripts that
fill these from an object of their own, or have such a flag themselves, need not know of them.
add_dict_to_argparser adds them as options, and args_to_dict passes on those that were set.
"""

from __future__ import annotations

import argparse
import inspect  # noqa: F401 (part of what `import *` brings)
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .. import script_util as _ours
from ..networks.unet import attention_downsample_rates, default_channel_mult, parse_channel_mult
from ..script_util import classifier_defaults, diffusion_defaults, str2bool  # noqa: F401
from ..settings.yaml_file import nearest
from . import gaussian_diffusion as gd
from .respace import SpacedDiffusion, space_timesteps
from .unet import EncoderUNetModel, SuperResModel, UNetModel

# Scripts import it, or set it; what the networks have where num_classes is not given.
NUM_CLASSES = 1000

# Of the process: name -> the value that means "not".
NEW_FLAGS = {"input_pertub": 0.0, "eps_scaler": 1.0, "eps_scaler_k": 0.0}
_SPELLINGS = {**NEW_FLAGS, "input_perturbation": 0.0}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of a U-Net and its process."""
    return _without_new(_ours.model_and_diffusion_defaults())


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of a classifier and its process."""
    return _without_new(_ours.classifier_and_diffusion_defaults())


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of a super-resolution U-Net and its process."""
    return _without_new(_ours.sr_model_and_diffusion_defaults())


def _without_new(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in flags.items()
        if name not in NEW_FLAGS and name != "num_classes"
    }


def create_model_and_diffusion(
    image_size: int = 64,
    class_cond: bool = False,
    learn_sigma: bool = False,
    num_channels: int = 128,
    num_res_blocks: int = 2,
    channel_mult: str = "",
    num_heads: int = 4,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    attention_resolutions: str = "16,8",
    dropout: float = 0.0,
    diffusion_steps: int = 1000,
    noise_schedule: str = "linear",
    timestep_respacing: str = "",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    use_checkpoint: bool = False,
    use_scale_shift_norm: bool = True,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    **new_flags: Any,
) -> tuple[nn.Module, SpacedDiffusion]:
    """A U-Net and its process.

    Args:
        new_flags: input_pertub (or input_perturbation), eps_scaler, eps_scaler_k, num_classes.

    Raises:
        TypeError: another flag.
        ValueError: a value that network or process refuse.
    """
    classes, process = split_new_flags("create_model_and_diffusion", new_flags)
    model = create_model(
        image_size,
        num_channels,
        num_res_blocks,
        channel_mult=channel_mult,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
        resblock_updown=resblock_updown,
        use_fp16=use_fp16,
        use_new_attention_order=use_new_attention_order,
        **classes,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
        **process,
    )
    return model, diffusion


def sr_create_model_and_diffusion(
    large_size: int = 256,
    small_size: int = 64,
    class_cond: bool = False,
    learn_sigma: bool = False,
    num_channels: int = 128,
    num_res_blocks: int = 2,
    num_heads: int = 4,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    attention_resolutions: str = "16,8",
    dropout: float = 0.0,
    diffusion_steps: int = 1000,
    noise_schedule: str = "linear",
    timestep_respacing: str = "",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    use_checkpoint: bool = False,
    use_scale_shift_norm: bool = True,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    **new_flags: Any,
) -> tuple[nn.Module, SpacedDiffusion]:
    """As create_model_and_diffusion, for a super-resolution U-Net."""
    classes, process = split_new_flags("sr_create_model_and_diffusion", new_flags)
    model = sr_create_model(
        large_size,
        small_size,
        num_channels,
        num_res_blocks,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
        resblock_updown=resblock_updown,
        use_fp16=use_fp16,
        **classes,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
        **process,
    )
    return model, diffusion


def create_classifier_and_diffusion(
    image_size: int = 64,
    classifier_use_fp16: bool = False,
    classifier_width: int = 128,
    classifier_depth: int = 2,
    classifier_attention_resolutions: str = "32,16,8",
    classifier_use_scale_shift_norm: bool = True,
    classifier_resblock_updown: bool = True,
    classifier_pool: str = "attention",
    learn_sigma: bool = False,
    diffusion_steps: int = 1000,
    noise_schedule: str = "linear",
    timestep_respacing: str = "",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    **new_flags: Any,
) -> tuple[nn.Module, SpacedDiffusion]:
    """As create_model_and_diffusion, for a classifier."""
    classes, process = split_new_flags("create_classifier_and_diffusion", new_flags)
    classifier = create_classifier(
        image_size,
        classifier_use_fp16,
        classifier_width,
        classifier_depth,
        classifier_attention_resolutions,
        classifier_use_scale_shift_norm,
        classifier_resblock_updown,
        classifier_pool,
        **classes,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
        **process,
    )
    return classifier, diffusion


def split_new_flags(name: str, flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(num_classes, those of the process), each only if it changes something: a create_model that
    somebody put in the place of ours takes no more than guided-diffusion's arguments.
    """
    for flag in flags:
        if flag not in _SPELLINGS and flag != "num_classes":
            raise TypeError(
                f"{name} got an unknown flag {flag!r}."
                + nearest(flag, [*_without_new(model_and_diffusion_defaults()), *_SPELLINGS])
            )
    given = flags.get("num_classes", NUM_CLASSES)
    classes = {} if given == NUM_CLASSES else {"num_classes": given}
    process = {flag: flags[flag] for flag, off in _SPELLINGS.items() if flags.get(flag, off) != off}
    return classes, process


def create_model(
    image_size: int,
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
    *,
    num_classes: int | None = None,
) -> UNetModel:
    """A U-Net for RGB images, of num_classes (NUM_CLASSES if None) labels if class_cond."""
    if channel_mult:
        mult = parse_channel_mult(channel_mult)
    else:
        mult = default_channel_mult(image_size)
    return UNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention_downsample_rates(image_size, attention_resolutions),
        dropout=dropout,
        channel_mult=mult,
        num_classes=_classes(num_classes) if class_cond else None,
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
    *,
    num_classes: int | None = None,
) -> SuperResModel:
    """A U-Net that also takes a smaller RGB image, of any size."""
    return SuperResModel(
        image_size=large_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention_downsample_rates(large_size, attention_resolutions),
        dropout=dropout,
        channel_mult=default_channel_mult(large_size, super_resolution=True),
        num_classes=_classes(num_classes) if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
    )


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    *,
    num_classes: int | None = None,
) -> EncoderUNetModel:
    """A classifier of RGB images: logits [N, num_classes], or NUM_CLASSES of them if None."""
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=classifier_width,
        out_channels=_classes(num_classes),
        num_res_blocks=classifier_depth,
        attention_resolutions=attention_downsample_rates(
            image_size, classifier_attention_resolutions
        ),
        channel_mult=default_channel_mult(image_size),
        use_fp16=classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def _classes(num_classes: int | None) -> int:
    return NUM_CLASSES if num_classes is None else num_classes


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
    input_pertub: float = 0.0,
    **options: Any,
) -> SpacedDiffusion:
    """The process that the flags describe.

    Args:
        options: further ones of SpacedDiffusion, such as eps_scaler and eps_scaler_k.
    """
    if learn_sigma:
        var_type = gd.ModelVarType.LEARNED_RANGE
    elif sigma_small:
        var_type = gd.ModelVarType.FIXED_SMALL
    else:
        var_type = gd.ModelVarType.FIXED_LARGE
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = gd.LossType.RESCALED_MSE
    else:
        loss_type = gd.LossType.MSE
    if input_pertub:
        options["input_pertub"] = input_pertub
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        **options,
    )


class _SetNumClasses(argparse.Action):
    """--num_classes N: NUM_CLASSES is N from here on, for networks as for labels."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        global NUM_CLASSES
        NUM_CLASSES = values
        setattr(namespace, self.dest, values)


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """One option for each entry, typed like its default; a None default takes text. Where these
    are the flags of a process and its network, the new ones too, unless the script has its own.
    """
    _ours.add_dict_to_argparser(parser, default_dict)
    if not default_dict.keys() >= diffusion_defaults().keys():
        return
    if "num_channels" in default_dict:
        for name, off in NEW_FLAGS.items():
            _add_unless_there(parser, f"--{name}", default=off, type=float)
    _add_unless_there(parser, "--num_classes", default=NUM_CLASSES, type=int, action=_SetNumClasses)
    # An option of that name that the script adds later takes the place of ours (a parser adds them
    # to this group of its own).
    parser._optionals.conflict_handler = "resolve"


def _add_unless_there(parser: argparse.ArgumentParser, option: str, **how: Any) -> None:
    try:
        parser.add_argument(option, **how)
    except argparse.ArgumentError:
        pass  # the script's own


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The named entries of a namespace. Where the keys are those of a network and its process, also
    what was given for the new flags of the process.
    """
    found = {key: getattr(args, key) for key in keys}
    if found.keys() >= {"num_channels", *diffusion_defaults()}:
        for name, off in NEW_FLAGS.items():
            value = getattr(args, name, off)
            if value != off:
                found[name] = value
    return found
