"""improved_diffusion.script_util: its factories and defaults, which differ from guided_diffusion's.

The networks and the process are those of compat.script_util: attention at fixed numbers of heads,
no residual blocks that resample, sigma_small as a flag, timesteps and learned variances rescaled
unless a flag says otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from . import script_util
from .script_util import (  # noqa: F401 (their known place is here)
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_gaussian_diffusion,
    str2bool,
)

_NOT_THERE = (
    "channel_mult",
    "num_head_channels",
    "resblock_updown",
    "use_fp16",
    "use_new_attention_order",
)
_RESCALED = {"rescale_timesteps": True, "rescale_learned_sigmas": True}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of a U-Net and its process."""
    flags = {**script_util.model_and_diffusion_defaults(), **_RESCALED, "sigma_small": False}
    return {name: value for name, value in flags.items() if name not in _NOT_THERE}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """The flags of a super-resolution U-Net and its process."""
    flags = {**script_util.sr_model_and_diffusion_defaults(), **_RESCALED}
    return {name: value for name, value in flags.items() if name not in _NOT_THERE}


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    sigma_small: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    **new_flags: Any,
) -> tuple[nn.Module, script_util.SpacedDiffusion]:
    """A U-Net and its process; new_flags as in guided_diffusion's."""
    classes, process = script_util.split_new_flags("create_model_and_diffusion", new_flags)
    model = create_model(
        image_size,
        num_channels,
        num_res_blocks,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
        **classes,
    )
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps,
        learn_sigma=learn_sigma,
        sigma_small=sigma_small,
        noise_schedule=noise_schedule,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        timestep_respacing=timestep_respacing,
        **process,
    )
    return model, diffusion


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    *,
    num_classes: int | None = None,
) -> script_util.UNetModel:
    """A U-Net for RGB images, of num_classes (NUM_CLASSES if None) labels if class_cond."""
    return script_util.create_model(
        image_size,
        num_channels,
        num_res_blocks,
        learn_sigma=learn_sigma,
        class_cond=class_cond,
        use_checkpoint=use_checkpoint,
        attention_resolutions=attention_resolutions,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        dropout=dropout,
        num_classes=num_classes,
    )


def sr_create_model_and_diffusion(
    large_size: int,
    small_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    **new_flags: Any,
) -> tuple[nn.Module, script_util.SpacedDiffusion]:
    """As create_model_and_diffusion, for a super-resolution U-Net."""
    return script_util.sr_create_model_and_diffusion(
        large_size,
        small_size,
        class_cond,
        learn_sigma,
        num_channels,
        num_res_blocks,
        num_heads,
        num_heads_upsample=num_heads_upsample,
        attention_resolutions=attention_resolutions,
        dropout=dropout,
        diffusion_steps=diffusion_steps,
        noise_schedule=noise_schedule,
        timestep_respacing=timestep_respacing,
        use_kl=use_kl,
        predict_xstart=predict_xstart,
        rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas,
        use_checkpoint=use_checkpoint,
        use_scale_shift_norm=use_scale_shift_norm,
        **new_flags,
    )
