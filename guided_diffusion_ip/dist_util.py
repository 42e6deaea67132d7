"""One process or many: who started us, how the processes meet, and what they say to each other.

Scripts call `setup_dist()` once, then use `dev()`, `get_rank()` and the collectives below, or torch.distributed
itself. torchrun, srun, mpiexec and plain `python` are told apart by their environment variables alone; this is the
only file that imports mpi4py, and it does so only when mpiexec started us without saying where to meet.
"""
from __future__ import annotations

import atexit
import hashlib
import io
import itertools
import os
import pickle
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Env = Mapping[str, str]
T = TypeVar("T")

_BUCKET_BYTES = 32 << 20
# Outlives cleanup(): a second setup_dist() must find the other ranks again, and MPI can be asked only once.
_meeting: tuple[str, dist.Store] | None = None
_setups = 0
_device: torch.device | None = None


# ---- Who started us -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LaunchInfo:
    """This process's place among the processes started together.

    `local_world` is the number of them on this machine; where the launcher does not say, the least it can be.
    """

    launcher: str
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world and 0 <= self.local_rank < self.local_world):
            raise ValueError(f"contradictory environment: {self}; ranks must lie in [0, world). Unset the "
                             f"variables left over from another job, or start with torchrun or mpiexec.")


def launch_info(env: Env = os.environ) -> LaunchInfo:
    """Reads the place of this process from the variables its launcher set.

    mpiexec's own variables come before Slurm's: mpiexec inside a Slurm job sees both, and Slurm's then describe the
    job or mpiexec's helper rather than us.

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


def _number(env: Env, name: str, default: int | None = None) -> int:
    text = env.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise ValueError(f"environment variable {name} is {text!r}, must be a whole number; it is set by "
                         f"the program that starts the processes (torchrun, srun, mpiexec).") from None


def _has_master(env: Env) -> bool:
    return bool(env.get("MASTER_ADDR") and env.get("MASTER_PORT"))


def _read_torchrun(env: Env) -> LaunchInfo | None:
    if not ("RANK" in env and "WORLD_SIZE" in env and ("TORCHELASTIC_RUN_ID" in env or _has_master(env))):
        return None
    rank = _number(env, "RANK")
    # Without LOCAL_RANK: one process per pod (Kubeflow), or processes started by hand on one machine.
    by_hand = env.get("MASTER_ADDR", "").startswith("127.") or env.get("MASTER_ADDR") == "localhost"
    local = _number(env, "LOCAL_RANK", rank if by_hand else 0)
    return LaunchInfo("torchrun", rank, _number(env, "WORLD_SIZE"), local,
                      _number(env, "LOCAL_WORLD_SIZE", local + 1))


def _read_openmpi(env: Env) -> LaunchInfo | None:
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    local = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0)
    return LaunchInfo("openmpi", _number(env, "OMPI_COMM_WORLD_RANK"), _number(env, "OMPI_COMM_WORLD_SIZE"),
                      local, _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", local + 1))


def _read_mpich(env: Env) -> LaunchInfo | None:
    # MPI_LOCALRANKID is what tells mpiexec (MPICH, Intel MPI) from srun, which may set PMI_RANK as well.
    if not ("PMI_RANK" in env and "MPI_LOCALRANKID" in env):
        return None
    local = _number(env, "MPI_LOCALRANKID")
    return LaunchInfo("mpich", _number(env, "PMI_RANK"), _number(env, "PMI_SIZE"),
                      local, _number(env, "MPI_LOCALNRANKS", local + 1))


def _read_slurm(env: Env) -> LaunchInfo | None:
    # A job script has SLURM_PROCID=0 and SLURM_NTASKS=N too, although it runs once; only srun makes a step.
    if not ("SLURM_STEP_ID" in env and "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env):
        return None
    world, local = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_LOCALID", 0)
    layout = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", layout):  # "4(x2),3" is 4, 4, 3
        counts += [int(count)] * int(times or 1)
    node = _number(env, "SLURM_NODEID", 0)
    local_world = counts[node] if sum(counts) == world and node < len(counts) else local + 1
    return LaunchInfo("slurm", _number(env, "SLURM_PROCID"), world, local, local_world)


def _read_pmi(env: Env) -> LaunchInfo | None:
    """A process manager that numbers ranks but says nothing about machines: take all to be on this one."""
    for rank_name, size_name in (("PMI_RANK", "PMI_SIZE"), ("PMIX_RANK", "WORLD_SIZE")):
        if rank_name in env:
            if size_name not in env:
                raise ValueError(f"{rank_name}={env[rank_name]} is set, but nothing says how many processes there "
                                 f"are: set {size_name}, or unset {rank_name} to run a single process.")
            rank, world = _number(env, rank_name), _number(env, size_name)
            return LaunchInfo("pmi", rank, world, _number(env, "LOCAL_RANK", rank),
                              _number(env, "LOCAL_WORLD_SIZE", world))
    return None


def expand_nodelist(text: str) -> list[str]:
    """Slurm's short form of host names: `node[01-03,07],other` is node01, node02, node03, node07, other."""
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


# ---- How the processes meet -----------------------------------------------------------------------------------

def setup_dist(timeout_s: float = 300) -> None:
    """Creates the process group (NCCL with CUDA, else gloo), for a single process too. Again: does nothing.

    The GPU is `cuda:{local_rank}` among the visible ones; CUDA_VISIBLE_DEVICES is left alone. `timeout_s` limits the
    wait for the other ranks and for one first collective; later collectives have PyTorch's own limits.

    Raises:
        ValueError: contradictory environment, more local processes than visible GPUs, mpi4py missing or of
            another MPI than mpiexec, or a port that is taken.
        TimeoutError: ranks are missing; it names them.
    """
    global _meeting, _setups, _device
    if dist.is_initialized():
        return
    if not timeout_s > 0:
        raise ValueError(f"timeout_s is {timeout_s}, must be positive (seconds)")
    info = launch_info()
    if _meeting is None:
        _meeting = _meet(info, os.environ, timeout_s)
    host, store = _meeting
    # Restarted workers and repeated setups would otherwise read what their predecessors wrote.
    _setups += 1
    store = dist.PrefixStore(f"setup{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{_setups}", store)
    cards = _check_in(info, store, host, timeout_s, _card_name())
    if torch.cuda.is_available():
        _device = torch.device("cuda", choose_gpu(info, torch.cuda.device_count(), cards))
        torch.cuda.set_device(_device)
        dist.init_process_group("nccl", store=store, rank=info.rank, world_size=info.world, device_id=_device)
    else:
        _device = torch.device("cpu")
        if host.startswith("127."):
            _keep_gloo_local()
        dist.init_process_group("gloo", store=store, rank=info.rank, world_size=info.world)
    if info.world > 1:
        _first_collective(info, timeout_s)
    atexit.register(_cleanup_at_exit)


def choose_gpu(info: LaunchInfo, visible: int, cards: list[str]) -> int:
    """The index of this process's GPU among the `visible` ones.

    `cards` names, per rank, the only GPU that rank can see: `srun --gpus-per-task=1` shows each process its own
    GPU as number 0, and then sharing can be told from the names alone.

    Raises:
        ValueError: more local processes than visible GPUs.
    """
    if info.local_world <= visible:
        return info.local_rank
    if visible == 1 and cards.count(cards[info.rank]) == 1:
        return 0
    script = os.path.basename(sys.argv[0]) or "script.py"
    command = {"torchrun": f"torchrun --nproc_per_node {visible} {script}",
               "slurm": f"srun --ntasks-per-node={visible} python {script}"}
    raise ValueError(f"{info.local_world} processes on this machine but {visible} visible GPU(s): one process needs "
                     f"one GPU. Start {visible} per machine: "
                     f"{command.get(info.launcher, f'mpiexec -n {visible} python {script}')}")


def _card_name() -> str:
    if torch.cuda.device_count() != 1:
        return ""
    uuid = torch.cuda.get_device_properties(0).uuid
    return f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {uuid}"


def _meet(info: LaunchInfo, env: Env, timeout_s: float) -> tuple[str, dist.Store]:
    """The address and the key-value store through which the ranks find each other. 127.0.0.1 on one machine, so that
    a machine that cannot look up its own name does not matter."""
    if info.world == 1:
        return "127.0.0.1", dist.HashStore()
    serve = info.rank == 0
    if _has_master(env):
        host, port = env["MASTER_ADDR"], _number(env, "MASTER_PORT")
        if info.launcher == "torchrun":
            if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
                host = "127.0.0.1"
            serve = serve and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    elif info.launcher == "slurm":
        host, port = slurm_address(env)
    elif info.launcher == "torchrun":
        raise ValueError(f"RANK={info.rank} of WORLD_SIZE={info.world}, but MASTER_ADDR and MASTER_PORT are not "
                         f"both set: set them, or start with torchrun.")
    else:
        return _meet_by_mpi(info, timeout_s)
    return host, _tcp_store(info, host, port, serve, timeout_s)


def slurm_address(env: Env) -> tuple[str, int]:
    """Host and port that every task of a Slurm step works out alike: its first node, and a port from the ids.

    Raises:
        ValueError: Slurm did not say which nodes the step has.
    """
    hosts = expand_nodelist(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
    if not hosts:
        raise ValueError("SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are both empty: set MASTER_ADDR to the name of "
                         "the first node and MASTER_PORT to a free port.")
    # Below 32768, where systems begin to hand out ports by themselves.
    port = 15000 + (31 * _number(env, "SLURM_JOB_ID", 0) + _number(env, "SLURM_STEP_ID", 0)) % 16000
    return ("127.0.0.1" if len(hosts) == 1 else hosts[0]), port


def _meet_by_mpi(info: LaunchInfo, timeout_s: float) -> tuple[str, dist.Store]:
    scripts_own = "mpi4py.MPI" in sys.modules
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library behind the wheel
        raise ValueError(f'mpiexec started {info.world} processes, but mpi4py cannot be used ({error}). Either pip '
                         f'install "guided_diffusion_ip[mpi]", or set MASTER_ADDR and MASTER_PORT, or start with '
                         f'torchrun --nproc_per_node {info.world}.') from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() != info.world:
        beside = os.path.join(sys.prefix, "bin", "mpiexec")
        use = beside if os.path.exists(beside) else "the mpiexec of that MPI"
        raise ValueError(f"mpiexec says {info.world} processes, MPI says {comm.Get_size()}: mpiexec and mpi4py belong "
                         f"to different MPIs. mpi4py loads {MPI.Get_library_version().splitlines()[0]}. Start with "
                         f"{use}, or with torchrun --nproc_per_node {info.world}.")
    one_machine = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == info.world
    place = None
    if info.rank == 0:
        host = "127.0.0.1" if one_machine else _own_address()
        # Port 0: the system picks a free one while opening it, so that nobody can take it in between.
        store = _tcp_store(info, host, 0, True, timeout_s)
        place = host, store.port
    host, port = comm.bcast(place)
    if not scripts_own:
        # MPI's finalisation at exit waits for all ranks: a rank that fails would then hang instead of ending the job.
        MPI.Finalize()
    return host, store if info.rank == 0 else _tcp_store(info, host, port, False, timeout_s)


def _own_address() -> str:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name
    # Debian maps the own name to 127.0.1.1, which other machines cannot use.
    return name if address.startswith("127.") else address


def _tcp_store(info: LaunchInfo, host: str, port: int, serve: bool, timeout_s: float) -> dist.TCPStore:
    try:
        return dist.TCPStore(host, port, is_master=serve, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        if serve:
            raise ValueError(f"rank 0 cannot listen on {host}:{port} ({_first_line(error)}): set MASTER_PORT to a free "
                             f"port.") from None
        raise _missing(info, [0], host, timeout_s) from None


def _check_in(info: LaunchInfo, store: dist.Store, host: str, timeout_s: float, card: str) -> list[str]:
    """Each rank signs in and waits for all others. Returns what each of them brought, in rank order."""
    keys = [f"rank{rank}" for rank in range(info.world)]
    try:
        store.set(keys[info.rank], card)
        store.wait(keys, timedelta(seconds=timeout_s))
        return [store.get(key).decode() for key in keys]
    except RuntimeError:
        pass
    try:
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:  # rank 0, which keeps the store, has gone: its own message says why
        absent = [0]
    raise _missing(info, absent, host, timeout_s)


def _missing(info: LaunchInfo, absent: list[int], host: str, timeout_s: float) -> TimeoutError:
    ranks = ("ranks " if len(absent) > 1 else "rank ") + ", ".join(map(str, absent))
    return TimeoutError(f"{ranks} of {info.world} did not answer at {host} within {timeout_s:g} s (started by "
                        f"{info.launcher}; this is rank {info.rank}). See the output of {ranks}; start the same command "
                        f"on every machine; between machines, let TCP connections through.")


def _first_collective(info: LaunchInfo, timeout_s: float) -> None:
    """Fails in finite time, and with advice, where the ranks can meet but not exchange data."""
    try:
        work = dist.all_reduce(torch.ones(1, device=_device), async_op=True)
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise TimeoutError(f"all {info.world} ranks joined, but the first exchange of data failed within {timeout_s:g} s "
                           f"({_first_line(error)}). With NCCL, try NCCL_P2P_DISABLE=1, or NCCL_SOCKET_IFNAME=<network "
                           f"interface>; NCCL_DEBUG=INFO shows where it stops.") from None


def _keep_gloo_local() -> None:
    # By default gloo looks up this machine's name, which may fail or take long.
    if "GLOO_SOCKET_IFNAME" not in os.environ and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def cleanup() -> None:
    """Destroys the process group, if there is one: NCCL warns about groups left at exit."""
    global _device
    _device = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _cleanup_at_exit() -> None:
    # After an exception the other ranks may be waiting inside a collective; only leaving at once ends the job.
    if not hasattr(sys, "last_value"):
        cleanup()
