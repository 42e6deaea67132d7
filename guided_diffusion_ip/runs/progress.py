"""A bar of images that moves with every call of the network: a batch may take hours."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tqdm.auto import tqdm

from .. import dist_util

ResultT = TypeVar("ResultT")
_TERMINAL_S, _FILE_S = 0.2, 5.0  # seconds between two states of the bar: a file keeps them all
_FORMAT = (
    "{desc}: {percentage:.1f}%|{bar}| {n:.2f}/{total} {unit} "
    "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)


class ImageBar:
    """To be used in a `with` block; on stderr of rank 0, which may be a file.

    Args:
        total: images of the whole run, over all processes; done: those that were there before.
        calls: of the network for one batch.
    """

    def __init__(self, desc: str, total: int, done: int, calls: int) -> None:
        self._calls, self._total = calls, total
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="img",
            desc=desc,
            disable=not dist_util.is_main(),
            bar_format=_FORMAT,
            miniters=0,
            mininterval=_TERMINAL_S if sys.stderr.isatty() else _FILE_S,
        )

    @contextlib.contextmanager
    def batch(self, model: Callable[..., ResultT], count: int) -> Iterator[Callable[..., ResultT]]:
        """`model`, counted, for `count` images of this process, beside which the others make as
        many each.
        """
        start = self._bar.n
        end = min(start + count * dist_util.get_world_size(), self._total)
        called = 0

        def counted(*args: Any, **kwargs: Any) -> ResultT:
            nonlocal called
            output = model(*args, **kwargs)
            called += 1
            self._bar.set_postfix_str(f"step {called}/{self._calls}", refresh=False)
            self._move(start + (end - start) * min(called / self._calls, 1))
            return output

        yield counted
        self._move(end)

    def _move(self, to: float) -> None:
        self._bar.update(to - self._bar.n)

    def __enter__(self) -> ImageBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
