"""What ranks say to each other. With one process, each of these is a no-op or the identity.

Every function here must be called on all ranks.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import watchdog
from .rendezvous import control_group, dev, get_rank, get_world_size

T = TypeVar("T")

_BUCKET_BYTES = 32 << 20


def barrier() -> None:
    """Waits until all ranks are here, for as long as they live: one may work for hours.

    Raises:
        dist.DistError: a rank is gone, has failed or has ended.
    """
    me = watchdog.current()
    if me is not None and me.watches_all:
        me.wait_for_all()
    elif get_world_size() > 1:
        dist.barrier()  # within the limit of collectives


def any_rank(*flags: bool) -> list[bool]:
    """Each flag, or-ed over ranks: how ranks agree on what to do next.

    Over TCP and from host memory, also where gradients travel by NCCL: no GPU is waited for.
    """
    if get_world_size() == 1:
        return list(flags)
    table = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=control_group())
    return [bool(flag) for flag in table.tolist()]


def broadcast_object(obj: T) -> T:
    """Rank 0's `obj`, on every rank; the other ranks' own is ignored."""
    if get_world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(work: Callable[[], T], device: torch.device | str = "cpu") -> T:
    """What work() returns on rank 0, on every rank; the others do not call it.

    Tensors in dicts, lists and tuples travel by themselves, in pieces, and arrive on `device` of
    the other ranks; rank 0 has its own. Everything else must be small.

    Raises:
        ValueError, OSError: work() has raised it; ValueError with the same text on other ranks.
    """
    if get_world_size() == 1:
        return work()
    result: Any = None
    error = None
    if get_rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as raised:  # the watchdog reports others: mistakes of ours
            error = raised
    complaint = broadcast_object(None if error is None else str(error))
    if error is not None:
        raise error
    if complaint is not None:
        raise ValueError(complaint)
    outline = broadcast_object(_with_tensors(result, lambda x: torch.empty_like(x, device="meta")))
    if get_rank() > 0:
        result = _with_tensors(outline, lambda x: torch.empty_like(x, device=device))
    tensors: list[Tensor] = []
    _with_tensors(result, tensors.append)
    sync_params(tensors)
    return result


def _with_tensors(content: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of nested dicts, lists and tuples, with change(x) in place of each tensor x."""
    if isinstance(content, Tensor):
        return change(content)
    if isinstance(content, dict):
        changed = copy.copy(content)  # an OrderedDict may have attributes, as state_dicts do
        changed.update((key, _with_tensors(value, change)) for key, value in content.items())
        return changed
    if type(content) in (list, tuple):
        return type(content)(_with_tensors(value, change) for value in content)
    return content


def all_gather_objects(obj: T) -> list[T]:
    """The `obj` of each rank, in rank order, on every rank."""
    if get_world_size() == 1:
        return [obj]
    box: list = [None] * get_world_size()
    dist.all_gather_object(box, obj)
    return box


def all_gather_tensor(x: Tensor) -> Tensor:
    """[N, ...] on each rank, of equal shape -> [world * N, ...] in rank order, on x's device.

    Raises:
        ValueError: x has no dimension to concatenate along.
    """
    if x.ndim == 0:
        raise ValueError(
            "all_gather_tensor needs a tensor with a first dimension, got a scalar: "
            "pass x.reshape(1)"
        )
    if get_world_size() == 1:
        return x
    sent = x.detach().to(_wire(x)).contiguous()
    parts = [torch.empty_like(sent) for _ in range(get_world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts).to(x.device)  # [world * N, ...]


def start_gather(x: Tensor) -> Callable[[], Tensor]:
    """all_gather_tensor without waiting: what it returns waits, and has [world * N, ...] on the
    host.

    What is queued on a GPU after this call is not waited for. x must not be changed in place
    meanwhile.
    """
    x = x.detach()
    parts, work = [x], None
    if get_world_size() > 1:
        sent = x.to(_wire(x)).contiguous()
        parts = [torch.empty_like(sent) for _ in range(get_world_size())]
        work = dist.all_gather(parts, sent, async_op=True)
    if parts[0].device.type != "cuda":

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            return torch.cat(parts).cpu()

        return finish
    if work is not None:
        work.wait()  # lets the current stream wait, not the host
    every = torch.cat(parts)
    on_host = torch.empty(every.shape, dtype=every.dtype, pin_memory=True)
    on_host.copy_(every, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def finish_copy() -> Tensor:
        copied.synchronize()
        return on_host

    return finish_copy


def all_gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows [n_r, D] of all ranks, one below the other, on every rank; n_r may differ, also be 0
    (whatever D then).
    """
    if get_world_size() == 1:
        return rows
    shapes = all_gather_tensor(torch.tensor([rows.shape]))  # [world, 2]
    padded = np.zeros((1, *shapes.amax(dim=0).tolist()), rows.dtype)
    padded[0, : len(rows), : rows.shape[1]] = rows
    every = all_gather_tensor(torch.from_numpy(padded)).numpy()
    return np.concatenate([part[:n] for part, n in zip(every, shapes[:, 0].tolist())])


@torch.no_grad()
def sync_params(params: Iterable[Tensor]) -> None:
    """Overwrites parameters (or buffers) in place by rank 0's.

    Without autograd, so that parameters which require gradients may be written; in flat pieces,
    because a collective per small tensor costs more than the copy.
    """
    if get_world_size() == 1:
        return
    for bucket in _buckets(params):
        flat = torch.cat([p.reshape(-1) for p in bucket])
        sent = flat.to(_wire(flat))
        dist.broadcast(sent.view(torch.uint8), src=0)  # not all backends know all types
        parts = sent.to(flat.device).split([p.numel() for p in bucket])
        for p, part in zip(bucket, parts):
            p.copy_(part.view(p.shape))


def check_in_sync(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor] | Tensor]) -> None:
    """Compares tensors across ranks bit by bit, through their hashes.

    Args:
        tensors: a state_dict, or pairs as of `named_parameters()`; bare tensors are named by
            their position.

    Raises:
        RuntimeError: on every rank, naming the first tensor that differs and the ranks that hold
            something else than rank 0.
    """
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    pairs = [
        (f"tensor {i}", item) if isinstance(item, Tensor) else item for i, item in enumerate(items)
    ]
    if get_world_size() == 1:
        return
    counts = all_gather_tensor(torch.tensor([len(pairs)])).tolist()  # [world]
    if len(set(counts)) > 1:
        raise RuntimeError(
            f"ranks hold different numbers of tensors, in rank order: {counts}; "
            f"build the model from the same config on every rank"
        )
    if not pairs:
        return
    mine = torch.tensor([[_fingerprint(name, x) for name, x in pairs]])  # [1, tensors]
    table = all_gather_tensor(mine)  # [world, tensors]
    differs = table != table[0]
    if differs.any():
        first = int(differs.any(dim=0).nonzero()[0])
        ranks = ", ".join(map(str, differs[:, first].nonzero().flatten().tolist()))
        raise RuntimeError(
            f"{pairs[first][0]} (on rank {get_rank()}) differs between rank 0 and "
            f"rank {ranks}; call sync_params after building or loading the model, "
            f"and load the same files on every rank"
        )


def _fingerprint(name: str, x: Tensor) -> int:
    digest = hashlib.blake2b(f"{name} {x.dtype} {tuple(x.shape)}".encode(), digest_size=8)
    digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "big", signed=True)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of like type and device of at most _BUCKET_BYTES (or one tensor), in order."""
    open_: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for x in tensors:
        bucket = open_.setdefault((x.dtype, x.device), [])
        if bucket and sum(b.nbytes for b in bucket) + x.nbytes > _BUCKET_BYTES:
            yield open_.pop((x.dtype, x.device))
            bucket = open_.setdefault((x.dtype, x.device), [])
        bucket.append(x)
    yield from open_.values()


def _wire(x: Tensor) -> torch.device:
    """Where x must be to travel: NCCL only moves what is on the GPU."""
    return dev() if dist.get_backend() == "nccl" else x.device
