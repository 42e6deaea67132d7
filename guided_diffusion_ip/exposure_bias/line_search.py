"""The lowest point of a smooth curve with errors, from few and dear evaluations: a parabola through
three of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Replicates = np.ndarray
_MOST = 10  # evaluations


@dataclass(frozen=True)
class Minimum:
    """Args:
    place: where the curve is lowest, replicate by replicate; NaN where one is not convex.
    value: its value there, replicate by replicate.
    points: every evaluation, by place.
    edge: the search has ended at a limit, which is then the place.
    """

    place: Replicates
    value: Replicates
    points: dict[float, Replicates]
    edge: bool = False


def minimise(
    evaluate: Callable[[float], Replicates],
    step: float,
    limits: tuple[float, float],
    known: dict[float, Replicates] | None = None,
) -> Minimum:
    """Look for the minimum from 0 on: at -step, 0 and step, then further out where it goes down at
    the end, then at the parabola's lowest point until that no longer moves.

    Args:
        evaluate: the curve at a place, as replicates [R] of which the first counts.
        step: the usual distance of two places; the result is good to a small part of it.
        limits: the smallest and the largest place.
        known: evaluations that there are already.
    """
    points = dict(known or {})

    def look(place: float) -> None:
        if place not in points:
            points[place] = evaluate(place)

    for place in (0.0, -step, step):
        look(min(max(place, limits[0]), limits[1]))
    for _ in range(_MOST):
        best = min(points, key=lambda place: points[place][0])
        around = _around(best, points, step)
        if around is None:
            end = limits[0] if best == min(points) else limits[1]
            if best == end:
                return Minimum(np.full_like(points[best], best), points[best], points, edge=True)
            look(_outward(best, points, step, end))
            continue
        place = float(vertex(around, points)[0][0])
        nearest = min(points, key=lambda p: abs(p - place))
        narrow = around[2] - around[0] <= 4 * step
        if abs(nearest - place) <= step / 4 and narrow:
            break
        if abs(nearest - place) > step / 4:
            look(place)
        else:  # the parabola is too wide to be trusted: on its wider side, a point nearby
            wider = 1 if around[2] - best > best - around[0] else -1
            look(best + wider * step)
    best = min(points, key=lambda place: points[place][0])
    around = _around(best, points, step)
    if around is None:
        return Minimum(np.full_like(points[best], best), points[best], points)
    return Minimum(*vertex(around, points), points)


def _outward(best: float, points: dict[float, Replicates], step: float, end: float) -> float:
    """Where to look if the last place is the best: at the lowest point of the parabola through the
    nearest three if that is not too far, else as far again as the places reach.
    """
    side = -1 if best == min(points) else 1
    nearest = sorted(points, key=lambda place: abs(place - best))[:3]
    reach = max(points) - min(points)
    if len(nearest) < 3:  # one side begins at its limit
        return max(best - reach, end) if side < 0 else min(best + reach, end)
    a, b, c = sorted(nearest)
    place = float(vertex((a, b, c), points)[0][0])
    ahead = side * (place - best)
    if min(abs(place - other) for other in points) >= step / 4 and ahead < 0:
        return place  # between places that there are
    if not ahead <= reach:  # too far, or NaN: no parabola with a lowest point
        ahead = reach
    place = best + side * max(ahead, step)
    return max(place, end) if side < 0 else min(place, end)


def _around(
    best: float, points: dict[float, Replicates], step: float
) -> tuple[float, float, float] | None:
    """The best place between its neighbours, those that are too near for a parabola left out; None
    if there is none on one side.
    """
    below = [place for place in points if place < best]
    above = [place for place in points if place > best]
    if not below or not above:
        return None
    far_below = [place for place in below if best - place >= step / 2]
    far_above = [place for place in above if place - best >= step / 2]
    return max(far_below or below), best, min(far_above or above)


def vertex(
    places: tuple[float, float, float], points: dict[float, Replicates]
) -> tuple[Replicates, Replicates]:
    """The lowest point of the parabola through three points, and its value, replicate by replicate;
    NaN where it has none.
    """
    (a, b, c), (fa, fb, fc) = places, (points[place] for place in places)
    left, right = (fb - fa) / (b - a), (fc - fb) / (c - b)
    curvature = (right - left) / (c - a)
    slope = left + curvature * (b - a)  # at b
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.where(curvature > 0, b - slope / (2 * curvature), np.nan)
        value = np.where(curvature > 0, fb - slope**2 / (4 * curvature), np.nan)
    return place, value
