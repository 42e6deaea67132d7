"""How scripts end: what a user did wrong is one line, a bug of ours a traceback."""

from __future__ import annotations

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from .. import dist_util

_LONGEST = 2000
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    homes = (_PACKAGE, os.path.dirname(os.path.abspath(sys.argv[0])))
    return os.path.dirname(os.path.abspath(frames[-1].filename)).startswith(homes)


def _verdict(error: BaseException) -> tuple[str, int]:
    """The line that a user gets to see ("": the traceback), and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted: {presentable(str(error))}" if str(error) else "interrupted", 130
    ours = isinstance(error, OSError) or isinstance(error, ValueError) and _raised_by_us(error)
    if not ours or os.environ.get("GUIDED_DIFFUSION_IP_TRACEBACK"):
        return "", 1
    return f"error: {presentable(str(error))}", 2


def presentable(text: str) -> str:
    """One line of at most _LONGEST characters, without any that a terminal would obey."""
    line = " ".join(text.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line
    )


def command(main: Callable[[], Any]) -> NoReturn:
    """Run a script's main: what a user did wrong becomes one line on stderr and exit code 2; bugs
    keep their traceback.

    A ValueError raised by our own code is addressed to the user; one from a library is a bug of
    ours. GUIDED_DIFFUSION_IP_TRACEBACK=1 shows the traceback in any case. One of several processes
    tells the others of its end, or names the rank whose end is the cause of its own (exit code 1),
    and does not wait for any.
    """
    # A warning is for the user too: one line, without the place in the code that raised it.
    warnings.formatwarning = lambda message, *_: f"warning: {presentable(str(message))}\n"
    try:
        main()
    except SystemExit as end:
        if end.code:
            dist_util.report_failure(f"exit code {end.code}")
        raise
    except (Exception, KeyboardInterrupt) as error:
        line, code = _verdict(error)
        dist_util.end_process(error, line, code)  # comes back in a single process
        if not line:
            raise
        print(line, file=sys.stderr)
        sys.exit(code)
    # What main made may live on in reference cycles, a process group of DDP among it, whose threads
    # would run into the interpreter's end and abort.
    gc.collect()
    sys.exit(0)
