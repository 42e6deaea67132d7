"""The published way of doing each thing, to be measured beside ours; nothing else uses it.

The same mathematics (tests compare losses, updated weights and samples), arranged as in the
programs that came with the papers:

    network    contiguous feature maps; attention by two einsums around a float32 softmax over [N h,
               T, T], q and k both scaled; group norm between casts; PyTorch's dropout masks
    process    tables in float64 on the host, copied to the device and indexed at every use
    training   t drawn by numpy for each microbatch, losses logged image by image, norms of
               gradients and weights one parameter at a time with a host sync each, AdamW and
               averages one parameter at a time
    fp16       half convolutions; float32 masters, flattened into two vectors, that gradients and
               weights are copied to and from
    sampling   torch.randn, t made on the host for each call
    results    every batch kept in memory, joined at the end, then written

Ways that differ in no measured part (data parallel wrappers of one process, files of logs) are left
out: that favours this side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion_ip.networks.attention import AttentionBlock
from guided_diffusion_ip.networks.layers import Dropout, GroupNorm32
from guided_diffusion_ip.networks.trunk import UNetTrunk
from guided_diffusion_ip.training.timestep_samplers import LossAwareSampler, ScheduleSampler

RandnLike = Callable[[Tensor], Tensor]
_FIRST_LOG_SCALE = 10.0  # low enough that no update is left out: that would be no full step
_LOG_SCALE_GROWTH = 1e-3  # per update


# ---- the network ----


def _wide(x: Tensor) -> Tensor:
    """float32; float64 stays, so that the two ways can be compared to all digits."""
    return x if x.dtype is torch.float64 else x.float()


class _CastNorm(GroupNorm32):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(_wide(x), self.num_groups, self.weight, self.bias, self.eps).type(
            x.dtype
        )


class _EinsumAttention(AttentionBlock):
    def _residual(self, x: Tensor) -> Tensor:
        n, channels = x.shape[:2]
        rows, width = n * self.num_heads, channels // self.num_heads
        qkv = self.qkv(self.norm(x.flatten(2)))  # [N, 3 C, T]
        if self.use_new_attention_order:
            q, k, v = (part.reshape(rows, width, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(rows, 3 * width, -1).chunk(3, dim=1)
        scale = width**-0.25
        weights = torch.einsum("nct,ncs->nts", q * scale, k * scale)
        weights = _wide(weights).softmax(dim=-1).type(weights.dtype)
        update = torch.einsum("nts,ncs->nct", weights, v).reshape(n, channels, -1)
        return x + self.proj_out(update).view(x.shape)


_PARTS: dict[type[nn.Module], type[nn.Module]] = {
    GroupNorm32: _CastNorm,
    AttentionBlock: _EinsumAttention,
    Dropout: nn.Dropout,
}


def published_network(network: nn.Module) -> nn.Module:
    """The network itself, its parts exchanged in place for the published ones; weights and their
    names stay.

    Raises:
        ValueError: not one of ADM's networks.
    """
    if not isinstance(network, UNetTrunk):
        raise ValueError(
            "--baseline knows the published form of ADM's networks only, not of a "
            f"{type(network).__name__}: use --framework adm, or leave --baseline out"
        )
    for module in network.modules():
        if type(module) in _PARTS:
            module.__class__ = _PARTS[type(module)]
    return network.to(memory_format=torch.contiguous_format)


# ---- the process ----


class _TablesAnew:
    """Before a process class: what it keeps on the device is made again at every use."""

    def at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        values = np.asarray(getattr(self, table), dtype=np.float64)
        chosen = torch.from_numpy(values).to(device=t.device)[t].float()
        table = chosen.view(-1, *[1] * (like.ndim - 1))
        return table.expand(like.shape) if isinstance(like, Tensor) else table

    def _map_on(self, device: torch.device) -> Tensor:
        return torch.tensor(self.timestep_map, device=device)


def published_process(process: Any) -> Any:
    """The process itself, its tables looked up in the published way from now on."""
    kind = type(process)
    if not issubclass(kind, _TablesAnew):
        process.__class__ = type(f"Published{kind.__name__}", (_TablesAnew, kind), {})
    return process


def published_chain(
    process: Any,
    network: nn.Module,
    shape: Sequence[int],
    device: torch.device,
    cond: dict[str, Tensor],
    use_ddim: bool = False,
    eta: float = 0.0,
    randn_like: RandnLike = torch.randn_like,
) -> Iterator[dict[str, Tensor]]:
    """Each step of one chain, from noise to images [N, C, H, W]; yields what p_sample or
    ddim_sample return.
    """
    step, options = (process.ddim_sample, {"eta": eta}) if use_ddim else (process.p_sample, {})
    x = randn_like(torch.empty(*shape, device=device))
    for index in reversed(range(process.num_timesteps)):
        t = torch.tensor([index] * shape[0], device=device)
        with torch.no_grad():
            out = step(network, x, t, model_kwargs=cond, randn_like=randn_like, **options)
        yield out
        x = out["sample"]


# ---- training ----


class PublishedStep:
    """What a published training loop does with one batch.

    Args:
        network, process: of published_network and published_process.
        microbatch: images per forward pass; -1: all.
        half: fp16 convolutions with float32 masters; otherwise everything in the network's own
            format.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Any,
        sampler: ScheduleSampler,
        *,
        microbatch: int = -1,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        ema_rates: Iterable[float] = (0.9999,),
        half: bool = False,
    ) -> None:
        self.network, self.process, self.sampler = network, process, sampler
        self.microbatch = microbatch
        self.half = half
        self.log_scale = _FIRST_LOG_SCALE
        self.logged: dict[str, tuple[float, int]] = {}  # name -> mean, count
        parameters = list(network.parameters())
        self.device = parameters[0].device
        self._groups = [
            group
            for group in (
                [p for p in parameters if p.ndim <= 1],
                [p for p in parameters if p.ndim > 1],
            )
            if group
        ]
        self.masters = parameters
        if half:
            self.masters = [
                nn.Parameter(_flat(p.detach() for p in group)) for group in self._groups
            ]
            network.convert_to_fp16()
        self.opt = torch.optim.AdamW(
            self.masters, lr=lr, weight_decay=weight_decay, foreach=False, fused=False
        )
        self.averages = [(rate, [p.detach().clone() for p in self.masters]) for rate in ema_rates]

    def __call__(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """One update from images [N, C, H, W] in [-1, 1] and their conditions."""
        self.forward_backward(batch, cond)
        self.update()

    def draw_t(self, part: slice) -> tuple[Tensor, Tensor]:
        """t, int64 [n], of the images `part`, and the weights of their losses."""
        p = self.sampler.weights()
        p = p / np.sum(p)
        chosen = np.random.choice(len(p), size=(part.stop - part.start,), p=p)
        weights = 1 / (len(p) * p[chosen])
        return torch.from_numpy(chosen).long().to(self.device), torch.from_numpy(
            weights
        ).float().to(self.device)

    def randn_like(self, part: slice, x: Tensor) -> Tensor:
        """Noise of the images `part`: epsilon, then xi if gamma is not 0."""
        return torch.randn_like(x)

    def forward_backward(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """Gradients of the mean loss, logged on the way."""
        for p in self.network.parameters():
            p.grad = None
        n = len(batch)
        size = self.microbatch if self.microbatch > 0 else n
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            images = batch[part].to(self.device)
            kwargs = {name: values[part].to(self.device) for name, values in cond.items()}
            t, weights = self.draw_t(part)
            losses = self.process.training_losses(
                self.network,
                images,
                t,
                model_kwargs=kwargs,
                randn_like=lambda x, part=part: self.randn_like(part, x),
            )
            if isinstance(self.sampler, LossAwareSampler):
                self.sampler.update(t, losses["loss"].detach())
            loss = (losses["loss"] * weights).sum() / n
            self._log_losses(t, {name: values * weights for name, values in losses.items()})
            (loss * 2**self.log_scale if self.half else loss).backward()

    def _log_losses(self, t: Tensor, losses: dict[str, Tensor]) -> None:
        for name, values in losses.items():
            self._log(name, values.mean().item())
            for one_t, one in zip(t.cpu().numpy(), values.detach().cpu().numpy()):
                self._log(f"{name}_q{int(4 * one_t / self.process.num_timesteps)}", float(one))

    def _log(self, name: str, value: float) -> None:
        mean, count = self.logged.get(name, (0.0, 0))
        self.logged[name] = (mean * count / (count + 1) + value / (count + 1), count + 1)

    def update(self) -> bool:
        """Weights and averages from the gradients; False if these are not finite, which leaves
        weights as they were.
        """
        if self.half:
            for master, group in zip(self.masters, self._groups):
                master.grad = _flat(p.grad for p in group)
        scale = 2**self.log_scale if self.half else 1.0
        grad_norm, weight_norm = self._norms()
        if not math.isfinite(grad_norm):
            self.log_scale -= 1
            return False
        self._log("grad_norm", grad_norm / scale)
        self._log("param_norm", weight_norm)
        if self.half:
            for master in self.masters:
                master.grad.mul_(1 / scale)
        self.opt.step()
        if self.half:
            self._copy_to_network()
            self.log_scale += _LOG_SCALE_GROWTH
        with torch.no_grad():
            for rate, averages in self.averages:
                for average, p in zip(averages, self.masters):
                    average.mul_(rate).add_(p, alpha=1 - rate)
        return True

    def _norms(self) -> tuple[float, float]:
        """Of all gradients, and of all weights."""
        gradients = weights = 0.0
        with torch.no_grad():
            for p in self.masters:
                weights += torch.linalg.vector_norm(_wide(p)).item() ** 2
                if p.grad is not None:
                    gradients += torch.linalg.vector_norm(_wide(p.grad)).item() ** 2
        return math.sqrt(gradients), math.sqrt(weights)

    def _copy_to_network(self) -> None:
        with torch.no_grad():
            for master, group in zip(self.masters, self._groups):
                for p, part in zip(group, master.split([p.numel() for p in group])):
                    p.copy_(part.view_as(p))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.float().reshape(-1) for tensor in tensors])


# ---- results ----


def gather_and_write(path: str, batches: Iterable[np.ndarray]) -> None:
    """Batches uint8 [n, H, W, C] into the npz `path`: all kept, joined, written."""
    kept = list(batches)
    np.savez(path, np.concatenate(kept))
