"""Ranks that notice each other's end: one that dies or fails ends all others, and each says which
one it was.

Without this, ranks in a collective with a dead one wait for PyTorch's own limits (NCCL), or end
with an error that names a socket (gloo). Each process has a daemon thread. Rank 0's holds one
connection to each other rank's; over it, each side says every second that it is there, a failing
rank says why before it ends, and one that is done says goodbye. The system closes the connections
of a process that dies, however it does, so that its end is known at once; silence alone tells of a
process that is stopped, or of a machine without power or network.

Not over the TCPStore of the rendezvous: its client waits without limit for a server that hangs,
does not tell of clients that vanish, and prints a page of C++ frames when the server goes.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch.distributed as dist

from .interfaces import is_loopback, route

DEFAULT_LIMIT_S = 300.0
_BEAT_S = 1.0
_QUIET_S = 3.0  # without a beat for so long: worth naming when a collective has failed
_GRACE_S = 5.0  # for a main thread to end by itself once a rank has failed
_MAX_LINE = 1 << 16  # bytes; knowledge about thousands of ranks fits in

_GONE = (
    "is gone without a word (its own output says why; if something killed it, the system's log "
    "does)"
)
_LEFT = "has ended as if all was done (did all ranks get the same flags and data?)"
_QUIET = "has not answered for some seconds"


def silence_limit(env: Mapping[str, str]) -> float:
    """How long a rank may be silent before it is taken for dead, in seconds:
    GUIDED_DIFFUSION_IP_TIMEOUT.

    Raises:
        ValueError: not a number of at least 5 seconds.
    """
    text = env.get("GUIDED_DIFFUSION_IP_TIMEOUT") or str(DEFAULT_LIMIT_S)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 5 <= limit < math.inf:
        raise ValueError(
            f"environment variable GUIDED_DIFFUSION_IP_TIMEOUT is {text!r}, must be a number of "
            f"seconds, at least 5: how long a rank may be silent (unset: {DEFAULT_LIMIT_S:g})"
        )
    return limit


@dataclass
class _Line:
    """A connection; `rank` is who is at its other end, None before it has said so."""

    socket: socket.socket
    rank: int | None = None
    unread: bytes = b""
    silence_s: float = 0.0

    def send(self, message: dict[str, Any]) -> None:
        # A full buffer means that nobody reads: the silence counts. A broken line is noticed by
        # reading.
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived, None once the other end has closed."""
        try:
            data = self.socket.recv(_MAX_LINE)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *texts, self.unread = (self.unread + data).split(b"\n")
        if not data or len(self.unread) > _MAX_LINE:
            return None
        self.silence_s = 0.0
        try:
            messages = [json.loads(text) for text in texts]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None


class Watchdog:
    """One rank's view of the others. Subclasses: _Hub on rank 0, _Spoke on the others."""

    def __init__(self, rank: int, world: int, limit_s: float) -> None:
        self.rank, self.world, self.limit_s = rank, world, limit_s
        self.failure: tuple[int, str] | None = None  # the first rank that failed, and what about it
        self.gone: set[int] = set()  # ended without goodbye
        self.left: set[int] = set()  # said goodbye
        self.silent: list[int] = []
        self.watches_all = False  # every rank has a watchdog; set by the rendezvous, on all alike
        self._calls = self._met = 0  # of wait_for_all: by this rank, by every rank
        self._lines: dict[int, _Line] = {}
        self._selector = selectors.DefaultSelector()
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._closed = self._reported = False
        self._end_at = math.inf
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Until close()."""
        self._thread.start()

    def report(self, text: str) -> tuple[int, str] | None:
        """See report_failure."""
        self._reported = True
        with self._lock:  # held for moments only: nothing done with it waits
            self._fail(self.rank, f"failed: {text}")
        until = time.monotonic() + 2
        while not self.failure and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)  # for rank 0's word on who was first
        return self.failure

    def absent(self, wait_s: float) -> tuple[list[int], str]:
        """See absent_ranks."""
        until = time.monotonic() + wait_s
        while True:
            with self._lock:
                failed = {self.failure[0]} if self.failure else set()
                ranks = (self.gone | failed) - {self.rank}
                late = not ranks and time.monotonic() >= until
                if late:  # what explains less, or may be chance
                    ranks = set(self.silent) or self.left - {self.rank}
                if ranks or late:
                    return sorted(ranks), self._sentence(ranks)
            time.sleep(0.02)

    def wait_for_all(self) -> None:
        """Until every rank has made as many calls; without limit, as long as they live.

        Raises:
            dist.DistError: one of them never will.
        """
        with self._news:
            self._calls += 1
            self._beat()
            while self._met < self._calls:
                # Rank 0 calls a rank that has left a failure, but itself may have left before.
                lost = self.gone or self.left & {0}
                if self.failure or lost:
                    raise dist.DistError(self._sentence(lost))
                self._news.wait(_BEAT_S)

    def close(self) -> None:
        """Says goodbye and ends the thread."""
        with self._lock:
            self.left.add(self.rank)
            self._say_goodbye()
            self._closed = True
            for held in self._sockets():
                with contextlib.suppress(OSError):
                    held.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(2 * _BEAT_S)

    def _sockets(self) -> Iterator[socket.socket]:
        yield from (line.socket for line in list(self._lines.values()))

    def _sentence(self, ranks: set[int] | list[int]) -> str:
        if self.failure:
            return f"rank {self.failure[0]} of {self.world} {self.failure[1]}"
        what = (
            _GONE
            if self.gone.issuperset(ranks)
            else _QUIET
            if set(self.silent).issuperset(ranks)
            else _LEFT
        )
        return f"rank {', '.join(map(str, sorted(ranks)))} of {self.world} {what}" if ranks else ""

    def _run(self) -> None:
        beat = last = time.monotonic()
        while not self._closed:
            ready = self._selector.select(_BEAT_S)
            with self._lock:
                for key, _ in ready:
                    if not self._closed:
                        self._attend(key.data)
                now = time.monotonic()
                if now >= beat and not self._closed:
                    self._beat()
                    beat = now + 0.9 * _BEAT_S
                # Whoever holds the interpreter up, or stops the whole job for a while, is not the
                # others' silence.
                self._judge(now, min(now - last, 2 * _BEAT_S))
                last = now
                self._news.notify_all()
        for held in self._sockets():
            held.close()

    def _attend(self, line: _Line) -> None:
        """Something has happened to a line."""
        messages = line.receive()
        for message in messages or []:
            self._hear(line, message)
        if messages is None:
            self._selector.unregister(line.socket)
            line.socket.close()
            if line.rank is not None:
                self._lines.pop(line.rank)
                if line.rank not in self.left:
                    self.gone.add(line.rank)
                    self._fail(line.rank, _GONE)
                elif line.rank == 0:  # is done: nobody is left to hear about the others
                    self._closed = self.failure is None

    def _judge(self, now: float, passed_s: float) -> None:
        for rank, line in self._lines.items():
            line.silence_s += passed_s
            if line.silence_s > self.limit_s:
                self._fail(
                    rank,
                    f"has not been heard of for {self.limit_s:g} s: see whether its machine and "
                    "network work, and what its process does (py-spy dump); "
                    "GUIDED_DIFFUSION_IP_TIMEOUT sets this limit",
                )
        if self.failure and not self._reported and not self._closed:
            self._end_at = min(self._end_at, now + _GRACE_S)
            if now >= self._end_at:
                # The main thread may be in a collective for ever, or at work whose result nobody
                # will use.
                self.left.add(self.rank)
                self._say_goodbye()
                exit_now(f"error: {self._sentence([])}; this is rank {self.rank}", 1)

    def _fail(self, rank: int, what: str) -> None:
        raise NotImplementedError

    def _hear(self, line: _Line, message: dict[str, Any]) -> None:
        raise NotImplementedError

    def _beat(self) -> None:
        raise NotImplementedError

    def _say_goodbye(self) -> None:
        self._beat()


class _Hub(Watchdog):
    """Rank 0's: tells everyone what it hears from each."""

    def __init__(self, rank: int, world: int, limit_s: float, host: str) -> None:
        super().__init__(rank, world, limit_s)
        self._calls_of: dict[int, int] = {}  # by the other ranks
        self.token = secrets.token_hex(8)  # whoever else finds the port is not listened to
        self._listener = _listen(host, world)
        self.port = self._listener.getsockname()[1]
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def _sockets(self) -> Iterator[socket.socket]:
        yield self._listener
        yield from super()._sockets()

    def _attend(self, line: _Line | None) -> None:
        if line is not None:
            return super()._attend(line)
        with contextlib.suppress(OSError):  # who called has hung up
            caller, _ = self._listener.accept()
            caller.setblocking(False)
            self._selector.register(caller, selectors.EVENT_READ, _Line(caller))

    def _hear(self, line: _Line, message: dict[str, Any]) -> None:
        if line.rank is None:
            if message.get("token") == self.token:
                line.rank = message["rank"]
                self._lines[line.rank] = line
        elif "failed" in message:
            self._fail(line.rank, message["failed"])
        elif "left" in message:
            self.left.add(line.rank)
            self._beat()
        elif message.get("calls", 0) > self._calls_of.get(line.rank, 0):
            self._calls_of[line.rank] = message["calls"]
            self._beat()

    def _fail(self, rank: int, what: str) -> None:
        self.failure = self.failure or (rank, what)
        self._beat()

    def _beat(self) -> None:
        self.silent = [rank for rank, line in self._lines.items() if line.silence_s > _QUIET_S]
        calls = [self._calls, *(self._calls_of.get(rank, 0) for rank in range(1, self.world))]
        self._met = min(calls)
        for rank in self.left:
            if calls[rank] < max(calls):  # somebody waits for it
                self.failure = self.failure or (rank, _LEFT)
        news = {
            "failure": self.failure,
            "gone": list(self.gone),
            "left": list(self.left),
            "silent": self.silent,
            "met": self._met,
        }
        for line in self._lines.values():
            line.send(news)


class _Spoke(Watchdog):
    """Any other rank's: knows what rank 0 tells, and how rank 0 is."""

    def __init__(
        self, rank: int, world: int, limit_s: float, host: str, port: int, token: str
    ) -> None:
        super().__init__(rank, world, limit_s)
        connection = socket.create_connection((host, port), timeout=10)
        connection.setblocking(False)
        self._hub = self._lines[0] = _Line(connection, 0)
        self._hub.send({"token": token, "rank": rank})
        self._selector.register(connection, selectors.EVENT_READ, self._hub)

    def _hear(self, line: _Line, message: dict[str, Any]) -> None:
        if message["failure"]:
            self.failure = tuple(message["failure"])
        self.gone.update(message["gone"])
        self.left.update(message["left"])
        self.silent = message["silent"]
        self._met = message["met"]

    def _fail(self, rank: int, what: str) -> None:
        if rank == self.rank:
            self._hub.send({"failed": what})
        else:  # rank 0 itself
            self.failure = self.failure or (rank, what)

    def _beat(self) -> None:
        if self._hub.silence_s > _QUIET_S:
            self.silent = [0]
        # Every time: what does not fit into the line is lost.
        self._hub.send({"calls": self._calls})

    def _say_goodbye(self) -> None:
        self._hub.send({"left": True})


def _listen(host: str, world: int) -> socket.socket:
    if host.startswith("127."):
        listener = socket.create_server((host, 0), backlog=world)
    elif socket.has_dualstack_ipv6():
        listener = socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=world, dualstack_ipv6=True
        )
    else:
        listener = socket.create_server(("", 0), backlog=world)
    listener.setblocking(False)
    return listener


def _own_address(host: str, port: int) -> str:
    """How the ranks that reach the store at host:port reach this process, which need not be the one
    that keeps the store.
    """
    own = route(host, port)[1]
    return host if is_loopback(own) else own


_current: Watchdog | None = None


def start(rank: int, world: int, store: dist.Store, host: str, port: int, limit_s: float) -> None:
    """Starts this process's watchdog; all ranks call it, after they have met at host:port, in
    `store`.

    A rank that cannot connect to rank 0 warns, and goes on unwatched.
    """
    global _current
    stop()
    watchdog: Watchdog
    if rank == 0:
        watchdog = hub = _Hub(rank, world, limit_s, host)
        store.set("watchdog", json.dumps([_own_address(host, port), hub.port, hub.token]))
    else:
        place, door, token = json.loads(store.get("watchdog"))
        try:
            watchdog = _Spoke(rank, world, limit_s, place, door, token)
        except OSError as error:
            warnings.warn(
                f"rank {rank} cannot connect to rank 0 at {place}:{door} ({error}): if one of the "
                "two dies, the other may wait long for it. Between machines, let TCP connections "
                "through.",
                stacklevel=3,
            )
            return
    watchdog.start()
    _current = watchdog


def stop() -> None:
    """Says goodbye to the others: this rank's end is no failure from now on."""
    global _current
    watchdog, _current = _current, None
    if watchdog:
        watchdog.close()


def current() -> Watchdog | None:
    """This process's watchdog: None in a single process, before the ranks have met and after
    goodbye.
    """
    return _current


def report_failure(text: str) -> tuple[int, str] | None:
    """Tells the other ranks that this one fails, in at most about two seconds; never raises.

    They get a few seconds to end by themselves, then their watchdogs end them.

    Returns: (rank, what) of the first failure that was reported, which may be another rank's; None
        in a single process.
    """
    return _current.report(" ".join(text.split())[:1000]) if _current else None


def absent_ranks(wait_s: float = 5) -> tuple[list[int], str]:
    """Which ranks are to blame, asked where a collective has just failed, and one sentence on what
    is known about them.

    At once if a rank has died or reported a failure; after `wait_s` seconds those that have been
    silent for 3 s, else those that have ended normally, else ([], "").
    """
    return _current.absent(wait_s) if _current else ([], "")


def exit_now(line: str, code: int) -> NoReturn:
    """Ends the process from any thread, whatever the main one is blocked in, without the exit
    handlers that could wait.
    """
    if line:
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, (line + "\n").encode())
    for child in multiprocessing.active_children():
        child.terminate()  # they hold this process's output open
    # In a thread, because the main one may hold a stream's lock.
    flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flush.start()
    flush.join(1)
    os._exit(code)


def _forget_in_child() -> None:
    """A forked child has no watchdog, and must not keep the connections of a parent that dies."""
    global _current
    for held in _current._sockets() if _current else ():
        held.close()
    _current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
