"""The same chains for one lambda(t) after another: chain i has its noise and its class whatever
lambda is, so that trials differ by lambda alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import dist_util
from ..data.image_io import to_uint8
from ..data.image_set import ImageSet
from ..data.image_source import ArraySource
from ..diffusion.epsilon_scaling import EpsilonScaling
from ..diffusion.process import Network
from ..features.space import FeatureSpace
from ..files import atomic_file, remove_temporaries
from ..runs.sample_batch import ImagesWithNaN, Sampler
from .measure_run import ImagesFor

# images [n, C, H, W], and whether their pixels are rounded (see Sampler) -> float32 [n, D]
ImageFeatures = Callable[[Tensor, bool], Tensor]


def pixels(images: Tensor, rounded: bool = False) -> Tensor:
    """The numbers of each image, neither clipped nor made whole."""
    return images.flatten(1).float()


def in_space(space: FeatureSpace, size: tuple[int, int] | None = None) -> ImageFeatures:
    """The vectors that a feature space makes of finished pixels.

    Args:
        size: (height, width) to which images are scaled first, as training would; None: as they
            are.
    """

    def features(images: Tensor, rounded: bool = False) -> Tensor:
        made = to_uint8(images, rounded)
        if size is None:
            return space(made).pool.float()
        whole = ImageSet(ArraySource(made.cpu().numpy()), size, made.shape[3])
        return space(whole.rows(0, len(made))).pool.float().to(images.device)

    return features


@dataclass
class RealImages:
    """What is needed of the real images: a share of them in each process.

    Args:
        index: the numbers of this process's share.
        rows: their features [n, D].
        cond: model_kwargs of all of them, by name.
    """

    count: int
    index: list[int]
    rows: Tensor
    cond: dict[str, Tensor]

    def all_rows(self) -> Tensor:
        """Of all processes, by number; a collective."""
        return gathered(self.rows)


def share(count: int) -> range:
    """The numbers, of 0 .. count - 1, that this process looks after."""
    rank, world = dist_util.get_rank(), dist_util.get_world_size()
    return range(count * rank // world, count * (rank + 1) // world)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of `share`; a collective."""
    if dist_util.get_world_size() == 1:
        return rows
    return torch.from_numpy(dist_util.all_gather_rows(rows.cpu().numpy())).to(rows.device)


def read_real_images(
    images_for: ImagesFor,
    count: int,
    batch_size: int,
    features: ImageFeatures,
    device: torch.device,
) -> RealImages:
    """Each image is read once, by one process; a collective."""
    index = list(share(count))
    rows, cond = [], []
    for first in range(0, len(index), batch_size):
        images, kwargs = images_for(index[first : first + batch_size])
        rows.append(features(images.to(device), True))  # they were pixels: exactly these again
        cond.append({name: value.cpu() for name, value in kwargs.items()})
    merged = [part for parts in dist_util.all_gather_objects(cond) for part in parts]
    return RealImages(
        count,
        index,
        torch.cat(rows),
        {name: torch.cat([part[name] for part in merged]) for name in merged[0]},
    )


@dataclass
class Chains:
    """`count` chains of a sampler, beginning with number `first`.

    Args:
        cond: model_kwargs of the real images, from which the chains take theirs evenly.
    """

    sampler: Sampler
    model: Network
    cond: dict[str, Tensor]
    count: int
    batch_size: int
    device: torch.device
    first: int = 0
    network_calls: int = field(default=0, init=False)  # images times calls, over all processes

    def with_other_noise(self) -> Chains:
        """As many chains, none of them one of these."""
        return replace(self, first=self.first + self.count)

    def finished(self, lambdas: np.ndarray, what: str) -> Iterator[tuple[list[int], Tensor]]:
        """This process's share in batches: the chains' places, 0 .. count - 1, and their images
        [n, C, H, W]; a collective, to be gone through to its end.

        Args:
            what: stands before the bar.

        Raises:
            ImagesWithNaN: there are some, in whichever process.
        """
        sampler = self.sampler.with_scaling(EpsilonScaling.of(lambdas))
        mine, bad = list(share(self.count)), 0
        starts = range(0, len(mine), self.batch_size)
        bar = tqdm(starts, what, unit="batch", leave=False, disable=not dist_util.is_main() or None)
        for start in bar:
            places = mine[start : start + self.batch_size]
            numbers = [self.first + place for place in places]
            images = sampler(self.model, numbers, self._cond(places), self.device)
            bad += int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
            if bad == 0:
                yield places, images
        if bad := sum(dist_util.all_gather_objects(bad)):
            raise ImagesWithNaN(
                f"{bad} of {self.count} images with {what} contain NaN or infinity: the model has "
                "diverged, overflows in half precision (try --precision fp32), or needs "
                "--clip_denoised True"
            )
        self.network_calls += self.count * sampler.network_calls

    def _cond(self, places: list[int]) -> dict[str, Tensor]:
        found = {}
        for name, values in self.cond.items():
            chosen = torch.tensor([place * len(values) // self.count for place in places])
            found[name] = values[chosen].to(self.device)
        return found


@dataclass(frozen=True)
class TrialStore:
    """What trials have come to, so that an interrupted search goes on: files in a folder of its
    own, on the main process's machine. Without a folder nothing is kept.
    """

    folder: str = ""

    def keep(self, key: str, compute: Callable[[], Tensor], device: torch.device) -> Tensor:
        """`compute()`, which is the same in all processes, or what it came to earlier; a
        collective.
        """
        path = os.path.join(self.folder, hashlib.sha256(key.encode()).hexdigest()[:16] + ".npy")
        rows = None
        if self.folder and dist_util.is_main() and os.path.exists(path):
            with contextlib.suppress(ValueError, EOFError, OSError):  # damaged: computed again
                rows = np.load(path, allow_pickle=False)
        rows = dist_util.broadcast_object(rows)
        if rows is not None:
            return torch.from_numpy(rows).to(device)
        found = compute()
        if self.folder and dist_util.is_main():
            with atomic_file(path) as file:
                np.save(file, found.cpu().numpy())
        return found

    def remove(self) -> None:
        """The folder, and what it kept."""
        if not (self.folder and dist_util.is_main() and os.path.isdir(self.folder)):
            return
        for name in os.listdir(self.folder):
            if name.endswith(".npy"):
                os.remove(os.path.join(self.folder, name))
        remove_temporaries(self.folder)
        os.rmdir(self.folder)
