"""Curves for reports: drawn once, legible on light and dark pages, on phones and in print.

Text and axes are drawn in a colour that stands for the page's own, the background is left out, and
lines have middle tones and differ in their dashes too. matplotlib (extra `plots`) is imported when
the first figure is drawn.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..files import atomic_file

COLORS = ("#3d85c6", "#d9733a", "#2f9e6e", "#b9569c", "#a98a1f", "#3a9fb5", "#cf4f5b", "#8467cf")
_DASHES = ("-", "--", "-.", ":")
_PAGE = "#010203"  # stands for the page's text colour; nothing else has it
_LABEL_LENGTH = 44
_STYLE = {
    "text.parse_math": False,  # a $ in a file name is a $
    "text.color": _PAGE,
    "axes.labelcolor": _PAGE,
    "xtick.color": _PAGE,
    "ytick.color": _PAGE,
    "axes.edgecolor": _PAGE,
    "axes.prop_cycle": None,
    "axes.grid": True,
    "grid.color": "#808080",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "svg.fonttype": "none",
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Curve:
    """`x`, `y` of equal length; `band` is the half-height of a shaded strip around y; `style`
    numbers colour and dashes.

    A dashed curve is a companion of the one of the same style, and not in the legend.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float] | None = None
    style: int | None = None
    dashed: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Plot:
    """One pair of axes. `name` is that of its files; `line` is a horizontal line, where a perfect
    model would lie.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    line: float | None = None
    log_y: bool = False
    note: str = ""

    def described(self) -> str:
        """For those who cannot see it."""
        return f"{self.title}: {self.y_label} over {self.x_label}, for {', '.join(curve.label for curve in self.named())}"

    def named(self) -> list[Curve]:
        """Those in the legend."""
        return [curve for curve in self.curves if not curve.dashed]


def inline_svg(plot: Plot) -> str:
    """An <svg> element in the page's colours that fills the width it is given."""
    text = _render(plot, "svg")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    end = text.index(">")
    head = re.sub(
        r' (width|height|xmlns|xmlns:xlink)="[^"]*"', "", text[:end]
    )  # HTML knows the names, CSS the width
    text = head + text[end:].replace("*{stroke", "svg *{stroke").replace("xlink:href", "href")
    text = re.sub(
        r'( id="|href="#|url\(#)', rf"\g<1>{plot.name}-", text
    )  # ids are those of the whole page
    return text.replace(_PAGE, "currentColor").strip()


def save_files(plot: Plot, folder: str) -> list[str]:
    """Write NAME.svg and NAME.png, black on white."""
    paths = []
    for ending in ("svg", "png"):
        paths.append(os.path.join(folder, f"{plot.name}.{ending}"))
        content = _render(plot, ending, facecolor="white")
        with atomic_file(paths[-1]) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    return paths


def _render(plot: Plot, ending: str, **options: Any) -> Any:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"reports draw their curves with matplotlib, which is not installed ({error}): "
            "pip install -e '.[plots]'"
        ) from None
    style = {
        **_STYLE,
        "svg.hashsalt": plot.name,
        "axes.prop_cycle": matplotlib.rcParamsDefault["axes.prop_cycle"],
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.9, 3.0 + 0.19 * len(plot.named())), layout="constrained")
        _draw(plot, figure)
        buffer = io.BytesIO()
        metadata = {"Date": None} if ending == "svg" else {}
        figure.savefig(buffer, format=ending, dpi=160, metadata=metadata, **options)
    return buffer.getvalue().decode() if ending == "svg" else buffer.getvalue()


def _draw(plot: Plot, figure: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes = figure.add_subplot()
    if plot.line is not None:
        axes.axhline(plot.line, color="#808080", linewidth=1)
    for number, curve in enumerate(plot.curves):
        style = number if curve.style is None else curve.style
        color = COLORS[style % len(COLORS)]
        dashes = "--" if curve.dashed else _DASHES[style // len(COLORS) % len(_DASHES)]
        few = len(curve.x) <= 25 or curve.markers
        axes.plot(
            curve.x,
            curve.y,
            dashes,
            color=color,
            label=None if curve.dashed else _legend(curve.label),
            marker="o" if few else None,
            markersize=3,
        )
        if curve.band is not None:
            low, high = zip(*((y - b, y + b) for y, b in zip(curve.y, curve.band)))
            axes.fill_between(curve.x, low, high, color=color, alpha=0.18, linewidth=0)
    if plot.log_y and all(y > 0 for curve in plot.curves for y in curve.y):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(
            StrMethodFormatter("{x:g}")
        )  # the default one needs mathematical type
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    if len(plot.named()) > 1:
        figure.legend(loc="outside lower center", ncols=1)


def _legend(label: str) -> str:
    """Short enough for a phone, and not taken for one that is to be hidden (matplotlib hides what
    starts with _).
    """
    short = label if len(label) <= _LABEL_LENGTH else "..." + label[3 - _LABEL_LENGTH :]
    return " " + short if short.startswith("_") else short
