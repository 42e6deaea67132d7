"""A rank that Open MPI's mpiexec cannot kill while it saves.

It answers Ctrl-C and SIGTERM by sending SIGCONT, SIGTERM and SIGKILL to its ranks' process groups,
a quarter of a second apart, which no parameter of its changes. A checkpoint takes longer. So what
mpiexec started stays behind as a go-between, which passes signals on and ends as the rank does, and
the rank is its child, in a process group of its own. If the go-between is killed, the rank finds
its parent gone, and takes that for the signal (dist_util/parent.py).

MPICH's mpiexec passes SIGINT and SIGTERM on, and waits: nothing is needed there.

Nothing of ours is imported here, and nothing large: a go-between is there as long as its rank.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TextIO

_PASSED_ON = ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "TSTP", "CONT")
_LOOK_S = 1.0  # how often a go-between looks whether mpiexec is still there


def is_needed(env: Mapping[str, str]) -> bool:
    """Whether this process is a rank of Open MPI's mpiexec."""
    return "OMPI_COMM_WORLD_RANK" in env and hasattr(os, "fork")


def step_aside(received: Iterable[str]) -> int:
    """The program goes on in a child, in a process group of its own; this process becomes its
    go-between, and does not come back.

    To be called before anything has started a thread or printed. `received` names the signals that
    have been noted so far, and is read again after the child has been made.

    Returns: in the child, the go-between's process id.
    """
    launcher, me = os.getppid(), os.getpid()
    child = os.fork()
    if child:
        _pass_on(child, launcher, received)
    # Not a session of its own: the system continues a stopped process whose group has lost the
    # last parent outside it, with a SIGHUP, but in a new session there never was such a parent.
    os.setpgid(0, 0)
    return me


def _pass_on(child: int, launcher: int, received: Iterable[str]) -> NoReturn:
    """Be the child to the launcher, and the launcher to the child."""

    def send(number: int, _: Any = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    def look(*_: Any) -> None:
        if os.getppid() != launcher:
            os._exit(1)  # the child takes this for its launcher's end, which it is

    for name in _PASSED_ON:
        number = getattr(signal, f"SIG{name}")
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, send)
    for name in received:  # what came between the fork and this
        send(getattr(signal, name))
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_S, _LOOK_S)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        # By the same signal, for mpiexec to say so; but the child's core file is the one to keep.
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


class _Forgiving(io.FileIO):
    """What nobody can read any more is not written, and that is no error."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return memoryview(data).nbytes


def forgive_lost_readers() -> None:
    """From now on, a terminal or mpiexec that is gone does not make print() fail: a run that is
    told to end by that has to save, and says so.
    """
    sys.stdout, sys.stderr = (_forgiving(stream) for stream in (sys.stdout, sys.stderr))


def _forgiving(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):  # somebody's own, or none at all
        return stream
    raw = _Forgiving(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
