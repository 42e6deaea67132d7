"""Combinations of sampling flags that have no meaning, refused with the reason before anything is
built.

What one flag alone may be is in its declaration; what belongs to one sampler only is in
make_sampler.py; lambda(t) is in diffusion/epsilon_scaling.py. The settings are given after their
checkpoint's were adopted and the solver was settled, and before lambda is.
"""

from __future__ import annotations

from ..runs.sample_batch import parse_class_ids
from .config import Config


def check_request(cfg: Config) -> list[str]:
    """Notes for the user on what is allowed and perhaps not meant; [] if there are none.

    Raises:
        ValueError: flags that contradict each other or the model.
    """
    if cfg.eps_scaler == "published" and cfg.eps_scaler_k:
        raise ValueError(
            f"--eps_scaler published is a constant lambda, but --eps_scaler_k {cfg.eps_scaler_k:g} "
            "adds a slope to it: leave one of them out"
        )
    _check_classes(cfg)
    notes = [*cfg.notes_on_origin(), *_notes_on_classes(cfg)]
    scale = cfg.values.get("classifier_scale", 0)
    if "classifier_scale" in cfg.values and not scale:
        notes.append(
            "note: --classifier_scale 0: the classifier is loaded and checked, but guides "
            "nothing; the images are those of image_sample.py"
        )
    guided = cfg.paper.get("classifier_scale", 0)
    if cfg.eps_scaler == "published" and guided != scale:
        notes.append(
            "note: the published lambdas of this config were found for classifier guidance with "
            f"scale {guided:g} ({'none' if not guided else 'classifier_sample.py'}); here it is "
            f"{scale:g}"
        )
    return notes


def classes_to_sample(cfg: Config) -> list[int] | None:
    """The classes that --class_ids names, by default all that the training images had (all of the
    network if that is not known); None for a model that knows no classes, unless a classifier
    guides it.
    """
    if not cfg.class_cond and "classifier_path" not in cfg.values:
        return None
    if cfg.class_names and not cfg.class_ids:
        return list(range(min(len(cfg.class_names), cfg.num_classes)))
    return parse_class_ids(cfg.class_ids, cfg.num_classes, cfg.class_names)


def _notes_on_classes(cfg: Config) -> list[str]:
    """Rows of the network that no training image had the label of are as random as at the start."""
    seen = len(cfg.class_names)
    if not seen or seen >= cfg.num_classes or "base_samples" in cfg.values:
        return []
    known = (
        f"the network has rows for {cfg.num_classes} classes, the training images were of {seen}"
    )
    if not cfg.class_ids:
        return [f"note: {known}: only these are sampled"]
    unseen = [
        k for k in parse_class_ids(cfg.class_ids, cfg.num_classes, cfg.class_names) if k >= seen
    ]
    return [f"note: {known}: it has never seen class {unseen[0]}"] if unseen else []


def _check_classes(cfg: Config) -> None:
    if not cfg.class_ids:
        return
    if "base_samples" in cfg.values:
        raise ValueError(
            f"--class_ids {cfg.class_ids} has no meaning here: the labels come with the "
            "low-resolution images (--base_samples)"
        )
    # A classifier guides an unconditional model, too, towards the class that is asked for.
    if not cfg.class_cond and "classifier_path" not in cfg.values:
        raise ValueError(
            f"--class_ids {cfg.class_ids} asks for classes, but this model is unconditional and "
            "knows none: leave it out, or guide the model by a classifier (classifier_sample.py)"
        )
