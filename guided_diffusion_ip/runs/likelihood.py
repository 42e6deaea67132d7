"""A likelihood run: bits per dimension of a set of images, over all processes, into one folder.

    out_dir/bpd.json              mean and standard error over the images
    out_dir/total_bpd.npz         arr_0 float32 [N]: each image
    out_dir/vb_terms.npz          arr_0 float64 [T]: the mean of each term of the bound;
                                  mse_terms.npz and xstart_mse_terms.npz likewise. Entry 0 is t =
                                  T-1 (as published)
    out_dir/settings.yaml         what it was made with

The noise of image i depends on (seed, i) alone: the result depends on neither batch size nor
processes, but for rounding. The same command again continues an interrupted run, from batches on
disk.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..data.npz_io import NpzReader, write_npz
from ..diffusion.gaussian_diffusion import GaussianDiffusion
from ..diffusion.process import Network
from ..noise import NormalStream, Stream
from .folder import complete
from .shards import ShardFolder, fill_shards

TERMS = ("vb", "mse", "xstart_mse")


@dataclass(frozen=True)
class LikelihoodRun:
    """What is to be measured, and where it goes.

    Args:
        diffusion: the (respaced) process.
        images_for: float32 [n, C, H, W] of the images numbered [n], and their model_kwargs.
        settings: everything that the result depends on, as plain values; a folder made with others
            is refused.
    """

    diffusion: GaussianDiffusion
    num_images: int
    images_for: Callable[[Sequence[int]], tuple[Tensor, dict[str, Tensor]]]
    out_dir: str
    settings: dict[str, Any]
    seed: int = 0
    clip_denoised: bool = True

    @property
    def summary_path(self) -> str:
        return os.path.join(self.out_dir, "bpd.json")

    def __call__(self, model: Network, batch_size: int, device: torch.device) -> dict[str, Any]:
        """Measure what is missing and sum up; a collective. Returns what is in bpd.json.

        Raises:
            ValueError: out_dir holds likelihoods made with other settings.
        """
        complete(
            self.out_dir,
            self.settings,
            "likelihoods",
            self.summary_path,
            lambda: fill_shards(
                self._shards(),
                lambda counted, index: self._measure(counted, index, device),
                model,
                batch_size,
                "likelihood",
                self.diffusion.num_timesteps,
            ),
            lambda: self._sum_up(self._shards()),
        )
        with open(self.summary_path, encoding="utf-8") as file:
            return json.load(file)

    def _shards(self) -> ShardFolder:
        return ShardFolder(os.path.join(self.out_dir, "shards"), self.num_images)

    def _measure(
        self, model: Network, index: Sequence[int], device: torch.device
    ) -> dict[str, np.ndarray]:
        """One batch: total_bpd and prior_bpd float32 [n], the TERMS float32 [n, T]."""
        images, kwargs = self.images_for(index)
        result = self.diffusion.calc_bpd_loop(
            model,
            images.to(device),
            clip_denoised=self.clip_denoised,
            model_kwargs={name: value.to(device) for name, value in kwargs.items()},
            randn_like=NormalStream(self.seed, Stream.LIKELIHOOD, torch.tensor(index)),
        )
        arrays = {
            name: result[name].float().cpu().numpy() for name in ("total_bpd", "prior_bpd", *TERMS)
        }
        bad = [i for i, bpd in zip(index, arrays["total_bpd"]) if not math.isfinite(bpd)]
        if bad:
            raise ValueError(
                f"the likelihood of image {bad[0]} is {arrays['total_bpd'][bad[0] - index[0]]}: "
                "the model has diverged or overflows in half precision (try --use_fp16 False)"
            )
        return arrays

    def _sum_up(self, folder: ShardFolder) -> None:
        """From the batches to the results; bpd.json comes last, and says that all is there."""
        n, total, prior = self.num_images, [], []
        sums = {name: np.zeros(self.diffusion.num_timesteps) for name in TERMS}
        for reader in _readers(folder):
            total.append(reader.rows("total_bpd", 0, reader.shape("total_bpd")[0]))
            prior.append(reader.rows("prior_bpd", 0, len(total[-1])))
            for name in TERMS:
                for rows in reader.chunks(name):
                    sums[name] += rows.sum(axis=0, dtype=np.float64)
        bpd = np.concatenate(total)
        assert len(bpd) == n, f"{folder.path} holds {len(bpd)} of {n} images"
        for name in TERMS:
            write_npz(os.path.join(self.out_dir, f"{name}_terms.npz"), {"arr_0": sums[name] / n})
        write_npz(os.path.join(self.out_dir, "total_bpd.npz"), {"arr_0": bpd})
        summary = {
            "total_bpd": float(bpd.mean(dtype=np.float64)),
            "standard_error": float(bpd.std(ddof=1, dtype=np.float64) / math.sqrt(n))
            if n > 1
            else None,
            "prior_bpd": float(np.concatenate(prior).mean(dtype=np.float64)),
            "num_images": n,
            "timesteps": self.diffusion.num_timesteps,
        }
        with files.atomic_file(self.summary_path) as file:
            file.write((json.dumps(summary, indent=1) + "\n").encode())
        folder.remove()


def _readers(folder: ShardFolder) -> Iterator[NpzReader]:
    """The batches in the order of their images, one open at a time."""
    for path in folder.files():
        with NpzReader(path) as reader:
            yield reader
