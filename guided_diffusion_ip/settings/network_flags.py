"""The flags of networks and processes: what a checkpoint is, and what it was trained for."""

from __future__ import annotations

import argparse

from ..diffusion.loss_weighting import RULES
from .flag import Flag, Role, image_size, mapping


def network_name(v: str) -> str:
    """the name of a network, or MODULE:CLASS"""
    from .models import NETWORKS
    from .own_network import is_own

    if not is_own(str(v)) and v not in NETWORKS:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(NETWORKS)}, or MODULE:CLASS for a network of your own, "
            f"got {v!r}"
        )
    return str(v)


MODEL = (
    Flag(
        "framework",
        "adm",
        Role.ARCHITECTURE,
        "whose network and process: adm; edm (networks behind a preconditioning, see section edm "
        "of --help); ddpm (DDPM's U-Net, from diffusers); or MODULE:CLASS, a network of your own",
        network_name,
        aliases=("network",),
    ),
    Flag(
        "image_size",
        64,
        Role.ARCHITECTURE,
        "size of the images: 64, or HEIGHTxWIDTH",
        image_size,
        in_weights=False,
    ),
    Flag(
        "in_channels",
        3,
        Role.ARCHITECTURE,
        "channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA)",
        choices=(1, 3, 4),
    ),
    Flag(
        "num_channels", 128, Role.ARCHITECTURE, "channels of the first level", least=1, most=65_536
    ),
    Flag("num_res_blocks", 2, Role.ARCHITECTURE, "residual blocks per level", least=1, most=1_000),
    Flag(
        "channel_mult",
        "",
        Role.ARCHITECTURE,
        "channels of each level as multiples of num_channels, such as 1,2,2,2; derived if empty",
    ),
    Flag(
        "num_heads",
        4,
        Role.ARCHITECTURE,
        "attention heads (unless num_head_channels is given)",
        in_weights=False,
    ),
    Flag(
        "num_head_channels", -1, Role.ARCHITECTURE, "channels per attention head; -1: use num_heads"
    ),
    Flag(
        "num_heads_upsample", -1, Role.ARCHITECTURE, "heads in the upsampling half; -1: num_heads"
    ),
    Flag(
        "attention_resolutions",
        "16,8",
        Role.ARCHITECTURE,
        "sizes of the feature maps that get attention (shorter side)",
    ),
    Flag("dropout", 0.0, Role.LOSS, "dropout in the residual blocks", least=0, most=1),
    Flag("class_cond", False, Role.ARCHITECTURE, "condition on class labels"),
    Flag(
        "num_classes",
        1000,
        Role.ARCHITECTURE,
        "number of classes if class_cond; a training that is not told takes as many as its "
        "images have",
        least=1,
        most=10_000_000,
    ),
    Flag(
        "null_class",
        False,
        Role.ARCHITECTURE,
        "one more label, number num_classes, for 'no class'; --class_dropout brings it along",
        in_weights=False,
    ),
    Flag("learn_sigma", False, Role.ARCHITECTURE, "predict the variance too"),
    Flag(
        "use_scale_shift_norm",
        True,
        Role.ARCHITECTURE,
        "timestep embedding as scale and shift after the norm, instead of a sum",
    ),
    Flag(
        "resblock_updown",
        False,
        Role.ARCHITECTURE,
        "residual blocks change the resolution, instead of plain convolutions",
    ),
    Flag(
        "use_new_attention_order",
        False,
        Role.ARCHITECTURE,
        "channel order of q, k, v in the attention weights",
        in_weights=False,
    ),
    Flag(
        "network_args",
        "",
        Role.ARCHITECTURE,
        'arguments of --network MODULE:CLASS beside our flags, such as "{width: 64}"',
        mapping,
        quiet=True,
    ),
    Flag("use_checkpoint", False, Role.SPEED, "gradient checkpointing: less memory, more time"),
    Flag("use_fp16", False, Role.ARITHMETIC, "half precision"),
)

LOSS_WEIGHTING = (
    Flag(
        "loss_weighting",
        "uniform",
        Role.LOSS,
        "weight of each timestep's MSE, by its signal-to-noise ratio: {choices}; training only",
        choices=lambda: RULES,
        aliases=("loss_weight",),
    ),
    Flag("p2_k", 1.0, Role.LOSS, "k of --loss_weighting p2, 1 / (k + SNR)^gamma", least=0),
    Flag("p2_gamma", 1.0, Role.LOSS, "gamma of --loss_weighting p2, published 0.5 and 1", least=0),
    Flag(
        "min_snr_gamma", 5.0, Role.LOSS, "gamma of --loss_weighting min_snr, min(SNR, gamma) / SNR"
    ),
    Flag(
        "weight_clamp",
        0.0,
        Role.LOSS,
        "largest weight that --loss_weighting may give; 0: no limit",
        least=0,
    ),
)

DIFFUSION = (
    Flag(
        "diffusion_steps",
        1000,
        Role.PROCESS,
        "T, the steps of the process",
        least=1,
        most=1_000_000,
    ),
    Flag(
        "noise_schedule", "linear", Role.PROCESS, "linear or cosine", choices=("linear", "cosine")
    ),
    Flag("use_kl", False, Role.LOSS, "train on the variational bound alone"),
    Flag("predict_xstart", False, Role.PROCESS, "predict x_0 instead of the noise"),
    Flag("rescale_timesteps", False, Role.PROCESS, "hand the network t * 1000 / T"),
    Flag(
        "rescale_learned_sigmas",
        False,
        Role.LOSS,
        "weigh the variational bound by T / 1000 when the variance is learned",
    ),
    Flag(
        "input_perturbation",
        0.0,
        Role.LOSS,
        "gamma of input perturbation: training only, 0 = off, published 0.1 to 0.15",
        aliases=("input_pertub",),
    ),
    *LOSS_WEIGHTING,
)

# EDM's networks and their losses; they take sizes, widths, classes, dropout and gamma from sections
# model and diffusion.
EDM = (
    Flag(
        "precond",
        "edm",
        Role.PROCESS,
        "preconditioning of the network (Table 1 of the EDM paper)",
        choices=("edm", "vp", "ve", "iddpm"),
    ),
    Flag(
        "edm_network",
        "ddpmpp",
        Role.ARCHITECTURE,
        "ddpmpp, ncsnpp, or adm (as EDM builds it)",
        choices=("ddpmpp", "ncsnpp", "adm"),
    ),
    Flag(
        "augment_dim",
        0,
        Role.ARCHITECTURE,
        "augmentation labels that the network takes; 9 for --augment and EDM's CIFAR-10 "
        "checkpoints",
        least=0,
        most=65_536,
    ),
    Flag(
        "label_dropout",
        0.0,
        Role.LOSS,
        "share of the class labels that EDM's networks drop in training",
        least=0,
        most=1,
    ),
    Flag("sigma_data", 0.5, Role.PROCESS, "standard deviation of the images, for --precond edm"),
    Flag(
        "edm_loss",
        "",
        Role.LOSS,
        "noise levels and weights in training: edm, vp or ve; default: what belongs to --precond",
        choices=("", "edm", "vp", "ve"),
    ),
    Flag("P_mean", -1.2, Role.LOSS, "mean of ln(sigma) in training, for the edm loss"),
    Flag("P_std", 1.2, Role.LOSS, "standard deviation of ln(sigma) in training, for the edm loss"),
    Flag(
        "augment",
        0.0,
        Role.LOSS,
        "probability of each of EDM's augmentations, published 0.12 to 0.15; needs --augment_dim 9",
        least=0,
        most=1,
    ),
)

CLASSIFIER = (
    Flag(
        "classifier_width",
        128,
        Role.ARCHITECTURE,
        "channels of the classifier's first level",
        least=1,
        most=65_536,
    ),
    Flag(
        "classifier_depth",
        2,
        Role.ARCHITECTURE,
        "residual blocks per level of the classifier",
        least=1,
        most=1_000,
    ),
    Flag(
        "classifier_attention_resolutions",
        "32,16,8",
        Role.ARCHITECTURE,
        "sizes of the classifier's feature maps that get attention",
    ),
    Flag(
        "classifier_pool",
        "attention",
        Role.ARCHITECTURE,
        "how the classifier sums up an image",
        choices=("adaptive", "attention", "spatial", "spatial_v2"),
    ),
    Flag(
        "classifier_use_scale_shift_norm",
        True,
        Role.ARCHITECTURE,
        "as use_scale_shift_norm, for the classifier",
    ),
    Flag(
        "classifier_resblock_updown",
        True,
        Role.ARCHITECTURE,
        "as resblock_updown, for the classifier",
    ),
    Flag("classifier_use_fp16", False, Role.ARITHMETIC, "as use_fp16, for the classifier"),
)

SUPER_RES = (
    Flag(
        "large_size",
        256,
        Role.ARCHITECTURE,
        "size of the images to make",
        image_size,
        in_weights=False,
    ),
    Flag(
        "small_size",
        64,
        Role.ARCHITECTURE,
        "size of the low-resolution images",
        image_size,
        in_weights=False,
    ),
)
