"""Signals that come before training can answer them: while Python imports PyTorch, ranks meet, ...

Without this, a SIGUSR1 (Slurm's --signal) or SIGTERM in the first seconds of a training script
kills it. A script calls `note_signals()` before it imports anything else;
`training.stopping.Signals` takes over from there, and training ends before its first step. Python
itself takes some hundredths of a second to come to a script's first line: nothing can be done about
those.

Ctrl-C is not noted: it ends a script that has nothing to save at once.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from . import go_between

NOTED = ("SIGHUP", "SIGTERM", "SIGUSR1")
received: list[str] = []  # names, in the order in which they came
parent = os.getppid()  # who started this process; once it is gone, the system names another
launcher = ""  # the name of that program, if its end is to be noticed (dist_util/parent.py)


def note_signals() -> None:
    """From now on the signals of NOTED do not end this process, nor does an output that nobody
    reads any more. In the main thread only.

    Under Open MPI, the script goes on in a child of the process that called this (go_between.py).
    """
    global parent
    for name in NOTED:
        number = getattr(signal, name, None)
        if number and not is_ignored(number):
            signal.signal(number, note)
    apart = go_between.is_needed(os.environ)
    if apart or any(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)):
        go_between.forgive_lost_readers()
    if apart:
        parent = go_between.step_aside(received)


def _forked() -> None:
    """In a forked child."""
    global parent
    parent = os.getppid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def is_ignored(number: int) -> bool:
    """Whether whoever started this process had it ignore a hang-up (nohup), which then it does."""
    hang_up = getattr(signal, "SIGHUP", None)
    return number == hang_up and signal.getsignal(number) is signal.SIG_IGN


def note(number: int, _: Any) -> None:
    """The handler."""
    received.append(signal.Signals(number).name)


def launcher_is_gone() -> bool:
    """Whether the program that started this process, and should outlive it, has ended."""
    return bool(launcher) and os.getppid() != parent


def what(name: str) -> str:
    """Why the signal of that name came, or the word of another rank (name ""), as far as known."""
    return f"{launcher} is gone" if name in ("", "SIGTERM") and launcher_is_gone() else name


def after_training(number: int) -> signal.Handlers:
    """When nothing is left to save, SIGTERM ends the process, and SIGUSR1 is ignored.

    By the system: Python forgets its own handlers when it ends, which takes a while with PyTorch.
    """
    return signal.SIG_IGN if number == getattr(signal, "SIGUSR1", None) else signal.SIG_DFL


def end_if_terminated() -> None:
    """For long waits with nothing to lose: a noted SIGTERM ends the process as it usually does."""
    if any(name != "SIGUSR1" for name in received):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
