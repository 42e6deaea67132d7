"""What one of the sampling scripts is asked for, as one value: a SamplingRequest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .. import files
from ..data.image_set import ImageSet, open_image_set
from ..data.super_resolution import check_sizes
from ..sizes import parse_size
from .adopt import adopt_checkpoint_config, adopt_classifier_config
from .beside import config_beside
from .config import Config, from_values
from .identity import default_folder, what_decides_the_images
from .lambdas import settle_lambda
from .make_sampler import check_solver
from .models import network_flags, process_flags
from .sample_checks import check_request, classes_to_sample
from .solver import number_of_steps, sampler_text, sampling_precision, settle_sampler

NO_CHECKPOINT = "no checkpoint: give --model_path, such as runs/NAME/ema_0.9999_100000.pt"


@dataclass(frozen=True)
class ClassifierGuidance:
    """A classifier that guides towards the class, and how strongly.

    Args:
        network: flags of its network.
        precision: fp32 or fp16.
    """

    path: str
    scale: float
    network: Mapping[str, Any]
    precision: str

    @cached_property
    def identity(self) -> dict[str, Any]:
        """As the run's settings.yaml has it. Reads the file."""
        return {
            "classifier_path": os.path.basename(self.path),
            "classifier_sha256": files.sha256(self.path),
            "classifier_scale": self.scale,
        }


@dataclass(frozen=True)
class BaseImages:
    """The low-resolution images that are enlarged.

    Args:
        size: height and width that they must have, or with `resize` are brought to.
        num_classes: of a class-conditional model, which needs their labels; None for others.
        count: how many of them are used at most.
    """

    path: str
    size: tuple[int, int]
    channels: int
    resize: bool
    num_classes: int | None
    count: int

    @cached_property
    def images(self) -> ImageSet:
        """Opened on first use. ValueError if they cannot be, or do not fit."""
        return open_image_set(
            self.path,
            self.size,
            self.channels,
            exact=not self.resize,
            what="--base_samples",
            remedy="add --resize_base True to have them scaled and cropped as training images are, "
            "or give others",
            num_classes=self.num_classes,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """As the run's settings.yaml has it. Reads, and so checks, them all."""
        return {
            "base_samples": os.path.basename(os.path.normpath(self.path)),
            "base_count": len(self.images),
            "base_sha256": self.images.digest(min(len(self.images), self.count)),
        }


@dataclass(frozen=True)
class SamplingRequest:
    """All that sampling needs to know, checked.

    Args:
        network: flags that make the network. process: flags that make what samples it, {} for
            EDM's models, which have no process.
        image_size: height and width.
        solver: ddpm, ddim, heun, euler, ...; steps: how many it takes.
        eps_scaler, eps_scaler_k: lambda(t) = k t + b of epsilon scaling; b may be one number per
            step.
        class_ids: classes to draw labels from; None for a model that knows none.
        class_names: of the training images, where they are known; label k is class_names[k].
        precision: fp32, fp16 or bf16.
        num_samples: images to make; batch_size: of them at a time, per process.
        wanted_dir: --out_dir, or ''.
        default_count: num_samples was not given.
        text: the sampler, for people.
        notes: what the user should know.
        settled: the flags that all this was read from; make_sampler reads the solver's own.
    """

    model_path: str
    network: Mapping[str, Any]
    process: Mapping[str, Any]
    image_size: tuple[int, int]
    solver: str
    steps: int
    eps_scaler: float | list[float]
    eps_scaler_k: float
    guidance_scale: float
    class_ids: tuple[int, ...] | None
    class_names: tuple[str, ...]
    precision: str
    seed: int
    num_samples: int
    batch_size: int
    compile: bool
    save_png: bool
    wanted_dir: str
    default_count: bool
    text: str
    notes: tuple[str, ...]
    classifier: ClassifierGuidance | None = None
    base: BaseImages | None = None
    settled: Config = field(repr=False, kw_only=True)

    @property
    def given(self) -> Mapping[str, str]:
        """Which flags somebody has set, and where."""
        return self.settled.given

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the images depend on, as the run's settings.yaml has it. Reads the files that
        are named here, once.
        """
        inputs = [part.identity for part in (self.classifier, self.base) if part]
        return what_decides_the_images(self.settled, **(inputs[0] if inputs else {}))

    @cached_property
    def out_dir(self) -> str:
        """--out_dir, else OPENAI_LOGDIR, else a folder beside the checkpoint that is named after
        the identity.
        """
        words = f"{self.solver}-n{self.num_samples}"
        default = default_folder(self.model_path, "samples", words, self.identity)
        return files.results_folder(self.wanted_dir, default)


def sampling_request(
    script: str = "image_sample", config: str = "", **flags: Any
) -> SamplingRequest:
    """A request from flags by name, as image_sample.py takes them: model_path="ema.pt",
    num_samples=64, timestep_respacing="50", ...

    Args:
        script: image_sample, classifier_sample or super_res_sample.
        config: a YAML file with settings, as --config.

    Raises:
        ValueError: as on the command line.
    """
    return request_from(from_values(script, flags, config))


def request_from(cfg: Config) -> SamplingRequest:
    """The request that the merged settings of a sampling script make.

    Raises:
        ValueError: no checkpoint is given, or flags that contradict each other or the model.
    """
    _require_paths(cfg)
    cfg = adopt_beside(cfg)
    if "classifier_path" in cfg.values and (beside := config_beside(cfg.classifier_path)):
        cfg = adopt_classifier_config(cfg, beside)
    cfg = settle_sampler(cfg)
    notes = check_request(cfg)
    check_solver(cfg)
    cfg = settle_lambda(cfg)
    enlarges = "large_size" in cfg.values
    class_ids = None if enlarges else classes_to_sample(cfg)
    return SamplingRequest(
        model_path=cfg.model_path,
        network=network_flags(cfg),
        process=process_flags(cfg),
        image_size=parse_size(cfg.large_size if enlarges else cfg.image_size),
        solver=cfg.solver,
        steps=number_of_steps(cfg),
        eps_scaler=cfg.eps_scaler,
        eps_scaler_k=cfg.eps_scaler_k,
        guidance_scale=cfg.guidance_scale,
        class_ids=None if class_ids is None else tuple(class_ids),
        class_names=cfg.class_names,
        precision=sampling_precision(cfg),
        seed=cfg.seed,
        num_samples=cfg.num_samples,
        batch_size=cfg.batch_size,
        compile=cfg.compile,
        save_png=cfg.save_png,
        wanted_dir=cfg.out_dir,
        default_count="num_samples" not in cfg.given,
        text=sampler_text(cfg),
        notes=tuple(notes),
        classifier=_classifier(cfg) if "classifier_path" in cfg.values else None,
        base=_base(cfg) if enlarges else None,
        settled=cfg,
    )


def adopt_beside(cfg: Config) -> Config:
    """`cfg` with what lies beside its checkpoint."""
    beside = config_beside(cfg.model_path)
    return adopt_checkpoint_config(cfg, beside) if beside else cfg


def complete_settings(cfg: Config) -> Config:
    """What a script that studies a checkpoint needs besides its flags: the config beside it, the
    solver and lambda(t) settled.

    Raises:
        ValueError: no checkpoint is given, or its settings contradict the flags.
    """
    if not cfg.model_path:
        raise ValueError(NO_CHECKPOINT)
    cfg = settle_sampler(adopt_beside(cfg))
    check_solver(cfg)
    return settle_lambda(cfg) if "eps_schedule" in cfg.values else cfg


def _require_paths(cfg: Config) -> None:
    if not cfg.model_path and "classifier_path" in cfg.values:
        raise ValueError(
            "no diffusion model: give --model_path, such as runs/NAME/ema_0.9999_100000.pt"
        )
    if not cfg.model_path:
        raise ValueError(NO_CHECKPOINT)
    if not cfg.values.get("base_samples", True):
        raise ValueError(
            "no low-resolution images: give --base_samples, an npz, a folder or a zip of images"
        )
    if not cfg.values.get("classifier_path", True):
        raise ValueError(
            "no classifier: give --classifier_path, such as runs/NAME/model150000.pt "
            "(scripts/classifier_train.py makes one), or sample without guidance by "
            "scripts/image_sample.py"
        )


def _classifier(cfg: Config) -> ClassifierGuidance:
    flags = {name: cfg.values[name] for name in ("image_size", "in_channels", "num_classes")}
    return ClassifierGuidance(
        cfg.classifier_path,
        cfg.classifier_scale,
        {**flags, **cfg.section("classifier")},
        "fp16" if cfg.classifier_use_fp16 else "fp32",
    )


def _base(cfg: Config) -> BaseImages:
    large, small = parse_size(cfg.large_size), parse_size(cfg.small_size)
    check_sizes(large, small)
    return BaseImages(
        cfg.base_samples,
        small,
        cfg.in_channels,
        cfg.resize_base,
        cfg.num_classes if cfg.class_cond else None,
        cfg.num_samples,
    )
