"""Measured rows as a table for people, and as JSON for everything else."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..files import atomic_file
from .machine import Machine
from .rows import Row

HEADINGS = ("what", "format", "batch", "ms: median (quartiles)", "images/s", "GFLOP", "GFLOP/s", "matrix rate", "share",
            "peak MB")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, a line for each row, padded so that it can be read as it is."""
    lines = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines]
    text.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in text)


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.quartiles_s
    memory = "not known" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.0f}"
    return (row.what, row.precision, str(row.batch_size), f"{_ms(row.median_s)} ({_ms(low)} to {_ms(high)})",
            f"{row.images_per_s:.3g}", f"{row.gflop:.4g}", f"{row.gflop_per_s:.4g}", f"{row.matrix_rate:.4g}",
            f"{row.share:.1%}", memory)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"


def notes(rows: Sequence[Row]) -> str:
    """What the columns do not say by themselves."""
    lines = []
    for row in rows:
        if row.calls_per_image > 1:
            lines.append(f"{row.what}: images/s is that of a whole chain of {row.calls_per_image} calls.")
        slowest = min(row.matrix_gflop_per_s)
        if slowest < 0.8 * row.matrix_rate:
            lines.append(f"{row.what}: the matrix rate varied from {slowest:.4g} to {row.matrix_rate:.4g} GFLOP/s: something "
                         "else was using this machine, so measure again when it is idle.")
    return "\n".join(lines)


def as_json(machine: Machine, settings: dict[str, Any], parameters: int, rows: Sequence[Row]) -> dict[str, Any]:
    """Every number: the repeats as measured, and what the table works out from them."""
    derived = ("median_s", "quartiles_s", "images_per_s", "gflop_per_s", "matrix_rate", "share")
    return {"machine": asdict(machine), "settings": settings, "parameters": parameters,
            "rows": [{**asdict(row), **{name: getattr(row, name) for name in derived}} for row in rows]}


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write it; the file appears whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
