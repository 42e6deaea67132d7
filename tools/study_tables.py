"""The tables and figures of docs/study.md, from the folders that its commands make.

    python tools/study_tables.py runs/study/sweep --reference runs/study/reference.npz \\
        --features study/cifar10-features.onnx --image_size 32 --out docs/study

Every cell of the sweep (two networks, solvers, steps, lambda = 1 and calibrated) is read as images;
their features are kept in the sweep's folder. Cells have equal noise, so that every difference has
a paired standard error (evaluation/paired.py).
"""

from __future__ import annotations

import argparse
import glob
import json
import os
from dataclasses import dataclass

import numpy as np
import torch

from guided_diffusion_ip.data.image_set import open_images
from guided_diffusion_ip.diffusion.solvers import SOLVERS
from guided_diffusion_ip.evaluation.opening import FeatureChoice
from guided_diffusion_ip.evaluation.paired import (
    Against,
    ComparisonRequest,
    changes,
    open_reference,
)
from guided_diffusion_ip.exposure_bias.plots import Curve, Panel, Picture, save_picture
from guided_diffusion_ip.features.space import FeatureSpace
from guided_diffusion_ip.files import atomic_file
from guided_diffusion_ip.sizes import parse_size

PLAIN, CALIBRATED = "1", "calibrated"


@dataclass(frozen=True)
class Cell:
    """One cell of the sweep: where it stands, its scores, and its replicates by distance."""

    network: str
    solver: str
    steps: str
    scaling: str
    scores: dict[str, float]
    replicates: dict[str, np.ndarray]

    @property
    def calls(self) -> int:
        return SOLVERS[self.solver].calls(int(self.steps.partition("@")[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--image_size", required=True)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    size, choice = parse_size(arguments.image_size), FeatureChoice(arguments.features)
    space = choice.open(torch.device("cpu"), lambda line: None)
    request = ComparisonRequest(arguments.reference, (), choice, 250, size)
    against = None
    cells = {}
    for path in sorted(glob.glob(f"{arguments.sweep}/cells/*/result.json")):
        found = json.load(open(path, encoding="utf-8"))
        samples = glob.glob(f"{os.path.dirname(path)}/samples/*.npz")[0]
        if against is None:
            first = open_images(samples, "samples", size)
            against = open_reference(request, space, first)
        cell = read_cell(found, samples, against, space, size)
        cells[cell.network, cell.solver, cell.steps, cell.scaling] = cell
    print(main_table(cells))
    print(network_table(cells))
    os.makedirs(arguments.out, exist_ok=True)
    for path in save_picture(time_to_quality(cells), arguments.out):
        print(f"picture: {path}")


def read_cell(
    found: dict, samples: str, against: Against, space: FeatureSpace, size: tuple[int, int]
) -> Cell:
    kept = samples.replace(".npz", ".replicates.json")
    if not os.path.exists(kept):
        images = open_images(samples, "samples", size)
        rows = np.concatenate(
            [space(batch).pool.numpy() for batch in images.batches(0, images.n, 250)]
        )
        replicates = {name: one.tolist() for name, one in against.replicates(rows).items()}
        with atomic_file(kept) as file:
            file.write(json.dumps(replicates).encode())
    replicates = json.load(open(kept, encoding="utf-8"))
    place = found["cell"]
    return Cell(
        place["checkpoint"],
        place["sampler"],
        place["steps"],
        place["lambda"],
        {name: score["value"] for name, score in found["metrics"].items()},
        {name: np.array(values) for name, values in replicates.items()},
    )


Cells = dict[tuple[str, str, str, str], Cell]


def rows_of(cells: Cells) -> list[tuple[str, str]]:
    """(solver, steps), by solver and number of steps."""
    places = {(cell.solver, cell.steps) for cell in cells.values()}
    order = {name: number for number, name in enumerate(SOLVERS)}
    return sorted(places, key=lambda p: (order[p[0]], "@" in p[1], int(p[1].partition("@")[0])))


def main_table(cells: Cells) -> str:
    """Frechet distances with lambda = 1 and calibrated, and the paired change."""
    networks = sorted({cell.network for cell in cells.values()})
    lines = [
        "| solver | steps | calls |"
        + "".join(f" {n}: lambda = 1 | calibrated: change (error) |" for n in networks),
        "|---" * (3 + 2 * len(networks)) + "|",
    ]
    for solver, steps in rows_of(cells):
        one = next(c for c in cells.values() if (c.solver, c.steps) == (solver, steps))
        line = f"| {SOLVERS[solver].title} | {steps} | {one.calls} |"
        for network in networks:
            plain = cells.get((network, solver, steps, PLAIN))
            scaled = cells.get((network, solver, steps, CALIBRATED))
            line += f" {plain.scores['fid']:.3f} |" if plain else " |"
            line += f" {change(plain, scaled, 'fid')} |"
        lines.append(line)
    return "\n".join(lines)


def change(before: Cell | None, after: Cell | None, distance: str) -> str:
    if before is None or after is None:
        return ""
    found = changes(before.replicates, after.replicates)[distance]
    return f"{found.value:+.3f} ({found.error:.3f})"


def network_table(cells: Cells) -> str:
    """What input perturbation gains at lambda = 1, with KID, precision and recall of both."""
    lines = [
        "| solver | steps | gamma 0.1 - gamma 0: FD (error) | KID x 1000 (error) "
        "| precision | recall |",
        "|---|---|---|---|---|---|",
    ]
    for solver, steps in rows_of(cells):
        both = [cells.get((name, solver, steps, PLAIN)) for name in ("gamma0", "gamma0.1")]
        if None in both:
            continue
        kid = changes(both[0].replicates, both[1].replicates)["kid"]
        pairs = [f"{both[0].scores[n]:.3f} -> {both[1].scores[n]:.3f}" for n in ("prec", "recall")]
        lines.append(
            f"| {SOLVERS[solver].title} | {steps} | {change(*both, 'fid')} "
            f"| {1000 * kid.value:+.2f} ({1000 * kid.error:.2f}) | {' | '.join(pairs)} |"
        )
    return "\n".join(lines)


def time_to_quality(cells: Cells) -> Picture:
    """Distance over network calls, by solver, of both networks."""
    panels = []
    for network in sorted({cell.network for cell in cells.values()}):
        curves = []
        for color, name in enumerate(SOLVERS):
            for dash, scaling in enumerate((PLAIN, CALIBRATED)):
                points = sorted(
                    (cell.calls, cell.scores["fid"])
                    for cell in cells.values()
                    if (cell.network, cell.solver, cell.scaling) == (network, name, scaling)
                    and "@" not in cell.steps
                )
                words = SOLVERS[name].title + (", calibrated" if dash else "")
                if points:
                    curves.append(Curve(words, points, color, dash))
        panels.append(
            Panel(network.replace("gamma", "gamma = "), "network calls", "Frechet distance", curves)
        )
    return Picture("time_to_quality", "Frechet distance over network calls", panels)


if __name__ == "__main__":
    main()
