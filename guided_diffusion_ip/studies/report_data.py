"""What a report can show: folders of training, sampling, sweeps and measurements, told apart by
what is in them.

Nothing that is read here is trusted: files may be torn, of another version, or somebody else's.
What cannot be read is left out or shown as text; report_html.py escapes everything.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

TRAINING, SAMPLES, SWEEP, MEASURES, SCHEDULE, PICTURES = (
    "training",
    "samples",
    "sweep",
    "measures",
    "schedule",
    "pictures",
)
_DEPTH = 3  # of the search in folders that hold runs
_MOST_POINTS = 500  # of a curve: more cannot be seen, and each costs bytes


@dataclass
class Run:
    """One thing to show. `data` depends on the kind; see the readers below."""

    kind: str
    path: str
    label: str
    data: dict[str, Any] = field(default_factory=dict)


def collect(paths: Sequence[str]) -> list[Run]:
    """Everything that can be shown below these paths, each once.

    Raises:
        ValueError: a path that does not exist or holds nothing to show.
    """
    found: dict[str, Run] = {}
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(
                f"{path} does not exist: give folders of training runs, samples, sweeps or "
                "measurements"
            )
        runs = list(_below(os.path.normpath(path), _DEPTH)) or list(_pictures(path))
        if not runs:
            raise ValueError(
                f"{path} holds nothing to show; a report is made of training runs (config.yaml, "
                "progress.csv), samples (settings.yaml, grid.png), sweeps (sweep.yaml), "
                "measurements (measures.json), lambda schedules and pictures"
            )
        for run in runs:
            found.setdefault(os.path.realpath(run.path), run)
    runs = list(found.values())
    for run, label in zip(runs, short_labels([run.path for run in runs])):
        run.label = label
    return runs


def short_labels(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as few as tell them apart."""
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    labels = []
    for own in parts:
        count = 1
        while count < len(own) and sum(other[-count:] == own[-count:] for other in parts) > 1:
            count += 1
        labels.append("/".join(own[-count:]))
    return labels


def _below(path: str, depth: int) -> Iterator[Run]:
    """The run at `path`, and those in folders below it (a sweep keeps its cells to itself)."""
    kind = kind_of(path)
    if kind:
        yield Run(kind, path, "", READERS[kind](path))
    if depth and os.path.isdir(path) and kind not in (SWEEP, SAMPLES):
        for name in sorted(os.listdir(path)):
            inner = os.path.join(path, name)
            if os.path.isdir(inner) and not name.startswith(".") or kind_of(inner) == SCHEDULE:
                yield from _below(inner, depth - 1)


def kind_of(path: str) -> str:
    """One of the kinds above, or ''."""
    if os.path.isfile(path):
        content = read_yaml_file(path) if path.endswith((".yaml", ".yml")) else {}
        return (
            SCHEDULE
            if isinstance(content.get("lambda"), list) and all(map(is_number, content["lambda"]))
            else ""
        )
    has = {name for name in os.listdir(path)} if os.path.isdir(path) else set()
    if "cells" in has and "sweep.yaml" in has:
        return SWEEP
    if "measures.json" in has:
        return MEASURES
    if {"config.yaml", "progress.csv"} <= has:
        return TRAINING
    if "settings.yaml" in has and has & {"grid.png", "evaluation.json"}:
        return SAMPLES
    return ""


def _pictures(path: str) -> Iterator[Run]:
    pictures = pictures_in(path)
    if pictures:
        yield Run(PICTURES, path, "", {"pictures": pictures})


def pictures_in(path: str) -> list[str]:
    """The paths of the pictures in a folder; of an SVG and a PNG of the same name, the SVG."""
    names = (
        sorted(name for name in os.listdir(path) if name.endswith((".png", ".svg")))
        if os.path.isdir(path)
        else []
    )
    return [
        os.path.join(path, name)
        for name in names
        if not (name.endswith(".png") and name[:-4] + ".svg" in names)
    ]


# ---- readers: a folder of each kind -> its data ----


def _read_training(path: str) -> dict[str, Any]:
    config = os.path.join(path, "config.yaml")
    return {
        "config": read_text(config),
        "settings": read_yaml_file(config),
        "curves": read_curves(os.path.join(path, "progress.csv")),
        "grids": [p for p in pictures_in(path) if os.path.basename(p).startswith("samples_")],
    }


def _read_samples(path: str) -> dict[str, Any]:
    grid, settings = os.path.join(path, "grid.png"), os.path.join(path, "settings.yaml")
    return {
        "settings": read_yaml_file(settings),
        "config": read_text(settings),
        "evaluation": read_json(os.path.join(path, "evaluation.json")),
        "grid": grid if os.path.isfile(grid) else "",
    }


def _read_sweep(path: str) -> dict[str, Any]:
    """cells: [(place in the grid, result or None, error, path of the grid picture)]."""
    index = read_json(os.path.join(path, "cells.json"))
    listed = [cell for cell in index.get("cells", []) if isinstance(cell, dict)]
    if not listed:  # of another version: whatever results there are
        for name in sorted(os.listdir(os.path.join(path, "cells"))):
            place = read_json(os.path.join(path, "cells", name, "result.json")).get("cell")
            listed += [{**place, "folder": name}] if isinstance(place, dict) else []
    cells = []
    for place in listed:
        folder = os.path.join(path, "cells", os.path.basename(str(place.get("folder"))))
        result = read_json(os.path.join(folder, "result.json"))
        if {"checkpoint", "sampler", "eta", "steps", "lambda", "seed", "column"} <= set(place):
            place = {
                **{key: str(value) for key, value in place.items()},
                "eta": to_float(place["eta"]) or 0.0,
            }
            grid = os.path.join(folder, "samples", "grid.png")
            error = str(read_json(os.path.join(folder, "failed.json")).get("error", ""))
            cells.append(
                (
                    place,
                    result if valid_result(result) else None,
                    error,
                    grid if os.path.isfile(grid) else "",
                )
            )
    found = list(
        dict.fromkeys(name for _, result, _, _ in cells if result for name in result["metrics"])
    )
    metrics = (
        [str(name) for name in index["metrics"]]
        if isinstance(index.get("metrics"), list)
        else found
    )
    return {
        "cells": cells,
        "metrics": metrics,
        "features": str(index.get("features", "")),
        "config": read_text(os.path.join(path, "sweep.yaml")),
    }


def valid_result(result: dict[str, Any]) -> bool:
    metrics = result.get("metrics")
    return isinstance(metrics, dict) and all(
        isinstance(m, dict) and is_number(m.get("value")) for m in metrics.values()
    )


def _read_measures(path: str) -> dict[str, Any]:
    """As MeasureRun writes measures.json, and the pictures beside it."""
    content = read_json(os.path.join(path, "measures.json"))
    settings = content.get("settings") if isinstance(content.get("settings"), dict) else {}
    return {
        "content": content,
        "settings": settings,
        "config": read_text(os.path.join(path, "settings.yaml")),
        "pictures": pictures_in(path),
    }


def _read_schedule(path: str) -> dict[str, Any]:
    return {
        "lambda": [float(value) for value in read_yaml_file(path)["lambda"]],
        "config": read_text(path),
    }


READERS = {
    TRAINING: _read_training,
    SAMPLES: _read_samples,
    SWEEP: _read_sweep,
    MEASURES: _read_measures,
    SCHEDULE: _read_schedule,
}


# ---- files that may be anything ----


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_text(path: str) -> str:
    """A text file, '' if there is none; bytes that are no UTF-8 show as such."""
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def read_yaml_file(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_curves(path: str) -> dict[str, list[tuple[float, float]]]:
    """{column: [(step, value), ...]} of a progress.csv, without cells that are no numbers; long
    curves are thinned to means.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            step = to_float(row.get("step"))
            for name, text in row.items():
                value = to_float(text)
                if name and name != "step" and step is not None and value is not None:
                    curves.setdefault(name, []).append((step, value))
    return {name: _thinned(points) for name, points in curves.items()}


def to_float(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else []
    return [
        (group[-1][0], math.fsum(value for _, value in group) / len(group)) for group in groups
    ] or points
