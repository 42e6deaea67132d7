"""How one of several processes ends after an error: who is to blame, who is told, who waits for
nobody.
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from . import watchdog


def is_failed_collective(error: BaseException | None) -> bool:
    """Is this, or what it was raised in answer to, an error of exchanging data with other ranks?"""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        # gloo has no exception type of its own, and DDP's come out of autograd.
        if isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("gloo/transport", "NCCL", "ProcessGroup")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def blame(error: BaseException) -> str:
    """Who is the cause of the error that ends this rank: one line about another rank, or "" if it
    is this one.

    In the latter case the others are told. In bounded time, like everything here.
    """
    me = watchdog.current()
    if me is None:
        return ""
    if is_failed_collective(error):
        ranks, sentence = me.absent(5)
        if ranks:
            watchdog.stop()  # ends as a consequence: the others must not take it for another cause
            return f"{sentence}; this is rank {me.rank}"
    watchdog.report_failure(_in_short(error))
    return ""


def end_process(error: BaseException, line: str, code: int) -> None:
    """Ends one of several watched processes after `error`, without waiting for any other; does
    nothing in a single one.

    If another rank is the cause, says so and exits with code 1. Otherwise tells the others, shows
    `line` (the traceback if it is "") unless another rank shows the same one, and exits with
    `code`.
    """
    me = watchdog.current()
    if me is None:
        return
    other = blame(error)
    if other:
        watchdog.exit_now(f"error: {other}", 1)
    if not line:
        sys.excepthook(type(error), error, error.__traceback__)
    elif me.rank > 0:
        # A mistake in flags shows on every rank: rank 0 tells of it, and the first that noticed.
        first, what = me.failure or (me.rank, "")
        same = first != me.rank and what == f"failed: {_in_short(error)}"
        line = "" if same else f"rank {me.rank}: {line}"
    watchdog.exit_now(line, code)


def _in_short(error: BaseException) -> str:
    """One line; names the type unless the message is addressed to the user."""
    text = " ".join(str(error).split())[:1000]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
