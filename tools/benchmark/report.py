"""Measured rows as a table for people, and as JSON for everything else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from guided_diffusion_ip.files import atomic_file

from .machine import Machine
from .rows import Row

HEADINGS = (
    "what",
    "format",
    "batch",
    "ms: median (quartiles)",
    "images/s",
    "GFLOP/s",
    "matrix rate",
    "limit ms",
    "share",
    "peak MB",
)
BASELINE_HEADINGS = (
    "published: format",
    "published ms: median (quartiles)",
    "ratio (quartiles of pairs)",
    "published peak MB",
)
DERIVED = (
    "median_s",
    "quartiles_s",
    "images_per_s",
    "gflop_per_s",
    "matrix_rate",
    "limit_s",
    "share",
    "baseline_median_s",
    "baseline_quartiles_s",
    "ratio",
    "ratio_quartiles",
)


def head(rows: Sequence[Row]) -> str:
    """What each row must cost at least, and what this machine can do: a line for each."""
    lines = []
    for row in rows:
        copies = max(row.copy_gb_per_s, default=0.0)
        parts = []
        if row.gflop:
            parts.append(
                f"{row.gflop:.4g} GFLOP ({row.gflop / row.batch_size:.4g} per image) at "
                f"{row.matrix_rate:.4g} GFLOP/s (matrix products): "
                f"{_ms(row.gflop / row.matrix_rate)} ms"
            )
        if copies:
            parts.append(
                f"{row.moved_bytes / 1e6:.4g} MB moved at {copies:.3g} GB/s (copies): "
                f"{_ms(row.moved_bytes / 1e9 / copies)} ms"
            )
        lines.append(f"limit of {row.what}, {row.precision}: {'; '.join(parts)}")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, a line for each row, padded so that it can be read as it is; with the
    published way if it was measured.
    """
    compared = any(row.baseline_seconds for row in rows)
    headings = HEADINGS + (BASELINE_HEADINGS if compared else ())
    return padded(
        [headings, *(_cells(row) + (_baseline_cells(row) if compared else ()) for row in rows)]
    )


def padded(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells, headings first, its columns as wide as their widest cell."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines]
    text.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in text)


def _cells(row: Row) -> tuple[str, ...]:
    images = (str(row.batch_size), f"{row.images_per_s:.3g}") if row.batch_size else ("", "")
    flop = (f"{row.gflop_per_s:.4g}", f"{row.matrix_rate:.4g}") if row.gflop else ("", "")
    return (
        row.what,
        row.precision,
        images[0],
        _median_and_quartiles(row.median_s, row.quartiles_s),
        images[1],
        *flop,
        _ms(row.limit_s),
        f"{row.share:.1%}",
        _megabytes(row.peak_memory_bytes),
    )


def _baseline_cells(row: Row) -> tuple[str, ...]:
    if not row.baseline_seconds:
        return ("",) * len(BASELINE_HEADINGS)
    low, high = row.ratio_quartiles
    return (
        row.baseline_precision,
        _median_and_quartiles(row.baseline_median_s, row.baseline_quartiles_s),
        f"{row.ratio:.2f} ({low:.2f} to {high:.2f})",
        _megabytes(row.baseline_peak_memory_bytes),
    )


def _median_and_quartiles(median: float, ends: tuple[float, float]) -> str:
    return f"{_ms(median)} ({_ms(ends[0])} to {_ms(ends[1])})"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"


def _megabytes(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e6:.0f}"


def notes(rows: Sequence[Row]) -> str:
    """What the columns do not say by themselves."""
    lines = []
    for row in rows:
        if row.calls_per_image > 1:
            lines.append(
                f"{row.what}: images/s is that of a whole chain of {row.calls_per_image} calls."
            )
        slowest = min(row.matrix_gflop_per_s)
        if slowest < 0.8 * row.matrix_rate:
            lines.append(
                f"{row.what}: the matrix rate varied from {slowest:.4g} to {row.matrix_rate:.4g} "
                "GFLOP/s: something else was using this machine, so measure again when it is idle."
            )
    return "\n".join(lines)


def as_json(
    machine: Machine, settings: dict[str, Any], parameters: int, rows: Sequence[Row]
) -> dict[str, Any]:
    """Every number: the repeats as measured, and what the table works out from them."""
    return {
        "machine": asdict(machine),
        "settings": settings,
        "parameters": parameters,
        "rows": [{**asdict(row), **{name: getattr(row, name) for name in DERIVED}} for row in rows],
    }


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write it; the file appears whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
