"""Every flag, once: name, default, role, meaning, and which script takes it. config.py fills them
in.

The lists of flags that the rest of this room needs are made here, from sections and roles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from .evaluate_flags import EVALUATE, FEATURES
from .flag import Flag, Role, size_or_none
from .network_flags import CLASSIFIER, DIFFUSION, EDM, LOSS_WEIGHTING, MODEL, SUPER_RES
from .sample_flags import LIKELIHOOD, MEASURED_IMAGES, RESPACING, SAMPLE
from .train_flags import EVALUATING, TRAIN

SECTIONS: dict[str, tuple[Flag, ...]] = {
    "model": MODEL,
    "classifier": CLASSIFIER,
    "super_res": SUPER_RES,
    "edm": EDM,
    "diffusion": DIFFUSION,
    "train": TRAIN,
    "sample": SAMPLE,
    "evaluate": EVALUATE,
}
# The sections that say what a checkpoint is.
DESCRIBING = ("model", "super_res", "classifier", "edm", "diffusion")


def names(
    sections: str | Iterable[str], *roles: Role, solvers: str | None = None
) -> tuple[str, ...]:
    """The flags of these sections, in the order of their declaration.

    Args:
        roles: only those of these roles; none given: of all.
        solvers: only those of these solvers, "" being those that all have; None: all.
    """
    sections = [sections] if isinstance(sections, str) else sections
    return tuple(
        flag.name
        for section in sections
        for flag in SECTIONS[section]
        if (not roles or flag.role in roles) and solvers in (None, flag.solvers)
    )


# What a trained checkpoint does without: sampling neither reads it nor asks that it agrees.
TRAINING_ONLY = names("diffusion", Role.LOSS)
# What may differ between a checkpoint and the flags that it is called with.
NOT_ARCHITECTURE = names(DESCRIBING, Role.LOSS, Role.SPEED, Role.ARITHMETIC)
# What two descriptions of one checkpoint may differ in.
SPEED_ONLY = names(DESCRIBING, Role.SPEED, Role.ARITHMETIC)
# Flags of one start: --resume FOLDER does not take them over.
OF_A_START = names("train", Role.START, Role.PLACE)
# What neither names nor shapes of weights tell, by framework: where nothing lies beside a
# checkpoint, flags or defaults say it.
_UNTOLD = sorted(
    (
        flag.name
        for name in ("model", "super_res")
        for flag in SECTIONS[name]
        if not flag.in_weights
    ),
    key=lambda name: (not name.endswith("_size"), name),  # sizes first
)
_OF_PROCESS = ("image_size", *names("diffusion", Role.PROCESS))
NOT_IN_WEIGHTS = {
    "adm": (*_UNTOLD, *_OF_PROCESS[1:]),
    "edm": ("image_size", *names("edm", Role.PROCESS)),
    "": _OF_PROCESS,  # any other
}
TRAIN_RESPACING = replace(RESPACING, role=Role.PROCESS)


@dataclass(frozen=True)
class Script:
    """What a script reads.

    Args:
        sections: whole sections.
        extra: flags of its own, or of another section that it takes only if asked for explicitly.
        without: flags of its sections that have no meaning for it.
        defaults: where they differ from the flag's own.
        positional: flags that may also be given without their name, in this order.
    """

    sections: tuple[str, ...]
    extra: tuple[Flag, ...] = ()
    without: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    positional: tuple[str, ...] = ()

    def flags(self) -> list[Flag]:
        return [flag for section in self.sections for flag in self.of_section(section)] + list(
            self.extra
        )

    def of_section(self, section: str) -> list[Flag]:
        """The flags of one section, with this script's defaults."""
        return [
            replace(flag, default=self.defaults.get(flag.name, flag.default))
            for flag in SECTIONS[section]
            if flag.name not in self.without
        ]

    def deciding(self) -> list[Flag]:
        """What decides the script's results, beside the checkpoint and other files: the flags of
        role images, its own first, then number formats.
        """
        ours = [*self.extra, *(self.of_section("sample") if "sample" in self.sections else ())]
        return [
            flag for role in (Role.IMAGES, Role.ARITHMETIC) for flag in ours if flag.role is role
        ]


def calibration_rules() -> tuple[str, ...]:
    """The rules of calibrate_eps."""
    from ..exposure_bias.calibrate import RULES  # only when it is asked for

    return tuple(RULES)


_SIGMA = names("sample", solvers="sigma")
_OWN_NETWORK = ("framework", "network_args")
# A classifier has a section of its own; of a model's it shares what images and classes are, and
# learn_sigma, which belongs to the process too.
_OF_BOTH = ("image_size", "in_channels", "num_classes", "learn_sigma")
_NOT_FOR_CLASSIFIERS = (
    *(name for name in names("model") if name not in _OF_BOTH),
    "lr_warmup_steps",
    "grad_clip",
    "compile",
    "class_dropout",
    *(flag.name for flag in LOSS_WEIGHTING),
)
_NOT_MEASURED = ("compile", "num_samples", "class_ids", "save_png")

SCRIPTS = {
    # Training on respaced steps only happens by an explicit flag, never through a config's sampling
    # section.
    "image_train": Script(("model", "edm", "diffusion", "train"), (TRAIN_RESPACING,)),
    "image_sample": Script(("model", "edm", "diffusion", "sample")),
    "image_nll": Script(("model", "diffusion"), LIKELIHOOD),
    "evaluator": Script(("evaluate",), positional=("ref", "samples")),
    "compare": Script(
        (),
        (
            Flag("ref", "", Role.INPUT, "reference, as for evaluator.py"),
            Flag("baseline", "", Role.INPUT, "samples A, as for evaluator.py"),
            Flag("samples", "", Role.INPUT, "samples B, drawn with the noise of A"),
            *FEATURES,
        ),
        positional=("ref", "baseline", "samples"),
    ),
    "make_reference": Script(
        (),
        (
            Flag("data", "", Role.INPUT, "images: a folder, a zip, or an npz with arr_0"),
            Flag("out", "", Role.PLACE, "the npz to write"),
            *FEATURES,
            Flag(
                "keep_images",
                0,
                Role.IMAGES,
                "store so many images, spread evenly, as arr_0, for precision and recall; -1: all",
                least=-1,
                most=100_000_000,
            ),
        ),
        positional=("data",),
    ),
    "npz_to_png": Script(
        (),
        (
            Flag("data", "", Role.INPUT, "an npz with arr_0, or a folder or zip of images"),
            Flag(
                "out",
                "",
                Role.PLACE,
                "what to write: a folder of pictures, one NAME.png with a grid, or NAME.npz",
            ),
            Flag(
                "count",
                0,
                Role.IMAGES,
                "only the first so many images; 0: all",
                least=0,
                most=100_000_000,
            ),
            Flag(
                "image_size",
                "",
                Role.IMAGES,
                "scale and crop all images as training does, to this size; default: as they are",
                size_or_none,
            ),
            Flag(
                "channels",
                0,
                Role.IMAGES,
                "of NAME.npz: 1 (grey), 3 or 4; 0: 1 if the first pictures are grey, else 3",
                choices=(0, 1, 3, 4),
            ),
            Flag(
                "classes",
                True,
                Role.IMAGES,
                "pictures of labelled images go to a folder per class, and NAME.npz gets their "
                "labels",
            ),
            Flag("overwrite", False, Role.PLACE, "replace a file that is there"),
        ),
        positional=("data",),
    ),
    "convert_checkpoint": Script(
        (),
        (
            Flag(
                "source",
                "",
                Role.INPUT,
                "what to convert: EDM's .pkl, a .pt of this library, a .safetensors, or a "
                "checkpoint of DDIM's code",
            ),
            Flag(
                "out",
                "",
                Role.PLACE,
                "what to write: NAME.safetensors for a .pt, else a folder for a .pt and its "
                "config.yaml",
            ),
            Flag(
                "image_size",
                "",
                Role.IMAGES,
                "of a DDIM checkpoint, if it does not attend at 16 pixels",
                size_or_none,
            ),
            Flag(
                "half",
                False,
                Role.IMAGES,
                "of NAME.safetensors: round the weights to half precision, for half the size",
            ),
            Flag("overwrite", False, Role.PLACE, "replace files that are there"),
        ),
        positional=("source", "out"),
    ),
    "classifier_train": Script(
        ("model", "classifier", "diffusion", "train"),
        (
            TRAIN_RESPACING,
            Flag("val_data_dir", "", Role.TELLING, "images for validation; none if empty"),
            Flag("noised", True, Role.LOSS, "train on noised images, as guidance needs it"),
            Flag("iterations", 150000, Role.LENGTH, "updates", least=1),
            Flag("anneal_lr", False, Role.TRAINING, "lower lr linearly to 0 over the iterations"),
            Flag("eval_interval", 5, Role.TELLING, "steps between validations", least=1),
        ),
        (
            *_NOT_FOR_CLASSIFIERS,
            "lr_anneal_steps",
            "max_steps",
            "sample_interval",
            "sample_count",
            "sample_respacing",
            "fp16_scale_growth",
            *(flag.name for flag in EVALUATING),
        ),
        {"lr": 3e-4, "batch_size": 4, "log_interval": 10, "ema_rate": ""},
    ),
    "classifier_sample": Script(
        ("model", "classifier", "diffusion", "sample"),
        (
            Flag(
                "classifier_path",
                "",
                Role.INPUT,
                "checkpoint of the classifier; its config.yaml is read from beside it",
            ),
            Flag("classifier_scale", 1.0, Role.IMAGES, "guidance scale", least=0),
        ),
        (*_OWN_NETWORK, *_SIGMA),
    ),
    "super_res_train": Script(
        ("model", "super_res", "diffusion", "train"),
        (TRAIN_RESPACING,),
        (*_OWN_NETWORK, "image_size"),
        {"log_interval": 10},
    ),
    "super_res_sample": Script(
        ("model", "super_res", "diffusion", "sample"),
        (
            Flag(
                "base_samples",
                "",
                Role.INPUT,
                "low-resolution images: an npz with arr_0 (and arr_1), a folder, or a zip",
            ),
            Flag(
                "resize_base",
                False,
                Role.INPUT,
                "scale and crop low-resolution images of another size, instead of refusing them",
            ),
        ),
        (*_OWN_NETWORK, "image_size", *_SIGMA),
    ),
    "sweep": Script(
        (),
        (
            Flag("sweep", "", Role.INPUT, "YAML file that describes the grid; see docs/sweep.md"),
            Flag("out_dir", "", Role.PLACE, "where results go; default: runs/sweep-NAME"),
            Flag(
                "processes",
                1,
                Role.SPEED,
                "cells that are computed at the same time",
                least=1,
                most=10_000,
            ),
            Flag(
                "launcher",
                "",
                Role.SPEED,
                "words before the programs of a cell, such as 'torchrun --standalone "
                "--nproc_per_node 2'",
            ),
        ),
        positional=("sweep",),
    ),
    "exposure_bias": Script(
        ("model", "edm", "diffusion", "sample"),
        (
            *MEASURED_IMAGES,
            Flag(
                "measures",
                "norm,delta,variance,prediction,accumulation,discretisation",
                Role.IMAGES,
                "what to measure, separated by commas: norm, delta, "
                "variance, prediction, accumulation, discretisation",
            ),
            Flag(
                "accumulation_steps",
                "",
                Role.IMAGES,
                "the K of error accumulation, separated by commas; default: four up to all steps",
            ),
            Flag(
                "features",
                "pixels",
                Role.IMAGES,
                "feature space of error accumulation: pixels (small images), inception, or a "
                "FILE.onnx",
            ),
            Flag(
                "inception_weights",
                "",
                Role.INPUT,
                "Inception's weights, for --features inception; see evaluations/README.md",
            ),
            Flag(
                "plots",
                True,
                Role.TELLING,
                "also draw a picture of each measure (needs matplotlib: pip install -e '.[plots]')",
            ),
        ),
        _NOT_MEASURED,
    ),
    "calibrate_eps": Script(
        ("model", "edm", "diffusion", "sample"),
        (
            *MEASURED_IMAGES,
            Flag(
                "by",
                "energy",
                Role.IMAGES,
                "rule: energy, kid or fid (distance of finished images to real ones, by common "
                "noise), final_variance (cheap), or a diagnostic: norm, variance, quotient",
                choices=calibration_rules,
            ),
            Flag(
                "num_chains",
                0,
                Role.IMAGES,
                "chains of each trial, of energy, kid, fid and final_variance; 0: as many as real "
                "images",
                least=0,
                most=100_000_000,
                quiet=True,
            ),
            Flag(
                "form",
                "b",
                Role.IMAGES,
                "of energy and kid: b, a constant; kb, lambda(t) = k t + b; groups, a constant for "
                "each of --groups stretches of the chain",
                choices=("b", "kb", "groups"),
                quiet=True,
            ),
            Flag(
                "groups",
                3,
                Role.IMAGES,
                "stretches of --form groups",
                least=2,
                most=10_000,
                quiet=True,
            ),
            Flag(
                "features",
                "inception",
                Role.IMAGES,
                "of energy and kid, as of evaluator.py: inception, a FILE.onnx, pixels (grey and "
                "tiny images), wavelets, random",
                quiet=True,
            ),
            Flag(
                "feature_size",
                "",
                Role.IMAGES,
                "scale images to this size before --features; default: as they are",
                size_or_none,
                quiet=True,
            ),
            Flag(
                "inception_weights",
                "",
                Role.INPUT,
                "Inception's weights; default: $GUIDED_DIFFUSION_IP_INCEPTION, or the user's cache",
            ),
            Flag(
                "plots",
                True,
                Role.TELLING,
                "of energy and kid: also draw the curve, beside the YAML (needs matplotlib: pip "
                "install -e '.[plots]')",
            ),
            Flag(
                "out",
                "",
                Role.PLACE,
                "the YAML to write; default: eps_schedule-... beside the checkpoint",
            ),
        ),
        (*_NOT_MEASURED, "eps_scaler", "eps_scaler_k", "eps_schedule", "out_dir"),
    ),
}
