"""Batches made ahead by a thread, while the last one is worked on.

Worth it where a GPU computes: the processor is idle then, and from pinned memory `x.to(device,
non_blocking=True)` returns at once. On a CPU the thread takes its time from the very cores that
train, so `load_data` starts none there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
_AHEAD = 2  # one being made, one waiting


class Prefetcher(Iterator[T], Generic[T]):
    """The results of make(), make(), ..., in order, from one thread that is at most two calls
    ahead.

    What make() raises is raised by the `next` that would have had its result. The thread ends with
    `close`, with the object, or with the interpreter, which waits for the calls under way (the pool
    of the standard library sees to that).
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1, "prefetch", _begin, (_gpu(),))
        self._coming = deque(self._pool.submit(make) for _ in range(_AHEAD))

    def __next__(self) -> T:
        made = self._coming.popleft().result()
        self._coming.append(self._pool.submit(self._make))
        return made

    def close(self) -> None:
        """End the thread; what it has made ahead is dropped."""
        self._pool.shutdown(cancel_futures=True)
        self._coming.clear()


def uses_gpu() -> bool:
    """Has this process put anything on a GPU?"""
    return torch.cuda.is_initialized()


def _gpu() -> int | None:
    return torch.cuda.current_device() if uses_gpu() else None


def _begin(gpu: int | None) -> None:
    """A new thread begins on GPU 0, where pinning would make every process of a node
    take memory.
    """
    if gpu is not None:
        torch.set_num_threads(1)  # as torch's own pinning thread: the cores are for others
        torch.cuda.set_device(gpu)
