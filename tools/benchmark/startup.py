"""How long a script takes until it has printed its --help, and which libraries that costs."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

# Imported where they are used, never at the start: each takes from a tenth of a second to several.
HEAVY = (
    "mpi4py",
    "scipy",
    "matplotlib",
    "tensorboard",
    "torchvision",
    "diffusers",
    "sklearn",
    "pandas",
)


@dataclass(frozen=True)
class StartUp:
    """Args: seconds: of SCRIPT --help. torch_seconds: of `import torch`, in turn. heavy: of HEAVY,
    what the script imported.
    own_ms: of its other libraries' imports, by library, the slowest first.
    """

    script: str
    seconds: tuple[float, ...]
    torch_seconds: tuple[float, ...]
    heavy: tuple[str, ...]
    own_ms: tuple[tuple[str, float], ...]

    @property
    def beyond_torch_s(self) -> float:
        """Seconds beyond `import torch`, by the medians."""
        return statistics.median(self.seconds) - statistics.median(self.torch_seconds)

    def __str__(self) -> str:
        slowest = ", ".join(f"{name} {ms:.0f} ms" for name, ms in self.own_ms[:5])
        return (
            f"{self.script} --help: {statistics.median(self.seconds):.2f} s, "
            f"{self.beyond_torch_s:.2f} s beyond `import torch`; heavy libraries imported: "
            f"{', '.join(self.heavy) or 'none'}; slowest: {slowest}"
        )


def measure_startup(script: str | os.PathLike, repeats: int = 5) -> StartUp:
    """Fresh processes of this Python: SCRIPT --help and `import torch` in turn, then once more with
    its imports timed.
    """
    ours, torch_alone = [os.fspath(script), "--help"], ["-c", "import torch"]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for argv, found in zip((ours, torch_alone), seconds):
            start = time.perf_counter()
            _python(argv)
            found.append(time.perf_counter() - start)
    costs, of_torch = import_costs(ours), import_costs(torch_alone)
    own = sorted(
        ((name, ms) for name, ms in costs.items() if name not in of_torch),
        key=lambda pair: -pair[1],
    )
    return StartUp(
        os.path.basename(ours[0]),
        tuple(seconds[0]),
        tuple(seconds[1]),
        tuple(name for name in HEAVY if name in costs),
        tuple(own),
    )


def import_costs(argv: Sequence[str]) -> dict[str, float]:
    """{library: ms that its own modules took to import} of everything that `python
    ARGV` imports.
    """
    costs: dict[str, float] = {}
    for own, name in re.findall(
        r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$",
        _python(["-X", "importtime", *argv]),
        re.MULTILINE,
    ):
        library = name.split(".")[0]
        costs[library] = costs.get(library, 0.0) + int(own) / 1000
    return costs


def _python(argv: Sequence[str]) -> str:
    """What it writes to stderr."""
    return subprocess.run(
        [sys.executable, *argv],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ).stderr
