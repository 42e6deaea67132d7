"""One picture per measure, from what measures.json holds; as PNG and SVG. matplotlib is imported
only here.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ..files import atomic_file
from .measure_run import as_arrays

# Told apart by brightness and by dash too, for print and for colour-blind readers (Okabe & Ito's
# palette).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


def save_plots(content: dict[str, Any], out_dir: str) -> list[str]:
    """Draw each measure in `content` (measures.json): the paths of NAME.png and NAME.svg in
    out_dir.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure_class, canvas_class = require_matplotlib()
    paths = []
    for name, found in content["measures"].items():
        figure = figure_class(figsize=(10, 4.2), layout="constrained")
        canvas_class(figure)
        PLOTS[name](figure, as_arrays(found), content)
        figure.suptitle(f"{TITLES[name]}\n{subtitle(content)}", fontsize=11)
        for kind in ("png", "svg"):
            paths.append(os.path.join(out_dir, f"{name}.{kind}"))
            _save(figure, paths[-1], kind)
    return paths


def require_matplotlib() -> tuple[Any, Any]:
    """(Figure, FigureCanvasAgg); no window system is needed.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "pictures need matplotlib, which is not installed: pip install -e '.[plots]', or "
            "--plots False"
        ) from None
    return Figure, FigureCanvasAgg


def _save(figure: Any, path: str, kind: str) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150)
    with atomic_file(path) as file:
        file.write(content.getvalue())


def subtitle(content: dict[str, Any]) -> str:
    """DDPM, 20 steps, lambda 1, 500 images."""
    settings, lam = content["settings"], np.array(content["lambda"])
    sampler = f"DDIM, eta {settings.get('eta', 0):g}" if settings.get("use_ddim") else "DDPM"
    span = f"{lam[0]:g}" if np.ptp(lam) == 0 else f"{lam.min():.4g} to {lam.max():.4g}"
    return f"{sampler}, {content['num_timesteps']} steps, lambda {span}, {content['num_images']} images"


def _axes(
    figure: Any, place: tuple[int, int, int], content: dict[str, Any], title: str, ylabel: str
) -> Any:
    """Axes over t, the noisy end at the left: time runs as in sampling."""
    axes = figure.add_subplot(*place)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("t, respaced step (0 = last, clean)")
    axes.set_ylabel(ylabel)
    steps = content["num_timesteps"]
    axes.set_xlim(steps - 0.5, -0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    return axes


def _norm(figure: Any, found: dict[str, Any], content: dict[str, Any]) -> None:
    t = np.arange(content["num_timesteps"])
    left = _axes(
        figure, (1, 2, 1), content, "mean norm per image", "Frobenius norm of epsilon_theta"
    )
    left.plot(t, found["inputs"], "o--", color=GREY, ms=3, label="on training inputs")
    left.plot(t, found["chain"], "s-", color=ORANGE, ms=3, label="in the chain")
    left.legend()
    right = _axes(
        figure,
        (1, 2, 2),
        content,
        "chain / training inputs (bars: standard error)",
        "ratio of mean norms",
    )
    right.axhline(1, color=GREY, lw=1)
    right.errorbar(
        t,
        found["ratio"],
        found["ratio_error"],
        fmt="s-",
        color=ORANGE,
        ms=3,
        capsize=2,
        label="raw",
    )
    if np.ptp(np.append(content["lambda"], 1.0)) > 0:
        right.plot(
            t,
            found["ratio_published"],
            "^:",
            color=BLUE,
            ms=3,
            label="chain's norm divided by lambda (as published)",
        )
    right.legend()


def _delta(figure: Any, found: dict[str, Any], content: dict[str, Any]) -> None:
    t = np.arange(content["num_timesteps"])
    left = _axes(
        figure, (1, 2, 1), content, "std of x_t - sqrt(ab) x_0", "std, averaged over pixels"
    )
    left.plot(t, found["expected_std"], "--", color=GREY, label="sqrt(1 - ab)")
    left.plot(t, found["std_single"], "^:", color=BLUE, ms=3, label="single step")
    left.plot(
        t, found["std_multi"], "s-", color=ORANGE, ms=3, label="whole chain from q(x_T | x_0)"
    )
    left.legend()
    right = _axes(figure, (1, 2, 2), content, "delta_t = (std - sqrt(1 - ab))^2", "delta_t")
    right.plot(t, found["delta_single"], "^:", color=BLUE, ms=3, label="single step")
    right.plot(t, found["delta_multi"], "s-", color=ORANGE, ms=3, label="whole chain")
    right.legend(loc="upper left")
    right.text(
        0.03,
        0.74,
        "The chain forgets the x_0 it started from:\neven a perfect sampler ends at\n"
        "std = sqrt(2) std(x_0). Compare methods\nwith each other, not with 0.",
        transform=right.transAxes,
        va="top",
        fontsize=8,
        color=GREY,
    )


def _variance(figure: Any, found: dict[str, Any], content: dict[str, Any]) -> None:
    t = np.arange(content["num_timesteps"])
    left = _axes(
        figure, (1, 2, 1), content, "variance of x_t over samples", "variance, averaged over pixels"
    )
    left.plot(
        t, found["expected"], "--", color=GREY, label="ab Var(x_0) + 1 - ab: a perfect sampler"
    )
    left.plot(t, found["chain"], "s-", color=ORANGE, ms=3, label="in the chain")
    left.plot(-0.35, found["final"], "*", color=GREEN, ms=9, clip_on=False, label="finished images")
    left.legend(loc="lower left")
    right = _axes(figure, (1, 2, 2), content, "variance error", "chain - perfect")
    right.axhline(0, color=GREY, lw=1)
    right.plot(t, found["error"], "s-", color=ORANGE, ms=3, label="in the chain")
    right.plot(
        -0.35, found["final_error"], "*", color=GREEN, ms=9, clip_on=False, label="finished images"
    )
    right.legend()


def _prediction(figure: Any, found: dict[str, Any], content: dict[str, Any]) -> None:
    t = np.arange(content["num_timesteps"])
    first = _axes(figure, (1, 3, 1), content, "error of x_0_hat on real images", "x_0_hat - x_0")
    first.plot(t, found["nu"], "s-", color=ORANGE, ms=3, label="std nu_t")
    first.plot(t, found["mean"], "o--", color=BLUE, ms=3, label="mean")
    first.legend()
    second = _axes(figure, (1, 3, 2), content, "as an error of epsilon", "gamma")
    second.plot(t, found["gamma"], "s-", color=ORANGE, ms=3, label="nu_t sqrt(ab / (1 - ab))")
    second.axhline(
        found["published_gamma"],
        color=GREY,
        ls="--",
        label=f"published gamma {found['published_gamma']:g}",
    )
    second.set_ylim(bottom=0)
    second.legend()
    third = _axes(
        figure,
        (1, 3, 3),
        content,
        "pixels that are not normal",
        "share rejected (Shapiro-Wilk, 0.05)",
    )
    third.axhline(0.05, color=GREY, ls="--", label="expected if all are normal")
    third.plot(t, found["rejected"], "s-", color=ORANGE, ms=3)
    third.set_ylim(0, 1.02)
    third.legend()


def _accumulation(figure: Any, found: dict[str, Any], content: dict[str, Any]) -> None:
    left = figure.add_subplot(1, 2, 1)
    left.plot(found["steps"], found["frechet"], "s-", color=ORANGE)
    left.set_title("K steps from noised real images", fontsize=10)
    left.set_xlabel("K, steps of the chain")
    left.set_ylabel(f"Frechet distance to them ({os.path.basename(str(found['features']))})")
    left.set_ylim(bottom=0)
    left.grid(alpha=0.3)
    right = _axes(
        figure,
        (1, 2, 2),
        content,
        "chain without noise, from q(x_(K-1) | x_0)",
        "mean |x_0_hat - x_0|",
    )
    colours, styles = (BLUE, GREEN, ORANGE, GREY), ("-", "--", "-.", ":")
    for row, steps in enumerate(found["steps"].astype(int)):
        right.plot(
            np.arange(steps),
            found["noise_free"][row, :steps],
            styles[row % 4],
            marker="o",
            ms=3,
            color=colours[row % 4],
            label=f"K = {steps}",
        )
    right.set_ylim(bottom=0)
    right.legend()


PLOTS: dict[str, Callable[[Any, dict[str, Any], dict[str, Any]], None]] = {
    "norm": _norm,
    "delta": _delta,
    "variance": _variance,
    "prediction": _prediction,
    "accumulation": _accumulation,
}
TITLES = {
    "norm": "Norm of the predicted noise",
    "delta": "Exposure bias delta_t",
    "variance": "Variance along the chain",
    "prediction": "Error of the predicted image",
    "accumulation": "Error accumulation",
}
