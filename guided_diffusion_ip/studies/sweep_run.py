"""Computing the cells of a sweep: each is image_sample.py, then evaluator.py, as processes of their
own.

    out_dir/cells/NAME-KEY/samples/         as image_sample.py leaves them
                           evaluation.json  as evaluator.py writes it
                           log.txt          what both said
                           lock             held (flock) by whoever works on the cell
                           failed.json      why it could not be computed; gone once it can
                           result.json      the cell is finished; written last, whole or not at all

A cell that has its result is never computed again. The lock is the kernel's, and the processes of a
cell inherit it: however a sweep dies, the lock goes with the last of them, and there are no stale
ones. Several sweeps may work on one folder (network file systems must support locks, as NFS and
Lustre with `flock` do).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import IO, Any

from tqdm.auto import tqdm

from ..files import atomic_file
from .sweep import Cell, Sweep

_POLL_S = 1.0  # between looks at a cell that another process is computing


@dataclass(frozen=True)
class How:
    """With what the cells are computed.

    Args:
        scripts: image_sample.py and evaluator.py.
        launcher: words before each of them, such as ["torchrun", "--nproc_per_node", "2"].
        processes: cells at a time.
        gpus: names for CUDA_VISIBLE_DEVICES; cells at the same time take different ones. Empty: not
            our business.
    """

    scripts: tuple[str, str]
    launcher: tuple[str, ...] = ()
    processes: int = 1
    gpus: tuple[str, ...] = ()

    def command(self, script: str, args: Sequence[str]) -> list[str]:
        """torchrun starts Python itself, mpiexec and srun start any program."""
        words = " ".join(self.launcher)
        python = [] if "torchrun" in words or "torch.distributed" in words else [sys.executable]
        return [*self.launcher, *python, script, *args]

    def environment(self, worker: int) -> dict[str, str]:
        env = dict(os.environ)
        if self.processes > 1:  # else each takes all cores, and all are slow
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.processes)))
        if self.gpus and not self.launcher:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[worker % len(self.gpus)]
        return env


@dataclass
class Outcome:
    """`results` and `errors` by the cell's folder name; `computed` are those that this run
    finished.
    """

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)


def cell_path(out_dir: str, cell: Cell, *parts: str) -> str:
    """A path in the cell's folder."""
    return os.path.join(out_dir, "cells", cell.folder, *parts)


def read_result(out_dir: str, cell: Cell, metrics: Sequence[str]) -> dict[str, Any] | None:
    """The result of a finished cell; None if there is none, or one that lacks some of
    the metrics.
    """
    try:
        with open(cell_path(out_dir, cell, "result.json"), encoding="utf-8") as file:
            result = json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result if set(metrics) <= set(result.get("metrics", {})) else None


def run_sweep(sweep: Sweep, out_dir: str, how: How) -> Outcome:
    """Compute what is missing, and wait for cells that other processes are computing.

    A cell that fails is told, and the others go on. An exception (Ctrl-C) stops the cells that are
    being computed.
    """
    work = _Work(sweep, out_dir, how)
    with ThreadPoolExecutor(how.processes) as pool:
        workers = [pool.submit(work.loop, number) for number in range(how.processes)]
        try:
            for done in as_completed(workers):
                done.result()
        except BaseException:
            work.stop()
            raise
        finally:
            work.bar.close()
    return work.outcome


class _Failure(Exception):
    """A program that a cell needs has failed; the text says why."""


class _Work:
    """The cells that are left, shared by the threads."""

    def __init__(self, sweep: Sweep, out_dir: str, how: How) -> None:
        self.sweep, self.out_dir, self.how, self.outcome = sweep, out_dir, how, Outcome()
        self._guard, self._stopping = threading.Lock(), False
        self._running: set[subprocess.Popen] = set()
        self._left: list[Cell] = []
        self._waited_for: set[str] = set()
        for cell in sweep.cells:
            if (result := read_result(out_dir, cell, sweep.metrics)) is None:
                self._left.append(cell)
            else:
                self.outcome.results[cell.folder] = result
        calls, left = (
            sum(cell.network_calls for cell in cells) for cells in (sweep.cells, self._left)
        )
        # Weighed by steps, so that the estimate holds for a grid of 10 and 1000 steps.
        self.bar = tqdm(
            total=calls,
            initial=calls - left,
            disable=None,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )
        self._show()

    def loop(self, worker: int) -> None:
        """Take cells until none is left."""
        refused = 0  # cells in a row that others are at
        while (cell := self._take()) is not None:
            holder = self._settle(cell, worker)
            refused = refused + 1 if holder else 0
            if holder:
                with self._guard:
                    self._left.append(cell)
                    all_tried = refused >= len(self._left)
                if all_tried:
                    self._tell_wait(holder)
                    time.sleep(_POLL_S)
                    refused = 0

    def stop(self) -> None:
        """End what runs."""
        with self._guard:
            self._stopping = True
            for process in self._running:
                process.terminate()

    def _tell_wait(self, holder: str) -> None:
        if holder not in self._waited_for:
            self.bar.write(f"waiting for cells that are being computed by {holder}")
        self._waited_for.add(holder)

    def _take(self) -> Cell | None:
        with self._guard:
            return None if self._stopping or not self._left else self._left.pop(0)

    def _show(self) -> None:
        self.bar.set_description_str(
            f"{len(self.outcome.results)}/{len(self.sweep.cells)} cells", refresh=True
        )

    def _settle(self, cell: Cell, worker: int) -> str:
        """Compute the cell unless it is finished by now; returns who else is at it, '' if it is
        settled.
        """
        os.makedirs(cell_path(self.out_dir, cell), exist_ok=True)
        with _lock(cell_path(self.out_dir, cell, "lock")) as (lock, holder):
            if lock is None:
                return holder
            result, error, start = (
                read_result(self.out_dir, cell, self.sweep.metrics),
                "",
                time.time(),
            )
            computed = result is None
            if computed:
                try:
                    result = self._compute(cell, lock.fileno(), worker)
                except _Failure as failure:
                    if self._stopping:
                        return ""
                    error = str(failure)
                    _write_json(
                        cell_path(self.out_dir, cell, "failed.json"),
                        {"cell": cell.describe(), "error": error},
                    )
        with self._guard:
            self.bar.update(cell.network_calls)
            if error:
                self.outcome.errors[cell.folder] = error
            else:
                self.outcome.results[cell.folder] = result
                self.outcome.computed += [cell.folder] * computed
            self._show()
        if computed:
            numbers = error or ", ".join(
                f"{name} {entry['value']:.4g}" for name, entry in result["metrics"].items()
            )
            self.bar.write(f"{cell.name}: {numbers} ({time.time() - start:.0f} s)")
        return ""

    def _compute(self, cell: Cell, lock: int, worker: int) -> dict[str, Any]:
        folder = cell_path(self.out_dir, cell)
        samples, evaluation, start = (
            os.path.join(folder, "samples"),
            os.path.join(folder, "evaluation.json"),
            time.time(),
        )
        earlier = read_result(self.out_dir, cell, ()) or {
            "metrics": {}
        }  # of a sweep that asked for fewer metrics
        metrics = list(dict.fromkeys([*self.sweep.metrics, *earlier["metrics"]]))
        image_sample, evaluator = self.how.scripts
        commands = [self.how.command(image_sample, [*cell.sample_args, "--out_dir", samples])]
        self._run(commands[0], folder, lock, worker)
        reference, *rest = cell.evaluate_args
        commands.append(
            self.how.command(
                evaluator,
                [
                    reference,
                    _npz_in(samples),
                    *rest,
                    "--metrics",
                    ",".join(metrics),
                    "--json",
                    evaluation,
                ],
            )
        )
        self._run(commands[1], folder, lock, worker)
        with open(evaluation, encoding="utf-8") as file:
            measured = json.load(file)
        result = {
            "cell": cell.describe(),
            "metrics": measured["metrics"],
            "features": measured.get("features"),
            "warnings": measured.get("warnings", []),
            "made_with": measured.get("made_with", {}),
            "commands": [shlex.join(words) for words in commands],
            "seconds": round(time.time() - start, 2),
            "host": socket.gethostname(),
            "versions": measured.get("versions", {}),
        }
        _write_json(os.path.join(folder, "result.json"), result)
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, "failed.json"))
        if not self.sweep.keep_samples:
            os.remove(_npz_in(samples))
        return result

    def _run(self, words: list[str], folder: str, lock: int, worker: int) -> None:
        """One program, its words in the cell's log.

        Raises:
            _Failure: with the program's last words.
        """
        with open(os.path.join(folder, "log.txt"), "ab") as log:
            log.write(f"\n$ {shlex.join(words)}\n".encode())
            log.flush()
            start = log.tell()
            with self._guard:
                if self._stopping:
                    raise _Failure("stopped")
                try:
                    process = subprocess.Popen(
                        words,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        pass_fds=(lock,),
                        env=self.how.environment(worker),
                    )
                except OSError as error:
                    raise _Failure(f"{words[0]} cannot be started: {error}") from None
                self._running.add(process)
            code = process.wait()
            with self._guard:
                self._running.discard(process)
        if code:
            raise _Failure(_last_words(os.path.join(folder, "log.txt"), start, code))


def _last_words(log: str, start: int, code: int) -> str:
    with open(log, "rb") as file:
        file.seek(start)
        lines = [
            line.strip()
            for line in file.read().decode(errors="replace").replace("\r", "\n").splitlines()
            if line.strip()
        ]
    if code < 0:
        return f"killed by {signal.Signals(-code).name} (out of memory?); see {log}"
    said = [line for line in lines if line.startswith("error: ")] or lines or ["it said nothing"]
    return f"exit code {code}: {said[-1].removeprefix('error: ')[:500]}; see {log}"


def _npz_in(folder: str) -> str:
    return next(
        os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".npz")
    )


def _write_json(path: str, content: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


@contextlib.contextmanager
def _lock(path: str) -> Iterator[tuple[IO[str] | None, str]]:
    """(the lock, ''), or (None, who holds it)."""
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield None, file.read().strip() or "another process"
            return
        except OSError as error:
            raise ValueError(
                f"{path} cannot be locked ({error}): give an --out_dir on a file system with locks"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield file, ""
