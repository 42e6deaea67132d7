"""What the evaluation scripts share: flags -> a device and a feature space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import dist_util
from ..features.spaces import FeatureSpace, open_features


def choose_device(device: str) -> torch.device:
    """The device of a --device flag, for this process; after setup_dist.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but PyTorch sees no GPU: use --device auto, or install a CUDA build "
            "of torch"
        )
    return torch.device("cpu") if device == "cpu" else dist_util.dev()


def open_space(cfg: Any, say: Callable[[str], Any]) -> FeatureSpace:
    """The feature space that the flags name. Rank 0 goes first, so that a download happens once."""
    device = choose_device(cfg.device)

    def opened() -> FeatureSpace:
        return open_features(
            cfg.features,
            device=device,
            precision=cfg.precision,
            inception_weights=cfg.inception_weights,
            allow_download=cfg.download,
            log=say,
        )

    if dist_util.is_main():
        try:
            space, complaint = opened(), None
        except ValueError as error:
            space, complaint = None, str(error)
        dist_util.broadcast_object(complaint)
    else:
        complaint = dist_util.broadcast_object(None)
        space = None if complaint else opened()
    if complaint:
        raise ValueError(complaint)
    return space
