"""The table of a sweep, as in the papers: a row for each number of steps, a column for
each method.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..diffusion.solvers import SOLVERS
from ..metrics.registry import METRICS, short_title

TITLES = {name: short_title(name) for name in METRICS}


@dataclass(frozen=True)
class Entry:
    """One place of the table: `values` over seeds, and how many cells of it are missing."""

    values: tuple[float, ...]
    missing: int = 0

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1), None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self) -> str:
        if not self.values:
            return "missing" if self.missing else ""
        spread = f" +- {self.spread:.2g}" if self.spread is not None else ""
        return f"{self.mean:.4g}{spread}" + (f" ({self.missing} missing)" if self.missing else "")


@dataclass(frozen=True)
class Table:
    """Rows are (metric, sampler, steps) with an Entry for each of the columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, str, str], tuple[Entry, ...]], ...]
    seeds: int
    features: str
    samples: tuple[int, ...] = ()  # how many a cell has; several numbers if cells differ

    def title(self, metric: str) -> str:
        return short_title(metric, self.features)


def sampler_title(cell: Mapping[str, Any]) -> str:
    """DDPM, or DDIM with its eta."""
    solver = SOLVERS.get(cell["sampler"])
    if solver is None:  # of another program's registry
        return str(cell["sampler"])
    return f"{solver.title}, eta {cell['eta']:g}" if "eta" in solver.options else solver.title


def make_table(
    cells: Iterable[dict[str, Any]],
    results: Iterable[dict[str, Any] | None],
    metrics: Sequence[str],
    features: str,
) -> Table:
    """The table of cells (Cell.describe()) and their results, in the same order; None for one that
    there is not.
    """
    places: dict[tuple[str, str], dict[str, list[dict[str, Any] | None]]] = {}
    columns: dict[tuple[str, str], str] = {}
    seeds, samples = set(), set()
    for cell, result in zip(cells, results, strict=True):
        sampler = sampler_title(cell)
        columns[cell["lambda"], cell["checkpoint"]] = cell["column"]
        places.setdefault((sampler, cell["steps"]), {}).setdefault(cell["column"], []).append(
            result
        )
        seeds.add(cell["seed"])
        samples |= {
            n
            for found in (result or {}).get("metrics", {}).values()
            if isinstance(n := found.get("samples"), int)
        }
    # As the papers have it: all checkpoints without scaling, then all with it.
    scalings = list(dict.fromkeys(scaling for scaling, _ in columns))
    names = [
        name for scaling in scalings for (other, _), name in columns.items() if other == scaling
    ]
    rows = []
    for metric in metrics:
        for (sampler, steps), found in places.items():
            rows.append(
                (
                    (metric, sampler, steps),
                    tuple(_entry(found.get(name, []), metric) for name in names),
                )
            )
    return Table(tuple(names), tuple(rows), len(seeds), features, tuple(sorted(samples)))


def _entry(results: list[dict[str, Any] | None], metric: str) -> Entry:
    values = [
        result["metrics"][metric]["value"]
        for result in results
        if result and metric in result["metrics"]
    ]
    return Entry(tuple(values), len(results) - len(values))


def best(metric: str, entries: Sequence[Entry]) -> int | None:
    """The place of the best mean in a row; None where there is nothing to compare."""
    means = {i: entry.mean for i, entry in enumerate(entries) if entry.mean is not None}
    if len(means) < 2:
        return None
    larger = metric in METRICS and METRICS[metric].larger_is_better
    return (max if larger else min)(means, key=means.__getitem__)


def headings(table: Table) -> list[str]:
    return ["metric", "sampler", "steps", *table.columns]


def as_markdown(table: Table) -> str:
    """Padded, so that it can be read as it is; the best mean of a row is bold."""
    lines = [headings(table)]
    for (metric, sampler, steps), entries in table.rows:
        chosen = best(metric, entries)
        cells = [
            f"**{entry.text()}**" if i == chosen else entry.text()
            for i, entry in enumerate(entries)
        ]
        lines.append([table.title(metric), sampler, steps, *cells])
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text) + "\n\n" + note(table) + "\n"


def note(table: Table) -> str:
    """What the table does not say by itself."""
    spread = (
        f"Mean +- standard deviation over {table.seeds} seeds. "
        if table.seeds > 1
        else "One seed: no spread is known. "
    )
    if table.samples:
        spread += f"Each value from {' or '.join(map(str, table.samples))} samples. "
    return (
        spread + "Bold: the best mean of a row, whether or not the difference means anything. "
        f"Features: {table.features}."
    )


def as_csv(table: Table) -> str:
    """All digits: mean, standard deviation (empty for one seed) and number of seeds of
    each column.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *headings(table)[:3],
            *(f"{name}{what}" for name in table.columns for what in ("", " std", " n")),
        ]
    )
    for place, entries in table.rows:
        row = [
            value for entry in entries for value in (entry.mean, entry.spread, len(entry.values))
        ]
        writer.writerow([*place, *("" if value is None else repr(value) for value in row)])
    return text.getvalue()
