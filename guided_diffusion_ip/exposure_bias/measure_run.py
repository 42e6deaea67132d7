"""A measuring run: the sums of some measures over all images and processes, into one folder.

    out_dir/measures.json      every figure, lists indexed by t (null: not defined there)
    out_dir/measures.npz       the same as float64 arrays MEASURE.NAME, and t, alphas_cumprod,
                               lambda, timestep_map
    out_dir/settings.yaml      what it was made with
    out_dir/partial/           sums so far, while it runs: one file per process and start, written
                               after each batch

The same command again continues an interrupted run, with any batch size and number of processes:
each file of sums says which images it counts, files of earlier starts are only read, and at the end
all are added up.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import dist_util
from ..data.npz_io import NpzReader, write_npz
from ..diffusion.process import Network
from ..diffusion.solvers.paths import ProcessPath, SamplingPath
from ..files import atomic_file, remove_temporaries
from ..runs.folder import complete, resumable
from ..runs.sample_batch import Sampler
from ..runs.shards import left_when_listed
from .measures import Measure, Sums, figures_of, observe, walks_of
from .walks import Batch

ImagesFor = Callable[[Sequence[int]], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class MeasureRun:
    """What is to be measured, and where it goes.

    Args:
        images_for: x_0 float32 [n, C, H, W] of the images numbered [n] (0 .. num_images - 1), and
            their model_kwargs.
        settings: everything that the result depends on, as plain values; a folder made with others
            is refused.
    """

    measures: Sequence[Measure]
    sampler: Sampler
    num_images: int
    images_for: ImagesFor
    out_dir: str
    settings: dict[str, Any]

    @property
    def json_path(self) -> str:
        return os.path.join(self.out_dir, "measures.json")

    def __call__(self, model: Network, batch_size: int, device: torch.device) -> dict[str, Any]:
        """Measure what is missing and sum up; a collective. Returns what is in measures.json.

        Raises:
            ValueError: out_dir holds measures made with other settings, or what `figures_of`
                refuses.
        """
        complete(
            self.out_dir,
            self.settings,
            "measures",
            self.json_path,
            lambda: self._fill(model, batch_size, device),
            lambda: self._sum_up(self.sampler.bind(model, device=device)),
        )
        with open(self.json_path, encoding="utf-8") as file:
            return json.load(file)

    def _fill(self, model: Network, batch_size: int, device: torch.device) -> None:
        partial = PartialSums(os.path.join(self.out_dir, "partial"))
        todo, start = dist_util.broadcast_object(
            (partial.missing(self.num_images), partial.next_start())
        )
        rank, world = dist_util.get_rank(), dist_util.get_world_size()
        calls = sum(path.length for path in walks_of(self.measures, self.sampler.num_steps))
        mine = todo[len(todo) * rank // world : len(todo) * (rank + 1) // world]
        sums: dict[str, Sums] = {}
        done: list[int] = []
        total = calls * self.num_images
        with (
            resumable(self.num_images, lambda: len(partial.missing(self.num_images))),
            tqdm(
                total=total,
                initial=calls * (self.num_images - len(todo)),
                unit="call",
                unit_scale=True,
                desc="measuring",
                disable=None if dist_util.is_main() else True,
            ) as bar,
        ):
            for first in range(0, len(mine), batch_size):
                index = mine[first : first + batch_size]
                images, kwargs = self.images_for(index)
                batch = Batch(
                    index,
                    images.to(device),
                    {name: value.to(device) for name, value in kwargs.items()},
                )
                observe(
                    self.measures,
                    self.sampler,
                    model,
                    batch,
                    sums,
                    lambda n: bar.update(min(n * world, total - bar.n)),
                )
                done += index
                partial.write(start, rank, done, sums)

    def _sum_up(self, path: SamplingPath) -> None:
        """From sums to figures; measures.json comes last, and says that all is there."""
        partial = PartialSums(os.path.join(self.out_dir, "partial"))
        if left := left_when_listed(lambda: partial.missing(self.num_images)):
            raise ValueError(
                f"{partial.path} does not count image {left[0]}, though all processes have written "
                "their sums: do they share this folder? The same command again measures what is "
                "missing"
            )
        sums, n = partial.total()
        assert n == self.num_images, f"{partial.path} counts {n} of {self.num_images} images"
        figures = figures_of(self.measures, sums, n, path)
        common = {"t": np.arange(path.num_steps), **_levels(path), "lambda": path.lambdas}
        arrays = {
            f"{name}.{key}": np.asarray(value)
            for name, found in figures.items()
            for key, value in found.items()
            if not isinstance(value, str)
        }
        write_npz(os.path.join(self.out_dir, "measures.npz"), {**common, **arrays})
        content = {
            "num_images": n,
            "num_timesteps": path.num_steps,
            "settings": self.settings,
            **{name: _plain(value) for name, value in common.items()},
            "measures": {name: _plain(found) for name, found in figures.items()},
        }
        with atomic_file(self.json_path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
        partial.remove()


def _levels(path: SamplingPath) -> dict[str, np.ndarray]:
    """Where the network was called: alpha_bar and the original steps of a process, or the noise
    levels sigma.
    """
    if not isinstance(path, ProcessPath):
        return {"alpha": path.alphas, "sigma": path.sigmas}
    process = path.process
    steps = getattr(process, "timestep_map", range(process.num_timesteps))
    return {"alphas_cumprod": process.alphas_cumprod, "timestep_map": np.asarray(steps)}


class PartialSums:
    """Sums so far, in files that each name the images which they count; no two share an image."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.makedirs(path, exist_ok=True)

    def files(self) -> list[str]:
        return sorted(
            name for name in os.listdir(self.path) if re.fullmatch(r"sums-\d+-\d+\.npz", name)
        )

    def next_start(self) -> int:
        """A number that no file has: what an earlier start wrote is never written again."""
        return 1 + max((int(name.split("-")[1]) for name in self.files()), default=-1)

    def missing(self, num_images: int) -> list[int]:
        """The images that no file counts."""
        done: set[int] = set()
        for name in self.files():
            with NpzReader(os.path.join(self.path, name)) as reader:
                done.update(reader.rows("images", 0, reader.shape("images")[0]).tolist())
        return [i for i in range(num_images) if i not in done]

    def write(self, start: int, rank: int, done: Sequence[int], sums: dict[str, Sums]) -> None:
        """Replace this process's file by one that counts the images `done`."""
        arrays = {
            f"{measure}.{name}": array
            for measure, own in sums.items()
            for name, array in own.items()
        }
        write_npz(
            os.path.join(self.path, f"sums-{start:04d}-{rank:04d}.npz"),
            {"images": np.asarray(done), **arrays},
        )

    def total(self) -> tuple[dict[str, Sums], int]:
        """The sums of all files, and the number of images that they count.

        Raises:
            ValueError: two files count the same image.
        """
        sums: dict[str, Sums] = {}
        seen: set[int] = set()
        for name in self.files():
            path = os.path.join(self.path, name)
            with NpzReader(path) as reader:
                images = set(reader.rows("images", 0, reader.shape("images")[0]).tolist())
                if twice := images & seen:
                    raise ValueError(
                        f"{path} counts image {min(twice)}, which another file there counts too: "
                        "two runs have written there at once; remove this file, and the same "
                        "command again makes what is missing"
                    )
                seen |= images
                for key in reader.keys:
                    if key != "images":
                        measure, _, part = key.partition(".")
                        own = sums.setdefault(measure, {})
                        own[part] = own.get(part, 0) + reader.rows(key, 0, reader.shape(key)[0])
        return sums, len(seen)

    def remove(self) -> None:
        for name in self.files():
            os.remove(os.path.join(self.path, name))
        remove_temporaries(self.path)
        os.rmdir(self.path)


def _plain(value: Any) -> Any:
    """Arrays and numbers as JSON has them; what is not finite as null."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(part) for part in value.tolist()]
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spread_over(total: int, wanted: int) -> list[int]:
    """`wanted` numbers out of 0 .. total - 1, evenly spread: a set that is sorted by class gives
    some of each.
    """
    return [k * total // wanted for k in range(wanted)]
