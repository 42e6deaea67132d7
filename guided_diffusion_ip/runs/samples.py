"""A sampling run: all images of one set, over all processes, into one folder.

    out_dir/samples_{N}x{H}x{W}x{C}.npz   arr_0 uint8 [N, H, W, C], arr_1 int64 [N] if there are
                                          labels
    out_dir/grid.png                      the first images
    out_dir/settings.yaml                 what they were made with
    out_dir/png/000000.png ...            if asked for; other names if they are given

The same command again continues an interrupted run; memory does not grow with the number of images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import dist_util
from ..data.image_io import save_grid, save_png, to_uint8
from ..data.npz_io import NpzReader
from ..diffusion.process import Network
from ..files import remove_temporaries
from ..ownership import owning
from .folder import complete
from .sample_batch import Sampler, captions
from .shards import ShardFolder, fill_shards

GRID_IMAGES = 64


@dataclass(frozen=True)
class SampleRun:
    """What is wanted, and where it goes.

    Args:
        settings: everything that the images depend on, as plain values; a folder made with others
            is refused.
        kwargs_for: model_kwargs (labels y, low_res, ...) of the images numbered [N].
        picture_names: of the PNG files, num_samples of them, without extension; () for their
            numbers.
        class_names: of the labels y, to be printed below the pictures of grid.png; () for their
            numbers.
    """

    sampler: Sampler
    num_samples: int
    out_dir: str
    settings: dict[str, Any]
    kwargs_for: Callable[[list[int]], dict[str, Any]] = lambda index: {}
    picture_names: Sequence[str] = ()
    class_names: Sequence[str] = ()

    @property
    def npz_path(self) -> str:
        channels, height, width = self.sampler.image_shape
        return os.path.join(
            self.out_dir, f"samples_{self.num_samples}x{height}x{width}x{channels}.npz"
        )

    def __call__(
        self, model: Network, batch_size: int, device: torch.device, png: bool = False
    ) -> str:
        """Make what is missing and join it; a collective. Returns the path of the npz.

        Raises:
            ValueError: out_dir holds samples made with other settings, or another run is at work
                in it.
        """
        with owning(self.out_dir):
            self._complete(model, batch_size, device)
            if dist_util.is_main():
                self._show(png)
            dist_util.barrier()
        return self.npz_path

    def _complete(self, model: Network, batch_size: int, device: torch.device) -> None:
        complete(
            self.out_dir,
            self.settings,
            "samples",
            self.npz_path,
            lambda: fill_shards(
                self._shards(),
                lambda counted, index: self._make(counted, list(index), device),
                model,
                batch_size,
                "sampling",
                self.sampler.network_calls,
            ),
            lambda: self._shards().merge(self.npz_path),
        )

    def _shards(self) -> ShardFolder:
        return ShardFolder(os.path.join(self.out_dir, "shards"), self.num_samples)

    def _make(
        self, model: Network, index: list[int], device: torch.device
    ) -> dict[str, np.ndarray]:
        """One batch: arr_0 uint8 [n, H, W, C] and, with labels, arr_1 int64 [n]."""
        kwargs = {name: value.to(device) for name, value in self.kwargs_for(index).items()}
        images = self.sampler(model, index, kwargs, device)
        arrays = {"arr_0": to_uint8(images, self.sampler.rounded).cpu().numpy()}
        if "y" in kwargs:
            arrays["arr_1"] = kwargs["y"].cpu().numpy()
        return arrays

    def _show(self, png: bool) -> None:
        reader = NpzReader(self.npz_path)
        try:
            first = reader.rows("arr_0", 0, min(GRID_IMAGES, self.num_samples))
            names = None
            if "arr_1" in reader.keys:
                names = captions(reader.rows("arr_1", 0, len(first)).tolist(), self.class_names)
            save_grid(first, os.path.join(self.out_dir, "grid.png"), captions=names)
            if png:
                pictures = os.path.join(self.out_dir, "png")
                remove_temporaries(pictures)
                digits = max(6, len(str(self.num_samples - 1)))
                number = 0
                for chunk in reader.chunks("arr_0"):
                    for image in chunk:
                        name = (
                            self.picture_names[number]
                            if self.picture_names
                            else f"{number:0{digits}d}"
                        )
                        save_png(image, os.path.join(pictures, f"{name}.png"))
                        number += 1
        finally:
            reader.close()
