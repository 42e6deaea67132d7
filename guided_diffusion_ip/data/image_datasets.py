"""Training images as an endless stream that is the same for any number of processes.

    images = load_data(data_dir="faces", batch_size=32, image_size=64)
    batch, cond = next(images)       # float32 [32, 3, 64, 64] in [-1, 1], {} or {"y": int64 [32]}

The batch of a step is a function of (seed, step): nothing needs saving to resume, `seek` is enough.
Images of another shape are scaled (also up) to cover the target and cropped; see image_io.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import random
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..noise import Stream, permutation
from ..sizes import parse_size
from .batches import BatchMaker, Failure, Order, stop_workers, worker_batches
from .image_io import center_crop_arr, pil_mode, random_crop_arr, render, to_model_range
from .image_set import ImageSet
from .image_source import SourceError
from .prefetch import Prefetcher, uses_gpu
from .preprocessing import of_loader
from .sources import Source, open_source, read_image

__all__ = ["ImageDataset", "ImageStream", "center_crop_arr", "load_data", "random_crop_arr"]

_MAX_WORKERS = 8


def load_data(
    *,
    data_dir: str | os.PathLike | Source,
    batch_size: int,
    image_size: int | Sequence[int],
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    channels: int = 3,
    seed: int = 0,
    rank: int | None = None,
    world: int | None = None,
    num_workers: int | None = None,
    cache_mb: float = 512,
    start_step: int = 0,
    log: Callable[[str], None] | None = None,
    num_classes: int | None = None,
    class_dropout: float = 0.0,
    prefetch: bool | None = None,
) -> ImageStream:
    """Open training data.

    Args:
        data_dir: a folder of images (sub-folders too), a .zip of images, a .npz with arr_0 uint8
            [N, H, W, C], or a remote folder gs:// or az://; or a source that is open.
        batch_size: images per rank and step.
        image_size: one number, or (height, width).
        class_cond: also yield labels; image_source.classes_of says where they come from.
        deterministic: in the order of the sorted names instead of shuffled.
        random_crop: a random piece (80 to 100 % of the shorter side) instead of the middle.
        random_flip: mirror every image with probability 1/2.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        rank, world: this process and how many there are; torch.distributed's, or 0 and 1.
        num_workers: decoding processes; 0 decodes in this one; default one per core, up to 8.
        cache_mb: sets that fit (as uint8, final size, per process) are decoded once, into memory.
        start_step: the step of the first batch.
        log: called with one line that says what was found.
        num_classes: how many the model knows; more in the data is an error.
        class_dropout: share of the labels that are replaced by label num_classes, "no class".
        prefetch: make the next batches in a thread meanwhile; None: if this process uses a GPU by
            the first batch. Where one is used, they are in pinned memory, for `x.to(device,
            non_blocking=True)`.

    An npz that is not compressed, of this size and number of channels, is memory-mapped: a batch is
    one gather from it, the system keeps one copy for all processes, and there is nothing to decode
    (npz_to_png.py makes it from a folder).

    Raises:
        ValueError: a wrong value, nothing usable at data_dir, or (also later) an unreadable image.
    """
    rank, world = _rank_and_world(rank, world)
    _check_positive(batch_size=batch_size, world=world)
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} must lie in [0, {world}), world being {world}")
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must be 0 (decode in this process) or more")
    if not 0 <= class_dropout < 1:
        raise ValueError(f"class_dropout={class_dropout} must lie in [0, 1): usual is 0.1")
    if class_dropout and not (class_cond and num_classes):
        raise ValueError("class_dropout needs labels: give class_cond and num_classes")
    size = parse_size(image_size)
    pil_mode(channels)
    try:
        source = data_dir if isinstance(data_dir, Source) else open_source(data_dir, class_cond)
    except SourceError as error:
        raise ValueError(f"data_dir: {error}") from error
    if source.classes is not None and num_classes is not None and len(source.classes) > num_classes:
        raise ValueError(
            f"{source.text}: {len(source.classes)} classes, but the model has "
            f"{num_classes}: pass --num_classes {len(source.classes)}"
        )
    maker = BatchMaker(
        ImageSet(source, size, channels),
        Order(len(source), batch_size, rank, world, seed, deterministic),
        random_crop,
        random_flip,
        class_dropout,
        num_classes,
    )
    cores = _cores_per_process(world)
    how = maker.fill_memory(int(cache_mb * 2**20), cores, quiet=rank != 0)
    workers = 0 if how else cores if num_workers is None else num_workers
    how = how or f"decoded by {f'{workers} worker processes' if workers else 'this process'}"
    stream = ImageStream(maker, workers, start_step, prefetch)
    if log is not None:
        log(f"data: {source.text}; {size[0]} x {size[1]}, {channels} channels, {how}")
    return stream


class ImageStream(Iterator[tuple[Tensor, dict[str, Tensor]]]):
    """Endless batches; made by `load_data`.

    Attributes:
        step: number of the next batch. num_images: in the whole set.
        classes: names of the classes, label k is classes[k]; None without class_cond.
        class_dropout: share of the labels replaced by "no class" in batches (not in examples).
        source: where the images come from, as text. preprocessing: how they were made, up to what
            is handed out, mirrored or not (see preprocessing.py). value_range: of the pixels handed
            out.
    """

    value_range = (-1.0, 1.0)

    def __init__(
        self, maker: BatchMaker, num_workers: int, start_step: int = 0, prefetch: bool | None = None
    ) -> None:
        self._maker = maker
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._batches: Iterator | None = None
        self._ahead: Prefetcher | None = None
        self._at_exit: Callable | None = None
        self.num_images = len(maker.source)
        self.classes = maker.source.classes
        self.class_dropout = maker.class_dropout
        self.source = maker.source.text
        self.preprocessing = of_loader(
            maker.source.preprocessing,
            maker.images.size,
            maker.images.channels,
            maker.random_crop,
            maker.source.shape,
        )
        self.seek(start_step)

    def __iter__(self) -> ImageStream:
        return self

    def __next__(self) -> tuple[Tensor, dict[str, Tensor]]:
        """float32 [b, C, H, W] in [-1, 1], and {"y": int64 [b]} or {}.

        Raises:
            ValueError: an image cannot be read; names it.
        """
        try:
            if self._batches is None:
                self._start()
            assert self._batches is not None
            batch = next(self._ahead) if self._ahead is not None else _finished(self._batches)
        except BaseException:  # even Ctrl-C: a batch that was under way must not be skipped
            self._stop()
            raise
        if isinstance(batch, Failure):
            self.close()
            raise ValueError(batch.message)
        self.step += 1
        return batch

    def seek(self, step: int) -> None:
        """Make `step` the next batch.

        Raises:
            ValueError: a step outside [0, 2**32).
        """
        if not 0 <= step < 1 << 32:
            raise ValueError(f"step={step} must lie in [0, 2**32)")
        self._stop()
        self.step = int(step)

    def examples(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`count` images drawn by the seed: the same on every rank, not mirrored, cut from the
        middle.

        Returns and raises as for a batch. A set of fewer images is repeated.
        """
        maker = self._maker
        order = permutation(maker.order.seed, Stream.SHUFFLE, 0, self.num_images)
        index = order[torch.arange(count) % self.num_images].tolist()
        return maker.images(index)

    def close(self) -> None:
        """Stop workers and thread, and close files. The next batch, if one is asked for, starts
        them again.
        """
        self._stop()
        self._maker.source.close()

    def _start(self) -> None:
        steps = itertools.count(self.step)
        if self._num_workers:
            self._batches = worker_batches(self._maker, steps, self._num_workers)
            # Registered after torch's own clean-up, hence run before it: it would wait 5 s per
            # worker.
            self._at_exit = atexit.register(functools.partial(_stop_at_exit, weakref.ref(self)))
        else:
            self._batches = map(self._maker.__getitem__, steps)
        # After the workers: forks do not mix with threads.
        if self._prefetch or self._prefetch is None and uses_gpu():
            self._ahead = Prefetcher(functools.partial(_finished, self._batches, pinned=uses_gpu()))

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        batches, self._batches = self._batches, None
        if batches is not None and self._num_workers:
            stop_workers(batches)
            if self._at_exit is not None:
                atexit.unregister(self._at_exit)


class ImageDataset(torch.utils.data.Dataset):
    """The files as a map-style dataset, for training scripts with a DataLoader of their own.

    Args:
        resolution: image size, one number or (height, width).
        image_paths: local or remote files. classes: one label per file, or None.
        shard, num_shards: take every num_shards-th file, from number `shard` on.
        random_crop, random_flip: drawn from Python's `random`, which torch seeds in each worker.
    """

    def __init__(
        self,
        resolution: int | Sequence[int],
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= shard < num_shards:
            raise ValueError(f"shard={shard} must lie in [0, num_shards={num_shards})")
        if classes is not None and len(classes) != len(image_paths):
            raise ValueError(f"{len(classes)} classes for {len(image_paths)} images: one each")
        self.resolution = parse_size(resolution)
        self.local_images = list(image_paths[shard::num_shards])
        self.local_classes = None if classes is None else list(classes[shard::num_shards])
        self.random_crop = random_crop
        self.random_flip = random_flip

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """float32 [3, H, W] in [-1, 1], and {"y": int64} or {}.

        Raises:
            ValueError: the file cannot be read; names it.
        """
        crop = [random.random() for _ in range(3)] if self.random_crop else None
        pixels = render(read_image(self.local_images[i], 3), self.resolution, crop)
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        cond = {}
        if self.local_classes is not None:
            cond["y"] = np.array(self.local_classes[i], dtype=np.int64)
        return to_model_range(np.ascontiguousarray(pixels)[None])[0].numpy(), cond


def _finished(
    batches: Iterator, pinned: bool = False
) -> tuple[Tensor, dict[str, Tensor]] | Failure:
    """The next of the BatchMaker's batches, as the stream hands it out."""
    batch = next(batches)
    if isinstance(batch, Failure):
        return batch
    pixels, labels = batch
    images, cond = to_model_range(pixels), {} if labels is None else {"y": labels}
    if pinned:
        images, cond = (
            images.pin_memory(),
            {name: values.pin_memory() for name, values in cond.items()},
        )
    return images, cond


def _stop_at_exit(stream: weakref.ref[ImageStream]) -> None:
    alive = stream()
    if alive is not None:
        alive._stop()


def _rank_and_world(rank: int | None, world: int | None) -> tuple[int, int]:
    dist = torch.distributed
    if rank is None and world is None and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return (0 if rank is None else rank), (1 if world is None else world)


def _cores_per_process(world: int) -> int:
    """Cores that this process may use for decoding, 1 to 8: those of the node, fairly shared."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    on_node = world  # if no launcher says otherwise: all here
    for name in (
        "LOCAL_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MPI_LOCALNRANKS",
        "SLURM_NTASKS_PER_NODE",
    ):
        if os.environ.get(name, "").isdigit() and int(os.environ[name]) > 0:
            on_node = min(world, int(os.environ[name]))
            break
    return max(1, min(_MAX_WORKERS, cores // on_node))


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
