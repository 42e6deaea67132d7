"""One input, in a forked child of this process: what it said, how it ended, what it has left."""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10  # of CPU time; a busy machine does not change it
_WALL = 90
MEMORY = 2 << 30  # bytes, resident, beyond those that it was born with
FINE = (0, 2)


@dataclass
class Case:
    """A script and its arguments, made for one folder.

    finals: patterns, below the folder, of names under which nothing may appear when the script
        refuses its input.
    """

    target: str
    script: str
    argv: list[str]
    finals: tuple[str, ...] = ()
    codes: tuple[int, ...] = FINE


@dataclass
class Outcome:
    case: Case
    code: int  # of exit; of a signal, negative
    seconds: float
    memory: int
    said: str
    left: list[str] = field(default_factory=list)

    @property
    def complaint(self) -> str:
        """What is wrong with how it ended; "" if nothing."""
        if self.code == -signal.SIGXCPU or self.code == -signal.SIGALRM:
            return f"took longer than {SECONDS} s"
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        if "Traceback (most recent call last)" in self.said:
            return f"ended with a traceback (exit code {self.code})"
        if self.code not in self.case.codes:
            return f"ended with exit code {self.code}"
        if self.memory > MEMORY:
            return f"took {self.memory >> 20} MB"
        if self.code == 2 and self.left:
            return f"refused its input and left {', '.join(self.left[:3])}"
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        if self.code == 2 and len(errors) != 1:
            return f"ended with exit code 2 and {len(errors)} lines of error"
        if any(len(line) > 2100 or not line.isprintable() for line in errors):
            return "has a line of error that is too long or not printable"
        return ""


def run(case: Case, folder: Path) -> Outcome:
    """Run it in a child that starts as a copy of this process, with everything imported."""
    before = _finals(case, folder)
    out = folder / "said.txt"
    start = time.monotonic()
    # A forked child holds less than its parent (not the mapped files): it says itself how much.
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        _be_the_script(case, folder, out, its)
    os.close(its)
    _, status, usage = os.wait4(child, 0)
    born = int(os.read(ours, 32) or 0)
    os.close(ours)
    return Outcome(
        case,
        os.waitstatus_to_exitcode(status),
        time.monotonic() - start,
        max(0, (usage.ru_maxrss << 10) - born),
        out.read_text(errors="backslashreplace") if out.exists() else "",
        sorted(_finals(case, folder) - before),
    )


def _resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _finals(case: Case, folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for pattern in case.finals for path in folder.glob(pattern)
    }


def _be_the_script(case: Case, folder: Path, out: Path, born: int) -> None:
    code = 99
    try:
        os.write(born, str(_resident()).encode())
        os.close(born)
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_WALL)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = open(1, "w", closefd=False, errors="backslashreplace")
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")
        os.chdir(folder)
        sys.argv = [case.script, *case.argv]
        try:
            runpy.run_path(str(ROOT / case.script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
