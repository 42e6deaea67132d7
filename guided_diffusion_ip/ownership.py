"""One owner for each folder that is being written: two runs in one folder would mix their files.

The lock is the kernel's (`flock`) on a small file in the folder, which names its holder. It goes
with the process, however that ends, and never goes stale. Children that are forked do not share it.
Where there are no such locks (some Lustre and FUSE mounts, Windows), a second file's existence is
the lock: one that a dead process of this machine has left is taken over, one of another machine is
refused with the file's name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator

from . import dist_util

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_WITHOUT_LOCKS = ".exclusive"  # after a lock's name, where a file system has no locks
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}
_GRACE_S = 10.0  # a killed process's descriptor may outlive it by as long as its memory is freed

_held: set[str] = set()  # real paths of this process's locks
_descriptors: set[int] = set()


class Held(ValueError):
    """Another process owns the folder."""


@contextlib.contextmanager
def owning(
    folder: str, name: str = LOCK, instead: str = "give another --out_dir"
) -> Iterator[None]:
    """Own `folder` for all processes of this run within the block; a collective. It is made if it
    is not there, and removed again if nothing has come into it. A process that owns it already
    enters once more.

    Args:
        name: of the lock's file in the folder.
        instead: what the message tells to do, apart from waiting.

    Raises:
        Held: another run owns it; on every rank.
    """
    with contextlib.ExitStack() as stack:
        complaint: str | None = None
        if dist_util.is_main():
            try:
                stack.enter_context(owning_alone(folder, name, instead))
            except Held as error:
                complaint = str(error)
        if complaint := dist_util.broadcast_object(complaint):
            raise Held(complaint)
        yield


@contextlib.contextmanager
def owning_alone(
    folder: str,
    name: str = LOCK,
    instead: str = "give another folder",
    say: Callable[[str], object] | None = None,
    keep: bool = False,
) -> Iterator[int]:
    """The same for this process alone, by the file `name` in the folder; gives its descriptor.

    Args:
        say: wait for the owner, and say so here, rather than raise.
        keep: leave the file there, for locks whose descriptor is handed to programs that may
            outlive this one.

    Raises:
        Held: another process owns it.
    """
    made = _make_folders(folder)
    path = os.path.join(os.path.realpath(folder), name)
    if path in _held:  # blocks are nested: the outer one keeps it
        yield -1
        return
    descriptor = _take(path, folder, instead, say)
    _held.add(path)
    _descriptors.add(descriptor)
    try:
        yield descriptor
    finally:
        _held.discard(path)
        _descriptors.discard(descriptor)
        for file in () if keep else (path, path + _WITHOUT_LOCKS):
            with contextlib.suppress(OSError):
                os.remove(file)
        os.close(descriptor)
        for empty in made:
            with contextlib.suppress(OSError):
                os.rmdir(empty)


def _take(path: str, folder: str, instead: str, say: Callable[[str], object] | None) -> int:
    deadline, told = time.monotonic() + _GRACE_S, False
    while True:
        descriptor = _try(path)
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _own_name().encode())
            return descriptor
        exclusive = path + _WITHOUT_LOCKS
        if os.path.exists(exclusive):
            holder, alive = _holder(exclusive)
            holder += f" (if that is gone, remove {exclusive})"
        else:
            holder, alive = _holder(path)
        if say is not None:
            if not told:
                say(f"waiting for {holder}, which computes in {folder}")
            told = True
        elif alive or time.monotonic() > deadline:
            raise Held(f"{folder} is being written by {holder}: wait for it, stop it, or {instead}")
        time.sleep(0.2)


def _try(path: str) -> int | None:
    """The locked file's descriptor; None if another process has it."""
    if fcntl is None:
        return _try_without_locks(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _same_file(descriptor, path):
            return descriptor
    except BlockingIOError:
        pass
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _NO_LOCKS:
            raise
        return _try_without_locks(path)
    os.close(descriptor)  # an owner that has just ended has removed the file: again
    return None


def _try_without_locks(path: str) -> int | None:
    """The same by being the one who makes a second file. One that does not say yet whose it is
    has just been made.
    """
    exclusive = path + _WITHOUT_LOCKS
    with contextlib.suppress(FileExistsError):
        return os.open(exclusive, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    if _holder(exclusive)[1] is False:
        with contextlib.suppress(OSError):
            os.remove(exclusive)
    return None


def _same_file(descriptor: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _own_name() -> str:
    program = os.path.basename(sys.argv[0] if sys.argv else "") or "python"
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} ({program}, since {since})"


def _holder(path: str) -> tuple[str, bool | None]:
    """Who says in the file to be its owner, and may it be alive? Other machines' processes may;
    None if the file does not say.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(300).strip()
    except OSError:
        text = ""
    words = text.split()
    known = len(words) >= 4 and words[0] == "process" and words[1].isdigit()
    if not known:
        return "another process", None
    if words[3] != socket.gethostname() or os.name != "posix":  # kill(pid, 0) is not harmless there
        return text, True
    try:
        os.kill(int(words[1]), 0)
    except (ProcessLookupError, OverflowError):
        return text, False
    except PermissionError:
        pass
    return text, True


def _make_folders(folder: str) -> list[str]:
    """Make a folder and those above it; returns those that were not there, deepest first."""
    missing, at = [], os.path.abspath(folder)
    while not os.path.exists(at):
        missing.append(at)
        at = os.path.dirname(at)
    os.makedirs(folder, exist_ok=True)
    return missing


def _forget_in_child() -> None:
    for descriptor in _descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
