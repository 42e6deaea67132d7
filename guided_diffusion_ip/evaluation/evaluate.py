"""Two sets of images -> numbers: FID, sFID, Inception Score, precision, recall, KID."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import dist_util
from ..data.image_set import Images
from ..features.spaces import FeatureSpace
from ..metrics import frechet_distance, kernel_distance, precision_recall
from .reference import StoredStatistics
from .set_features import SetFeatures, extract

METRICS = ("fid", "sfid", "is", "prec", "recall", "kid")
PUBLISHED = METRICS[:5]  # what the published evaluator prints
TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception Score",
    "prec": "Precision",
    "recall": "Recall",
    "kid": "KID",
}


@dataclass
class Metric:
    """One number: `n` images of samples against `n_ref` of the reference (0: needs none)."""

    value: float
    n: int
    n_ref: int | None = 0
    spread: float | None = None  # standard deviation over subsets, for KID
    label: str = ""  # in the table, where it is not the plain one


@dataclass
class Result:
    metrics: dict[str, Metric]
    warnings: list[str] = field(default_factory=list)


def parse_metrics(text: str) -> list[str]:
    """ "fid,prec" -> ["fid", "prec"].

    Raises:
        ValueError: a name that is no metric.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(
            f"--metrics {text}: "
            f"{unknown[0] + ' is no metric' if unknown else 'nothing asked for'}; allowed: "
            f"{', '.join(METRICS)}, separated by commas"
        )
    return list(dict.fromkeys(names))


def unavailable(name: str, space: FeatureSpace, ref_has_images: bool) -> str:
    """Why a metric cannot be had, or ''."""
    if name == "sfid" and not space.has_spatial:
        return f"the features {space.name} have no spatial part"
    if name == "is" and not space.has_logits:
        return f"the features {space.name} have no classes"
    if name in ("prec", "recall", "kid") and not ref_has_images:
        return "the reference holds statistics only, no images (arr_0)"
    return ""


def evaluate(
    reference: Images | SetFeatures | None,
    stored: StoredStatistics | None,
    samples: Images,
    space: FeatureSpace,
    *,
    metrics: Sequence[str] = PUBLISHED,
    num_samples: int = 0,
    batch_size: int = 64,
    pr_arithmetic: str = "float32",
    seed: int = 0,
    device: torch.device | None = None,
    say: Callable[[str], Any] = print,
) -> Result:
    """Compare `samples` with a reference: its images, statistics of them, or both; a collective.

    With `stored` statistics, the images of the reference only serve precision, recall and KID.

    Args:
        reference: images, or what has been extracted from them before; None: `stored` alone serves.
        num_samples: the first so many samples; 0: all.
        pr_arithmetic: of the distances of precision and recall; "half" imitates the published
            evaluator.
        seed: of KID's subsets.
        device: of the distances of precision and recall; None: this process's.

    Raises:
        ValueError: a metric that this reference or feature space does not allow, or too few images.
    """
    for name in metrics:
        if why := unavailable(name, space, reference is not None):
            raise ValueError(f"{TITLES[name]} cannot be had: {why}")
    manifold = any(name in metrics for name in ("prec", "recall"))
    keep = manifold or "kid" in metrics
    moments = any(name in metrics for name in ("fid", "sfid"))
    _enough(
        samples.n if not num_samples else min(num_samples, samples.n), moments, manifold, "samples"
    )
    ref = reference if isinstance(reference, SetFeatures) else None
    if (
        reference is not None
        and not isinstance(reference, SetFeatures)
        and (keep or moments and stored is None)
    ):
        _enough(reference.n, moments and stored is None, manifold, "reference")
        ref = extract(
            reference,
            space,
            batch_size=batch_size,
            keep_rows=keep,
            what="reference",
            spatial="sfid" in metrics and stored is None,
        )
    made = extract(
        samples,
        space,
        batch_size=batch_size,
        limit=num_samples,
        keep_rows=keep,
        score="is" in metrics,
        spatial="sfid" in metrics,
        what="samples",
    )
    result = Result({}, list(space.warnings))
    if moments:
        known = stored or ref
        for name, part in (("fid", "pool"), ("sfid", "spatial")):
            if name in metrics:
                dim = len(getattr(made, part).mean)
                say(f"Frechet distance between covariances of {dim} dimensions")
                result.metrics[name] = _frechet(
                    name, getattr(known, part), getattr(made, part), known.n
                )
        result.warnings += _few(result.metrics, space)
    if "is" in metrics:
        result.metrics["is"] = Metric(made.score.value, made.n)
    if manifold:
        say(f"precision and recall: {made.n} samples, {ref.n} reference images")
        pair = precision_recall(
            ref.rows, made.rows, arithmetic=pr_arithmetic, device=device or dist_util.dev()
        )
        for name, value in zip(("prec", "recall"), pair):
            if name in metrics:
                result.metrics[name] = Metric(value, made.n, ref.n)
    if "kid" in metrics:
        say(f"kernel distance: {made.n} samples, {ref.n} reference images")
        value, spread = kernel_distance(ref.rows, made.rows, seed=seed)
        result.metrics["kid"] = Metric(value, made.n, ref.n, spread)
    result.metrics = {name: result.metrics[name] for name in METRICS if name in result.metrics}
    return result


def _frechet(name: str, ref: Any, made: Any, n_ref: int | None) -> Metric:
    metric = Metric(frechet_distance(ref.mean, ref.cov, made.mean, made.cov), made.n, n_ref)
    if min(made.n, n_ref or made.n) <= len(made.mean):
        metric.label = f"{TITLES[name]}@{made.n}"
    return metric


def _few(metrics: dict[str, Metric], space: FeatureSpace) -> list[str]:
    """A warning where covariances are of fewer images than the features have dimensions."""
    labelled = [
        metric for name, metric in metrics.items() if name in ("fid", "sfid") and metric.label
    ]
    if not labelled:
        return []
    first = labelled[0]
    n_ref = first.n_ref or "an unknown number of"
    return [
        f"{first.n} samples and {n_ref} reference images for features of {space.dim} dimensions: "
        f"{', '.join(metric.label for metric in labelled)} biased upwards, comparable only with "
        "values of as many images"
    ]


def _enough(n: int, moments: bool, manifold: bool, what: str) -> None:
    least = 4 if manifold else 2 if moments else 1
    if n < least:
        raise ValueError(
            f"{n} image{'s' * (n != 1)} in the {what}, but "
            f"{'precision and recall need' if manifold else 'a covariance needs'} at least {least}"
        )
