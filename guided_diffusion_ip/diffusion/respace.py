"""Fewer steps from a process with many: keep a subset of the timesteps, with betas that give the
same q at each of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .epsilon_scaling import EpsilonScaling
from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The timesteps to keep, out of num_timesteps.

    Args:
        section_counts: "N": N steps spread evenly from first to last; "a,b,c" (or a sequence): the
            range is cut in equal sections with a, b, c evenly spread steps in them, the noisy end
            last; "ddimN": every i-th step from 0 (Song et al. 2021), i being the smallest stride
            that leaves N of them (T/N where N divides T). Any of them, or nothing for all steps,
            with "@t" behind it: out of the steps 0 to t, so that chains start there.

    Raises:
        ValueError: not of these forms, more steps than there are, or ddimN where no stride leaves
            N.
    """
    if isinstance(section_counts, str):
        text, at, first = section_counts.strip().partition("@")
        if at:
            num_timesteps = _first_steps(first, num_timesteps, section_counts)
            text = text or str(num_timesteps)
        if text.startswith("ddim"):
            return _every_sth(num_timesteps, _count(text[len("ddim") :], text))
        section_counts = [_count(part, text) for part in text.split(",")]
    counts = list(section_counts)
    if not counts:
        raise ValueError("timestep_respacing is empty: give a number of steps, such as 100")
    base, extra = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        size = base + (section < extra)
        if not 1 <= count <= size:
            raise ValueError(
                f"timestep_respacing asks for {count} steps in a section of {size} "
                f"({num_timesteps} steps in {len(counts)} sections): give 1 to {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        # A running sum, not index * stride: checkpoints were published with samples of exactly
        # these steps.
        offsets = np.cumsum([0.0] + [stride] * (count - 1))
        kept.update(start + round(float(offset)) for offset in offsets)
        start += size
    return kept


def _first_steps(start: str, num_timesteps: int, whole: str) -> int:
    """How many steps there are up to `start`."""
    if not start.strip().isdigit() or not 1 <= int(start) < num_timesteps:
        raise ValueError(
            f"timestep_respacing {whole!r} starts at {start or 'nothing'}: chains can start at a "
            f"step from 1 to {num_timesteps - 1}, such as 10@{num_timesteps * 96 // 100}"
        )
    return int(start) + 1


def _count(text: str, whole: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(
            f"timestep_respacing {whole!r} is not understood: use a number (100), "
            "numbers per section (10,15,20), ddim and a number (ddim25), or one of these with the "
            "step to start at (10@960)"
        )
    return int(text)


def _every_sth(num_timesteps: int, count: int) -> set[int]:
    kept = range(0, num_timesteps, -(-num_timesteps // max(count, 1)))  # smaller strides leave more
    if len(kept) != count:
        possible = {-(-num_timesteps // stride) for stride in range(1, num_timesteps + 1)}
        near = [
            max((n for n in possible if n < count), default=0),
            min((n for n in possible if n > count), default=0),
        ]
        raise ValueError(
            f"ddim{count}: no stride from 0 takes {count} of {num_timesteps} steps; "
            f"possible near it: {', '.join(f'ddim{n}' for n in near if n)}, "
            f"or {min(max(count, 1), num_timesteps)} without 'ddim'"
        )
    return set(kept)


class SpacedDiffusion(GaussianDiffusion):
    """A process on a subset of another's timesteps.

    Its own t runs over 0 .. T'-1; the network, which was trained on the original steps, is told the
    original ones. The new betas make alpha_bar agree at every step kept.

    Args:
        use_timesteps: original timesteps to keep.
        kwargs: as for GaussianDiffusion; `betas` are the original ones.
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs: Any) -> None:
        betas = np.asarray(kwargs.pop("betas"), dtype=np.float64)
        self.original_num_steps = len(betas)
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = sorted(self.use_timesteps)
        if not self.timestep_map or self.timestep_map[0] < 0 or self.timestep_map[-1] >= len(betas):
            raise ValueError(
                f"timesteps to keep must lie in 0 .. {len(betas) - 1}, got {self.timestep_map[:3]} "
                "..."
            )
        self._original = {"betas": betas, **kwargs}
        kept = np.cumprod(1.0 - betas)[self.timestep_map]
        super().__init__(betas=1.0 - kept / np.append(1.0, kept[:-1]), **kwargs)

    def whole(self) -> SpacedDiffusion:
        """The process on all original timesteps; lambda there is that of the nearest step kept."""
        all_steps = np.arange(self.original_num_steps)
        distance = np.abs(np.asarray(self.timestep_map)[:, None] - all_steps)
        lambdas = self.lambdas[distance.argmin(axis=0)]
        other = SpacedDiffusion(all_steps.tolist(), **self._original_without_scaling())
        return other.with_scaling(EpsilonScaling.of(lambdas))

    def finer(self) -> SpacedDiffusion:
        """The process with a step more between any two of this one's: step t here is step 2 t
        there, and lambda in between is the mean of its neighbours'.

        Raises:
            ValueError: there is no original timestep between two of them.
        """
        kept = self.timestep_map
        between = [(a + b) // 2 for a, b in zip(kept, kept[1:])]
        if any(middle in (a, b) for middle, a, b in zip(between, kept, kept[1:])):
            raise ValueError(
                f"{len(kept)} of {self.original_num_steps} steps leave no room for one more "
                "between each two: take fewer (--timestep_respacing)"
            )
        other = SpacedDiffusion({*kept, *between}, **self._original_without_scaling())
        return other.with_scaling(EpsilonScaling.of(self.lambdas).finer(self.num_timesteps))

    def _original_without_scaling(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self._original.items()
            if name not in ("eps_scaler", "eps_scaler_k")
        }

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """The only difference: first the original index, then the rescaling of the original
        process.
        """
        t = torch.as_tensor(self._map_on(t.device), dtype=t.dtype)[t]
        return t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t

    def _map_on(self, device: torch.device) -> Tensor:
        key = ("timestep_map", device)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self.timestep_map, device=device)
        return self._on_device[key]
