"""The curve of a calibration by common noise, as a picture."""

from __future__ import annotations

import numpy as np

from .common_noise import CommonNoise
from .plots import Curve, Panel, Picture

_FINE = 61  # points of the parabola


def picture(found: CommonNoise, name: str) -> Picture:
    """The change of the distance with constant b, the parabola through the lowest trials, and what
    chains with other noise say.
    """
    trials = sorted(found.trials, key=lambda trial: abs(trial.b - found.b))[:3]
    coefficients = np.polyfit([t.b - found.b for t in trials], [t.change for t in trials], 2)
    low, high = min(t.b for t in found.trials), max(t.b for t in found.trials)
    b = np.linspace(max(low, found.b - 0.04), min(high, found.b + 0.04), _FINE)
    curves = [
        Curve(
            f"trials with equal noise, {found.num_chains} chains",
            [(trial.b, trial.change) for trial in found.trials],
            0,
            errors=[2 * trial.change_error for trial in found.trials],
        ),
        Curve(
            "parabola through the lowest three",
            list(zip(b, np.polyval(coefficients, b - found.b))),
            1,
            1,
        ),
    ]
    if found.form == "b":
        curves.append(
            Curve(
                "as many chains with other noise",
                [(1.0, 0.0), (found.b, -found.held_out.value)],
                2,
                2,
                errors=[0.0, 2 * found.held_out.error],
            )
        )
    panel = Panel(found.distance, "b", "change from lambda = 1", curves, [0])
    return Picture(
        name,
        f"{found.verdict.partition(':')[0]}: lowest at b = {found.b:.4f} +- {found.b_error:.4f}",
        [panel],
        "Bands: two standard errors of the difference from lambda = 1.",
    )
