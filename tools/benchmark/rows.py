"""One measured thing each: a training step, its update alone, a network call of sampling.

Each builds what it measures, and if asked for the same in the published way (baseline.py), warms
both up, then times repeats of them in turn, with the machine's rates measured before, between and
after: what disturbs one then disturbs the others too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion_ip.allocator import keep_freed_memory
from guided_diffusion_ip.noise import NormalStream, Stream
from guided_diffusion_ip.training.ema import parse_rates
from guided_diffusion_ip.training.precision import DTYPES
from guided_diffusion_ip.training.protocols import Losses
from guided_diffusion_ip.training.settings import TrainSettings
from guided_diffusion_ip.training.timestep_samplers import create_named_schedule_sampler
from guided_diffusion_ip.training.train_loop import TrainLoop

from .baseline import PublishedStep, published_chain, published_network, published_process
from .limits import Work, optimizer_work, sampling_work, training_work
from .machine import PeakMemory, copy_rates, matrix_rates, timed

# The first call allocates, the first update makes AdamW's averages; only then all memory is there.
WARM_UP = 3
BLOCKS = 3
Build = Callable[[], tuple[nn.Module, Any]]  # () -> network, on the default device, and process
Prepare = Callable[[], Callable[[], Any]]  # () -> what is timed, a call without arguments


@dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    Args:
        build: makes the network (float32) and the process.
        image_shape: C, H, W.
        classes: number of classes, 0 if the network knows none.
        precision: fp32, bf16 or fp16.
        matrix_size: side of the matrices that the machine's rate is measured with; its copies take
            four such matrices.
        baseline: measure the published way too.
        compile: our network is called through torch.compile, by the backend compile_backend; the
            published way never is.
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
    baseline: bool = False
    compile: bool = False
    compile_backend: str = "inductor"

    def inputs(self, device: torch.device | str) -> tuple[Tensor, dict[str, Tensor]]:
        """Random images [N, C, H, W] in [-1, 1], and labels if the network wants them."""
        shape = (self.batch_size, *self.image_shape)
        images = torch.rand(shape, device=device) * 2 - 1
        labels = torch.randint(max(1, self.classes), shape[:1], device=device)
        return images, {"y": labels} if self.classes else {}

    def make(self) -> tuple[nn.Module, Any]:
        """Network and process on the device, with the same weights every time; the network is in
        training mode.
        """
        torch.manual_seed(self.seed)
        network, process = self.build()
        return network.to(self.device).train(), process

    def make_published(self) -> tuple[nn.Module, Any]:
        """The same in their published form."""
        network, process = self.make()
        return published_network(network), published_process(process)

    @property
    def baseline_precision(self) -> str:
        """The published programs know fp32, and fp16 on a GPU."""
        return "fp32" if self.precision == "fp32" or self.device.type == "cpu" else "fp16"

    def callable(self, network: nn.Module) -> Callable[..., Tensor]:
        """What calls our network: itself, or its compiled form."""
        return torch.compile(network, backend=self.compile_backend) if self.compile else network


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        batch_size: 0 for what does not depend on images.
        gflop: of one repeat, whatever the kernels do: no recomputation, attention as two products.
        seconds: each repeat.
        matrix_gflop_per_s: every matrix product's rate, in the order measured.
        calls_per_image: repeats that a batch of images needs.
        moved_bytes: of one repeat, a lower bound, see limits.py.
        copy_gb_per_s: every copy's rate, in the order measured.
        baseline_seconds: the published way, each repeat just after ours; () if it was not measured.
        baseline_precision: its number format.
    """

    what: str
    precision: str
    batch_size: int
    gflop: float
    seconds: tuple[float, ...]
    matrix_gflop_per_s: tuple[float, ...]
    peak_memory_bytes: int | None
    calls_per_image: int = 1
    moved_bytes: int = 0
    copy_gb_per_s: tuple[float, ...] = ()
    baseline_seconds: tuple[float, ...] = ()
    baseline_peak_memory_bytes: int | None = None
    baseline_precision: str = ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """Between these lie the middle half of the repeats."""
        return quartiles(self.seconds)

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
    def limit_s(self) -> float:
        """Seconds of one repeat if the machine did nothing but its products, or nothing but its
        moves: whichever takes longer.
        """
        moves = self.moved_bytes / 1e9 / max(self.copy_gb_per_s) if self.copy_gb_per_s else 0.0
        return max(self.gflop / self.matrix_rate, moves)

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.limit_s / self.median_s

    @property
    def baseline_median_s(self) -> float | None:
        return statistics.median(self.baseline_seconds) if self.baseline_seconds else None

    @property
    def baseline_quartiles_s(self) -> tuple[float, float] | None:
        return quartiles(self.baseline_seconds) if self.baseline_seconds else None

    @property
    def ratio(self) -> float | None:
        """How many times longer the published way takes, by the medians."""
        return self.baseline_median_s / self.median_s if self.baseline_seconds else None

    @property
    def ratio_quartiles(self) -> tuple[float, float] | None:
        """Between these lie the middle half of the ratios of a repeat to the one just before it."""
        pairs = [theirs / ours for ours, theirs in zip(self.seconds, self.baseline_seconds)]
        return quartiles(pairs) if pairs else None


def quartiles(values: tuple[float, ...] | list[float]) -> tuple[float, float]:
    """Lower and upper quartile; of a single value, itself."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def measure(
    plan: Plan, what: str, work: Work, prepare: Prepare, published: Prepare | None = None
) -> Row:
    """A row of what prepare() returns, and of what published() returns if the plan wants it.

    Memory of each is counted from before it is prepared.
    """
    calls, peaks = [], []
    for way in [prepare, published] if plan.baseline and published else [prepare]:
        memory = PeakMemory(plan.device)
        memory.start()
        calls.append(way())
        for _ in range(WARM_UP):
            calls[-1]()
        peaks.append(memory.growth())  # before the matrices of the rate, which take memory too
    matrix: list[float] = []
    copies: list[float] = []

    def look_at_the_machine() -> None:
        matrix.extend(matrix_rates(plan.device, DTYPES[plan.precision], plan.matrix_size))
        copies.extend(copy_rates(plan.device, 4 * plan.matrix_size**2))

    look_at_the_machine()
    seconds: list[list[float]] = [[] for _ in calls]
    for block in range(min(BLOCKS, plan.repeats)):
        for _ in range(block, plan.repeats, BLOCKS):
            for call, found in zip(calls, seconds):
                found.append(timed(call, plan.device))
        look_at_the_machine()
    row = Row(
        what,
        plan.precision,
        plan.batch_size,
        work.gflop,
        tuple(seconds[0]),
        tuple(matrix),
        peaks[0],
        moved_bytes=work.moved_bytes,
        copy_gb_per_s=tuple(copies),
    )
    if len(calls) == 1:
        return row
    return replace(
        row,
        baseline_seconds=tuple(seconds[1]),
        baseline_peak_memory_bytes=peaks[1],
        baseline_precision=plan.baseline_precision,
    )


class UpdateOnly(TrainLoop):
    """A loop whose steps have their gradients already: what is left of a step is the update."""

    def forward_backward(
        self, batch: Tensor, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Losses, Tensor]:
        n = len(batch)
        ones = torch.ones(n, device=self.device)
        return torch.zeros(n, dtype=torch.int64, device=self.device), {"loss": ones}, ones


def _our_loop(
    plan: Plan,
    kind: type[TrainLoop],
    microbatch: int,
    schedule_sampler: str,
    ema_rate: str,
    **options: float,
) -> TrainLoop:
    network, process = plan.make()
    network.to(memory_format=torch.channels_last)
    settings = TrainSettings(
        batch_size=plan.batch_size,
        microbatch=microbatch,
        ema_rates=tuple(parse_rates(ema_rate)),
        precision=plan.precision,
        seed=plan.seed,
        **options,
    )
    sampler = create_named_schedule_sampler(schedule_sampler, process)
    loop = kind(network, process, iter(()), settings, schedule_sampler=sampler)
    loop.gradients.network = plan.callable(network)
    return loop


def _published_step(
    plan: Plan, microbatch: int, schedule_sampler: str, ema_rate: str, **options: float
) -> PublishedStep:
    network, process = plan.make_published()
    return PublishedStep(
        network,
        process,
        create_named_schedule_sampler(schedule_sampler, process),
        microbatch=microbatch,
        ema_rates=parse_rates(ema_rate),
        half=plan.baseline_precision == "fp16",
        **options,
    )


def measure_training(
    plan: Plan,
    *,
    microbatch: int = -1,
    lr: float = 1e-4,
    weight_decay: float = 0.0,
    ema_rate: str = "0.9999",
    schedule_sampler: str = "uniform",
) -> Row:
    """One update by the training loop itself: noise, forward, backward, AdamW, averaged weights.
    Images are in memory.
    """
    settings = (microbatch, schedule_sampler, ema_rate)

    def ours() -> Callable[[], None]:
        loop = _our_loop(plan, TrainLoop, *settings, lr=lr, weight_decay=weight_decay)
        batch = plan.inputs(plan.device)
        return lambda: loop.run_step(*batch)

    def published() -> Callable[[], None]:
        step = _published_step(plan, *settings, lr=lr, weight_decay=weight_decay)
        batch = plan.inputs(plan.device)
        return lambda: step(*batch)

    return measure(
        plan, "training step", training_work(plan, len(parse_rates(ema_rate))), ours, published
    )


def measure_optimizer(
    plan: Plan, *, lr: float = 1e-4, weight_decay: float = 0.0, ema_rate: str = "0.9999"
) -> Row:
    """A training step without the passes that make its gradients: norms, AdamW, averaged weights;
    gradients are random.
    """
    settings = (-1, "uniform", ema_rate)

    def fill(network: nn.Module) -> None:
        for p in network.parameters():
            p.grad = torch.randn_like(p)

    def ours() -> Callable[[], None]:
        loop = _our_loop(plan, UpdateOnly, *settings, lr=lr, weight_decay=weight_decay)
        if (
            plan.precision == "fp16"
        ):  # a scale of 1 leaves the gradients as they are, however often they are unscaled
            loop.precision.scaler = torch.amp.GradScaler(plan.device.type, init_scale=1.0)
            loop.precision.scaler.scale(torch.zeros((), device=plan.device))
        fill(loop.model)
        batch = plan.inputs(plan.device)
        return lambda: loop.run_step(*batch)

    def published() -> Callable[[], Any]:
        step = _published_step(plan, *settings, lr=lr, weight_decay=weight_decay)
        fill(step.network)
        return step.update

    row = measure(
        plan, "optimizer", optimizer_work(plan, len(parse_rates(ema_rate))), ours, published
    )
    return replace(row, batch_size=0)


def measure_sampling(plan: Plan, *, use_ddim: bool = False, eta: float = 0.0) -> Row:
    """One network call of a sampling chain with its arithmetic; images/s is worked out from it for
    the whole chain.

    The process says how many calls a chain has. fp16 and bf16 have convolutions of that format, as
    image_sample has them.
    """
    steps: list[int] = []

    def ours() -> Callable[[], Any]:
        network, process = plan.make()
        network.to(memory_format=torch.channels_last)
        keep_freed_memory(plan.device)
        if plan.precision != "fp32":
            getattr(network, f"convert_to_{plan.precision}")()
        network.eval().requires_grad_(False)
        steps.append(process.num_timesteps)
        chain = _endless_chain(
            plan, plan.callable(network), process, {"eta": eta} if use_ddim else {}, use_ddim
        )
        return lambda: next(chain)

    def published() -> Callable[[], Any]:
        network, process = plan.make_published()
        network.eval()
        if plan.baseline_precision == "fp16":
            network.convert_to_fp16()
        chain = _endless_published_chain(plan, network, process, use_ddim, eta)
        return lambda: next(chain)

    row = measure(
        plan, f"{'DDIM' if use_ddim else 'DDPM'} network call", sampling_work(plan), ours, published
    )
    return replace(row, calls_per_image=steps[0])


def _endless_chain(
    plan: Plan, model: Callable[..., Tensor], process: Any, options: dict[str, Any], use_ddim: bool
) -> Iterator[dict[str, Tensor]]:
    """Steps of one chain after another, with noise as sampling runs draw it."""
    chain = process.ddim_sample_loop_progressive if use_ddim else process.p_sample_loop_progressive
    cond = plan.inputs(plan.device)[1]
    index = torch.arange(plan.batch_size)
    while True:
        yield from chain(
            model,
            (plan.batch_size, *plan.image_shape),
            device=plan.device,
            model_kwargs=cond,
            randn_like=NormalStream(plan.seed, Stream.SAMPLE, index),
            **options,
        )


def _endless_published_chain(
    plan: Plan, network: nn.Module, process: Any, use_ddim: bool, eta: float
) -> Iterator[dict[str, Tensor]]:
    cond = plan.inputs(plan.device)[1]
    while True:
        yield from published_chain(
            process, network, (plan.batch_size, *plan.image_shape), plan.device, cond, use_ddim, eta
        )
