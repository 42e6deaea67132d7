"""A reference and samples -> the metrics asked for, each with what it needs and no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..data.image_set import Images
from ..features.space import FeatureSpace
from ..metrics import METRICS, FeatureStatistics
from ..metrics.entry import (
    DEFAULT_OPTIONS,
    LOGITS,
    MOMENTS,
    REFERENCE_ROWS,
    ROWS,
    SPATIAL_MOMENTS,
    Metric,
    MetricOptions,
    SetFeatures,
    Value,
)
from ..metrics.registry import check_metrics
from .reference import StoredStatistics
from .set_features import extract


class Say(Protocol):
    """Receives lines for the user."""

    def __call__(self, text: str, /) -> object: ...


@dataclass(frozen=True)
class Score:
    """One number: `n` images of samples against `n_ref` of the reference (0: needs none, None: not
    known).
    """

    value: float
    n: int
    n_ref: int | None = 0
    spread: float | None = None  # of the metric's own kind, for those that have one
    label: str = ""  # in the table, where it is not the title
    detail: str = ""  # in the table, behind it


@dataclass(frozen=True)
class Result:
    """Scores by name, in the order of METRICS, and what a reader of them must know."""

    metrics: Mapping[str, Score]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: images, statistics of images from a file, or both.

    Where there are statistics, the images only serve metrics that need the features themselves.

    Args:
        known: what has been extracted from the images before.
    """

    images: Images | None = None
    stored: StoredStatistics | None = None
    known: SetFeatures | None = None

    @property
    def preprocessing(self) -> str:
        """How its images were prepared; '' where it does not say."""
        side = self.images if self.images is not None else self.stored
        return side.preprocessing if side is not None else ""

    def measured(
        self, metrics: Collection[str], space: FeatureSpace, batch_size: int = 64
    ) -> Reference:
        """This reference with what the metrics need of its images extracted; a collective.

        Raises:
            ValueError: too few images.
        """
        if self.known is not None or self.images is None:
            return self
        from_images = {REFERENCE_ROWS}
        if self.stored is None:
            from_images |= {MOMENTS, SPATIAL_MOMENTS}
        entries = [METRICS[name] for name in metrics if METRICS[name].needs & from_images]
        if not entries:
            return self
        _enough(self.images.n, entries, "reference")
        needs = _needs(entries) & from_images
        if REFERENCE_ROWS in needs:
            needs |= {ROWS}
        known = extract(self.images, space, needs, batch_size=batch_size, what="reference")
        return replace(self, known=known)

    def features(self) -> SetFeatures:
        """Statistics from the file where there is one, everything else from the images."""
        known = self.known or SetFeatures()
        if self.stored is None:
            return known
        spatial = self.stored.spatial or FeatureStatistics()
        return replace(known, pool=self.stored.pool, spatial=spatial)


def unavailable(name: str, space: FeatureSpace, ref_has_images: bool) -> str:
    """Why a metric cannot be had, or ''."""
    needs = METRICS[name].needs
    if SPATIAL_MOMENTS in needs and not space.has_spatial:
        return f"the features {space.name} have no spatial part"
    if LOGITS in needs and not space.has_logits:
        return f"the features {space.name} have no classes"
    if REFERENCE_ROWS in needs and not ref_has_images:
        return "the reference holds statistics only, no images (arr_0)"
    return ""


def compare(
    reference: Reference,
    samples: Images,
    space: FeatureSpace,
    metrics: Sequence[str],
    options: MetricOptions = DEFAULT_OPTIONS,
    *,
    num_samples: int = 0,
    batch_size: int = 64,
    say: Say = print,
) -> Result:
    """The metrics of samples; a collective.

    Args:
        metrics: names of METRICS.
        num_samples: the first so many samples; 0: all.

    Raises:
        ValueError: a metric that is unknown, or that this reference or feature space does not
            allow; too few images.
    """
    for name in check_metrics(metrics, f"metrics {list(metrics)}"):
        if why := unavailable(name, space, reference.images is not None):
            raise ValueError(f"{METRICS[name].title} cannot be had: {why}")
    entries = [entry for name, entry in METRICS.items() if name in metrics]
    _enough(min(num_samples or samples.n, samples.n), entries, "samples")
    ref = reference.measured(metrics, space, batch_size).features()
    made = extract(
        samples, space, _needs(entries), batch_size=batch_size, limit=num_samples, what="samples"
    )
    computed: dict[object, Mapping[str, Value]] = {}
    scores: dict[str, Score] = {}
    few: dict[str, list[Score]] = {}  # what is wrong -> the scores that it is wrong with
    for entry in entries:
        n_ref = _reference_images(entry, ref)
        if entry.compute not in computed:
            if entry.progress:
                say(entry.progress.format(samples=made.n, reference=n_ref, dim=_dim(entry, made)))
            computed[entry.compute] = entry.compute(ref, made, options)
        value = computed[entry.compute][entry.name]
        label = f"{entry.title}@{made.n}" if value.few else ""
        score = Score(value.value, made.n, n_ref, value.spread, label, value.detail)
        scores[entry.name] = score
        if value.few:
            few.setdefault(value.few, []).append(score)
    return Result(scores, (*space.warnings, *_warnings_of_few(few, space)))


def _needs(entries: Sequence[Metric]) -> frozenset[str]:
    return frozenset().union(*(entry.needs for entry in entries))


def _reference_images(entry: Metric, reference: SetFeatures) -> int | None:
    """How many images of the reference a metric is made of; None: its file does not tell."""
    if REFERENCE_ROWS in entry.needs:
        return len(reference.rows)
    if SPATIAL_MOMENTS in entry.needs:
        return reference.spatial.n
    return reference.pool.n if MOMENTS in entry.needs else 0


def _dim(entry: Metric, samples: SetFeatures) -> int:
    """Of the features that a metric compares; 0 where it compares none."""
    if SPATIAL_MOMENTS in entry.needs:
        return len(samples.spatial.mean)
    return len(samples.pool.mean) if MOMENTS in entry.needs else samples.rows.shape[1]


def _warnings_of_few(few: Mapping[str, Sequence[Score]], space: FeatureSpace) -> list[str]:
    """Where there are too few images for features of so many dimensions."""
    warnings = []
    for what, scores in few.items():
        n_ref = scores[0].n_ref or "an unknown number of"
        labels = ", ".join(score.label for score in scores)
        warnings.append(
            f"{scores[0].n} samples and {n_ref} reference images for features of {space.dim} "
            f"dimensions: {labels} {what}, comparable only with values of as many images"
        )
    return warnings


def _enough(n: int, entries: Sequence[Metric], what: str) -> None:
    most = max(entries, key=lambda entry: entry.least)
    if n < most.least:
        raise ValueError(
            f"{n} image{'s' * (n != 1)} in the {what}, but {most.least_for} at least {most.least}"
        )
