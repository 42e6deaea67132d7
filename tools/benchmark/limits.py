"""What a step must cost at least: FLOP of its matrix products, bytes that have to be moved.

Nothing is computed here, so any size will do. Divided by the machine's rates these give the limit
that a row is measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from .rows import Plan

_FLOAT = 4  # bytes of a float32: weights, gradients, averages and optimizer state have this format


@dataclass(frozen=True)
class Work:
    """Of one repeat: GFLOP, and bytes that are moved whatever the kernels do (a lower bound)."""

    gflop: float
    moved_bytes: int


def training_work(plan: Plan, averages: int) -> Work:
    """A whole update, keeping so many averages of the weights.

    Bytes: weights read forward and backward, gradients written, the update, and what the backward
        pass needs of the forward
    pass written and read, in the format that is measured.
    """
    network = _on_no_device(plan)
    moved = (
        3 * _FLOAT * _count(network)
        + update_bytes(_count(network), averages)
        + 2 * saved_bytes(plan)
    )
    return Work(count_gflop(plan, backward=True), moved)


def sampling_work(plan: Plan) -> Work:
    """A network call without gradients. Bytes: weights read (half ones for fp16 and bf16), images
    read and written.
    """
    network, images = _on_no_device(plan), plan.inputs("meta")[0]
    each = _FLOAT if plan.precision == "fp32" else 2
    return Work(
        count_gflop(plan, backward=False), each * _count(network) + 2 * _FLOAT * images.numel()
    )


def optimizer_work(plan: Plan, averages: int) -> Work:
    """An update without the passes that make its gradients."""
    return Work(0.0, update_bytes(_count(_on_no_device(plan)), averages))


def update_bytes(parameters: int, averages: int) -> int:
    """Gradients read twice (their norm decides about the update), AdamW's two moments, weights and
    averages read and written.
    """
    return _FLOAT * parameters * (2 + 4 + 2 + 2 * averages)


def count_gflop(plan: Plan, backward: bool) -> float:
    """GFLOP of one network call, with `backward` of its gradients too.

    Counted from the definition, so that the figure does not depend on device or kernels: attention
    as two products (fused kernels recompute one), no gradient checkpointing.
    """
    network = _on_no_device(plan)
    for module in network.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = False
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.set_grad_enabled(backward),
    ):
        output = _call(plan, network)
        if backward:
            output.sum().backward()
    return counter.get_total_flops() / 1e9


def saved_bytes(plan: Plan) -> int:
    """What autograd keeps of a forward pass over the batch, weights and masks left out, each number
    in the plan's format.

    Attention counts as a fused kernel: q, k, v and its result, but no [T, T] matrix. Under gradient
    checkpointing: the inputs of the blocks.
    """
    network = _on_no_device(plan).train()
    ours = {_storage(p) for p in network.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and _storage(tensor) not in ours:
            found[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        _call(plan, network)
    each = _FLOAT if plan.precision == "fp32" else 2
    return each * sum(
        tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in found.values()
    )


class _FusedAttention(TorchFunctionMode):
    """In place of attention something that keeps as many numbers as a fused kernel does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            return q * k * v
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # tensors on no device have no addresses


def _on_no_device(plan: Plan) -> nn.Module:
    with torch.device("meta"):
        return plan.build()[0]


def _call(plan: Plan, network: nn.Module) -> Tensor:
    images, cond = plan.inputs("meta")
    return network(images, torch.zeros(plan.batch_size, dtype=torch.int64, device="meta"), **cond)


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
