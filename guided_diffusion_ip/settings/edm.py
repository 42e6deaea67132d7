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
from .flags import SECTIONS

AUGMENT_LABELS = 9  # that describe an augmented image to the network

# ADM's channel_mult depends on the size; these are EDM's.
_EDM_CHANNEL_MULTS = {"ddpmpp": (2, 2, 2), "ncsnpp": (2, 2, 2), "adm": (1, 2, 3, 4)}


def edm_denoiser(cfg: Any, use_fp16: bool | None = None) -> nn.Module:
    """The preconditioned EDM network that sections model and edm describe: D(x, sigma, labels).

    Raises:
        ValueError: flags that EDM's networks do not have.
    """
    if not isinstance(cfg.image_size, int):
        raise ValueError(f"--framework edm makes square images, not {cfg.image_size}")
    for name, without in (
        ("learn_sigma", False),
        ("null_class", False),
        ("resblock_updown", False),
        ("use_new_attention_order", False),
    ):
        if getattr(cfg, name) != without:
            raise ValueError(
                f"--{name} {getattr(cfg, name)} belongs to ADM's U-Net, and EDM's networks have no "
                "such thing: leave it out"
            )
    precond = {"sigma_data": cfg.sigma_data} if cfg.precond == "edm" else {}
    mult = (
        parse_channel_mult(cfg.channel_mult)
        if cfg.channel_mult
        else _EDM_CHANNEL_MULTS[cfg.edm_network]
    )
    return create_edm_denoiser(
        cfg.precond,
        img_resolution=cfg.image_size,
        img_channels=cfg.in_channels,
        label_dim=cfg.num_classes if cfg.class_cond else 0,
        use_fp16=cfg.use_fp16 if use_fp16 is None else use_fp16,
        **precond,
        **EDM_NETWORKS[cfg.edm_network],
        model_channels=cfg.num_channels,
        channel_mult=[int(m) if m == int(m) else m for m in mult],
        num_blocks=cfg.num_res_blocks,
        attn_resolutions=[
            int(size) for size in cfg.attention_resolutions.split(",") if size.strip()
        ],
        dropout=cfg.dropout,
        augment_dim=cfg.augment_dim,
        label_dropout=cfg.label_dropout,
    )


def edm_process(cfg: Any) -> EDMProcess:
    """What trains an EDM network: noise levels and weights of --edm_loss, gamma, augmentation.

    Raises:
        ValueError: settings of a process with T steps, or augmentation without labels for it.
    """
    for name in [
        flag.name for flag in SECTIONS["diffusion"] if flag.name != "input_perturbation"
    ] + ["timestep_respacing"]:
        if cfg.given.get(name, "").startswith("--"):
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
