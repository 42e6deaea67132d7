"""Ranks notice that what started them is gone: a killed torchrun or mpiexec ends nobody by itself.

Ranks whose launcher was killed (kill -9, the system's out-of-memory killer, a SIGUSR1 to torchrun)
would go on without anyone who knows of them, and meet the next start of the same command in its
folder. So each looks every second whether its parent is still the one it began with. If not, that
counts as a SIGTERM: training saves and ends, on all ranks at the same step; other scripts end.

Only where the launcher is the parent: a program that a shell has started may outlive the shell
(`nohup python script.py &`), and srun's tasks are looked after by Slurm.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from .. import early_signals
from . import watchdog
from .launcher import Env, LaunchInfo

_LOOK_S = 1.0


def launcher_above(info: LaunchInfo, env: Env) -> str:
    """The name of the program that is this process's parent as long as the job lives, or ""."""
    if info.launcher == "torchrun":
        # RANK and MASTER_ADDR alone may have been set by hand, in a shell.
        return "torchrun" if "TORCHELASTIC_RUN_ID" in env else ""
    return "mpiexec" if info.launcher in ("openmpi", "mpich") else ""


def watch(info: LaunchInfo) -> None:
    """Starts to look, once in a process, if there is a launcher to look at."""
    name = launcher_above(info, os.environ)
    if name and not early_signals.launcher:
        early_signals.launcher = name
        threading.Thread(target=_look, name="parent", daemon=True).start()


def _look() -> None:
    while not early_signals.launcher_is_gone():
        time.sleep(_LOOK_S)
    name = early_signals.launcher
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # Nobody would hear of it otherwise, and data loaders would be left.
        watchdog.report_failure(f"{name} is gone")
        watchdog.exit_now(f"error: {name}, which started this process, is gone", 1)
    os.kill(os.getpid(), signal.SIGTERM)
