"""What image_nll is asked for, as one value: a LikelihoodRequest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .. import files
from ..data.image_set import ImageSet, open_image_set
from ..sizes import parse_size
from .config import Config, from_values
from .identity import default_folder, what_decides_the_likelihood
from .models import network_flags, process_flags
from .sampling import NO_CHECKPOINT, adopt_beside
from .solver import sampling_precision


@dataclass(frozen=True)
class LikelihoodRequest:
    """All that a measurement of likelihoods needs to know, checked.

    Args:
        network, process: flags that make them; the process is respaced.
        image_size: height and width.
        num_classes: of a class-conditional model, which needs the images' labels; None for others.
        asked_for: how many images were asked for; `count` of them are measured.
        settled: the flags that all this was read from.
    """

    model_path: str
    network: Mapping[str, Any]
    process: Mapping[str, Any]
    data_dir: str
    image_size: tuple[int, int]
    channels: int
    num_classes: int | None
    asked_for: int
    batch_size: int
    seed: int
    clip_denoised: bool
    precision: str
    wanted_dir: str
    notes: tuple[str, ...]
    settled: Config = field(repr=False, kw_only=True)

    @property
    def given(self) -> Mapping[str, str]:
        """Which flags somebody has set, and where."""
        return self.settled.given

    @cached_property
    def images(self) -> ImageSet:
        """Opened on first use. ValueError if they cannot be, or do not fit."""
        return open_image_set(
            self.data_dir,
            self.image_size,
            self.channels,
            num_classes=self.num_classes,
            what="--data_dir",
        )

    @property
    def count(self) -> int:
        """How many images are measured: those asked for, or all that there are."""
        return min(self.asked_for, len(self.images))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the result depends on, as the run's settings.yaml has it. Reads every image, so
        that a damaged one is found now.
        """
        return what_decides_the_likelihood(
            self.settled,
            data_dir=os.path.basename(os.path.normpath(self.data_dir)),
            data_sha256=self.images.digest(self.count),
            num_images=self.count,
        )

    @cached_property
    def out_dir(self) -> str:
        """--out_dir, else OPENAI_LOGDIR, else a folder beside the checkpoint."""
        default = default_folder(self.model_path, "nll", f"n{self.count}", self.identity)
        return files.results_folder(self.wanted_dir, default)


def likelihood_request(config: str = "", **flags: Any) -> LikelihoodRequest:
    """A request from flags by name, as image_nll.py takes them.

    Raises:
        ValueError: as on the command line.
    """
    return request_from(from_values("image_nll", flags, config))


def request_from(cfg: Config) -> LikelihoodRequest:
    """The request that the merged settings of image_nll make.

    Raises:
        ValueError: no checkpoint or no images are given, or the flags contradict the checkpoint.
    """
    if not cfg.model_path:
        raise ValueError(NO_CHECKPOINT)
    if not cfg.data_dir:
        raise ValueError("no images: give --data_dir, a folder, a zip or an npz of images")
    cfg = adopt_beside(cfg)
    return LikelihoodRequest(
        model_path=cfg.model_path,
        network=network_flags(cfg),
        process=process_flags(cfg),
        data_dir=cfg.data_dir,
        image_size=parse_size(cfg.image_size),
        channels=cfg.in_channels,
        num_classes=cfg.num_classes if cfg.class_cond else None,
        asked_for=cfg.num_samples,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        clip_denoised=cfg.clip_denoised,
        precision=sampling_precision(cfg),
        wanted_dir=cfg.out_dir,
        notes=tuple(cfg.notes_on_origin()),
        settled=cfg,
    )
