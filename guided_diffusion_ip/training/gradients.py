"""Forward and backward: from a batch of images to gradients of the mean loss.

t, epsilon and xi of an image depend on (seed, step, its position in the global batch), dropout on
(seed, step, rank, microbatch); so the same global batch gives the same gradients for any number of
processes and microbatches.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import dist_util, noise
from ..diffusion.process import Process, uniforms_per_image
from ..noise import Stream
from .guards import diagnose
from .precision import Precision
from .protocols import Cond, Losses, Network, Objective
from .settings import TrainSettings
from .timestep_samplers import ScheduleSampler

# Whether DDP sends buffers from rank 0 before each forward pass; from PyTorch 2.13 on the older
# name is deprecated.
_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


def trained_network(model: nn.Module, compiled: bool) -> Network:
    """The network as training calls it: compiled if asked for, and averaging gradients over ranks.

    DDP averages while the backward pass is still running; after it, if that is compiled, for then
    it is one node of the graph. (Compiling DDP itself would split it, which older PyTorch refuses
    under use_checkpoint.)
    """
    network: Any = torch.compile(model) if compiled else model
    if dist_util.get_world_size() == 1:
        return network
    options: dict[str, Any] = {_BUFFERS: False}
    device = next(model.parameters()).device
    if device.type == "cuda":
        options["device_ids"] = [device]
    return DistributedDataParallel(network, **options)


def process_losses(process: Process) -> Objective:
    """The usual objective: the process's own training losses."""

    def objective(
        model: Network,
        images: Tensor,
        t: Tensor,
        cond: Cond,
        epsilon: Tensor,
        xi: Callable[[Tensor], Tensor],
    ) -> Losses:
        return process.training_losses(
            model, images, t, model_kwargs=cond, noise=epsilon, randn_like=xi
        )

    return objective


@dataclass
class Gradients:
    """Gradients of the mean loss over the global batch, from microbatches.

    Args:
        model: whose parameters get the gradients.
        network: the same as it is called in training, see trained_network.
    """

    model: nn.Module
    network: Network
    process: Process
    objective: Objective
    schedule_sampler: ScheduleSampler
    precision: Precision
    settings: TrainSettings
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self._rank = dist_util.get_rank()

    def __call__(self, batch: Tensor, cond: Cond, step: int) -> tuple[Tensor, Losses, Tensor]:
        """Forward and backward from this rank's images [N, C, H, W], after `step` completed steps.

        Returns: t [N], the losses [N] each, and the weights [N] that the timestep sampler gives
            them.
        """
        self.model.zero_grad(set_to_none=True)
        n = batch.shape[0]
        t, weights = self.draw_t(n, step)
        parts: list[Losses] = []
        for number, part in enumerate(self._microbatches(n)):
            # Forward and backward: DDP decides in the former whether the latter is to average over
            # ranks.
            with self._without_averaging() if part.stop < n else contextlib.nullcontext():
                losses = self._losses(self.network, batch, cond, t, step, part, number)
                self.precision.backward((losses["loss"] * weights[part]).sum() / n)
            parts.append({name: values.detach() for name, values in losses.items()})
        together = {name: torch.cat([losses[name] for losses in parts]) for name in parts[0]}
        return t, together, weights

    def draw_t(self, n: int, step: int) -> tuple[Tensor, Tensor]:
        """t [N] of this rank's images, and the weights [N] of their losses."""
        uniforms = noise.uniform(
            self.settings.seed, Stream.TIMESTEP, self._positions(n), step, device=self.device
        )
        self.schedule_sampler.settle()
        return self.schedule_sampler.sample(n, self.device, uniforms)

    def diagnose(self, batch: Tensor, cond: Cond, t: Tensor, step: int) -> str:
        """What in this step is not finite, and from where on; see guards.diagnose. A collective."""
        again = [
            (functools.partial(self._losses, self.model, batch, cond, t, step, part, number), part)
            for number, part in enumerate(self._microbatches(len(batch)))
        ]
        return diagnose(self.model, batch, t, again, self.process, self.settings.precision)

    def _without_averaging(self) -> contextlib.AbstractContextManager:
        """Gradients of this rank are added up, and stay here."""
        if isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _positions(self, n: int) -> range:
        """Of this rank's images in the global batch."""
        return range(self._rank * n, (self._rank + 1) * n)

    def _microbatches(self, n: int) -> list[slice]:
        size = self.settings.images_per_pass
        return [slice(start, start + size) for start in range(0, n, size)]

    def _losses(
        self,
        model: Network,
        batch: Tensor,
        cond: Cond,
        t: Tensor,
        step: int,
        part: slice,
        number: int,
    ) -> Losses:
        """The losses of the images `part`, microbatch `number`, with a graph for gradients."""
        seed, device = self.settings.seed, self.device
        images = batch[part].to(device, non_blocking=True)
        cond = {name: x[part].to(device, non_blocking=True) for name, x in cond.items()}
        position = self._positions(len(batch))[part]
        epsilon = noise.normal(seed, Stream.EPSILON, position, step, images.shape[1:], device)
        if count := uniforms_per_image(self.process):
            cond["augment_uniforms"] = noise.uniform(
                seed, Stream.AUGMENT, position, step, (count,), device
            )

        def xi(x: Tensor) -> Tensor:
            """From a stream of its own: gamma does not change what else is drawn."""
            return noise.normal(seed, Stream.XI, position, step, x.shape[1:], x.device)

        torch.manual_seed(self._dropout_seed(step, number))
        with self.precision.autocast():
            return self.objective(model, images, t[part], cond, epsilon, xi)

    def _dropout_seed(self, step: int, microbatch_number: int) -> int:
        address = [self.settings.seed, step, self._rank, microbatch_number]
        words = np.random.SeedSequence(address).generate_state(2)
        return int(words[0]) << 31 ^ int(words[1])
