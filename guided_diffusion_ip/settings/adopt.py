"""How a script takes over what a checkpoint was trained with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .beside import note_on_state
from .config import Config
from .flags import DESCRIBING, NOT_ARCHITECTURE, SCRIPTS
from .own_network import require_named_by_user
from .yaml_file import Content, read_yaml, values_from_yaml

# What guidance by a classifier needs to be the same for it and the diffusion model.
_SHARED = (
    "image_size",
    "in_channels",
    "num_classes",
    "diffusion_steps",
    "noise_schedule",
    "rescale_timesteps",
)


def adopt_checkpoint_config(cfg: Config, path: str) -> Config:
    """`cfg` with model and diffusion from what belongs to a checkpoint: a `path` of config_beside.

    Raises:
        ValueError: a flag that was given contradicts the architecture or the process that the
            checkpoint was trained with.
    """
    content = read_yaml(path)
    spec = SCRIPTS[cfg.script]
    shared = [name for name in DESCRIBING if name in spec.sections and name != "classifier"]
    trained = values_from_yaml(content, shared, path, spec.without)
    if not trained.get("class_cond", cfg.values.get("class_cond")):
        trained.pop("num_classes", None)  # says nothing about a network without classes
    if "framework" in trained:
        require_named_by_user(trained["framework"], cfg.on_command_line("framework"), path)
    cfg = _adopt(cfg, trained, path, "checkpoint")
    return replace(
        cfg,
        adopted=path,
        notes=(*cfg.notes, *note_on_state(path, content)),
        paper=cfg.paper or content.get("paper", {}),
        trained_on=str(content.get("data", {}).get("preprocessing", "")),
        class_names=_classes_in(content) if cfg.values.get("class_cond") else cfg.class_names,
    )


def adopt_classifier_config(cfg: Config, path: str) -> Config:
    """`cfg` with the classifier from what belongs to its checkpoint; after adopt_checkpoint_config
    for the diffusion model.

    Settings without a section `classifier` belong to something else: nothing is taken from them.

    Raises:
        ValueError: it contradicts a flag that was given, or the diffusion model: other images,
            classes or noise levels.
    """
    content = read_yaml(path)
    if "classifier" not in content:
        return cfg
    cfg = _adopt(cfg, values_from_yaml(content, ("classifier",), path), path, "classifier")
    cfg = replace(cfg, notes=(*cfg.notes, *note_on_state(path, content)))
    both = values_from_yaml(content, ("model", "diffusion"), path)
    if "num_classes" in both and not cfg.class_cond:
        cfg = _adopt(cfg, {"num_classes": both["num_classes"]}, path, "classifier")
    for name in _SHARED:
        if name in both and both[name] != cfg.values[name]:
            raise ValueError(
                f"the classifier was trained with {name} {both[name]!r} ({path}), the diffusion "
                f"model has {name} {cfg.values[name]!r}: guidance needs two that agree in it"
            )
    classes = _classes_in(content)
    for k, (ours, theirs) in enumerate(zip(cfg.class_names, classes)):
        if ours != theirs:
            warnings.warn(
                f"label {k} is {ours!r} for the diffusion model and {theirs!r} for the "
                "classifier: guidance needs two that mean the same"
            )
            break
    if content.get("classifier_train", {}).get("noised") is False:
        warnings.warn(
            "the classifier was trained on clean images (--noised False), but guidance shows it "
            "noised ones"
        )
    return replace(cfg, class_names=cfg.class_names or classes)


def _classes_in(content: Content) -> tuple[str, ...]:
    """The names of the training images' classes; () if they are not known."""
    classes = content.get("data", {}).get("classes")
    return tuple(str(name) for name in classes) if isinstance(classes, list) else ()


def _adopt(cfg: Config, trained: Mapping[str, Any], path: str, what: str) -> Config:
    """Take over what was not given; what was given must agree, where it belongs to the architecture
    or the process.
    """
    taken = {}
    for name, value in trained.items():
        if name not in cfg.given:
            taken[name] = value
        elif cfg.values[name] != value and name not in NOT_ARCHITECTURE:
            raise ValueError(
                f"{cfg.given[name]} sets {name} to {cfg.values[name]!r}, but the {what} was "
                f"trained with {name} {value!r} ({path}): leave it out"
            )
    return cfg.with_values(**taken)
