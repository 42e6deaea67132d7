"""An evaluation, from what the user names to the numbers: what evaluations/evaluator.py runs.

from guided_diffusion_ip.evaluation.evaluate import EvaluationRequest, evaluate

evaluation = evaluate(EvaluationRequest("reference.npz", samples, features="pixels"))
print(evaluation.values["fid"])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..data.image_set import Images
from ..features.space import FeatureSpace
from ..metrics import METRICS
from ..metrics.entry import MetricOptions
from ..metrics.manifold import ARITHMETIC
from ..metrics.registry import check_metrics, parse_metrics
from .compare import Reference, Result, compare, unavailable
from .opening import FeatureChoice, GivenImages, check_sizes, choose_device, open_side, path_of
from .published import settings_beside
from .reference import compare_features, has_images, has_statistics, read_statistics

__all__ = ["PUBLISHED", "Evaluation", "EvaluationRequest", "evaluate", "parse_metrics"]

PUBLISHED = ("fid", "sfid", "is", "prec", "recall")  # what ADM's evaluator prints


@dataclass(frozen=True)
class EvaluationRequest:
    """What to compare, and how.

    Args:
        reference: images (a path, or an array uint8 [N, H, W, C]), or the path of an npz with
            statistics.
        samples: images, likewise.
        features: a feature space of `FeatureSpace`'s kind, or the name of one.
        metrics: names of METRICS; None: those of PUBLISHED that this reference and these features
            allow.
        num_samples: the first so many samples; 0: all.
        image_size: (H, W) to which images of files are scaled and cropped as for training; None: as
            they are.
        pr_arithmetic, seed: as of MetricOptions.
        device: auto, cpu or cuda.

    Raises:
        ValueError: an unknown metric or arithmetic, numbers out of range.
    """

    reference: GivenImages
    samples: GivenImages
    features: str | FeatureChoice | FeatureSpace = "inception"
    metrics: tuple[str, ...] | None = None
    num_samples: int = 0
    batch_size: int = 64
    image_size: tuple[int, int] | None = None
    pr_arithmetic: str = "float32"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.metrics is not None:
            check_metrics(self.metrics, f"metrics {list(self.metrics)}")
        if self.pr_arithmetic not in ARITHMETIC:
            raise ValueError(
                f"pr_arithmetic {self.pr_arithmetic!r} is not among {', '.join(ARITHMETIC)}"
            )
        if self.batch_size < 1 or self.num_samples < 0 or self.seed < 0:
            raise ValueError(
                f"batch_size {self.batch_size} must be at least 1, num_samples {self.num_samples} "
                f"and seed {self.seed} at least 0"
            )


@dataclass(frozen=True)
class Evaluation:
    """The numbers, and what they were made from; `report` shows them.

    Args:
        features: what the feature space says of itself.
        made_with: the settings.yaml beside the samples, {} if there is none.
    """

    request: EvaluationRequest
    reference: Reference
    samples: Images
    features: dict[str, Any]
    made_with: dict[str, Any]
    result: Result

    @property
    def values(self) -> dict[str, float]:
        """{"fid": ...}."""
        return {name: score.value for name, score in self.result.metrics.items()}

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.result.warnings


def evaluate(request: EvaluationRequest, say: Callable[[str], object] = print) -> Evaluation:
    """Compare samples with a reference; a collective.

    Raises:
        ValueError: files that are no sets of images, sides that do not fit together, a metric that
            this reference or feature space does not allow, too few images.
    """
    device = choose_device(request.device)
    ref_path, path = path_of(request.reference), path_of(request.samples)
    samples = open_side(request.samples, "samples", request.image_size)
    reference, with_statistics = _open_reference(request)
    if reference.images is not None:
        check_sizes(reference.images, samples, with_statistics)
    features = request.features
    choice = FeatureChoice(features) if isinstance(features, str) else features
    space = choice.open(device, say) if isinstance(choice, FeatureChoice) else choice
    if with_statistics:
        stored = read_statistics(ref_path, space, samples.shape)
        reference = Reference(reference.images, stored)
    metrics = _allowed(request, space, reference, say)
    made_with = settings_beside(path) if path else {}
    notes = _differences(path, reference, samples, made_with, space)
    for note in notes:
        say(f"note: {note}")
    images = reference.images
    say(
        f"reference: {ref_path or '(memory)'}"
        + (f", {images.n} images" if images is not None else "")
        + (", statistics" if reference.stored is not None else "")
    )
    precision = space.describe().get("precision", "fp32")
    say(f"samples: {path or '(memory)'}, {samples.n} images; features: {space.name}, {precision}")
    result = compare(
        reference,
        samples,
        space,
        metrics,
        MetricOptions(request.pr_arithmetic, request.seed, device),
        num_samples=request.num_samples,
        batch_size=request.batch_size,
        say=say,
    )
    result = replace(result, warnings=(*result.warnings, *notes))
    return Evaluation(request, reference, samples, space.describe(), made_with, result)


def _open_reference(request: EvaluationRequest) -> tuple[Reference, bool]:
    """Its images, if it has some; does it have statistics?"""
    path = path_of(request.reference)
    if path and not has_images(path):
        return Reference(), True
    images = open_side(request.reference, "reference", request.image_size)
    return Reference(images), bool(path) and has_statistics(path)


def _allowed(
    request: EvaluationRequest,
    space: FeatureSpace,
    reference: Reference,
    say: Callable[[str], object],
) -> list[str]:
    """The metrics asked for; by default, whatever this reference and these features allow."""
    if request.metrics is not None:
        return list(request.metrics)
    metrics = []
    for name in PUBLISHED:
        if why := unavailable(name, space, reference.images is not None):
            say(f"note: {METRICS[name].title} left out: {why}")
        else:
            metrics.append(name)
    return metrics


def _differences(
    path: str, reference: Reference, samples: Images, made_with: dict[str, Any], space: FeatureSpace
) -> list[str]:
    """What a reader of the numbers must know about the two sides, in words.

    Args:
        path: of the samples, '' in memory.
    """
    notes = []
    if path and has_statistics(path):
        notes.append(
            f"{path} holds statistics (mu) too: ignored, samples are always measured from their "
            "images"
        )
    notes += compare_features(reference.stored, space)
    images = reference.images
    if images is not None and images.shape != samples.shape:
        notes.append(
            f"reference images have {images.shape[2]} channels, samples {samples.shape[2]}"
        )
    trained_on = made_with.get("trained_on", "") or samples.preprocessing
    if reference.preprocessing and trained_on and reference.preprocessing != trained_on:
        notes.append(
            "the two sides were prepared differently, which FID sees: reference "
            f"'{reference.preprocessing}', the samples' model was trained on '{trained_on}'"
        )
    return notes
