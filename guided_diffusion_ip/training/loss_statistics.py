"""Mean losses between two log lines, whole and by quarter of the process, without a host sync per
step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dist_util


class LossStatistics:
    """Sums on the device; `reduce` adds those of all ranks and brings them to the host.

    Quartile q0 is the clean quarter of the timesteps, q3 the noisy one.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self._sums: dict[str, Tensor] = {}  # name -> [2, 4]: sum and count per quartile

    @torch.no_grad()
    def add(self, t: Tensor, losses: dict[str, Tensor], weights: Tensor) -> None:
        """t, weights: [N]; losses: [N] each. Each loss counts with the weight that training gives
        it.
        """
        quartile = ((4 * t) // self.num_timesteps).long()  # t may be continuous
        for name, values in losses.items():
            both = torch.stack([values.detach().float() * weights, torch.ones_like(weights)])
            sums = self._sums.setdefault(
                name, torch.zeros(2, 4, device=values.device, dtype=torch.float64)
            )
            sums.index_add_(1, quartile, both.double())

    def reduce(self, keep: bool = False) -> dict[str, float]:
        """{name: mean, name_q0 ... name_q3: means of the quartiles seen}; a collective. Starts
        afresh, unless told to `keep`.
        """
        result: dict[str, float] = {}
        for name, sums in self._sums.items():
            if dist.is_initialized() and dist.get_world_size() > 1:
                sums = sums.clone()
                dist.all_reduce(sums)
            total, count = sums.tolist()
            result[name] = sum(total) / max(sum(count), 1)
            result.update({f"{name}_q{q}": total[q] / count[q] for q in range(4) if count[q]})
        if not keep:
            self._sums = {}
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of every rank, {name: [world, 2, 4]}; a collective."""
        return {
            name: dist_util.all_gather_tensor(sums[None]).cpu() for name, sums in self._sums.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back this rank's sums; with another number of ranks, rank 0 takes them all."""
        rank, world, device = dist_util.get_rank(), dist_util.get_world_size(), dist_util.dev()
        self._sums = {
            name: (sums[rank] if len(sums) == world else sums.sum(dim=0) * (rank == 0))
            .to(device)
            .clone()
            for name, sums in state.items()
        }
