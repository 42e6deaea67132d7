"""Which curves a report draws besides those of the measures (exposure_bias/plots.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..exposure_bias.plots import Curve, Panel, Picture, is_number
from .report_data import Measurement, Run, Schedule, Training
from .sweep_table import TITLES

_METRIC = re.compile(r"(\w+)@(\d+)")
_QUARTERS = ("quarter 1 (clean end)", "quarter 2", "quarter 3", "quarter 4 (noise)")
_MOST_QUARTERS = 4  # runs whose loss is shown by quarters of t
_LOSSES = {"loss": "Training loss", "mse": "Mean squared error of the predicted noise"}


def loss_pictures(runs: Sequence[Training]) -> list[Picture]:
    """Loss of all training runs together, and of each by quarters of t."""
    note = ""
    if len({run.gamma for run in runs}) > 1:
        note = (
            "With input perturbation the network sees noisier inputs: losses of different gamma do "
            "not compare."
        )
    pictures = []
    for column, title in _LOSSES.items():
        curves = [
            Curve(run.label, run.curves[column], number)
            for number, run in enumerate(runs)
            if column in run.curves
        ]
        pictures.append(_over_steps(column, title, column, curves, note))
    for number, run in enumerate(runs[:_MOST_QUARTERS]):
        columns = [(q, f"loss_q{q}") for q in range(4) if f"loss_q{q}" in run.curves]
        curves = [Curve(f"t in {_QUARTERS[q]}", run.curves[column], q) for q, column in columns]
        title = f"Loss by quarters of t: {run.label}"
        pictures.append(_over_steps(f"loss_quarters_{number}", title, "loss", curves))
    return [picture for picture in pictures if picture.panels[0].curves]


def metric_pictures(runs: Sequence[Training]) -> list[Picture]:
    """FID@N and its like over training, one picture for each."""
    found: dict[tuple[str, str], list[Curve]] = {}
    for number, run in enumerate(runs):
        for column, points in run.curves.items():
            if match := _METRIC.fullmatch(column):
                found.setdefault((match[1], match[2]), []).append(Curve(run.label, points, number))
    pictures = []
    for (name, count), curves in found.items():
        title = f"{TITLES.get(name, name)}@{count}"
        note = (
            f"From {count} samples each time, with the averaged weights and always the same noise; "
            "compares only with values of as many images."
        )
        place = f"training_{name}_{count}"
        pictures.append(_over_steps(place, f"{title} during training", title, curves, note, False))
    return pictures


def _over_steps(
    name: str, title: str, y_label: str, curves: list[Curve], note: str = "", log_y: bool = True
) -> Picture:
    return Picture(name, title, [Panel("", "step", y_label, curves, log_y=log_y)], note)


def lambda_pictures(runs: Sequence[Run]) -> list[Picture]:
    """lambda(t) of schedules, and of measurements that were made with one."""
    curves: list[Curve] = []
    for run in runs:
        values = run.lambdas if isinstance(run, Schedule) else []
        if isinstance(run, Measurement) and isinstance(run.content.get("lambda"), list):
            values = run.content["lambda"]
        if any(is_number(value) and value != 1 for value in values):
            # By share of the chain: schedules of different lengths can be laid over each other.
            last = max(1, len(values) - 1)
            points = [(t / last, value) for t, value in enumerate(values) if is_number(value)]
            curves.append(Curve(f"{run.label} ({len(values)} steps)", points, len(curves)))
    if not curves:
        return []
    panel = Panel("", "step / (steps - 1), 0 = clean", "lambda", curves, lines=[1])
    note = f"The predicted noise is divided by it while sampling. Curves: {_names(curves)}."
    return [Picture("lambda", "lambda(t)", [panel], note)]


def _names(curves: Sequence[Curve]) -> str:
    return ", ".join(curve.label for curve in curves)
