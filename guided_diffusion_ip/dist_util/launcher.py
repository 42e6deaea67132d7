"""Who started this process: torchrun, srun, mpiexec or nobody, told by environment variables alone.

Pure functions, no torch and no MPI, so that every launcher can be tested as a table.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Env = Mapping[str, str]


@dataclass(frozen=True)
class LaunchInfo:
    """This process's place among the processes started together.

    `local_world` is the number of them on this machine; where the launcher does not say, the least
    it can be.
    """

    launcher: str
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world and 0 <= self.local_rank < self.local_world):
            raise ValueError(
                f"contradictory environment: {self}; ranks must lie in [0, world). "
                f"Unset what is left over from another job, or start with torchrun."
            )


def launch_info(env: Env = os.environ) -> LaunchInfo:
    """Reads the place of this process from the variables its launcher set.

    mpiexec's own variables come before Slurm's: mpiexec inside a Slurm job sees both, and Slurm's
    then describe the job, or mpiexec's helper, rather than us.

    Raises:
        ValueError: a variable is not a number, or the numbers contradict each other.
    """
    for read in (_read_torchrun, _read_openmpi, _read_mpich, _read_slurm, _read_pmi):
        if info := read(env):
            return info
    return LaunchInfo("none")


def env_rank(env: Env = os.environ) -> int:
    """The rank according to the environment, before any process group exists."""
    return launch_info(env).rank


def number(env: Env, name: str, default: int | None = None) -> int:
    """The whole number in a variable. Raises ValueError when it is missing or is none."""
    text = env.get(name, default)
    try:
        return int("" if text is None else text)
    except (TypeError, ValueError):
        raise ValueError(
            f"environment variable {name} is {text!r}, must be a whole number; what "
            f"starts the processes sets it (torchrun, srun, mpiexec)."
        ) from None


def has_master(env: Env) -> bool:
    """Whether the environment says where to meet."""
    return bool(env.get("MASTER_ADDR") and env.get("MASTER_PORT"))


def _read_torchrun(env: Env) -> LaunchInfo | None:
    if not ("RANK" in env and "WORLD_SIZE" in env):
        return None
    if not ("TORCHELASTIC_RUN_ID" in env or has_master(env)):
        return None
    rank = number(env, "RANK")
    # Without LOCAL_RANK: one process per pod (Kubeflow), or all started by hand on one machine.
    address = env.get("MASTER_ADDR", "")
    by_hand = address.startswith("127.") or address == "localhost"
    local = number(env, "LOCAL_RANK", rank if by_hand else 0)
    return LaunchInfo(
        "torchrun",
        rank,
        number(env, "WORLD_SIZE"),
        local,
        number(env, "LOCAL_WORLD_SIZE", local + 1),
    )


def _read_openmpi(env: Env) -> LaunchInfo | None:
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    local = number(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0)
    return LaunchInfo(
        "openmpi",
        number(env, "OMPI_COMM_WORLD_RANK"),
        number(env, "OMPI_COMM_WORLD_SIZE"),
        local,
        number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", local + 1),
    )


def _read_mpich(env: Env) -> LaunchInfo | None:
    # MPI_LOCALRANKID tells mpiexec (MPICH, Intel MPI) from srun, which may set PMI_RANK as well.
    if not ("PMI_RANK" in env and "MPI_LOCALRANKID" in env):
        return None
    local = number(env, "MPI_LOCALRANKID")
    return LaunchInfo(
        "mpich",
        number(env, "PMI_RANK"),
        number(env, "PMI_SIZE"),
        local,
        number(env, "MPI_LOCALNRANKS", local + 1),
    )


def _read_slurm(env: Env) -> LaunchInfo | None:
    # A job script has SLURM_PROCID=0 and SLURM_NTASKS=N too, although it runs once; only srun makes
    # a step of N tasks.
    if not all(f"SLURM_{name}" in env for name in ("STEP_ID", "STEP_NUM_TASKS", "PROCID")):
        return None
    world, local = number(env, "SLURM_STEP_NUM_TASKS"), number(env, "SLURM_LOCALID", 0)
    layout = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", layout):  # "4(x2),3" is 4, 4, 3
        counts += [int(count)] * int(times or 1)
    node = number(env, "SLURM_NODEID", 0)
    # The job's layout, all there may be, is not the step's: then it does not add up.
    known = sum(counts) == world and node < len(counts)
    return LaunchInfo(
        "slurm", number(env, "SLURM_PROCID"), world, local, counts[node] if known else local + 1
    )


def _read_pmi(env: Env) -> LaunchInfo | None:
    """A process manager that numbers ranks but not machines: take all to be on this one."""
    for rank_name, size_name in (("PMI_RANK", "PMI_SIZE"), ("PMIX_RANK", "WORLD_SIZE")):
        if rank_name not in env:
            continue
        if size_name not in env:
            raise ValueError(
                f"{rank_name}={env[rank_name]} is set, but nothing says how many "
                f"processes there are: set {size_name}, or unset {rank_name}."
            )
        rank, world = number(env, rank_name), number(env, size_name)
        return LaunchInfo(
            "pmi",
            rank,
            world,
            number(env, "LOCAL_RANK", rank),
            number(env, "LOCAL_WORLD_SIZE", world),
        )
    return None


def slurm_address(env: Env) -> tuple[str, int]:
    """Host and port that every task of a Slurm step works out alike: first node, port from the ids.

    Raises:
        ValueError: Slurm did not say which nodes the step has.
    """
    hosts = expand_nodelist(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
    if not hosts:
        raise ValueError(
            "SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are both empty: set "
            "MASTER_ADDR to the first node's name and MASTER_PORT to a free port."
        )
    # Below 32768, where systems begin to hand out ports by themselves.
    ids = 31 * number(env, "SLURM_JOB_ID", 0) + number(env, "SLURM_STEP_ID", 0)
    return ("127.0.0.1" if len(hosts) == 1 else hosts[0]), 15000 + ids % 16000


def expand_nodelist(text: str) -> list[str]:
    """Slurm's short form of host names: `n[01-03,07],other` is n01, n02, n03, n07, other."""
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        pieces = [_expand_range(piece) for piece in re.split(r"(\[[^\]]*\])", item)]
        hosts += ["".join(parts) for parts in itertools.product(*pieces)]
    return hosts


def _expand_range(piece: str) -> list[str]:
    if not piece.startswith("["):
        return [piece]
    names: list[str] = []
    for part in piece[1:-1].split(","):
        first, _, last = part.partition("-")
        names += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return names


def choose_gpu(info: LaunchInfo, visible: int, cards: Sequence[str]) -> int:
    """The index of this process's GPU among the `visible` ones.

    `cards` names, per rank, the only GPU that rank can see ("" if it sees several or none): with
    `srun --gpus-per-task=1` each process has a GPU of its own as number 0, and the names tell this
    from sharing.

    Raises:
        ValueError: more local processes than visible GPUs.
    """
    if info.local_world <= visible:
        return info.local_rank
    if visible == 1 and cards.count(cards[info.rank]) == 1:
        return 0
    script = os.path.basename(sys.argv[0]) or "script.py"
    start = {
        "torchrun": f"torchrun --nproc_per_node {visible} {script}",
        "slurm": f"srun --ntasks-per-node={visible} python {script}",
    }
    command = start.get(info.launcher, f"mpiexec -n {visible} python {script}")
    raise ValueError(
        f"{info.local_world} processes on this machine but {visible} visible GPU(s): "
        f"each process needs one of its own. Start {visible} per machine: {command}"
    )
