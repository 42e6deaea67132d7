"""Where a run's numbers and messages go: an output takes rows of values, lines of text, or both."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

Value = float | int | str

# The rest follows in the order in which it was logged.
_FIRST = ("step", "loss")
_QUARTILE = re.compile(r"(.+)_q([0-3])")


class Output:
    """Base of all outputs: ignores what it is given. `path` names it; `notes`: what was found amiss
    in it.
    """

    notes: tuple[str, ...] = ()
    path = "standard output"

    def write_values(self, values: Mapping[str, Value]) -> None:
        """Takes one row of numbers."""

    def write_line(self, text: str) -> None:
        """Takes one message."""

    def close(self) -> None:
        """Flushes and lets go of files."""


class Terminal(Output):
    """Messages, and one line per row, on standard output."""

    def write_values(self, values: Mapping[str, Value]) -> None:
        self.write_line(line(values))

    def write_line(self, text: str) -> None:
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if bars is not None and getattr(bars, "_instances", None) and sys.stdout.isatty():
            bars.write(text, file=sys.stdout)  # lifts the progress bars for a moment
        else:
            print(text, flush=True)


class TextFile(Output):
    """The terminal's text, in a file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = open(path, "a", encoding="utf-8")

    def write_values(self, values: Mapping[str, Value]) -> None:
        self.write_line(line(values))

    def write_line(self, text: str) -> None:
        self._file.write(text + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class CsvFile(Output):
    """A row per dump, a column per key; rows older than a column have an empty cell there."""

    def __init__(self, path: str, resume_step: int | None = None) -> None:
        self.path = path
        self.notes = _mend(path, _is_row, _is_table, has_header=True)
        if resume_step is not None:
            self._drop_after(resume_step)
        self._columns: list[str] = next(iter(self._read()), [])
        self._file = open(path, "a", newline="", encoding="utf-8")

    def write_values(self, values: Mapping[str, Value]) -> None:
        new = [key for key in values if key not in self._columns]
        if new:
            self._add_columns(new)
        csv.writer(self._file).writerow([values.get(key, "") for key in self._columns])
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _read(self) -> list[list[str]]:
        if not os.path.exists(self.path):
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    def _add_columns(self, new: list[str]) -> None:
        self._file.close()
        rows = self._read()[1:]
        self._columns += new
        self._rewrite(
            [self._columns] + [row + [""] * (len(self._columns) - len(row)) for row in rows]
        )
        self._file = open(self.path, "a", newline="", encoding="utf-8")

    def _rewrite(self, rows: list[list[str]]) -> None:
        # A crash half-way must not cost the history: write beside, then replace.
        with open(self.path + ".tmp", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        os.replace(self.path + ".tmp", self.path)

    def _drop_after(self, step: int) -> None:
        rows = self._read()
        if rows and "step" in rows[0]:
            column = rows[0].index("step")
            self._rewrite(
                rows[:1] + [row for row in rows[1:] if _at_most("".join(row[column:][:1]), step)]
            )


def _at_most(text: Any, step: int) -> bool:
    """Is it a row of a step up to this one? Rows without a step stay."""
    try:
        return float(text) <= step
    except (TypeError, ValueError, OverflowError):
        return True


class JsonLines(Output):
    """An object per line. JSON has no nan and no infinity: both become null."""

    def __init__(self, path: str, resume_step: int | None = None) -> None:
        self.path = path
        self.notes = _mend(path, _is_object)
        if resume_step is not None and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                kept = [
                    line for line in file if _at_most(json.loads(line).get("step"), resume_step)
                ]
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                file.writelines(kept)
            os.replace(path + ".tmp", path)
        self._file = open(path, "a", encoding="utf-8")

    def write_values(self, values: Mapping[str, Value]) -> None:
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard(Output):
    """Scalars by step, or by the number of the dump where no step is logged."""

    def __init__(self, folder: str, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"log format tensorboard needs the package tensorboard ({error}): "
                f"pip install tensorboard, or leave the format out"
            ) from None
        self._writer: Any = SummaryWriter(
            folder, purge_step=None if resume_step is None else resume_step + 1
        )
        self.path = folder
        self._dumps = 0

    def write_values(self, values: Mapping[str, Value]) -> None:
        self._dumps += 1
        step = int(values.get("step", self._dumps))
        for key, value in values.items():
            if key != "step" and not isinstance(value, str):
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


FORMATS = {
    "stdout": lambda folder, suffix, resume_step: Terminal(),
    "log": lambda folder, suffix, resume_step: TextFile(os.path.join(folder, f"log{suffix}.txt")),
    "csv": lambda folder, suffix, resume_step: CsvFile(
        os.path.join(folder, f"progress{suffix}.csv"), resume_step
    ),
    "json": lambda folder, suffix, resume_step: JsonLines(
        os.path.join(folder, f"progress{suffix}.json"), resume_step
    ),
    "tensorboard": lambda folder, suffix, resume_step: TensorBoard(
        os.path.join(folder, f"tb{suffix}"), resume_step
    ),
}


def make_output_format(
    format: str, ev_dir: str, log_suffix: str = "", resume_step: int | None = None
) -> Output:
    """The output of that name, with its file in `ev_dir`, which is made if need be; see configure
    for `resume_step`.

    Raises:
        ValueError: no such format, or TensorBoard is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"log format {format!r} is unknown; there are {', '.join(FORMATS)}")
    if format != "stdout":
        os.makedirs(ev_dir, exist_ok=True)
    return FORMATS[format](ev_dir, log_suffix, resume_step)


def line(values: Mapping[str, Value]) -> str:
    """A row of values for reading: `step 1,200  loss 0.05123  loss_q 0.12/0.05/-/0.02`.

    `loss_q0` to `loss_q3`, quarters of the time range, share a cell; `-` is one that no sample fell
    into.
    """
    cells: dict[str, str] = {}
    for key in [*filter(values.__contains__, _FIRST), *values]:
        if quarter := _QUARTILE.fullmatch(key):
            name = f"{quarter[1]}_q"
            parts = [values.get(f"{name}{q}", "-") for q in range(4)]
            cells[name] = "/".join(number_text(part, digits=3) for part in parts)
        else:
            cells[key] = number_text(values[key])
    return "  ".join(f"{name} {text}" for name, text in cells.items())


def number_text(value: Value, digits: int = 4) -> str:
    """Numbers from 1000 on without decimals, others with `digits` of them; text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _mend(
    path: str,
    is_readable: Callable[[bytes], bool],
    is_whole: Callable[[bytes], bool] = lambda text: False,
    has_header: bool = False,
) -> tuple[str, ...]:
    """Make a log of lines one that can be read and continued; says what was done.

    A last line without its end is cut off: a killed process may leave half a number there. Lines
    that cannot be read, as a power cut leaves them, go to a file of their own.

    Args:
        is_readable: of a line. is_whole: there is no need to look at the lines. has_header: without
            the first line the others mean nothing.
    """
    if not os.path.exists(path):
        return ()
    with open(path, "rb") as file:
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    lines = [line + b"\n" for line in whole.split(b"\n")[:-1]]
    kept = lines if is_whole(whole) else [line for line in lines if is_readable(line)]
    if has_header and kept[:1] != lines[:1]:
        kept = []
    if len(kept) < len(lines):
        good = set(map(id, kept))
        aside = f"{path}.damaged"
        with open(aside, "ab") as file:
            file.writelines(line for line in lines if id(line) not in good)
    if b"".join(kept) != text:
        # A crash half-way must not cost the history: write beside, then replace.
        with open(path + ".tmp", "wb") as file:
            file.writelines(kept)
        os.replace(path + ".tmp", path)
    if len(kept) == len(lines):
        return ()
    count = len(lines) - len(kept)
    return (f"note: {count} of {len(lines)} lines of {path} cannot be read; they are in {aside}",)


def _is_table(text: bytes) -> bool:
    """Is it a CSV in which every row has as many cells as the first, whose cells are names?"""
    rows = _rows(text)
    return (
        bool(rows) and len({len(row) for row in rows}) == 1 and all(map(str.isprintable, rows[0]))
    )


def _is_row(line: bytes) -> bool:
    """Is it one row of a CSV, of printable text?"""
    rows = _rows(line)
    return len(rows) == 1 and all(map(str.isprintable, rows[0]))


def _rows(text: bytes) -> list[list[str]]:
    """The rows of a CSV; [] if it is none."""
    try:
        return list(csv.reader(io.StringIO(text.decode(), newline=""), strict=True))
    except (csv.Error, UnicodeDecodeError):
        return []


def _is_object(line: bytes) -> bool:
    """Is it one JSON object?"""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
