"""When training ends: limits, and signals that mean "save and go"."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import early_signals

# Ctrl-C; what schedulers and launchers send, and a launcher's end (dist_util/parent.py); what Slurm
# sends ahead of time (--signal=USR1@120); a terminal that is closed, unless nohup.
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


@dataclass(frozen=True)
class Limits:
    """0 means none. Steps, images (over all processes), and hours of this process, not counting
    those before a resume.

    Raises:
        ValueError: one of them is below 0.
    """

    max_steps: int = 0
    max_images: int = 0
    max_hours: float = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_images", "max_hours"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0 (no limit), got {value}")

    def last_step(self, global_batch: int) -> int | None:
        """The step at which one of the first two is reached; None without them."""
        steps = [self.max_steps, -(-self.max_images // global_batch)]
        return min((limit for limit in steps if limit > 0), default=None)


@dataclass
class Signals:
    """In its block, the first signal of SIGNALS is noted in `received` instead of breaking into the
    middle of an update.

    One that a script noted before it came here counts (early_signals.py). A second Ctrl-C breaks,
    a first one after another signal does not. Does nothing outside the main thread, where Python
    takes no signals.
    """

    received: str = ""
    _interrupted: bool = False
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number and not early_signals.is_ignored(number):
                    self._before[number] = signal.signal(number, self._note)
            self.received = self.received or next(iter(early_signals.received), "")
        return self

    def _note(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.received = self.received or signal.Signals(number).name

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            if handler is early_signals.note:
                handler = early_signals.after_training(number)
            signal.signal(number, handler)
        self._before.clear()


class Wishes(NamedTuple):
    """What a rank wants beside training; once the ranks have agreed, what one of them wants."""

    stop: bool = False  # told to by a signal
    over: bool = False  # out of time
    save_due: bool = False


class Interruptions:
    """What comes up while a run goes on: signals (in its block), the end of its hours, a checkpoint
    that is due by the clock. Ranks differ by moments, so they have to agree on the wishes.
    """

    def __init__(self, max_hours: float, save_minutes: float) -> None:
        self._start = self._saved = time.monotonic()
        self._max_hours, self._save_minutes = max_hours, save_minutes
        self._signals = Signals()
        self.failure: OSError | None = None

    def failed(self, error: OSError) -> None:
        """Something beside training has failed on this rank: save and end, and then say so."""
        self.failure = self.failure or error

    def __enter__(self) -> Interruptions:
        self._signals = Signals().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._signals.__exit__(*error)

    def saved(self) -> None:
        """A checkpoint has been written just now."""
        self._saved = time.monotonic()

    def wishes(self) -> Wishes:
        """This rank's, at this moment."""
        now = time.monotonic()
        return Wishes(
            stop=bool(self._signals.received or self.failure),
            over=0 < self._max_hours <= (now - self._start) / 3600,
            save_due=0 < self._save_minutes <= (now - self._saved) / 60,
        )

    def why_ended(self, agreed: Wishes) -> str:
        """What the ranks' agreement to end is about; '' if they have not agreed to."""
        if agreed.stop:
            if self.failure:
                return f"{self.failure}: stopped"
            why = early_signals.what(self._signals.received) or "another process was told to stop"
            return f"{why}: stopped"
        if agreed.over:
            return f"--max_hours {self._max_hours:g} are over: stopped"
        return ""
