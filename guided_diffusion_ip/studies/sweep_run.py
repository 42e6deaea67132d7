"""Computing the cells of a sweep: each is image_sample.py, then evaluator.py, as processes of their
own.

    out_dir/lock                            held (flock) by the sweep that computes
    out_dir/cells/NAME-KEY/samples/         as image_sample.py leaves them
                           evaluation.json  as evaluator.py writes it
                           log.txt          what both said
                           failed.json      why it could not be computed; gone once it can
                           result.json      the cell is finished; written last, whole or not at all

A cell that has its result is never computed again. A second sweep on the same folder waits for the
first. The lock is the kernel's, and the programs of the cells inherit it: however a sweep dies, the
lock goes with the last of them, and there are no stale ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from ..files import atomic_file
from ..ownership import owning_alone
from .sweep import GridCell, Sweep


@dataclass(frozen=True)
class Launch:
    """How the programs of a cell are started.

    Args:
        scripts: image_sample.py and evaluator.py.
        launcher: words before each of them, such as ["torchrun", "--nproc_per_node", "2"].
        processes: cells at a time.
        gpus: names for CUDA_VISIBLE_DEVICES; cells at the same time take different ones. Empty:
            the environment is left as it is.
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


def cell_path(out_dir: str, cell: GridCell, *parts: str) -> str:
    """A path in the cell's folder."""
    return os.path.join(out_dir, "cells", cell.folder, *parts)


def read_result(out_dir: str, cell: GridCell, metrics: Sequence[str]) -> dict[str, Any] | None:
    """The result of a finished cell; None if there is none, or one that lacks some of
    the metrics.
    """
    try:
        with open(cell_path(out_dir, cell, "result.json"), encoding="utf-8") as file:
            result = json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result if set(metrics) <= set(result.get("metrics", {})) else None


def run_sweep(
    sweep: Sweep, out_dir: str, launch: Launch, say: Callable[[str], object] = tqdm.write
) -> Outcome:
    """Compute what is missing; waits while another process is at work in out_dir.

    A cell that fails is reported, and the others go on. An exception (Ctrl-C) stops the cells that
    are being computed.
    """
    with owning_alone(out_dir, "lock", say=say, keep=True) as lock:
        work = _CellRunner(sweep, out_dir, launch, lock, say)
        with ThreadPoolExecutor(launch.processes) as pool:
            try:
                for done in as_completed([pool.submit(work.settle, cell) for cell in work.left]):
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                work.stop()
                raise
            finally:
                work.bar.close()
    return work.outcome


class _Failure(Exception):
    """A program that a cell needs has failed; the text says why."""


class _CellRunner:
    """Computes cells; shared by the threads. `left` are those without a result."""

    def __init__(
        self, sweep: Sweep, out_dir: str, launch: Launch, lock: int, say: Callable[[str], object]
    ) -> None:
        self.sweep, self.out_dir, self.launch, self.outcome = sweep, out_dir, launch, Outcome()
        self._lock, self._say = lock, say
        self._guard, self._stopping = threading.Lock(), False
        self._running: set[subprocess.Popen] = set()
        self._workers: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(launch.processes):
            self._workers.put(number)
        self.left: list[GridCell] = []
        for cell in sweep.cells:
            if (result := read_result(out_dir, cell, sweep.metrics)) is None:
                self.left.append(cell)
            else:
                self.outcome.results[cell.folder] = result
        calls = sum(cell.network_calls for cell in sweep.cells)
        # Weighed by steps, so that the estimate holds for a grid of 10 and 1000 steps.
        self.bar = tqdm(
            total=calls,
            initial=calls - sum(cell.network_calls for cell in self.left),
            disable=None,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )
        self._show()

    def stop(self) -> None:
        """End what runs."""
        with self._guard:
            self._stopping = True
            for process in self._running:
                process.terminate()

    def _show(self) -> None:
        count = f"{len(self.outcome.results)}/{len(self.sweep.cells)} cells"
        self.bar.set_description_str(count, refresh=True)

    def settle(self, cell: GridCell) -> None:
        """Compute a cell; its result, or why there is none, is in the outcome."""
        start, worker = time.time(), self._workers.get()
        try:
            os.makedirs(cell_path(self.out_dir, cell), exist_ok=True)
            result = self._compute(cell, worker)
            text = ", ".join(f"{name} {m['value']:.4g}" for name, m in result["metrics"].items())
            self.outcome.results[cell.folder] = result
            self.outcome.computed.append(cell.folder)
        except _Failure as failure:
            if self._stopping:
                return
            text = self.outcome.errors[cell.folder] = str(failure)
            failed = {"cell": cell.describe(), "error": text}
            _write_json(cell_path(self.out_dir, cell, "failed.json"), failed)
        finally:
            self._workers.put(worker)
        with self._guard:
            self.bar.update(cell.network_calls)
            self._show()
        self._say(f"{cell.name}: {text} ({time.time() - start:.0f} s)")

    def _compute(self, cell: GridCell, worker: int) -> dict[str, Any]:
        folder = cell_path(self.out_dir, cell)
        samples, evaluation = (
            os.path.join(folder, "samples"),
            os.path.join(folder, "evaluation.json"),
        )
        start = time.time()
        earlier = read_result(self.out_dir, cell, ())  # of a sweep that asked for fewer metrics
        metrics = [*self.sweep.metrics, *(earlier["metrics"] if earlier else ())]
        image_sample, evaluator = self.launch.scripts
        commands = [self.launch.command(image_sample, [*cell.sample_args, "--out_dir", samples])]
        self._run(commands[0], folder, worker)
        reference, *rest = cell.evaluate_args
        commands.append(
            self.launch.command(
                evaluator,
                [
                    reference,
                    _npz_in(samples),
                    *rest,
                    "--metrics",
                    ",".join(dict.fromkeys(metrics)),
                    "--json",
                    evaluation,
                ],
            )
        )
        self._run(commands[1], folder, worker)
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

    def _run(self, words: list[str], folder: str, worker: int) -> None:
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
                        pass_fds=(self._lock,),
                        env=self.launch.environment(worker),
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
