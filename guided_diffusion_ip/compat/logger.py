"""guided_diffusion.logger: the library's logger, whose outputs may also be of one's own class, and
its classes under their other names.

There is one logger in use, the library's: what is set here (Logger.CURRENT) is what the training
loop logs to.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from .. import logger as ours
from ..logger import (
    DEBUG,
    DISABLED,
    ERROR,
    INFO,
    WARN,
    debug,
    dumpkvs,
    error,
    get_dir,
    get_rank_without_mpi_import,
    getkvs,
    info,
    log,
    logkv,
    logkv_mean,
    logkvs,
    profile,
    profile_kv,
    set_comm,
    set_level,
    warn,
)
from ..logger.outputs import CsvFile, JsonLines, Output, TensorBoard, TextFile, Value, line

__all__ = [
    "DEBUG",
    "DISABLED",
    "ERROR",
    "INFO",
    "WARN",
    "CSVOutputFormat",
    "HumanOutputFormat",
    "JSONOutputFormat",
    "KVWriter",
    "Logger",
    "SeqWriter",
    "TensorBoardOutputFormat",
    "configure",
    "debug",
    "dump_tabular",
    "dumpkvs",
    "error",
    "get_current",
    "get_dir",
    "get_rank_without_mpi_import",
    "getkvs",
    "info",
    "log",
    "logkv",
    "logkv_mean",
    "logkvs",
    "make_output_format",
    "mpi_weighted_mean",
    "profile",
    "profile_kv",
    "record_tabular",
    "reset",
    "scoped_configure",
    "set_comm",
    "set_level",
    "warn",
]


class KVWriter:
    """Base of outputs that take rows."""

    def writekvs(self, kvs: Mapping[str, Value]) -> None:
        raise NotImplementedError


class SeqWriter:
    """Base of outputs that take messages."""

    def writeseq(self, seq: Iterable[str]) -> None:
        raise NotImplementedError


class _Ours(KVWriter):
    """An output of the library's under guided-diffusion's methods."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def writekvs(self, kvs: Mapping[str, Value]) -> None:
        self._output.write_values(kvs)

    def close(self) -> None:
        self._output.close()


class _OpenFile(Output):
    """Lines to a file that is open, and stays so."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write_values(self, values: Mapping[str, Value]) -> None:
        self.write_line(line(values))

    def write_line(self, text: str) -> None:
        self._file.write(text + "\n")
        self._file.flush()


class HumanOutputFormat(_Ours, SeqWriter):
    """Messages, and a line per row, at the end of a file of that name or in one that is open."""

    def __init__(self, filename_or_file: str | IO[str]) -> None:
        if isinstance(filename_or_file, str):
            super().__init__(TextFile(filename_or_file))
        elif hasattr(filename_or_file, "write"):
            super().__init__(_OpenFile(filename_or_file))
        else:
            raise ValueError(
                f"HumanOutputFormat takes a file or its name, got {filename_or_file!r}"
            )

    def writeseq(self, seq: Iterable[str]) -> None:
        self._output.write_line(" ".join(map(str, seq)))


class JSONOutputFormat(_Ours):
    """A JSON object per row, at the end of a file."""

    def __init__(self, filename: str) -> None:
        super().__init__(JsonLines(filename))


class CSVOutputFormat(_Ours):
    """A column per key, at the end of a file."""

    def __init__(self, filename: str) -> None:
        super().__init__(CsvFile(filename))


class TensorBoardOutputFormat(_Ours):
    """Scalars for TensorBoard, in a folder."""

    def __init__(self, dir: str) -> None:
        super().__init__(TensorBoard(dir))


class _Theirs(Output):
    """A KVWriter, a SeqWriter or both, as the library's logger calls them."""

    def __init__(self, format: KVWriter | SeqWriter) -> None:
        self._format: Any = format

    def write_values(self, values: Mapping[str, Value]) -> None:
        if hasattr(self._format, "writekvs"):
            self._format.writekvs(values)

    def write_line(self, text: str) -> None:
        if hasattr(self._format, "writeseq"):
            self._format.writeseq([text])

    def close(self) -> None:
        if hasattr(self._format, "close"):
            self._format.close()


class _WithCurrent(type):
    """Logger.CURRENT is the logger in use, of the whole library."""

    DEFAULT: Logger | None = None

    @property
    def CURRENT(cls) -> Logger | None:  # noqa: N802 (published name)
        return get_current() if ours._current is not None else None

    @CURRENT.setter
    def CURRENT(cls, logger: Logger | None) -> None:  # noqa: N802
        ours._current = logger


class Logger(ours.Logger, metaclass=_WithCurrent):
    """The library's logger; output_formats may be changed at any time.

    Args:
        output_formats: KVWriters, SeqWriters, or outputs of the library's.
    """

    def __init__(
        self,
        dir: str | None,
        output_formats: Sequence[Output | KVWriter | SeqWriter],
        comm: Any = None,
    ) -> None:
        self.output_formats = output_formats
        super().__init__(dir, (), comm)

    @property
    def _outputs(self) -> list[Output]:
        return [x if isinstance(x, Output) else _Theirs(x) for x in self.output_formats]

    @_outputs.setter
    def _outputs(self, _: list[Output]) -> None:
        pass  # the base's constructor: they are output_formats

    @property
    def name2val(self) -> dict[str, Value]:
        """The row so far."""
        return self.getkvs()

    @property
    def dir(self) -> str | None:
        return self._dir

    @property
    def comm(self) -> Any:
        return self._comm

    @property
    def level(self) -> int:
        return self._level


def get_current() -> Logger:
    """The logger in use."""
    current = ours.get_current()
    if not isinstance(current, Logger):
        logger = Logger(current.get_dir(), current._outputs, current._comm)
        logger._sums, logger._level = current._sums, current._level
        ours._current = current = logger
    return current


def make_output_format(
    format: str, ev_dir: str, log_suffix: str = "", resume_step: int | None = None
) -> KVWriter:
    """The output of that name, with its file in `ev_dir`; see the library's make_output_format."""
    kinds: dict[str, type[_Ours]] = {
        "stdout": HumanOutputFormat,
        "log": HumanOutputFormat,
        "json": JSONOutputFormat,
        "csv": CSVOutputFormat,
        "tensorboard": TensorBoardOutputFormat,
    }
    output = ours.make_output_format(format, ev_dir, log_suffix, resume_step)
    kind = kinds.get(format, _Ours)
    made = kind.__new__(kind)
    _Ours.__init__(made, output)
    return made


def configure(
    dir: str | None = None,
    format_strs: Sequence[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
    rank: int | None = None,
    resume_step: int | None = None,
) -> None:
    """See the library's configure."""
    ours.configure(dir, format_strs, comm, log_suffix, rank, resume_step)
    get_current()


def reset() -> None:
    """Close the current logger; Logger.DEFAULT, if there is one, follows."""
    if Logger.DEFAULT is not None and ours._current is Logger.DEFAULT:
        return
    ours.reset()
    ours._current = Logger.DEFAULT


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """configure() for the length of a `with` block; the logger before it then continues."""
    with ours.scoped_configure(dir, format_strs, comm):
        yield


def mpi_weighted_mean(
    comm: Any, local_name2valcount: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """Means over ranks of {name: (value, weight)}, on rank 0; {} on the others. What is no number
    is left out, with a warning.

    Args:
        comm: has mpi4py's gather(object) and rank.
    """
    tables = comm.gather(dict(local_name2valcount))
    if comm.rank != 0:
        return {}
    totals: defaultdict[str, float] = defaultdict(float)
    weights: defaultdict[str, float] = defaultdict(float)
    for name, (value, weight) in (item for table in tables for item in table.items()):
        try:
            number = float(value)
        except ValueError:
            warnings.warn(f"logged value {name!r} is no number: {value!r}")
            continue
        totals[name] += number * weight
        weights[name] += weight
    return {name: total / weights[name] for name, total in totals.items()}


# Their older names.
record_tabular = logkv
dump_tabular = dumpkvs
