"""EDM's networks from the arguments with which they are published: preconditioning, architecture,
and the settings of both.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from ..diffusion.denoiser import PRECONDITIONINGS, Preconditioning, iDDPMPrecond
from ..networks.edm_unets import DhariwalUNet, EDMUNet, SongUNet

NETWORKS: dict[str, type[EDMUNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
# What --edm_network names, as published for CIFAR-10 (ddpmpp, ncsnpp) and ImageNet-64 (adm).
EDM_NETWORKS: dict[str, dict[str, Any]] = {
    "ddpmpp": {
        "model_type": "SongUNet",
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
    },
    "ncsnpp": {
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
    },
    "adm": {"model_type": "DhariwalUNet"},
}
# Published with each preconditioning, used where model_type is not given.
DEFAULT_NETWORK = {
    "edm": "DhariwalUNet",
    "vp": "SongUNet",
    "ve": "SongUNet",
    "iddpm": "DhariwalUNet",
}


def create_edm_denoiser(
    precond: str,
    *,
    img_resolution: int,
    img_channels: int = 3,
    label_dim: int = 0,
    use_fp16: bool = False,
    model_type: str | None = None,
    **kwargs: Any,
) -> Preconditioning:
    """A preconditioned EDM network D(x, sigma, labels), with the published parameter names
    (`model.enc.32x32_conv.weight`, ...).

    Args:
        precond: edm, vp, ve or iddpm, or the name of the class, such as EDMPrecond.
        img_resolution: side of the images; img_channels: their channels.
        label_dim: number of classes; 0: unconditional.
        use_fp16: call the network in float16 on CUDA.
        model_type: SongUNet or DhariwalUNet; None: SongUNet for vp and ve, DhariwalUNet for edm and
            iddpm.
        kwargs: what the preconditioning and the network have besides, such as sigma_data,
            model_channels, augment_dim.

    Raises:
        TypeError: an argument that neither has.
        ValueError: unknown names, or what the network refuses.
    """
    name = next(
        (key for key, cls in PRECONDITIONINGS.items() if precond in (key, cls.__name__)), None
    )
    if name is None:
        classes = ", ".join(cls.__name__ for cls in PRECONDITIONINGS.values())
        raise ValueError(
            f"unknown precond {precond!r}: use one of {', '.join(PRECONDITIONINGS)} (or {classes})"
        )
    model_type = model_type or DEFAULT_NETWORK[name]
    if model_type not in NETWORKS:
        raise ValueError(f"unknown model_type {model_type!r}: use one of {', '.join(NETWORKS)}")
    wrapper, network = PRECONDITIONINGS[name], NETWORKS[model_type]
    of_wrapper = _own_arguments(wrapper, {"network", "label_dim", "use_fp16"})
    of_network = _own_arguments(
        network, {"img_resolution", "in_channels", "out_channels", "label_dim"}
    )
    for key in kwargs:
        if key not in (known := [*of_wrapper, *of_network]):
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise TypeError(
                f"{wrapper.__name__} of {model_type} has no argument {key!r}."
                + (f" Did you mean {close[0]}?" if close else f" It has {', '.join(known)}")
            )
    outputs = (
        2 * img_channels if wrapper is iDDPMPrecond else img_channels
    )  # iDDPM's networks predict the variance as well
    model = network(
        img_resolution,
        img_channels,
        outputs,
        label_dim,
        **{k: v for k, v in kwargs.items() if k in of_network},
    )
    return wrapper(
        model,
        use_fp16=use_fp16,
        label_dim=label_dim,
        **{k: v for k, v in kwargs.items() if k in of_wrapper},
    )


def _own_arguments(cls: type, settled: set[str]) -> list[str]:
    """Names that the constructor takes, but for those that are settled elsewhere."""
    return [name for name in inspect.signature(cls).parameters if name not in settled]
