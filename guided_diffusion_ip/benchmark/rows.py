"""One measured thing each: a training step, a network call of sampling.

Each builds what it measures, warms it up, then times repeats, with the machine's matrix rate measured before, between and
after them: what disturbs one then disturbs the other too. FLOP are those of the network's convolutions and matrix products.
"""
from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..noise import NormalStream, Stream
from ..training.precision import DTYPES, Precision
from ..training.timestep_samplers import create_named_schedule_sampler
from ..training.train_loop import TrainLoop
from .machine import PeakMemory, matrix_rates, timed

WARM_UP = 2  # the first call allocates, the first update makes AdamW's averages
BLOCKS = 3
Build = Callable[[], tuple[nn.Module, Any]]  # () -> network, on the default device, and process


@dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    Args:
        build: makes the network (float32) and the process.
        image_shape: C, H, W.
        classes: number of classes, 0 if the network knows none.
        precision: fp32, bf16 or fp16.
        matrix_size: side of the matrices that the machine's rate is measured with.
    """

    build: Build
    image_shape: tuple[int, int, int]
    classes: int
    batch_size: int
    device: torch.device
    precision: str = "fp32"
    repeats: int = 15
    seed: int = 0
    matrix_size: int = 4096

    def inputs(self, device: torch.device | str) -> tuple[Tensor, dict[str, Tensor]]:
        """Random images [N, C, H, W] in [-1, 1], and labels if the network wants them."""
        shape = (self.batch_size, *self.image_shape)
        images = torch.rand(shape, device=device) * 2 - 1
        labels = torch.randint(max(1, self.classes), shape[:1], device=device)
        return images, {"y": labels} if self.classes else {}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        gflop: of one repeat, whatever the kernels do: no recomputation, attention as two products.
        seconds: each repeat.
        matrix_gflop_per_s: every matrix product's rate, in the order measured.
        calls_per_image: repeats that a batch of images needs.
    """

    what: str
    precision: str
    batch_size: int
    gflop: float
    seconds: tuple[float, ...]
    matrix_gflop_per_s: tuple[float, ...]
    peak_memory_bytes: int | None
    calls_per_image: int = 1

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """Between these lie the middle half of the repeats."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def images_per_s(self) -> float:
        return self.batch_size / (self.median_s * self.calls_per_image)

    @property
    def gflop_per_s(self) -> float:
        return self.gflop / self.median_s

    @property
    def matrix_rate(self) -> float:
        """GFLOP/s of the fastest product."""
        return max(self.matrix_gflop_per_s)

    @property
    def share(self) -> float:
        """Of the machine's matrix rate."""
        return self.gflop_per_s / self.matrix_rate


def count_gflop(plan: Plan, backward: bool) -> float:
    """GFLOP of one network call, with `backward` of its gradients too; nothing is computed, so any size will do.

    Counted from the definition, so that the figure does not depend on device or kernels: attention as two products (fused
    kernels recompute one), no gradient checkpointing.
    """
    with torch.device("meta"):
        network = plan.build()[0]
    for module in network.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = False
    images, cond = plan.inputs("meta")
    t = torch.zeros(plan.batch_size, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        output = network(images, t, **cond)
        if backward:
            output.sum().backward()
    return counter.get_total_flops() / 1e9


def measure(plan: Plan, what: str, gflop: float, prepare: Callable[[], Callable[[], Any]]) -> Row:
    """A row of what prepare() returns: a call without arguments. Memory is counted from before prepare()."""
    memory = PeakMemory(plan.device)
    memory.start()
    call = prepare()
    for _ in range(WARM_UP):
        call()
    peak = memory.growth()  # before the matrices of the rate, which take memory too
    rates = matrix_rates(plan.device, DTYPES[plan.precision], plan.matrix_size)
    seconds: list[float] = []
    for block in range(min(BLOCKS, plan.repeats)):
        seconds += [timed(call, plan.device) for _ in range(block, plan.repeats, BLOCKS)]
        rates += matrix_rates(plan.device, DTYPES[plan.precision], plan.matrix_size)
    return Row(what, plan.precision, plan.batch_size, gflop, tuple(seconds), tuple(rates), peak)


def measure_training(
    plan: Plan, *, microbatch: int = -1, lr: float = 1e-4, weight_decay: float = 0.0, ema_rate: str = "0.9999",
    schedule_sampler: str = "uniform",
) -> Row:
    """One update by the training loop itself: noise, forward, backward, AdamW, averaged weights. Images are in memory."""

    def prepare() -> Callable[[], None]:
        torch.manual_seed(plan.seed)
        network, process = plan.build()
        network.to(device=plan.device, memory_format=torch.channels_last).train()
        batch = plan.inputs(plan.device)
        loop = TrainLoop(
            model=network, diffusion=process, data=iter(()), batch_size=plan.batch_size, microbatch=microbatch, lr=lr,
            ema_rate=ema_rate, log_interval=10**9, save_interval=10**9, resume_checkpoint="", weight_decay=weight_decay,
            seed=plan.seed, schedule_sampler=create_named_schedule_sampler(schedule_sampler, process))
        loop.precision = Precision(plan.precision, plan.device)
        return lambda: loop.run_step(*batch)

    return measure(plan, "training step", count_gflop(plan, backward=True), prepare)


def measure_sampling(plan: Plan, *, use_ddim: bool = False, eta: float = 0.0) -> Row:
    """One network call of a sampling chain with its arithmetic; images/s is worked out from it for the whole chain.

    The process says how many calls a chain has. fp16 has half weights, as image_sample has them; bf16 is autocast.
    """
    steps: list[int] = []

    def prepare() -> Callable[[], Any]:
        torch.manual_seed(plan.seed)
        network, process = plan.build()
        network.to(device=plan.device, memory_format=torch.channels_last).eval()
        if plan.precision == "fp16":
            network.convert_to_fp16()
        steps.append(process.num_timesteps)
        bf16 = Precision(plan.precision, plan.device).autocast() if plan.precision == "bf16" else contextlib.nullcontext()
        chain = _endless_chain(plan, network, process, {"eta": eta} if use_ddim else {}, use_ddim)

        def call() -> None:
            with bf16:
                next(chain)

        return call

    row = measure(plan, f"{'DDIM' if use_ddim else 'DDPM'} network call", count_gflop(plan, backward=False), prepare)
    return replace(row, calls_per_image=steps[0])


def _endless_chain(
    plan: Plan, network: nn.Module, process: Any, options: dict[str, Any], use_ddim: bool
) -> Iterator[dict[str, Tensor]]:
    """Steps of one chain after another, with noise as sampling runs draw it."""
    chain = process.ddim_sample_loop_progressive if use_ddim else process.p_sample_loop_progressive
    cond = plan.inputs(plan.device)[1]
    index = torch.arange(plan.batch_size)
    while True:
        yield from chain(network, (plan.batch_size, *plan.image_shape), device=plan.device, model_kwargs=cond,
                         randn_like=NormalStream(plan.seed, Stream.SAMPLE, index), **options)
