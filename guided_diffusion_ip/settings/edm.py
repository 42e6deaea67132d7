"""From flags to EDM's objects: the preconditioned network, and the process that trains it.

`cfg` is the merged settings of a script (config.Config): an object that has the flags as
attributes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..diffusion.edm_augmentation import Augmentation
from ..diffusion.edm_losses import EDM_LOSSES, EDMLoss, EDMProcess
from ..interop.edm_networks import EDM_NETWORKS, create_edm_denoiser
from ..networks.unet import parse_channel_mult
from ..sizes import ImageSize, parse_size
from .config import Config
from .flag import numbers
from .flags import names

AUGMENT_LABELS = 9  # that describe an augmented image to the network

# ADM's channel_mult depends on the size; these are EDM's.
_EDM_CHANNEL_MULTS = {"ddpmpp": (2, 2, 2), "ncsnpp": (2, 2, 2), "adm": (1, 2, 3, 4)}


def edm_network(
    image_size: ImageSize,
    in_channels: int,
    num_channels: int,
    channel_mult: str,
    num_res_blocks: int,
    attention_resolutions: str,
    dropout: float,
    class_cond: bool,
    num_classes: int,
    use_fp16: bool,
    precond: str,
    edm_network: str,
    augment_dim: int,
    label_dropout: float,
    sigma_data: float,
) -> nn.Module:
    """The preconditioned EDM network that sections model and edm describe: D(x, sigma, labels).

    Raises:
        ValueError: images that are not square, or what the network refuses.
    """
    height, width = parse_size(image_size)
    if height != width:
        raise ValueError(f"--framework edm makes square images, not {image_size}")
    mult = parse_channel_mult(channel_mult) if channel_mult else _EDM_CHANNEL_MULTS[edm_network]
    constants: dict[str, Any] = {"sigma_data": sigma_data} if precond == "edm" else {}
    return create_edm_denoiser(
        precond,
        img_resolution=height,
        img_channels=in_channels,
        label_dim=num_classes if class_cond else 0,
        use_fp16=use_fp16,
        **constants,
        **EDM_NETWORKS[edm_network],
        model_channels=num_channels,
        channel_mult=[int(m) if m == int(m) else m for m in mult],
        num_blocks=num_res_blocks,
        attn_resolutions=numbers(attention_resolutions, "attention_resolutions"),
        dropout=dropout,
        augment_dim=augment_dim,
        label_dropout=label_dropout,
    )


def edm_process(cfg: Config) -> EDMProcess:
    """What trains an EDM network: noise levels and weights of --edm_loss, gamma, augmentation.

    Raises:
        ValueError: settings of a process with T steps, or augmentation without labels for it.
    """
    for name in (*names("diffusion"), "timestep_respacing"):
        if name != "input_perturbation" and cfg.on_command_line(name):
            raise ValueError(
                f"--{name} {getattr(cfg, name)} belongs to a process with T steps, and --framework "
                "edm has none: leave it out (--edm_loss, --P_mean, --P_std say which noise levels "
                "are trained)"
            )
    if cfg.class_dropout:
        raise ValueError(
            f"--class_dropout {cfg.class_dropout:g} replaces labels by 'no class', for which EDM's "
            "networks have no label: use --label_dropout"
        )
    if cfg.augment and cfg.augment_dim != AUGMENT_LABELS:
        raise ValueError(
            f"--augment {cfg.augment:g} tells the network what was done to an image by "
            f"{AUGMENT_LABELS} numbers: add --augment_dim {AUGMENT_LABELS}"
        )
    kind = cfg.edm_loss or (
        "edm" if cfg.precond == "edm" else "ve" if cfg.precond == "ve" else "vp"
    )
    loss = EDMLoss(cfg.P_mean, cfg.P_std, cfg.sigma_data) if kind == "edm" else EDM_LOSSES[kind]()
    return EDMProcess(
        loss, cfg.input_perturbation, Augmentation(cfg.augment) if cfg.augment else None
    )
