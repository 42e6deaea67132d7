"""The machine: what it is, how fast it multiplies matrices, and how much memory something took."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MATRIX_PRODUCTS = 5  # the best of so many is the rate
COPIES = 5


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` names.

    Raises:
        ValueError: cuda is asked for but not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but this PyTorch sees no GPU: use --device cpu, or install a CUDA "
            "build of torch"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def wait_for(device: torch.device) -> None:
    """Return when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes, from an idle device to an idle device."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def matrix_rates(
    device: torch.device, dtype: torch.dtype, size: int = 4096, warm_up_s: float = 0.3
) -> list[float]:
    """GFLOP/s of MATRIX_PRODUCTS products of two size x size matrices, 2 size^3 FLOP each.

    With as many threads, and in the same process, as what is compared with it.
    """
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    times = _times(device)

    def products() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    end = time.perf_counter() + warm_up_s
    timed(products, device)  # libraries choose their kernels, threads start, clocks rise
    while time.perf_counter() < end:
        timed(products, device)
    return [2e-9 * size**3 * times / timed(products, device) for _ in range(MATRIX_PRODUCTS)]


def copy_rates(device: torch.device, numbers: int = 1 << 26) -> list[float]:
    """GB/s of COPIES copies of so many float32 from memory to memory: 4 bytes of each read, 4
    written.

    2^26, 256 MB, is more than caches hold; fewer measure the cache.
    """
    source, target = torch.ones(numbers, device=device), torch.empty(numbers, device=device)
    times = _times(device)

    def copies() -> None:
        for _ in range(times):
            target.copy_(source)

    timed(copies, device)  # pages of the target are made
    return [8e-9 * numbers * times / timed(copies, device) for _ in range(COPIES)]


def _times(device: torch.device) -> int:
    """A GPU takes a fraction of a millisecond for one product or copy: several, so that starting
    and waiting do not count.
    """
    return 20 if device.type == "cuda" else 1


class PeakMemory:
    """Bytes in use at most since `start()`, beyond what was in use then.

    GPU: what PyTorch's allocator has handed out. CPU: the process's resident set; its high-water
        mark is reset at the start
    (Linux: /proc/self/clear_refs), after free memory has been given back to the system, so that it
    cannot be reused unseen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            wait_for(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (AttributeError, OSError):
            pass  # not glibc: some of what is measured may reuse memory that was free before
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
        except OSError:
            self._before = None  # not Linux, or not allowed
        else:
            self._before = _resident("VmRSS")

    def growth(self) -> int | None:
        """The bytes; None where this system does not tell."""
        if self._before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return _resident("VmHWM") - self._before


def _resident(entry: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return 1024 * int(re.search(rf"^{entry}:\s+(\d+) kB", file.read(), re.MULTILINE)[1])


@dataclass(frozen=True)
class Machine:
    """What the figures belong to."""

    cpu: str
    cores: int  # that this process may use
    threads: int
    device: str  # cpu, or the GPU's name
    torch: str
    cuda: str
    cpu_capability: str
    load_average: float | None  # before measuring: other people's work disturbs
    float32_matmul_precision: str
    tf32_matmul: bool
    tf32_convolution: bool

    @classmethod
    def look(cls, device: torch.device) -> Machine:
        """This machine, as it is now."""
        gpu = device.type == "cuda"
        return cls(
            cpu=_cpu_name(),
            threads=torch.get_num_threads(),
            cores=len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
            device=torch.cuda.get_device_name(device) if gpu else "cpu",
            torch=torch.__version__,
            cuda=torch.version.cuda or "",
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            float32_matmul_precision=torch.get_float32_matmul_precision(),
            tf32_matmul=gpu and torch.backends.cuda.matmul.allow_tf32,
            tf32_convolution=gpu and torch.backends.cudnn.allow_tf32,
        )

    def __str__(self) -> str:
        where = f"{self.cpu}, {self.cores} cores, {self.threads} threads"
        if self.device != "cpu":
            on_off = {True: "on", False: "off"}
            where = (
                f"{self.device} (TF32: matrix products {on_off[self.tf32_matmul]}, convolutions "
                f"{on_off[self.tf32_convolution]}), {where}"
            )
        load = "" if self.load_average is None else f", load average {self.load_average:g} before"
        return f"{where}, {self.cpu_capability}, torch {self.torch}{load}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)[1].strip()
    except (OSError, TypeError):  # TypeError: the file names no model
        return platform.processor() or platform.machine()
