"""Numbers and messages of a run: on the terminal and in files, by rank 0 only.

    log.txt          what the terminal shows: messages, and one line of numbers per dumpkvs()
    progress.csv     a column per key; a key that turns up later gets its column then
    progress.json    a JSON object per line; nan and inf, which JSON lacks, become null
    tb/              TensorBoard, if asked for

All of them continue the files that are there, so a resumed run has one history. A value may be a
tensor: it is copied when logged and read when dumped, so that logging never waits for the GPU.
Until configure() is called, everything goes to the terminal alone.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .outputs import FORMATS as FORMATS
from .outputs import Output, Value, make_output_format

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50

_PREFIX = {WARN: "warning: ", ERROR: "error: "}
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_DEFAULT_FORMATS = "stdout,log,csv,json"


class Logger:
    """Collects values by key and hands them to its outputs, one row per dumpkvs().

    Args:
        dir: the run's folder, for get_dir(); files are the outputs' affair.
        output_formats: made by make_output_format; none on the ranks that stay silent.
        comm: averages values over ranks, see set_comm.
    """

    def __init__(self, dir: str | None, output_formats: Sequence[Output], comm: Any = None) -> None:
        self._dir = dir
        self._outputs = list(output_formats)
        self._comm = comm
        self._level = INFO
        self._sums: dict[str, tuple[Any, int]] = {}  # key -> (sum, how many)

    def logkv(self, key: str, val: Any) -> None:
        """Sets a value of the next row; the last one counts. Raises ValueError unless a scalar."""
        self._sums[key] = _scalar(key, val), 1

    def logkv_mean(self, key: str, val: Any) -> None:
        """Adds to a mean of the next row. Raises ValueError unless a scalar."""
        total, count = self._sums.get(key, (0.0, 0))
        # float(): a sum of many halves would overflow or lose digits.
        val = val.detach().float() if hasattr(val, "detach") else val
        self._sums[key] = total + _scalar(key, val), count + 1

    def logkv_sum(self, key: str, val: Any) -> None:
        """Adds to a sum of the next row. Raises ValueError unless a scalar."""
        self._sums[key] = self._sums.get(key, (0.0, 1))[0] + _scalar(key, val), 1

    def getkvs(self) -> dict[str, Value]:
        """What dumpkvs() would write now, of this rank."""
        return {key: _mean(total, count) for key, (total, count) in self._sums.items()}

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """The numbers of the row so far, as {key: (sum, how many)}."""
        plain = {
            key: (total.item() if hasattr(total, "item") else total, count)
            for key, (total, count) in self._sums.items()
        }
        return {key: pair for key, pair in plain.items() if isinstance(pair[0], (int, float))}

    def load_state_dict(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Goes on with these numbers, beside what the row has."""
        self._sums.update({key: (total, count) for key, (total, count) in state.items()})

    def dumpkvs(self) -> dict[str, Value]:
        """Writes the row, returns it, and starts the next one. A collective if there is a comm."""
        values = self.getkvs() if self._comm is None else self._mean_over_ranks()
        self._sums.clear()
        if values and self._level < DISABLED:
            self._write(lambda output: output.write_values(values))
        return values

    def log(self, *args: Any, level: int = INFO) -> None:
        """Writes a message, the arguments joined by blanks, unless its level is too low."""
        if level >= self._level and self._level < DISABLED:
            text = _PREFIX.get(level, "") + " ".join(map(str, args))
            self._write(lambda output: output.write_line(text))

    def _write(self, what: Callable[[Output], None]) -> None:
        """To all outputs. One that fails (a full disk) gets nothing more from then on.

        Raises:
            OSError: one has failed just now; it names the file.
        """
        failure: OSError | None = None
        for output in self._outputs:
            try:
                what(output)
            except OSError as error:
                failure = OSError(error.errno, error.strerror, error.filename or output.path)
                self._outputs = [other for other in self._outputs if other is not output]
        if failure is not None:
            raise failure

    def set_level(self, level: int) -> None:
        """The least level of messages that are written; DISABLED also stops the rows."""
        self._level = level

    def set_comm(self, comm: Any) -> None:
        """Rows become means over ranks; `comm` is anything with mpi4py's allgather(object)."""
        self._comm = comm

    def get_dir(self) -> str | None:
        """The run's folder."""
        return self._dir

    def close(self) -> None:
        """Closes the files."""
        for output in self._outputs:
            output.close()

    def _mean_over_ranks(self) -> dict[str, Value]:
        mine = {key: (_mean(total, count), count) for key, (total, count) in self._sums.items()}
        merged: dict[str, tuple[Value, int]] = {}
        for table in self._comm.allgather(mine):
            for key, (value, count) in table.items():
                mean, before = merged.get(key, (value, 0))
                if not isinstance(value, str) and before:
                    mean = (mean * before + value * count) / (before + count)
                merged[key] = mean, before + count
        return {key: mean for key, (mean, _) in merged.items()}


def _scalar(key: str, val: Any) -> Any:
    """A copy, which later in-place changes do not reach, still on its device."""
    if math.prod(getattr(val, "shape", ())) != 1:
        raise ValueError(
            f"logged value {key!r} has shape {tuple(val.shape)}, must be one number: "
            f"log its mean, or one key per entry"
        )
    if hasattr(val, "detach"):
        return val.detach().clone()
    return val.copy() if hasattr(val, "shape") else val


def _mean(total: Any, count: int) -> Value:
    number = total.item() if hasattr(total, "item") else total
    if isinstance(number, bool):
        return int(number)
    if not isinstance(number, (int, float)):
        return str(number)
    return number / count if count > 1 else number


def get_rank_without_mpi_import() -> int:
    """The rank as the launcher's environment variables give it; 0 without a launcher."""
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)


_current: Logger | None = None


def configure(
    dir: str | None = None,
    format_strs: Sequence[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
    rank: int | None = None,
    resume_step: int | None = None,
) -> None:
    """Starts logging to a folder; what was configured before is closed.

    Args:
        dir: the folder; default $OPENAI_LOGDIR, else runs/<date>-<time>. Each rank takes the time
            by itself: where ranks must agree, pass the same `dir` to all.
        format_strs: keys of FORMATS; default $OPENAI_LOG_FORMAT, else all but tensorboard.
        comm: see Logger.set_comm.
        log_suffix: inserted into the file names, before the ending.
        rank: ranks other than 0 write and print nothing; default from the environment.
        resume_step: a run that continues at this step writes what came later in its files anew:
            rows beyond it are removed.

    Raises:
        ValueError: an unknown format.
    """
    global _current
    rank = get_rank_without_mpi_import() if rank is None else rank
    named = dir is not None
    dir = os.path.expanduser(dir or os.environ.get("OPENAI_LOGDIR") or _new_folder())
    if format_strs is None:
        format_strs = os.environ.get("OPENAI_LOG_FORMAT", _DEFAULT_FORMATS).split(",")
    outputs = []
    if rank == 0:
        os.makedirs(dir, exist_ok=True)
        outputs = [
            make_output_format(name.strip(), dir, log_suffix, resume_step) for name in format_strs
        ]
    reset()
    _current = Logger(dir, outputs, comm)
    if not named:
        log(f"logging to {dir}")
    for note in (note for output in outputs for note in output.notes):
        log(note)


def _new_folder() -> str:
    """runs/<now>, with a number appended where another run started in the same second."""
    base = path = os.path.join("runs", time.strftime("%Y-%m-%d-%H-%M-%S"))
    number = 1
    while os.path.exists(path):
        number += 1
        path = f"{base}-{number}"
    return path


def reset() -> None:
    """Closes the current logger; what follows goes to the terminal alone."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """configure() for the length of a `with` block; the logger before it then continues."""
    global _current
    outer, _current = _current, None
    try:
        configure(dir, format_strs, comm)
        yield
    finally:
        reset()
        _current = outer


def get_current() -> Logger:
    """The logger in use: the configured one, else one that only prints (on rank 0)."""
    global _current
    if _current is None:
        silent = get_rank_without_mpi_import() != 0
        _current = Logger(None, [] if silent else [make_output_format("stdout", "")])
    return _current


def get_dir() -> str:
    """The run's folder. Whoever asks needs one: without configure(), this calls it."""
    folder = get_current().get_dir()
    if folder is None:
        configure()
        folder = get_current().get_dir()
        assert folder is not None  # configure gives it one
    return folder


def logkv(key: str, val: Any) -> None:
    """Sets a value of the next row (a number, a string, or a tensor of one element)."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Adds to a mean of the next row; tensors are summed where they are."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """logkv for each entry."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs() -> dict[str, Value]:
    """Writes the row, returns it, and starts the next one."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Value]:
    """The row so far."""
    return get_current().getkvs()


def log(*args: Any, level: int = INFO) -> None:
    """Writes a message."""
    get_current().log(*args, level=level)


def debug(*args: Any) -> None:
    """A message that is shown after set_level(DEBUG)."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """An ordinary message."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """A message marked as a warning."""
    log(*args, level=WARN)


def error(*args: Any) -> None:
    """A message marked as an error."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """The least level of messages that are written."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """See Logger.set_comm."""
    get_current().set_comm(comm)


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Adds the seconds spent in the `with` block to `wait_<scopename>` of the row."""
    start = time.perf_counter()
    try:
        yield
    finally:
        get_current().logkv_sum(f"wait_{scopename}", time.perf_counter() - start)


def profile(n: str) -> Callable[[Callable], Callable]:
    """Decorator: profile_kv(n) around every call."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate
