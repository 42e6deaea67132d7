"""Batch number `step` as a pure function: which images, which crop, which flip, which labels go.

Shapes: uint8 [b, H, W, C] pixels, int64 [b] labels; b images per rank.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from ..noise import Stream, permutation, uniform
from .image_io import render
from .image_set import ImageSet
from .npz_source import NpzSource


@dataclass
class Order:
    """Which images a rank sees at a step: a function of (seed, position in the endless stream).

    Position p = step * global batch + rank * batch + j holds image p mod n of epoch p div n, each
    epoch in an order of its own. Fewer images than the batch simply means several epochs per batch.
    """

    n: int
    batch_size: int
    rank: int
    world: int
    seed: int
    deterministic: bool
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def in_batch(self) -> torch.Tensor:
        """Positions in the global batch, int64 [b]."""
        return self.rank * self.batch_size + torch.arange(self.batch_size)

    def images(self, step: int) -> np.ndarray:
        """Image numbers, int64 [b]."""
        positions = step * self.world * self.batch_size + self.in_batch().numpy()
        epochs, places = np.divmod(positions, self.n)
        if self.deterministic:
            return places
        needed = np.unique(epochs).tolist()
        self._orders = {
            epoch: self._orders[epoch]
            if epoch in self._orders
            else permutation(self.seed, Stream.SHUFFLE, epoch, self.n).numpy()
            for epoch in needed
        }
        images = np.empty_like(places)
        for epoch in needed:
            images[epochs == epoch] = self._orders[epoch][places[epochs == epoch]]
        return images


@dataclass
class Failure:
    """A message on its way from a worker process; raising there would bury it in tracebacks."""

    message: str


class BatchMaker(torch.utils.data.Dataset):
    """Maps a step to its batch. `memory` (uint8 [n, H, W, C]) replaces decoding where it is set."""

    def __init__(
        self,
        images: ImageSet,
        order: Order,
        random_crop: bool,
        random_flip: bool,
        class_dropout: float = 0.0,
        null_label: int | None = None,
    ) -> None:
        if class_dropout and null_label is None:
            raise ValueError(
                f"class_dropout={class_dropout} needs null_label, the label of no class"
            )
        self.images = images
        self.source = images.source
        self.order = order
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.class_dropout = class_dropout
        self.null_label = null_label
        self.memory: np.ndarray | None = None

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pixels uint8 [b, H, W, C] and labels int64 [b] (None without classes).

        Raises:
            ValueError: an image cannot be read; names it.
        """
        images, index = self.order.images(step), self.order.in_batch()
        if self.memory is not None:
            pixels = self.memory[images]
        elif not self.random_crop:
            pixels = self.images.pixels(images)
        else:
            crops = uniform(self.order.seed, Stream.CROP, index, step, (3,)).tolist()
            pixels = np.stack([self._cropped(int(i), crop) for i, crop in zip(images, crops)])
        if self.random_flip:
            flip = (uniform(self.order.seed, Stream.FLIP, index, step) < 0.5).numpy()
            # Of pixels instead of their channels: 2 to 10 times as fast.
            whole = pixels.view(f"V{pixels.shape[3]}")
            whole[flip] = whole[flip][:, :, ::-1]
        labels = None
        if self.source.labels is not None:
            labels = torch.from_numpy(self.source.labels[images])
            if self.class_dropout and self.null_label is not None:
                drawn = uniform(self.order.seed, Stream.CLASS_DROPOUT, index, step)
                labels[drawn < self.class_dropout] = self.null_label
        return torch.from_numpy(pixels), labels

    def _cropped(self, i: int, crop: list[float]) -> np.ndarray:
        return render(self.source.image(i, self.images.channels), self.images.size, crop)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None] | Failure:
        try:
            return self.batch(step)
        except ValueError as error:
            return Failure(str(error))

    def fill_memory(self, limit: int, threads: int, quiet: bool) -> str | None:
        """Set `memory` if no pixel depends on the step and it takes at most `limit` bytes.

        Returns: what was done, for the log; None if nothing.

        Raises:
            ValueError: an image cannot be read; names it.
        """
        if isinstance(self.source, NpzSource):
            _ = self.source.pixels  # a compressed file is unpacked here, before workers exist
        if self.random_crop:
            return None
        shape = (len(self.images), *self.images.shape)
        if isinstance(self.source, NpzSource) and self.source.shape == self.images.shape:
            self.memory = self.source.pixels
            return "read as it is"
        megabytes = int(np.prod(shape, dtype=np.int64)) / 2**20
        if megabytes * 2**20 > limit:
            return None
        memory = np.empty(shape, dtype=np.uint8)
        decode_all(lambda i: self._decode_into(memory, i), len(memory), threads, quiet)
        self.memory = memory
        return f"kept in memory ({megabytes:.1f} MB)"

    def _decode_into(self, memory: np.ndarray, i: int) -> None:
        memory[i] = self.images.pixels([i])[0]


def worker_batches(maker: BatchMaker, steps: Iterable[int], workers: int) -> Iterator:
    """maker[step] of each step, in order, made by worker processes until `stop_workers`."""
    loader = torch.utils.data.DataLoader(
        maker,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=4,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),
    )  # its own: the global generator must not notice
    return iter(loader)


def stop_workers(batches: Iterator) -> None:
    """End the processes of `worker_batches`.

    They would also end with the iterator; but the traceback of an exception that went through it
    keeps it alive until the interpreter ends, and then torch waits for them, for ever, since they
    ignore signals.
    """
    batches._shutdown_workers()  # type: ignore[attr-defined]  # torch has no public way


def _ignore_signals(worker: int) -> None:
    """Job managers signal whole process groups; only the trainer may act, or it loses its data.

    Workers still end with their parent: torch tells them, and they watch for its death.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def decode_all(decode: Callable[[int], None], n: int, threads: int, quiet: bool) -> None:
    """Call decode(0 .. n-1) in threads (Pillow works outside the interpreter lock), with a bar."""
    pool = ThreadPoolExecutor(threads)
    try:
        # disable=None: no bar where nobody watches, that is when stderr is a file.
        for _ in tqdm(
            pool.map(decode, range(n)),
            "decoding images",
            n,
            leave=False,
            delay=1,
            disable=True if quiet else None,
        ):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
