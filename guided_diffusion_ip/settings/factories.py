"""From flags to networks and processes, one factory each; models.py chooses among them."""

from __future__ import annotations

from collections.abc import Sequence

from ..diffusion.kinds import LossType, ModelMeanType, ModelVarType
from ..diffusion.loss_weighting import LossWeighting
from ..diffusion.noise_schedule import get_named_beta_schedule
from ..diffusion.respace import SpacedDiffusion, space_timesteps
from ..networks.trunk import require_divisible
from ..networks.unet import (
    EncoderUNetModel,
    SuperResModel,
    UNetModel,
    attention_downsample_rates,
    default_channel_mult,
    parse_channel_mult,
)
from ..sizes import ImageSize, parse_size


def _channel_mult(
    text: str | Sequence[float], size: tuple[int, int], super_resolution: bool = False
) -> tuple[float, ...]:
    if not text:
        return default_channel_mult(size, super_resolution=super_resolution)
    mult = parse_channel_mult(text)
    require_divisible(size, len(mult))
    return mult


def number_of_labels(class_cond: bool, num_classes: int, null_class: bool) -> int | None:
    """How many labels the network knows; None if it is unconditional."""
    if null_class and not class_cond:
        raise ValueError(
            "null_class is a label for 'no class', but the network has no labels: add "
            "--class_cond True, or leave --null_class out"
        )
    return num_classes + null_class if class_cond else None


def create_model(
    image_size: ImageSize,
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
    num_classes: int = 1000,
    in_channels: int = 3,
    null_class: bool = False,
) -> UNetModel:
    """ADM's U-Net for images [N, in_channels, H, W]; 2 * in_channels outputs if learn_sigma.

    With null_class, label num_classes stands for "no class" (classifier-free guidance): one more
    row in label_emb.
    """
    size = parse_size(image_size)
    return UNetModel(
        image_size=size,
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention_downsample_rates(size, attention_resolutions),
        dropout=dropout,
        channel_mult=_channel_mult(channel_mult, size),
        num_classes=number_of_labels(class_cond, num_classes, null_class),
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
    num_classes: int = 1000,
    in_channels: int = 3,
    channel_mult: str | Sequence[float] = "",
    use_new_attention_order: bool = False,
    null_class: bool = False,
) -> SuperResModel:
    """The U-Net that also sees a low-resolution image. small_size is not needed: the model
    upsamples what it is given.
    """
    size = parse_size(large_size)
    return SuperResModel(
        image_size=size,
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention_downsample_rates(size, attention_resolutions),
        dropout=dropout,
        channel_mult=_channel_mult(channel_mult, size, super_resolution=True),
        num_classes=number_of_labels(class_cond, num_classes, null_class),
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
    image_size: ImageSize,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    num_classes: int = 1000,
    in_channels: int = 3,
) -> EncoderUNetModel:
    """The downsampling half of the U-Net with a pooled head: logits [N, num_classes]."""
    size = parse_size(image_size)
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
