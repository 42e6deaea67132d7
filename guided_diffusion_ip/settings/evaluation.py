"""The flags of evaluator.py and make_reference.py -> requests."""

from __future__ import annotations

import os

from ..evaluation.evaluate import EvaluationRequest, parse_metrics
from ..evaluation.opening import FeatureChoice
from ..evaluation.paired import ComparisonRequest
from ..evaluation.reference import has_statistics
from ..evaluation.reference_file import ReferenceRequest
from ..sizes import parse_size
from .config import Config


def evaluation_request(cfg: Config) -> EvaluationRequest:
    """What evaluator.py was asked for.

    Raises:
        ValueError: an argument is missing, a metric unknown, the order of REF and SAMPLES wrong, or
            the folder of --json does not exist.
    """
    if not cfg.ref or not cfg.samples:
        raise ValueError("two arguments are needed: evaluator.py REF SAMPLES (see --help)")
    metrics = tuple(parse_metrics(cfg.metrics))
    _check_order(cfg)
    if cfg.json and not os.path.isdir(os.path.dirname(os.path.abspath(cfg.json))):
        raise ValueError(f"--json {cfg.json}: its folder does not exist")
    return EvaluationRequest(
        cfg.ref,
        cfg.samples,
        _features(cfg),
        metrics=metrics if "metrics" in cfg.given else None,
        num_samples=cfg.num_samples,
        batch_size=cfg.batch_size,
        image_size=_image_size(cfg),
        pr_arithmetic=cfg.pr_arithmetic,
        seed=cfg.seed,
        device=cfg.device,
    )


def reference_request(cfg: Config) -> ReferenceRequest:
    """What make_reference.py was asked for.

    Raises:
        ValueError: an argument is missing, or --out is no name of an .npz file.
    """
    if not cfg.data or not cfg.out:
        raise ValueError(
            "give the images and the file to write: make_reference.py DATA --out reference.npz "
            "(see --help)"
        )
    return ReferenceRequest(
        cfg.data,
        cfg.out,
        _features(cfg),
        keep_images=cfg.keep_images,
        batch_size=cfg.batch_size,
        image_size=_image_size(cfg),
        device=cfg.device,
    )


def comparison_request(cfg: Config) -> ComparisonRequest:
    """What compare.py was asked for.

    Raises:
        ValueError: an argument is missing.
    """
    if not cfg.ref or not cfg.baseline or not cfg.samples:
        raise ValueError("three arguments are needed: compare.py REF A.npz B.npz (see --help)")
    return ComparisonRequest(
        cfg.ref,
        (cfg.baseline, cfg.samples),
        _features(cfg),
        batch_size=cfg.batch_size,
        image_size=_image_size(cfg),
        device=cfg.device,
    )


def _features(cfg: Config) -> FeatureChoice:
    return FeatureChoice(cfg.features, cfg.precision, cfg.inception_weights, cfg.download)


def _image_size(cfg: Config) -> tuple[int, int] | None:
    return parse_size(cfg.image_size) if cfg.image_size else None


def _check_order(cfg: Config) -> None:
    """Raises ValueError: REF and SAMPLES, given by their places, look swapped."""
    by_place = cfg.given["samples"] == "SAMPLES"
    if not by_place or not os.path.exists(cfg.samples) or not has_statistics(cfg.samples):
        return
    if not has_statistics(cfg.ref):
        raise ValueError(
            f"{cfg.samples}, given as SAMPLES, holds reference statistics (mu), and {cfg.ref}, "
            "given as REF, does not: the order is REF SAMPLES. If it is meant so, name them: "
            "--ref ... --samples ..."
        )
