"""All metrics by name, in the order of tables."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from .entry import Metric


def _metrics(file: str) -> tuple[Metric, ...]:
    return importlib.import_module(f".{file}", __package__).METRICS


_FILES = (
    "frechet",  # fid, sfid
    "score",  # is
    "manifold",  # prec, recall
    "kernel",  # kid
    "frechet_infinity",  # fd_inf
    "density_coverage",  # density, coverage
)
METRICS: dict[str, Metric] = {metric.name: metric for file in _FILES for metric in _metrics(file)}
METRIC_NAMES = ", ".join(METRICS)  # for help texts and messages


def check_metrics(names: Iterable[str], asked: str) -> list[str]:
    """The names, each once.

    Args:
        asked: the beginning of the message: where the names come from, and what was asked for.

    Raises:
        ValueError: a name that is no metric, or no names.
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(
            f"{asked}: {unknown[0] + ' is no metric' if unknown else 'nothing asked for'}; "
            f"allowed: {METRIC_NAMES}, separated by commas"
        )
    return names


def parse_metrics(text: str) -> list[str]:
    """ "fid,prec" -> ["fid", "prec"].

    Raises:
        ValueError: a name that is no metric.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    return check_metrics(names, f"--metrics {text}")


def short_title(name: str, features: str = "inception") -> str:
    """For narrow tables and plots; a name that is no metric stays as it is."""
    entry = METRICS.get(name)
    return entry.title_for(features, entry.short) if entry else name
