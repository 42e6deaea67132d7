"""One picture of each measure, for one measurement or several in the same axes; and how curves are
drawn, here and in reports. matplotlib is imported only here, when the first figure is drawn.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files import atomic_file
from ..runs.sampler_text import sampler_text

# Okabe & Ito's palette, for colour-blind readers; in print, dashes tell curves apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#555555")
GREY = "#777777"
_DASHES = ("-", "--", ":", "-.")
_DASH_NAMES = ("solid", "dashed", "dotted", "dash-dotted")
_LABEL_LENGTH = 44
_STYLE = {
    "text.parse_math": False,  # a $ in a file name is a $
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "axes.formatter.useoffset": False,
}
_TIME = "t (0 = clean)"
Points = Sequence[tuple[float, float]]
Measured = Sequence[tuple[str, Mapping[str, Any]]]  # (label, measures.json) of each measurement


@dataclass(frozen=True)
class Curve:
    """`points` (x, y), and `errors`, the half-height of a band around them.

    `color` and `dash` are numbers, of PALETTE and of the kinds of dashes. Without a label it is not
    in the legend.
    """

    label: str
    points: Points
    color: int = 0
    dash: int = 0
    errors: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `lines` are horizontal ones, where a perfect model would lie."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    lines: Sequence[float] = ()
    log_y: bool = False


@dataclass(frozen=True)
class Picture:
    """Panels side by side. `name` is that of its files; `note` says how to read it."""

    name: str
    title: str
    panels: Sequence[Panel]
    note: str = ""

    @property
    def description(self) -> str:
        """For those who cannot see it."""
        labels = dict.fromkeys(c.label for panel in self.panels for c in panel.curves if c.label)
        return f"{'; '.join(panel.title for panel in self.panels)}: {', '.join(labels)}"


def require_matplotlib() -> None:
    """Raises ValueError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"pictures need matplotlib, which is not installed ({error}): "
            "pip install -e '.[plots]', or --plots False"
        ) from None


def save_plots(content: Mapping[str, Any], out_dir: str) -> list[str]:
    """Draw each measure in `content` (measures.json): the paths of NAME.png and NAME.svg in
    out_dir.

    Raises:
        ValueError: matplotlib is not installed.
    """
    settings = {"timestep_respacing": content["num_timesteps"], **content["settings"]}
    heading = f"{sampler_text(settings)}, seed {settings.get('seed', '?')}, "
    heading += f"{content['num_images']} images"
    return [
        path
        for picture in measure_pictures([("", content)])
        for path in save_picture(picture, out_dir, heading)
    ]


def save_picture(picture: Picture, folder: str, heading: str = "") -> list[str]:
    """Write NAME.png and NAME.svg; returns their paths."""
    paths = []
    for kind in ("png", "svg"):
        paths.append(os.path.join(folder, f"{picture.name}.{kind}"))
        title = f"{picture.title}\n{heading}" if heading else picture.title
        with atomic_file(paths[-1]) as file:
            file.write(drawn(picture, kind, title))
    return paths


def drawn(picture: Picture, kind: str, title: str = "") -> bytes:
    """The content of a "png" or "svg" file; `title` stands above the panels."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": picture.name}
    with matplotlib.rc_context(style):
        named = max(len([c for c in panel.curves if c.label]) for panel in picture.panels)
        size = (4.8 * len(picture.panels), 3.4 + 0.17 * named)
        figure = Figure(figsize=size, layout="constrained")
        for number, panel in enumerate(picture.panels):
            _draw(panel, figure.add_subplot(1, len(picture.panels), number + 1))
        if title:
            figure.suptitle(title, fontsize=11)
        content = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(content, format=kind, dpi=150, metadata=metadata)
    return content.getvalue()


def _draw(panel: Panel, axes: Any) -> None:
    for level in panel.lines:
        axes.axhline(level, color=GREY, linewidth=1)
    for curve in panel.curves:
        x, y = zip(*curve.points)
        color = PALETTE[curve.color % len(PALETTE)]
        dash = _DASHES[(curve.dash + curve.color // len(PALETTE)) % len(_DASHES)]
        marker = "o" if len(x) <= 25 else ""
        label = _legend_text(curve.label) if curve.label else None
        axes.plot(x, y, dash, color=color, marker=marker, markersize=3, label=label)
        if curve.errors:
            low, high = zip(*((value - e, value + e) for value, e in zip(y, curve.errors)))
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    if panel.log_y and all(y > 0 for curve in panel.curves for _, y in curve.points):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if panel.x_label == _TIME:
        axes.invert_xaxis()  # time runs as in sampling
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if sum(bool(curve.label) for curve in panel.curves) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.17))


def _legend_text(label: str) -> str:
    """Short, and not beginning with _, which matplotlib leaves out."""
    short = label if len(label) <= _LABEL_LENGTH else "..." + label[3 - _LABEL_LENGTH :]
    return " " + short if short.startswith("_") else short


def is_number(value: Any) -> bool:
    """Is it a finite int or float?"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def measure_pictures(measured: Measured) -> list[Picture]:
    """A picture of each measure that any of the measurements has; without those parts of it that
    are not there, or are no numbers.
    """
    pictures = []
    for name, panels in PANELS.items():
        found = [panel for panel in panels(measured) if panel.curves]
        if found:
            pictures.append(Picture(name, TITLES[name], found, NOTES.get(name, "")))
    return pictures


def _values(content: Mapping[str, Any], measure: str, key: str) -> list[Any]:
    found = content.get("measures", {}).get(measure, {}).get(key)
    return found if isinstance(found, list) else []


def _over_time(content: Mapping[str, Any], values: Sequence[Any], first: int = 0) -> Points:
    """(t of the whole process, value) of each step of the respaced one that has a number."""
    times = content.get("timestep_map")
    if not isinstance(times, list) or len(times) != len(values) or not all(map(is_number, times)):
        times = range(len(values))
    pairs = list(zip(times, values))[first:]
    return [(float(t), float(value)) for t, value in pairs if is_number(value)]


def _curves(
    measured: Measured, measure: str, keys: Mapping[str, str], errors: str = "", first: int = 0
) -> list[Curve]:
    """The arrays `keys` (key -> label) of a measure over time; of several measurements, each has
    its colour and its name, and the keys differ by their dashes.

    Args:
        errors: the array of the first key's standard errors, two of which are shown as a band.
        first: the first step that is shown.
    """
    curves = []
    for dash, (key, label) in enumerate(keys.items()):
        for color, (name, content) in enumerate(measured):
            points = _over_time(content, _values(content, measure, key), first)
            if not points:
                continue
            error = _over_time(content, _values(content, measure, errors), first)
            band = [2 * e for _, e in error] if len(error) == len(points) and dash == 0 else []
            if len(measured) > 1:
                companion = f"{_DASH_NAMES[dash]}: {label}" if color == 0 else ""
                curves.append(Curve(companion if dash else name, points, color, dash, band))
            else:
                curves.append(Curve(label, points, dash, dash, band))
    return curves


def _finished(measured: Measured, key: str) -> list[Curve]:
    """A number of the measure `variance`, which is of the finished images, after the last step."""
    curves = []
    for color, (_, content) in enumerate(measured):
        value = content.get("measures", {}).get("variance", {}).get(key)
        times = [t for t, _ in _over_time(content, _values(content, "variance", "error"))]
        if times and is_number(value):
            label, shade = ("finished images", 2) if len(measured) == 1 else ("", color)
            curves.append(Curve(label, [(-0.02 * max(1.0, max(times)), float(value))], shade))
    return curves


def _norm(measured: Measured) -> list[Panel]:
    norms = {"chain": "in the chain", "inputs": "on training inputs"}
    ratios = {"ratio": "as predicted"}
    if any(_values(content, "norm", "ratio_published") for _, content in measured):
        ratios["ratio_published"] = "chain's norm divided by lambda"
    return [
        Panel("norm of epsilon_theta", _TIME, "mean per image", _curves(measured, "norm", norms)),
        Panel(
            "sampling over training",
            _TIME,
            "ratio of mean norms",
            _curves(measured, "norm", ratios, "ratio_error", first=1),
            lines=[1],
        ),
    ]


def _delta(measured: Measured) -> list[Panel]:
    stds = {
        "std_multi": "whole chain from q(x_T | x_0)",
        "std_single": "single step",
        "expected_std": "sqrt(1 - ab)",
    }
    deltas = {"delta_multi": "whole chain", "delta_single": "single step"}
    return [
        Panel("std of x_t - sqrt(ab) x_0", _TIME, "std", _curves(measured, "delta", stds)),
        Panel(
            "delta_t",
            _TIME,
            "(std - sqrt(1 - ab))^2",
            _curves(measured, "delta", deltas),
            lines=[0],
        ),
    ]


def _variance(measured: Measured) -> list[Panel]:
    variances = {"chain": "in the chain", "expected": "a perfect sampler"}
    return [
        Panel(
            "variance of x_t",
            _TIME,
            "mean over pixels",
            [*_curves(measured, "variance", variances), *_finished(measured, "final")],
        ),
        Panel(
            "variance error",
            _TIME,
            "chain - perfect",
            [
                *_curves(measured, "variance", {"error": "in the chain"}),
                *_finished(measured, "final_error"),
            ],
            lines=[0],
        ),
    ]


def _prediction(measured: Measured) -> list[Panel]:
    errors = {"nu": "std nu_t", "mean": "mean"}
    gammas = {
        content["measures"]["prediction"].get("published_gamma")
        for _, content in measured
        if "prediction" in content.get("measures", {})
    }
    return [
        Panel("x_0_hat - x_0", _TIME, "over pixels", _curves(measured, "prediction", errors), [0]),
        Panel(
            "the same as an error of epsilon",
            _TIME,
            "nu_t sqrt(ab / (1 - ab))",
            _curves(measured, "prediction", {"gamma": "gamma"}),
            lines=[gamma for gamma in gammas if is_number(gamma)],
        ),
        Panel(
            "pixels that are not normal",
            _TIME,
            "share rejected (Shapiro-Wilk, 0.05)",
            _curves(measured, "prediction", {"rejected": "rejected"}),
            lines=[0.05],
        ),
    ]


def _accumulation(measured: Measured) -> list[Panel]:
    curves, without_noise = [], []
    spaces: dict[str, None] = {}
    for color, (name, content) in enumerate(measured):
        steps = _values(content, "accumulation", "steps")
        pairs = zip(steps, _values(content, "accumulation", "frechet"))
        points = sorted((float(k), float(v)) for k, v in pairs if is_number(k) and is_number(v))
        if points:
            curves.append(Curve(name, points, color))
            features = content["measures"]["accumulation"].get("features", "")
            spaces[os.path.basename(str(features))] = None
        for row, (k, values) in enumerate(
            zip(steps, _values(content, "accumulation", "noise_free"))
        ):
            if len(measured) == 1 and isinstance(values, list):
                points = [(float(t), float(v)) for t, v in enumerate(values) if is_number(v)]
                without_noise += [Curve(f"K = {k:g}", points, row, row)] if points else []
    return [
        Panel(
            "K steps from noised real images",
            "K",
            f"Frechet distance to them ({', '.join(spaces)})",
            curves,
        ),
        Panel(
            "chain without noise, from q(x_(K-1) | x_0)",
            "step of the chain (0 = clean)",
            "mean |x_0_hat - x_0|",
            without_noise,
        ),
    ]


def _discretisation(measured: Measured) -> list[Panel]:
    ratios = {
        "extrapolated": "extrapolated to infinitely many steps",
        "ratio": "with these steps",
        "ratio_finer": "with a step more between any two",
    }
    return [
        Panel(
            "sampling over training",
            _TIME,
            "ratio of mean norms",
            _curves(measured, "discretisation", ratios, "extrapolated_error", first=1),
            lines=[1],
        )
    ]


PANELS: dict[str, Callable[[Measured], list[Panel]]] = {
    "norm": _norm,
    "delta": _delta,
    "variance": _variance,
    "prediction": _prediction,
    "accumulation": _accumulation,
    "discretisation": _discretisation,
}
TITLES = {
    "norm": "Norm of the predicted noise",
    "delta": "Exposure bias delta_t",
    "variance": "Variance along the chain",
    "prediction": "Error of the predicted image on real images",
    "accumulation": "Error accumulation",
    "discretisation": "Exposure bias without the sampler's finite steps",
}
NOTES = {
    "discretisation": "What finite steps contribute to the ratio halves with a step more between "
    "any two; the extrapolated curve is without it. Its distance from 1 is exposure bias. Bands: "
    "two standard errors. The last step (t = 0) is left out.",
    "norm": "Above 1, the network predicts more noise along its own chain than on training inputs. "
    "Bands: two standard errors. The last step (t = 0) is left out of the ratio.",
    "delta": "The chain forgets the x_0 from whose noise it started: even a perfect sampler ends "
    "at std = sqrt(2) std(x_0), well above 0. Compare methods with each other, not with 0.",
    "variance": "A perfect sampler has no variance error at any t. Above 0, the samples spread too "
    "much. The points at the right end are the finished images.",
    "prediction": "The grey line beside gamma is the IP paper's constant. Shown for comparison; no "
    "value follows from it.",
}
