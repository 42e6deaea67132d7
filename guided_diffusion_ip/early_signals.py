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
from typing import Any

NOTED = ("SIGTERM", "SIGUSR1")
received: list[str] = []  # names, in the order in which they came


def note_signals() -> None:
    """From now on the signals of NOTED do not end this process. In the main thread only."""
    for name in NOTED:
        if number := getattr(signal, name, None):
            signal.signal(number, note)


def note(number: int, _: Any) -> None:
    """The handler."""
    received.append(signal.Signals(number).name)


def after_training(number: int) -> signal.Handlers:
    """When nothing is left to save, SIGTERM ends the process, and SIGUSR1 is ignored.

    By the system: Python forgets its own handlers when it ends, which takes a while with PyTorch.
    """
    return signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN


def end_if_terminated() -> None:
    """For long waits with nothing to lose: a noted SIGTERM ends the process as it usually does."""
    if "SIGTERM" in received:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
