"""What a report can show: folders of training, sampling, sweeps and measurements, told apart by
the files in them, each read into a value of its own kind.

Nothing that is read here is trusted: files may be torn, of another version, or somebody else's.
What cannot be read is left out; what is in these values has the types that are declared.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..exposure_bias.plots import TITLES, is_number
from ..yaml_text import parse_yaml

_DEPTH = 3  # of the search in folders that hold runs
_MOST_POINTS = 500  # of a curve: more cannot be seen, and each costs bytes
_PLACE = ("checkpoint", "sampler", "eta", "steps", "lambda", "seed", "column")
Curves = dict[str, list[tuple[float, float]]]


@dataclass
class Run:
    """One thing to show. `label` is short and unique in the report; `config` is a text file."""

    kind: ClassVar[str] = ""
    title: ClassVar[str] = ""
    path: str
    config: str = field(kw_only=True, default="")
    label: str = field(kw_only=True, default="")


@dataclass
class Training(Run):
    """`curves`: (step, value) of each column of progress.csv; `grids`: pictures of samples."""

    kind, title = "training", "training runs"
    gamma: str
    curves: Curves
    grids: list[str]


@dataclass
class Evaluation:
    """evaluation.json: values of metrics, from `count` images; `sides` are the paths of reference
    and samples, if both are recorded.
    """

    metrics: dict[str, float]
    features: str
    count: str
    sides: list[str]


@dataclass
class Samples(Run):
    """`settings`: those of the samples, by the names of their flags; `grid`: a picture, or ""."""

    kind, title = "samples", "sets of samples"
    settings: dict[str, Any]
    evaluation: Evaluation | None
    grid: str


@dataclass
class SweepCell:
    """`place`: where in the grid, see Cell.describe; `result`: with "metrics", None if there is
    none; `error`: why; `grid`: a picture, or "".
    """

    place: dict[str, Any]
    result: dict[str, Any] | None
    error: str
    grid: str
    warnings: list[str]
    commands: list[str]


@dataclass
class SweepRun(Run):
    """A sweep, finished or not."""

    kind, title = "sweep", "sweeps"
    cells: list[SweepCell]
    metrics: list[str]
    features: str


@dataclass
class Measurement(Run):
    """`content`: measures.json, in which `settings` is a dict and `measures` a dict of dicts;
    `pictures`: those beside it that are not drawings of it.
    """

    kind, title = "measures", "measurements"
    content: dict[str, Any]
    pictures: list[str]


@dataclass
class Schedule(Run):
    """A lambda schedule file."""

    kind, title = "schedule", "lambda schedules"
    lambdas: list[float]


@dataclass
class Pictures(Run):
    """Any other folder with pictures."""

    kind, title = "pictures", "folders of pictures"
    pictures: list[str]


KINDS = (Training, Samples, SweepRun, Measurement, Schedule, Pictures)


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
        runs = list(_below(os.path.normpath(path), _DEPTH))
        if not runs and pictures_in(path):
            runs = [Pictures(path, pictures_in(path))]
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
    run = read_run(path)
    if run is not None:
        yield run
    if depth and os.path.isdir(path) and not isinstance(run, (SweepRun, Samples)):
        for name in sorted(os.listdir(path)):
            if not name.startswith("."):
                yield from _below(os.path.join(path, name), depth - 1)


def read_run(path: str) -> Run | None:
    """The run in a folder, or the schedule in a file; None if it is something else."""
    if not os.path.isdir(path):
        return _read_schedule(path) if path.endswith((".yaml", ".yml")) else None
    names = set(os.listdir(path))
    readers: tuple[tuple[bool, Callable[[str], Run]], ...] = (
        ({"cells", "sweep.yaml"} <= names, _read_sweep),
        ("measures.json" in names, _read_measures),
        ({"config.yaml", "progress.csv"} <= names, _read_training),
        ("settings.yaml" in names and bool(names & {"grid.png", "evaluation.json"}), _read_samples),
    )
    return next((read(path) for fits, read in readers if fits), None)


def pictures_in(path: str) -> list[str]:
    """The paths of the pictures in a folder; of an SVG and a PNG of the same name, the SVG."""
    if not os.path.isdir(path):
        return []
    names = sorted(name for name in os.listdir(path) if name.endswith((".png", ".svg")))
    return [
        os.path.join(path, name)
        for name in names
        if name.endswith(".svg") or f"{name[:-4]}.svg" not in names
    ]


def _read_training(path: str) -> Training:
    config = os.path.join(path, "config.yaml")
    gamma = _dict(read_yaml(config).get("diffusion")).get("input_perturbation", 0)
    grids = [p for p in pictures_in(path) if os.path.basename(p).startswith("samples_")]
    curves = read_curves(os.path.join(path, "progress.csv"))
    return Training(path, str(gamma), curves, grids, config=read_text(config))


def _read_samples(path: str) -> Samples:
    settings = os.path.join(path, "settings.yaml")
    grid = _file(path, "grid.png")
    evaluation = _evaluation(read_json(os.path.join(path, "evaluation.json")))
    return Samples(path, read_yaml(settings), evaluation, grid, config=read_text(settings))


def _evaluation(content: dict[str, Any]) -> Evaluation | None:
    metrics = _metrics(content)
    if metrics is None:
        return None
    features = _dict(content.get("features"))
    count = next((str(m["samples"]) for m in metrics.values() if "samples" in m), "")
    sides = [_dict(content.get(side)).get("path") for side in ("reference", "samples")]
    return Evaluation(
        {name: metric["value"] for name, metric in metrics.items()},
        str(features.get("file") or features.get("name", "")),
        count,
        [str(side) for side in sides] if all(sides) else [],
    )


def _metrics(content: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """{name: {"value": number, ...}}, None if it has another form."""
    metrics = content.get("metrics")
    if not isinstance(metrics, dict):
        return None
    fine = all(isinstance(m, dict) and is_number(m.get("value")) for m in metrics.values())
    return metrics if fine else None


def _read_sweep(path: str) -> SweepRun:
    index = read_json(os.path.join(path, "cells.json"))
    listed = [place for place in _list(index.get("cells")) if isinstance(place, dict)]
    if not listed:  # still running, or of another version: whatever results there are
        for name in sorted(os.listdir(os.path.join(path, "cells"))):
            place = read_json(os.path.join(path, "cells", name, "result.json")).get("cell")
            listed += [{**place, "folder": name}] if isinstance(place, dict) else []
    cells = [_read_cell(path, place) for place in listed if set(_PLACE) <= set(place)]
    found = dict.fromkeys(name for cell in cells if cell.result for name in cell.result["metrics"])
    names = index.get("metrics")
    return SweepRun(
        path,
        cells,
        [str(name) for name in names] if isinstance(names, list) else list(found),
        str(index.get("features", "")),
        config=read_text(os.path.join(path, "sweep.yaml")),
    )


def _read_cell(path: str, place: dict[str, Any]) -> SweepCell:
    folder = os.path.join(path, "cells", os.path.basename(str(place.get("folder"))))
    content = read_json(os.path.join(folder, "result.json"))
    metrics = _metrics(content)
    texts = {key: str(value) for key, value in place.items()}
    return SweepCell(
        {**texts, "eta": to_float(place["eta"]) or 0.0},
        None if metrics is None else {"metrics": metrics},
        str(read_json(os.path.join(folder, "failed.json")).get("error", "")),
        _file(folder, "samples", "grid.png"),
        [str(warning) for warning in _list(content.get("warnings"))],
        [str(line) for line in _list(content.get("commands"))],
    )


def _read_measures(path: str) -> Measurement:
    content = read_json(os.path.join(path, "measures.json"))
    measures = {name: _dict(found) for name, found in _dict(content.get("measures")).items()}
    content = {**content, "settings": _dict(content.get("settings")), "measures": measures}
    config = read_text(os.path.join(path, "settings.yaml"))
    others = [p for p in pictures_in(path) if os.path.basename(p)[:-4] not in TITLES]
    return Measurement(path, content, others, config=config)


def _read_schedule(path: str) -> Schedule | None:
    content = read_yaml(path)
    lambdas = content.get("lambda")
    if "checkpoints" in content:  # a sweep's plan, whose lambdas are alternatives
        return None
    if not isinstance(lambdas, list) or not all(map(is_number, lambdas)):
        return None
    return Schedule(path, [float(value) for value in lambdas], config=read_text(path))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _file(*parts: str) -> str:
    """The path if there is a file, else ""."""
    path = os.path.join(*parts)
    return path if os.path.isfile(path) else ""


def read_text(path: str) -> str:
    """A text file, "" if there is none; bytes that are not UTF-8 show as such."""
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError):
        return ""


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, {} if there is none."""
    try:
        return _dict(parse_yaml(read_text(path), path))
    except ValueError:
        return {}


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file, {} if there is none."""
    try:
        return _dict(json.loads(read_text(path)))
    except (ValueError, RecursionError):
        return {}


def read_curves(path: str) -> Curves:
    """{column: [(step, value), ...]} of a progress.csv, without cells that are no numbers; long
    curves are thinned to means.
    """
    curves: Curves = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            step = to_float(row.get("step"))
            for name, text in row.items():
                value = to_float(text)
                if name and name != "step" and step is not None and value is not None:
                    curves.setdefault(name, []).append((step, value))
    return {name: _thinned(points) for name, points in curves.items()}


def to_float(text: Any) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], math.fsum(v for _, v in group) / len(group)) for group in groups]
