"""Which curves a report draws, and of what."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .report_data import MEASURES, SCHEDULE, TRAINING, Run, is_number
from .report_plots import Curve, Plot
from .sweep_table import TITLES

_METRIC = re.compile(r"(\w+)@(\d+)")
_QUARTER_NAMES = (" (clean end)", "", "", " (noise)")
_MOST_QUARTERS = 4  # runs whose loss is shown by quarters of t

Points = list[tuple[float, float]]


def curve(label: str, points: Points, **options: Any) -> Curve:
    x, y = zip(*points)
    return Curve(label, x, y, **options)


def loss_plots(runs: Sequence[Run]) -> list[Plot]:
    """Loss of all training runs together, and of each by quarters of t."""
    trained = [run for run in runs if run.kind == TRAINING]
    sections = [run.data["settings"].get("diffusion") for run in trained]
    gammas = {
        str(section.get("input_perturbation", 0))
        for section in sections
        if isinstance(section, dict)
    }
    told = "With input perturbation the network sees noisier inputs: losses of different gamma do not compare."
    plots = []
    for column, title in (
        ("loss", "Training loss"),
        ("mse", "Mean squared error of the predicted noise"),
    ):
        curves = [
            curve(run.label, run.data["curves"][column], style=number)
            for number, run in enumerate(trained)
            if column in run.data["curves"]
        ]
        if curves:
            plots.append(
                Plot(
                    column,
                    title,
                    "step",
                    column,
                    curves,
                    log_y=True,
                    note=told if len(gammas) > 1 else "",
                )
            )
    for number, run in enumerate(trained[:_MOST_QUARTERS]):
        quarters = [
            (f"t in quarter {q + 1}{_QUARTER_NAMES[q]}", run.data["curves"].get(f"loss_q{q}"))
            for q in range(4)
        ]
        curves = [
            curve(label, points, style=q) for q, (label, points) in enumerate(quarters) if points
        ]
        if curves:
            plots.append(
                Plot(
                    f"loss_quarters_{number}",
                    f"Loss by quarters of t: {run.label}",
                    "step",
                    "loss",
                    curves,
                    log_y=True,
                )
            )
    return plots


def metric_plots(runs: Sequence[Run]) -> list[Plot]:
    """FID@N and its like over training, one plot for each."""
    found: dict[tuple[str, str], list[Curve]] = {}
    for number, run in enumerate(run for run in runs if run.kind == TRAINING):
        for column, points in run.data["curves"].items():
            if match := _METRIC.fullmatch(column):
                found.setdefault((match[1], match[2]), []).append(
                    curve(run.label, points, style=number, markers=True)
                )
    plots = []
    for (name, count), curves in found.items():
        title = f"{TITLES.get(name, name)}@{count}"
        plots.append(
            Plot(
                f"training_{name}_{count}",
                f"{title} during training",
                "step",
                title,
                curves,
                note=f"From {count} samples each time, with the averaged weights and always the same noise; compares "
                "only with values of as many images.",
            )
        )
    return plots


# ---- measurements ----


def figures(run: Run, measure: str) -> dict[str, Any]:
    """One measure of measures.json, {} if it is not there."""
    measures = run.data["content"].get("measures")
    found = measures.get(measure) if isinstance(measures, dict) else None
    return found if isinstance(found, dict) else {}


def over_time(run: Run, values: Any, first: int = 0) -> Points:
    """(t of the whole process, value) for each step of the respaced one, from `first` on, that has
    a number.
    """
    content = run.data["content"]
    if not isinstance(values, list):
        return []
    times = content.get("timestep_map")
    if not isinstance(times, list) or len(times) != len(values) or not all(map(is_number, times)):
        times = range(len(values))
    return [(float(t), float(v)) for t, v in list(zip(times, values))[first:] if is_number(v)]


def measure_plots(runs: Sequence[Run]) -> list[Plot]:
    """The figures of both papers, all measurements in each."""
    measured = [run for run in runs if run.kind == MEASURES]

    def curves(
        measure: str, key: str, error: str = "", first: int = 0, **options: Any
    ) -> list[Curve]:
        """`error`: the standard error, of which a band shows twice; `first`: so many steps at the
        clean end are left out.
        """
        kept = []
        for number, run in enumerate(measured):
            if points := over_time(run, figures(run, measure).get(key), first):
                errors = over_time(run, figures(run, measure).get(error), first)
                band = [2 * e for _, e in errors] if len(errors) == len(points) else None
                kept.append(curve(run.label, points, style=number, band=band, **options))
        return kept

    time = "t (0 = clean)"
    plots = [
        Plot(
            "eps_norm_ratio",
            "Norm of the predicted noise: sampling over training",
            time,
            "ratio",
            curves("norm", "ratio", "ratio_error", first=1),
            line=1,
            note="Above 1, the network predicts more noise along its own chain than on training inputs. Bands: two standard "
            "errors. The last step (t = 0) is left out. Sampling goes from right to left.",
        ),
        Plot(
            "delta",
            "delta_t",
            time,
            "(std - sqrt(1 - ab))^2",
            [*curves("delta", "delta_multi"), *curves("delta", "delta_single", dashed=True)],
            line=0,
            note="The published measure, along whole chains (dashed: after one step from a noised real image). It compares a "
            "chain with the image from whose noise it began, which a stochastic chain has "
            "forgotten by its end: even a perfect sampler ends well above 0. Compare methods, "
            "not with 0.",
        ),
        Plot(
            "variance_error",
            "Variance error",
            time,
            "Var(x_t) - (ab Var(x_0) + 1 - ab)",
            curves("variance", "error"),
            line=0,
            note="A perfect sampler is at 0 for every t. Above: the samples spread too much.",
        ),
        Plot(
            "nu",
            "Error of the predicted x_0 on real images",
            time,
            "std, nu_t",
            curves("prediction", "nu"),
            line=0,
        ),
        Plot(
            "gamma",
            "The same as an error of the noise",
            time,
            "nu_t sqrt(ab / (1 - ab))",
            curves("prediction", "gamma"),
            line=0.1,
            note="The grey line is the published constant gamma = 0.1. Shown for comparison; no value follows from it.",
        ),
        Plot(
            "accumulation",
            "Error accumulation",
            "stochastic steps from a noised real image",
            "Frechet distance",
            _accumulation(measured),
        ),
    ]
    return [plot for plot in plots if plot.curves]


def _accumulation(runs: Sequence[Run]) -> list[Curve]:
    found = []
    for number, run in enumerate(runs):
        values = figures(run, "accumulation")
        both = [
            values.get(name) if isinstance(values.get(name), list) else []
            for name in ("steps", "frechet")
        ]
        pairs = zip(*both)
        if points := sorted(
            (float(k), float(v)) for k, v in pairs if is_number(k) and is_number(v)
        ):
            found.append(curve(run.label, points, style=number, markers=True))
    return found


def lambda_plots(runs: Sequence[Run]) -> list[Plot]:
    """lambda(t) of schedules, and of measurements that were made with one."""
    curves = []
    for run in runs:
        content = (
            run.data
            if run.kind == SCHEDULE
            else run.data["content"]
            if run.kind == MEASURES
            else {}
        )
        values = content.get("lambda")
        if isinstance(values, list) and any(is_number(v) and v != 1 for v in values):
            # By share of the chain: schedules for different numbers of steps can be laid over each
            # other.
            points = [
                (t / max(1, len(values) - 1), v) for t, v in enumerate(values) if is_number(v)
            ]
            curves.append(curve(f"{run.label} ({len(values)} steps)", points))
    return (
        [
            Plot(
                "lambda",
                "lambda(t)",
                "step / (steps - 1), 0 = clean",
                "lambda",
                curves,
                line=1,
                note="The predicted noise is divided by it while sampling.",
            )
        ]
        if curves
        else []
    )
