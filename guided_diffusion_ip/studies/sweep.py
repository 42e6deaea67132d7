"""What a sweep is: one YAML file -> a grid of cells, each a set of samples and its evaluation.

    checkpoints:                      # name -> path, or {path:, config:}
      baseline: runs/baseline/ema_0.9999_100000.pt
      IP: {path: runs/ip/ema_0.9999_100000.pt, config: configs/cifar10_ip.yaml}
    reference: cifar10.npz
    steps: [100, 50, 20]
    lambda: [1.0, {ES: published}]

Every combination of checkpoint, sampler, eta (DDIM only), steps, lambda and seed is a cell, unless
`only` or `exclude` says otherwise. sweep_run.py computes cells, sweep_table.py makes the table.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from .. import files
from ..diffusion.solvers import SOLVERS
from ..settings.config import from_values
from ..settings.flag import Flag
from ..settings.flags import SCRIPTS
from ..settings.sampling import adopt_beside
from ..settings.yaml_file import nearest
from ..yaml_text import parse_yaml

KEYS = (
    "checkpoints",
    "reference",
    "features",
    "metrics",
    "num_samples",
    "sampler",
    "steps",
    "lambda",
    "eta",
    "seeds",
    "only",
    "exclude",
    "sample",
    "evaluate",
    "keep_samples",
)
_RULE_KEYS = ("checkpoint", "sampler", "eta", "steps", "lambda", "seed")
# Flags of image_sample.py that the grid sets itself, with the key of the sweep that does.
_SET_BY = {
    "model_path": "checkpoints",
    "config": "checkpoints",
    "num_samples": "num_samples",
    "use_ddim": "sampler",
    "sampler": "sampler",
    "solver": "sampler",
    "timestep_respacing": "steps",
    "edm_steps": "steps",
    "eps_scaler": "lambda",
    "eps_scaler_k": "lambda",
    "eps_schedule": "lambda",
    "eta": "eta",
    "seed": "seeds",
    "out_dir": "--out_dir",
}
_FILES = (
    "config",
    "model_path",
    "eps_schedule",
    "reference",
    "features",
    "inception_weights",
)  # count by their content
_NO_MATTER = ("batch_size", "device", "save_png")  # change no number
_SET_BY_EVALUATE = {
    "ref": "reference",
    "samples": "checkpoints",
    "features": "features",
    "metrics": "metrics",
    "json": "--out_dir",
}


def _steps(value: Any) -> str:
    """a number of steps, or a respacing such as ddim50, 10,10,20 or 10@960"""
    form = r"((ddim)?[1-9]\d*|\d+(,\d+)+)(@[1-9]\d*)?"
    if isinstance(value, bool) or not re.fullmatch(form, str(value)):
        raise ValueError
    return str(value)


_OF_SAMPLING = {flag.name: flag for flag in SCRIPTS["image_sample"].flags()}
# The axes of the grid beside checkpoints and lambda: key -> the flag that a value of it sets.
_GRID = {
    "sampler": replace(_OF_SAMPLING["solver"], default="ddpm", choices=lambda: SOLVERS),
    "steps": replace(_OF_SAMPLING["timestep_respacing"], type=_steps),
    "eta": _OF_SAMPLING["eta"],
    "seeds": _OF_SAMPLING["seed"],
}
_NUM_SAMPLES = replace(_OF_SAMPLING["num_samples"], least=2)  # a covariance needs two
_KEEP = replace(_OF_SAMPLING["save_png"], default=True)  # true or false


@dataclass(frozen=True)
class Scaling:
    """One entry of `lambda`: `label` names its column, "" for no scaling; `flags` are those of
    image_sample.py.
    """

    label: str
    flags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class GridCell:
    """One set of samples. `name` is unique within the sweep; `key` is the hash of all that its
    numbers depend on.
    """

    checkpoint: str
    sampler: str
    eta: float
    steps: str
    scaling: Scaling
    seed: int
    key: str
    sample_args: tuple[str, ...] = field(repr=False)  # of image_sample.py, without --out_dir
    evaluate_args: tuple[str, ...] = field(
        repr=False
    )  # of evaluator.py, without the samples, the metrics and --json

    @property
    def name(self) -> str:
        sampler = f"{self.sampler}-eta{self.eta:g}" if self.eta else self.sampler
        scaling = f"-{self.scaling.label}" if self.scaling.label else ""
        return f"{self.checkpoint}{scaling}, {sampler}, {self.steps} steps, seed {self.seed}"

    @property
    def folder(self) -> str:
        """The name as a folder's, with the key."""
        return f"{re.sub(r'[^A-Za-z0-9.+]+', '-', self.name).strip('-')[:100]}-{self.key}"

    @property
    def column(self) -> str:
        """The paper's name of the method: checkpoint, and the scaling if there is one."""
        return (
            f"{self.checkpoint} + {self.scaling.label}" if self.scaling.label else self.checkpoint
        )

    def describe(self) -> dict[str, Any]:
        """The cell's place in the grid, as plain values."""
        return {
            "checkpoint": self.checkpoint,
            "sampler": self.sampler,
            "eta": self.eta,
            "steps": self.steps,
            "lambda": self.scaling.label or "1",
            "seed": self.seed,
            "column": self.column,
        }

    @property
    def network_calls(self) -> int:
        """For one batch; a weight for estimates of time."""
        steps = max(1, sum(int(number) for number in re.findall(r"\d+", self.steps)))
        return SOLVERS[self.sampler].calls(steps)


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked. `metrics` are not part of a cell's key: one more needs no
    new samples.
    """

    path: str
    cells: tuple[GridCell, ...]
    metrics: tuple[str, ...]
    features: str
    keep_samples: bool
    text: str = field(repr=False)


def read_sweep(path: str) -> Sweep:
    """The sweep that a YAML file describes.

    Raises:
        ValueError: not YAML, unknown keys, values that make no sense, files that are not there, or
            no cell at all; one line.
    """
    content, text = _load(path)
    for needed in ("checkpoints", "reference", "steps"):
        if not content.get(needed):
            raise ValueError(
                f"{path}: {needed} is missing; a sweep needs checkpoints, reference and steps"
            )
    lists = {
        key: [_converted(path, key, flag, v) for v in _list(content, key, flag.default)]
        for key, flag in _GRID.items()
    }
    rules = {name: _rules(path, name, content.get(name)) for name in ("only", "exclude")}
    shared = _Shared(path, content)
    scalings = _list(content, "lambda", 1.0)
    cells = []
    for name, checkpoint in _checkpoints(path, content["checkpoints"]).items():
        for sampler, eta, steps, entry, seed in itertools.product(
            lists["sampler"], lists["eta"], lists["steps"], scalings, lists["seeds"]
        ):
            if "eta" not in SOLVERS[sampler].options:
                eta = 0.0  # the same cell for every eta
            place = {
                "checkpoint": name,
                "sampler": sampler,
                "eta": eta,
                "steps": steps,
                "seed": seed,
                "lambda": _label(path, entry),
            }
            kept = not rules["only"] or any(_matches(rule, place) for rule in rules["only"])
            if kept and not any(_matches(rule, place) for rule in rules["exclude"]):
                cells.append(shared.cell(place, checkpoint, entry))
    cells = list({cell.folder: cell for cell in cells}.values())
    if not cells:
        raise ValueError(f"{path}: only and exclude leave no cell of the grid")
    return Sweep(
        path,
        tuple(cells),
        _metrics(path, content),
        shared.features,
        _converted(path, "keep_samples", _KEEP, content.get("keep_samples", _KEEP.default)),
        text,
    )


class _Shared:
    """What all cells of a file have in common."""

    def __init__(self, path: str, content: dict[str, Any]) -> None:
        self.path = path
        count = content.get("num_samples", _NUM_SAMPLES.default)
        self.num_samples = _converted(path, "num_samples", _NUM_SAMPLES, count)
        self.reference = _existing(path, "reference", content["reference"])
        self.features = str(content.get("features", "inception"))
        self.sample = _more_flags(path, "sample", content, _SET_BY)
        self.evaluate = _more_flags(path, "evaluate", content, _SET_BY_EVALUATE)
        self._hashes: dict[str, str] = {}

    def cell(self, place: dict[str, Any], checkpoint: dict[str, str], entry: Any) -> GridCell:
        scaling = _scaling(self.path, entry, place)
        config = [("config", checkpoint["config"])] if checkpoint.get("config") else []
        along_sigma = self._goes_along_sigma(place["sampler"], checkpoint)
        if along_sigma and not place["steps"].isdigit():
            raise ValueError(
                f"{self.path}: steps {place['steps']} is a respacing for DDPM and DDIM; "
                f"{place['sampler']} takes a number: exclude {{sampler: {place['sampler']}, steps: "
                f"{place['steps']}}}"
            )
        sample = [
            *config,
            ("model_path", checkpoint["path"]),
            ("num_samples", str(self.num_samples)),
            ("edm_steps" if along_sigma else "timestep_respacing", place["steps"]),
            ("seed", str(place["seed"])),
            *scaling.flags,
            *self.sample,
        ]
        # As the flags were called when the first sweeps were made: cells are found by these words.
        if place["sampler"] == "ddim":
            sample += [("use_ddim", "True")]
        elif place["sampler"] != "ddpm":
            sample += [("sampler", place["sampler"])]
        if "eta" in SOLVERS[place["sampler"]].options:
            sample += [("eta", f"{place['eta']:g}")]
        evaluate = [*config, ("features", self.features), *self.evaluate]
        beside = os.path.join(os.path.dirname(checkpoint["path"]), "config.yaml")
        # Pixels of EDM's models were truncated once, and a sweep's folder may hold such cells.
        pixels = [("quantisation", "EDM's rounded")] if along_sigma else []
        decides = [
            *sample,
            *pixels,
            ("reference", self.reference),
            *evaluate,
            *([("config", beside)] if os.path.exists(beside) else []),
        ]
        identity = [
            [name, self._hash(value) if name in _FILES and os.path.exists(value) else value]
            for name, value in decides
            if name not in _NO_MATTER
        ]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
        return GridCell(
            place["checkpoint"],
            place["sampler"],
            place["eta"],
            place["steps"],
            scaling,
            place["seed"],
            key,
            _words(sample),
            (self.reference, *_words(evaluate)),
        )

    def _goes_along_sigma(self, sampler: str, checkpoint: dict[str, str]) -> bool:
        solver = SOLVERS[sampler]
        if solver.along != "either":
            return solver.goes_along_sigma(edm=False)
        flags = {"model_path": checkpoint["path"], **dict(self.sample)}
        cfg = adopt_beside(from_values("image_sample", flags, checkpoint.get("config", "")))
        return solver.goes_along_sigma(cfg.framework == "edm")

    def _hash(self, path: str) -> str:
        if path not in self._hashes:
            self._hashes[path] = files.sha256_tree(path)
        return self._hashes[path]


def _words(flags: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(word for name, value in flags for word in (f"--{name}", value))


def _load(path: str) -> tuple[dict[str, Any], str]:
    if not os.path.isfile(path):
        raise ValueError(f"sweep file {path} does not exist; configs/sweeps/ has an example")
    with open(path, "rb") as file:
        raw = file.read()
    content = parse_yaml(raw, path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected 'key: value' lines with {', '.join(KEYS)}, found "
            f"{type(content).__name__}"
        )
    for key in content:
        if key not in KEYS:
            raise ValueError(
                f"{path}: unknown key {key!r}; allowed: {', '.join(KEYS)}."
                + nearest(str(key), KEYS)
            )
    return content, raw.decode(errors="replace")


def _list(content: dict[str, Any], key: str, default: Any) -> list[Any]:
    value = content.get(key, default)
    values = value if isinstance(value, list) else [value]
    return [v for i, v in enumerate(values) if v not in values[:i]]


def _converted(path: str, key: str, flag: Flag, value: Any) -> Any:
    """A value of a key as that of the flag which it sets."""
    try:
        return flag.convert(value)
    except argparse.ArgumentTypeError as error:
        known = nearest(str(value), flag.allowed)
        raise ValueError(f"{path}: {key} {value!r}: {error}.{known}") from None


def _existing(path: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not os.path.exists(value):
        raise ValueError(
            f"{path}: {key}: {value} does not exist (paths count from the folder in which the "
            "sweep is started)"
        )
    return value


def _metrics(path: str, content: dict[str, Any]) -> tuple[str, ...]:
    value = content.get("metrics", "fid")
    names = value.split(",") if isinstance(value, str) else value
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) and name.strip() for name in names)
    ):
        raise ValueError(f"{path}: metrics {value!r} must be a list of names, such as [fid, prec]")
    return tuple(dict.fromkeys(name.strip().lower() for name in names))


def _checkpoints(path: str, value: Any) -> dict[str, dict[str, str]]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: checkpoints must hold 'name: path' lines")
    found = {}
    for name, entry in value.items():
        entry = entry if isinstance(entry, dict) else {"path": entry}
        for key in entry:
            if key not in ("path", "config"):
                raise ValueError(
                    f"{path}: unknown key {key!r} in checkpoint {name}; allowed: path, config."
                    + nearest(str(key), ("path", "config"))
                )
        found[str(name)] = {"path": _existing(path, f"checkpoint {name}", entry.get("path"))}
        if entry.get("config"):
            found[str(name)]["config"] = _existing(
                path, f"config of checkpoint {name}", entry["config"]
            )
    return found


def _more_flags(
    path: str, key: str, content: dict[str, Any], taken: dict[str, str]
) -> list[tuple[str, str]]:
    """Section `sample` or `evaluate`: further flags; whether they exist, the script that takes them
    says.
    """
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} must hold 'flag: value' lines")
    for name in value:
        if name in taken:
            raise ValueError(f"{path}: {name} in {key} is set by {taken[name]}: leave it out")
    return [
        (str(name), ",".join(map(str, v)) if isinstance(v, list) else str(v))
        for name, v in value.items()
    ]


def _rules(path: str, key: str, value: Any) -> list[dict[str, list[str]]]:
    """[{lambda: [1.0, ES], sampler: ddim}, ...]: a rule matches a cell that has one of the values
    for each of its keys.
    """
    rules = value if isinstance(value, list) else [value] if value else []
    for rule in rules:
        if not isinstance(rule, dict):
            raise ValueError(
                f"{path}: {key} must be a list of rules such as {{sampler: ddim, lambda: "
                f"[published]}}"
            )
        for name in rule:
            if name not in _RULE_KEYS:
                raise ValueError(
                    f"{path}: unknown key {name!r} in {key}; allowed: {', '.join(_RULE_KEYS)}."
                    + nearest(str(name), _RULE_KEYS)
                )
    return [
        {
            name: [_text(v) for v in (values if isinstance(values, list) else [values])]
            for name, values in rule.items()
        }
        for rule in rules
    ]


def _matches(rule: dict[str, list[str]], place: dict[str, Any]) -> bool:
    return all((_text(place[name]) or "1") in values for name, values in rule.items())


def _text(value: Any) -> str:
    """1.0 and 1 are the same."""
    return (
        f"{value:g}"
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else str(value)
    )


# ---- lambda ----


def _label(path: str, entry: Any) -> str:
    """How the column of this entry is called; '' for lambda = 1."""
    if isinstance(entry, dict):
        if len(entry) != 1:
            raise ValueError(
                f"{path}: lambda {entry!r} must be one 'LABEL: value', such as {{ES: 1.017}}"
            )
        return str(next(iter(entry)))
    if isinstance(entry, str):
        return "ES" if entry == "published" else os.path.splitext(os.path.basename(entry))[0]
    return "" if entry == 1 else f"lambda {_text(entry)}"


def _scaling(path: str, entry: Any, place: dict[str, Any]) -> Scaling:
    """The flags of one entry at one place in the grid.

    An entry is a number, "published", a lambda schedule file, {b:, k:} or {steps: any of these},
    with or without a label.
    """
    label = _label(path, entry)
    value = next(iter(entry.values())) if isinstance(entry, dict) else entry
    if isinstance(value, dict) and not set(value) <= {"b", "k"}:
        by_steps = {str(steps): v for steps, v in value.items()}
        if place["steps"] not in by_steps:
            raise ValueError(
                f"{path}: lambda {label} has no value for {place['steps']} steps: add one, or "
                f"exclude {{lambda: {label}, steps: {place['steps']}}}"
            )
        value = by_steps[place["steps"]]
    line = value if isinstance(value, dict) else {"b": value}
    if value == "published":
        return Scaling(label, (("eps_scaler", "published"),))
    if isinstance(value, str):
        try:
            file = value.format(**{name: _text(v) for name, v in place.items()})
        except (KeyError, IndexError, ValueError):
            raise ValueError(
                f"{path}: lambda {value!r}: between braces may stand {', '.join(place)}"
            ) from None
        return Scaling(label, (("eps_schedule", _existing(path, f"lambda {label}", file)),))
    for name, number in line.items():
        if (
            isinstance(number, bool)
            or not isinstance(number, (int, float))
            or not math.isfinite(number)
        ):
            raise ValueError(
                f"{path}: lambda {label or value}: {name} is {number!r}; allowed are a number, "
                "published, a lambda schedule file, {b:, k:}, or one of these for each number of "
                "steps"
            )
    flags = [
        (f"eps_scaler{'_k' if name == 'k' else ''}", repr(float(number)))
        for name, number in line.items()
    ]
    return Scaling(label, tuple(flags))
