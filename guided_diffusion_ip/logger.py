"""What a run says: lines on the terminal and in log.txt; numbers in progress.csv, progress.json and TensorBoard.

    configure("runs/one")                       # once; rank 0 writes, the others are silent
    logkv("loss", loss); logkv_mean("x", x)     # collect; tensors are not read before dumpkvs, so no step waits for a GPU
    dumpkvs()                                   # one line on the terminal, one row in the files

Module functions act on the current Logger, as in the published code, so that existing scripts work.
"""
from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50
FORMATS = ("stdout", "log", "csv", "json", "tensorboard")


# ---- outputs: each takes a dict of numbers and texts ----

class TextOutput:
    """One line per dump, in the order in which the values were logged; messages as they are."""

    def __init__(self, path: str | None = None) -> None:
        self._file = open(path, "a", encoding="utf-8") if path else None

    def write_text(self, text: str) -> None:
        if self._file:
            print(text, file=self._file, flush=True)
            return
        from tqdm import tqdm  # its write() leaves a progress bar whole

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def write_values(self, values: dict[str, Any]) -> None:
        # The quartiles are for the files: on a terminal they would hide the loss.
        shown = {k: v for k, v in values.items() if self._file or not k[-3:-1] == "_q"}
        self.write_text("  ".join(f"{key} {short(value)}" for key, value in shown.items()))

    def close(self) -> None:
        if self._file:
            self._file.close()


class CSVOutput:
    """Columns by name. A new name rewrites the file once with a wider header; a file that is there is continued."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._columns: list[str] = []
        if os.path.exists(path):
            with open(path, newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), [])

    def write_values(self, values: dict[str, Any]) -> None:
        new = [name for name in values if name not in self._columns]
        if new:
            self._widen(new)
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(values)

    def _widen(self, new: list[str]) -> None:
        rows: list[dict[str, str]] = []
        if self._columns:
            with open(self._path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        self._columns += new
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, self._columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        with open(self._path + ".tmp", "w", newline="", encoding="utf-8") as file:
            file.write(content.getvalue())
        os.replace(self._path + ".tmp", self._path)

    def close(self) -> None:
        pass


class JSONOutput:
    """One JSON object a line; numbers that are not finite become null, which JSON can say."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", encoding="utf-8")

    def write_values(self, values: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        print(json.dumps(finite), file=self._file, flush=True)

    def close(self) -> None:
        self._file.close()


class TensorBoardOutput:
    """Scalars over `step` (or over the number of dumps, if no step is logged)."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only when asked for

        self._writer = SummaryWriter(folder)
        self._dumps = 0

    def write_values(self, values: dict[str, Any]) -> None:
        self._dumps += 1
        step = int(values.get("step", self._dumps))
        for name, value in values.items():
            if isinstance(value, (int, float)) and name != "step":
                # Quartiles of one quantity share a group of plots.
                tag = f"{name[:-3]}/{name[-2:]}" if name[-3:-1] == "_q" else name
                self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> Any:
    """One of FORMATS, writing into ev_dir.

    Raises:
        ValueError: unknown format.
    """
    path = functools.partial(os.path.join, ev_dir)
    makers: dict[str, Callable[[], Any]] = {
        "stdout": TextOutput,
        "log": lambda: TextOutput(path(f"log{log_suffix}.txt")),
        "csv": lambda: CSVOutput(path(f"progress{log_suffix}.csv")),
        "json": lambda: JSONOutput(path(f"progress{log_suffix}.json")),
        "tensorboard": lambda: TensorBoardOutput(path(f"tb{log_suffix}")),
    }
    if format not in makers:
        raise ValueError(f"unknown log format {format!r}: use {', '.join(FORMATS)}")
    os.makedirs(ev_dir, exist_ok=True)
    return makers[format]()


def plain(value: Any) -> Any:
    """A number or text: tensors and arrays of one element are read here."""
    if isinstance(value, (str, bool, int)):
        return value
    return float(value)


def short(value: Any) -> str:
    """Four significant digits; whole numbers whole."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


# ---- the logger ----

class Logger:
    """Collects values and hands them to its outputs.

    Args:
        dir: the output folder. output_formats: a list of outputs; empty on ranks that are to be silent.
        comm: accepted for existing code; values are those of this process.
    """

    CURRENT: Logger | None = None

    def __init__(self, dir: str, output_formats: Sequence[Any], comm: Any = None) -> None:
        self.dir = dir
        self.output_formats = list(output_formats)
        self.comm = comm
        self.level = INFO
        self._values: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def logkv(self, key: str, val: Any) -> None:
        self._values[key] = val

    def logkv_mean(self, key: str, val: Any) -> None:
        count = self._counts.get(key, 0)
        self._values[key] = val if count == 0 else self._values[key] + (val - self._values[key]) / (count + 1)
        self._counts[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        """Write what was logged since the last dump, and return it."""
        values = {key: plain(value) for key, value in self._values.items()}
        for output in self.output_formats if self.level < DISABLED else ():
            output.write_values(values)
        self._values, self._counts = {}, {}
        return values

    def log(self, *args: Any, level: int = INFO) -> None:
        if self.level <= level:
            text = " ".join(map(str, args))
            for output in self.output_formats:
                if isinstance(output, TextOutput):
                    output.write_text(text)

    def set_level(self, level: int) -> None:
        self.level = level

    def set_comm(self, comm: Any) -> None:
        self.comm = comm

    def get_dir(self) -> str:
        return self.dir

    def close(self) -> None:
        for output in self.output_formats:
            output.close()


def get_rank_without_mpi_import() -> int:
    """This process's rank, as its launcher put it into the environment; 0 if nobody did."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def default_dir() -> str:
    """OPENAI_LOGDIR if it is set, else runs/<time>."""
    return os.environ.get("OPENAI_LOGDIR") or os.path.join("runs", time.strftime("%Y-%m-%d-%H-%M-%S"))


def configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None, log_suffix: str = "",
    rank: int | None = None,
) -> None:
    """Start logging into `dir`.

    Args:
        format_strs: of FORMATS; default OPENAI_LOG_FORMAT (separated by commas), else all of them.
        rank: this process's; only rank 0 writes anything. Default: the environment's.
    """
    reset()
    dir = os.path.expanduser(dir or default_dir())
    rank = get_rank_without_mpi_import() if rank is None else rank
    if format_strs is None:
        format_strs = os.environ.get("OPENAI_LOG_FORMAT", ",".join(FORMATS)).split(",")
    if rank == 0:
        os.makedirs(dir, exist_ok=True)
    outputs = [make_output_format(f, dir, log_suffix) for f in format_strs if f] if rank == 0 else []
    Logger.CURRENT = Logger(dir, outputs, comm)


def reset() -> None:
    """Close the current logger; the next call configures a new one."""
    if Logger.CURRENT is not None:
        Logger.CURRENT.close()
        Logger.CURRENT = None


@contextlib.contextmanager
def scoped_configure(dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None) -> Iterator[None]:
    """Log into another folder inside a `with` block."""
    before, Logger.CURRENT = Logger.CURRENT, None
    try:
        configure(dir, format_strs, comm)
        yield
    finally:
        reset()
        Logger.CURRENT = before


def get_current() -> Logger:
    """The logger in use; configured with the defaults if there is none."""
    if Logger.CURRENT is None:
        configure()
    return Logger.CURRENT


def logkv(key: str, val: Any) -> None:
    """Log a value; a later one of the same name replaces it."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Log a value; several of the same name are averaged."""
    get_current().logkv_mean(key, val)


def logkvs(d: dict[str, Any]) -> None:
    """Log several values."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs() -> dict[str, Any]:
    """Write the values logged since the last dump."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """The values logged since the last dump."""
    return get_current()._values


def log(*args: Any, level: int = INFO) -> None:
    """A line of text, if `level` is not below the logger's."""
    get_current().log(*args, level=level)


debug = functools.partial(log, level=DEBUG)
info = functools.partial(log, level=INFO)
warn = functools.partial(log, level=WARN)
error = functools.partial(log, level=ERROR)


def set_level(level: int) -> None:
    """Hide what is below `level`."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """Accepted for existing code."""
    get_current().set_comm(comm)


def get_dir() -> str:
    """The output folder."""
    return get_current().get_dir()


@contextlib.contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Log the seconds spent in a `with` block as wait_<scopename>, summed between dumps."""
    start = time.perf_counter()
    try:
        yield
    finally:
        name = f"wait_{scopename}"
        logkv(name, getkvs().get(name, 0.0) + time.perf_counter() - start)


def profile(n: str) -> Callable:
    """Decorator: profile_kv(n) around every call."""
    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate
