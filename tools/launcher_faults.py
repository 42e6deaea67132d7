"""The table of docs/launching.md: what a signal to a training's launcher or ranks leads to.

    python tools/launcher_faults.py                                  # about 15 minutes, on Linux
    python tools/launcher_faults.py --launchers torchrun --faults "TERM to"

Each row is a training of two real processes (one without a launcher) on random images of 8 x 8
pixels. In the middle of it a signal is sent, once: then nothing but waiting. Two processes that
have not heard from each other for 5 seconds end (GUIDED_DIFFUSION_IP_TIMEOUT, 300 by default).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ("none", "mpiexec", "torchrun")
MARK = "LAUNCHER_FAULTS_RUN"  # in the environment of all processes of a run, and of no others
FLAGS = (
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --diffusion_steps 100 "
    "--attention_resolutions 4 --num_head_channels 32 --batch_size 4 --num_workers 1 "
    "--log_interval 1 --save_interval 1000000 --max_steps 1000000"
).split()
# What else launchers put into an environment must not reach those under test.
FOREIGN = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "TORCHELASTIC_", "MPI_LOCAL", "MASTER_")
PLACES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"}


def images(folder: Path) -> Path:
    """An npz of random images."""
    path = folder / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    np.savez(path, arr_0=pixels)
    return path


def mpiexec_program() -> str | None:
    """The mpiexec beside this Python, which belongs to the MPI wheel, else that of the PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def prefix(launcher: str, ranks: int, mpiexec: str | None) -> list[str]:
    """What comes before `script.py --flags` on the command line.

    Raises:
        ValueError: there is no mpiexec.
    """
    if launcher == "none":
        return [sys.executable]
    if launcher == "mpiexec":
        program = mpiexec or mpiexec_program()
        if program is None:
            raise ValueError('no mpiexec here: pip install -e ".[mpi]"')
        version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
        more = ["--map-by", ":OVERSUBSCRIBE"] if "Open MPI" in version else []
        return [program, *more, "-n", str(ranks), sys.executable]
    with socket.socket() as probe:  # for a port that is free
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*launch, "--master_addr", "127.0.0.1", "--master_port", str(port)]


@dataclass
class Run:
    """One training, or another script, under a launcher; `out_dir` is its own.

    Use as a context: what is left at the end of the block is killed.
    """

    launcher: str
    folder: Path
    ranks: int = 2
    script: str = "scripts/image_train.py"
    flags: tuple[str, ...] = ()  # {out_dir} is replaced
    options: tuple[str, ...] = ()  # of the launcher
    mpiexec: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __enter__(self) -> Run:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.out_dir, self.log = self.folder / "out", self.folder / "output.txt"
        clean = {
            key: value
            for key, value in os.environ.items()
            if key not in PLACES and not key.startswith(FOREIGN)
        }
        env = {
            **clean,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "GUIDED_DIFFUSION_IP_TIMEOUT": "5",
            MARK: self.mark,
            **self.env,
        }
        start = prefix(self.launcher, self.ranks, self.mpiexec)
        if self.options:
            start = (
                [*start[:-1], *self.options, start[-1]]
                if self.launcher == "mpiexec"
                else [*start, *self.options]
            )
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*start, str(ROOT / self.script), *self.flags, "--out_dir", str(self.out_dir)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=listen,
            )
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        """All output so far."""
        return self.log.read_text(errors="replace")

    def alive(self) -> list[int]:
        """Process ids of everything that belongs to this run and lives (or is stopped)."""
        wanted = f"{MARK}={self.mark}".encode()
        return [pid for pid in process_ids() if wanted in read(pid, "environ").split(b"\0")]

    def rank(self, number: int) -> int:
        """The process id of a rank: the one process with that number that has loaded PyTorch and
        is not the child of such a one.
        """
        if self.launcher == "none":
            return self.process.pid
        name = b"RANK=" if self.launcher == "torchrun" else b"OMPI_COMM_WORLD_RANK="
        if self.launcher == "mpiexec" and "PMI_RANK" in self._names():
            name = b"PMI_RANK="
        wanted = name + str(number).encode()
        mine = [
            pid
            for pid in self.alive()
            if wanted in read(pid, "environ").split(b"\0") and b"libtorch" in read(pid, "maps")
        ]
        (found,) = [pid for pid in mine if parent_of(pid) not in mine]
        return found

    def _names(self) -> set[str]:
        return {
            entry.split(b"=")[0].decode(errors="replace")
            for pid in self.alive()
            for entry in read(pid, "environ").split(b"\0")
        }

    def steps(self) -> int:
        """The last step in the log of progress."""
        with contextlib.suppress(OSError, KeyError, ValueError, IndexError):
            with open(self.out_dir / "progress.csv", newline="") as file:
                return int([row["step"] for row in csv.DictReader(file)][-1])
        return 0

    def saved(self) -> int:
        """The step of the newest complete checkpoint, -1 without any."""
        names = os.listdir(self.out_dir) if self.out_dir.exists() else []
        steps = [int(m[1]) for name in names if (m := re.fullmatch(r"state(\d+)\.pt", name))]
        return max(steps, default=-1)

    def wait_for(self, condition: Callable[[], object], limit_s: float, what: str) -> None:
        """Until the condition holds.

        Raises:
            RuntimeError: it does not in time.
        """
        until = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > until:
                raise RuntimeError(f"{what}: not within {limit_s:g} s:\n{self.said()}")
            time.sleep(0.1)

    def wait_for_steps(self, steps: int = 5, limit_s: float = 240) -> None:
        """Until so many are done.

        Raises:
            RuntimeError: they are not in time, or the run has ended.
        """
        self.wait_for(
            lambda: self.steps() >= steps or self.process.poll() is not None, limit_s, "first steps"
        )
        if self.process.poll() is not None:
            raise RuntimeError(f"ended by itself:\n{self.said()}")

    def end(self, limit_s: float) -> End:
        """Waits until everything has ended, at most so long."""
        begin = time.monotonic()
        while time.monotonic() < begin + limit_s:
            if self.process.poll() is not None and not self.alive():
                break
            time.sleep(0.1)
        left = self.alive()
        return End(self.process.poll(), left, time.monotonic() - begin)


@dataclass(frozen=True)
class End:
    """How a run ended: the launcher's exit code (None: it has not), who is left, how long that
    took.
    """

    code: int | None
    left: list[int]
    seconds: float


def listen() -> None:
    """Before a program starts: no signal is ignored. (A shell's background jobs ignore Ctrl-C.)"""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def process_ids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def read(pid: int, name: str) -> bytes:
    """A file of /proc, empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    fields = read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


@dataclass(frozen=True)
class Fault:
    """What is done to a run in the middle of training."""

    name: str
    do: Callable[[Run], None]
    launchers: tuple[str, ...] = LAUNCHERS
    options: tuple[str, ...] = ()


def to_launcher(*numbers: signal.Signals) -> Callable[[Run], None]:
    def do(run: Run) -> None:
        for i, number in enumerate(numbers):
            if i:  # the system delivers signals that wait at the same time in no certain order
                time.sleep(0.15)
            with contextlib.suppress(ProcessLookupError):
                os.kill(run.process.pid, number)

    return do


def to_group(run: Run) -> None:
    """As a terminal does at Ctrl-C."""
    os.killpg(run.process.pid, signal.SIGINT)


def to_rank(rank: int, number: signal.Signals) -> Callable[[Run], None]:
    return lambda run: os.kill(run.rank(rank), number)


MANY = ("mpiexec", "torchrun")
FAULTS = (
    Fault("INT to the launcher", to_launcher(signal.SIGINT)),
    Fault("INT to its process group (Ctrl-C)", to_group),
    Fault("TERM to the launcher", to_launcher(signal.SIGTERM)),
    Fault("TERM, then INT", to_launcher(signal.SIGTERM, signal.SIGINT)),
    Fault("INT twice", to_launcher(signal.SIGINT, signal.SIGINT)),
    Fault("HUP to the launcher", to_launcher(signal.SIGHUP)),
    Fault("USR1 to the launcher", to_launcher(signal.SIGUSR1)),
    Fault(
        "USR1 to torchrun --signals-to-handle=SIGUSR1",
        to_launcher(signal.SIGUSR1),
        ("torchrun",),
        ("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",),
    ),
    Fault("KILL to the launcher", to_launcher(signal.SIGKILL)),
    Fault("TERM to rank 1", to_rank(1, signal.SIGTERM), MANY),
    Fault("KILL to rank 0", to_rank(0, signal.SIGKILL), MANY),
    Fault("KILL to rank 1", to_rank(1, signal.SIGKILL), MANY),
    Fault("STOP to rank 0", to_rank(0, signal.SIGSTOP), MANY),
    Fault("STOP to rank 1", to_rank(1, signal.SIGSTOP), MANY),
)


def trial(run: Run, fault: Fault, limit_s: float) -> str:
    """One row of the table."""
    with run:
        run.wait_for_steps()
        reached = run.steps()
        fault.do(run)
        end = run.end(limit_s)
        kept = "yes" if run.saved() >= reached else "no"
        code = "runs on" if end.code is None else str(end.code)
        took = f"{end.seconds:.1f}" if not end.left else f"> {limit_s:g}"
        name = fault.name if run.launcher != "none" else fault.name.replace("launcher", "process")
        return f"| {run.launcher} | {name} | {code} | {kept} | {len(end.left) or 'none'} | {took} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--launchers", nargs="+", default=LAUNCHERS, choices=LAUNCHERS)
    parser.add_argument("--faults", default="", help="only those with this in their names")
    parser.add_argument("--mpiexec", help="another than the one beside this Python")
    parser.add_argument("--limit", type=float, default=60, help="seconds to wait at most")
    parser.add_argument("--keep", help="a folder for what the runs print and write")
    args = parser.parse_args()
    if not os.path.isdir("/proc/self"):
        parser.error("this needs Linux: it finds a run's processes in /proc")
    print(
        "| launcher | what is done | exit code | saved | left over | seconds until all are gone |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    with contextlib.ExitStack() as stack:
        folder = Path(args.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        data = images(folder)
        for launcher in args.launchers:
            for i, fault in enumerate(FAULTS):
                if launcher in fault.launchers and args.faults in fault.name:
                    run = Run(
                        launcher,
                        folder / f"{launcher}{i}",
                        flags=(*FLAGS, "--data_dir", str(data)),
                        options=fault.options,
                        mpiexec=args.mpiexec,
                    )
                    print(trial(run, fault, args.limit), flush=True)


if __name__ == "__main__":
    main()
