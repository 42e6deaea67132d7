"""From separate processes to one process group."""

from __future__ import annotations

import atexit
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from .. import early_signals
from . import endings, parent, watchdog
from .interfaces import choose_gloo_interface, route
from .launcher import Env, LaunchInfo, choose_gpu, has_master, launch_info, number, slurm_address

# Dead ranks are the watchdog's business. What is left to collectives is ranks that live but do not
# agree on what comes next, and a limit for that has to let one rank work while the others wait
# (scores of 50,000 images, a file of gigabytes): NCCL's own 10 minutes can be too short, so gloo's
# 30 are taken for both.
_COLLECTIVE_S = 1800.0
_START_S = 300.0
_FIRST_WORD_S = 10.0  # of waiting in silence

# Called with (timeout, group): a group is connected within the limit of the start, and has the
# longer one of collectives from then on. Public since PyTorch 2.15, where the private name warns;
# where there is neither, the longer limit holds for both.
_set_limit: Callable[..., None] | None = getattr(dist, "set_timeout", None) or getattr(
    dist.distributed_c10d, "_set_pg_timeout", None
)

# Outlives cleanup(): a second setup_dist() must find the other ranks again, and MPI is asked once.
_meeting: tuple[str, dist.Store] | None = None
_setups = 0
_device: torch.device | None = None
_control: dist.ProcessGroup | None = None


def setup_dist(timeout_s: float | None = None) -> None:
    """Creates the process group, for a single process too: NCCL where there is CUDA and it, else
    gloo.

    Where a group exists already, does nothing. The GPU is `cuda:{local_rank}` among the visible
    ones; CUDA_VISIBLE_DEVICES is left alone. `timeout_s` limits the wait for the other ranks and
    for one first collective; without it GUIDED_DIFFUSION_IP_START_TIMEOUT does (300). After ten
    seconds of waiting, a line on stderr says who is missing.

    From then on a rank that dies or fails ends the others (watchdog.py), and so does one that is
    silent for GUIDED_DIFFUSION_IP_TIMEOUT seconds (300). The end of torchrun or mpiexec counts as a
    SIGTERM (parent.py). The limit of a later collective is 30 minutes, or that variable where it is
    more: ranks that are alive may have reason to wait.

    Raises:
        ValueError: contradictory environment, one of the two variables no number of seconds, more
            local processes than visible GPUs, mpi4py missing or of another MPI than mpiexec, or a
            port that is taken.
        TimeoutError: ranks are missing; it names them. Or they cannot exchange data.
    """
    global _meeting, _setups, _device
    if timeout_s is None:
        timeout_s = _start_limit(os.environ)
    if not timeout_s > 0:
        raise ValueError(f"timeout_s is {timeout_s}, must be positive (seconds)")
    if dist.is_initialized():
        return
    limit_s = watchdog.silence_limit(os.environ)
    info = launch_info()
    parent.watch(info)
    if _meeting is None:
        _meeting = _meet(info, os.environ, timeout_s)
        atexit.register(_cleanup_at_exit)
    host, base = _meeting
    # Without a prefix, restarted workers and repeated setups would read what went before.
    _setups += 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"setup{attempt}.{_setups}", base)
    cards, seen = _check_in(info, store, host, timeout_s)
    port = getattr(base, "port", 0)  # the store of a single process has none
    if info.world > 1:
        watchdog.start(info.rank, info.world, store, host, port, limit_s)
    choose_gloo_interface(host, port, seen)
    _device = torch.device("cpu")
    if torch.cuda.is_available():
        _device = torch.device("cuda", choose_gpu(info, torch.cuda.device_count(), cards))
        torch.cuda.set_device(_device)
    _open_groups(info, store, timeout_s, timedelta(seconds=max(_COLLECTIVE_S, limit_s)))


def _open_groups(info: LaunchInfo, store: dist.Store, timeout_s: float, limit: timedelta) -> None:
    """The process group, and beside NCCL one of gloo for what the host alone decides; tries both.

    Raises:
        TimeoutError: the ranks cannot exchange data.
    """
    global _control
    backend = _backend()
    # Naming the device lets barrier() and object collectives of existing scripts find it.
    place = _device if backend == "nccl" else None
    start = timedelta(seconds=timeout_s) if _set_limit else limit
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=info.rank,
            world_size=info.world,
            timeout=start if backend == "gloo" else limit,
            device_id=place,
        )
        if info.world > 1:
            if backend != "gloo":
                _control = dist.new_group(backend="gloo", timeout=start)
            _first_collective(timeout_s)
    except RuntimeError as error:
        if info.world == 1:
            raise
        name = os.environ.get("GLOO_SOCKET_IFNAME")
        raise TimeoutError(
            f"all {info.world} ranks joined, but their first exchange of data "
            f"failed within {timeout_s:g} s ({_first_line(error)}). Set "
            f"GLOO_SOCKET_IFNAME ({f'here: {name}' if name else 'not set'}) on each "
            f"machine to the interface that leads to the others. With NCCL, try "
            f"NCCL_P2P_DISABLE=1, or NCCL_SOCKET_IFNAME=<network interface>; "
            f"NCCL_DEBUG=INFO shows where it stops."
        ) from None
    for group in (dist.group.WORLD, _control):
        if _set_limit and group is not None and dist.get_backend(group) == "gloo":
            _set_limit(limit, group)


def _backend() -> str:
    # PyTorch for Windows, and some builds for Linux, have CUDA but no NCCL.
    return "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def _start_limit(env: Env) -> float:
    text = env.get("GUIDED_DIFFUSION_IP_START_TIMEOUT") or str(_START_S)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise ValueError(
            f"environment variable GUIDED_DIFFUSION_IP_START_TIMEOUT is {text!r}, must "
            f"be a number of seconds above 0: how long ranks wait for each other at the "
            f"start (unset: {_START_S:g})"
        )
    return limit


def control_group() -> dist.ProcessGroup | None:
    """The gloo group for what hosts agree on; None: the process group, which is of gloo itself."""
    global _control
    if _control is None and dist.get_backend() != "gloo":  # somebody else made the process group
        _control = dist.new_group(backend="gloo")
    return _control


def get_rank() -> int:
    """The number of this process, 0..world - 1; before setup_dist(), as the environment says."""
    return dist.get_rank() if dist.is_initialized() else launch_info().rank


def get_world_size() -> int:
    """The number of processes; before setup_dist(), as the environment says."""
    return dist.get_world_size() if dist.is_initialized() else launch_info().world


def is_main() -> bool:
    """Is this the process that prints and writes files?"""
    return get_rank() == 0


def say(text: str) -> None:
    """Print on one rank."""
    if is_main():
        print(text, flush=True)


def dev() -> torch.device:
    """This process's device: `cuda:{local_rank}`, or the CPU where CUDA is not available.

    Raises:
        ValueError: before setup_dist(), if there are fewer visible GPUs than local processes.
    """
    if _device is not None:
        return _device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    info = launch_info()
    return torch.device("cuda", choose_gpu(info, torch.cuda.device_count(), [""] * info.world))


def cleanup() -> None:
    """Ends this rank's part: says goodbye to the others, destroys the process group if there is
    one.

    (NCCL warns about groups left at exit.)
    """
    global _device, _control
    _device = _control = None
    watchdog.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def _cleanup_at_exit() -> None:
    error = getattr(sys, "last_value", None)
    if error is None:
        cleanup()
        return
    # Others may wait for us in a collective: no cleanup, which could wait for them.
    if watchdog.current():
        if other := endings.blame(error):
            print(f"error: {other}", file=sys.stderr)
        if hasattr(signal, "alarm"):
            # Whatever holds up what follows (communicators with dead peers), the system ends it.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(15)


def _card_name() -> str:
    """Names the only visible GPU, so that the ranks can tell whether they share it."""
    if torch.cuda.device_count() != 1:
        return ""
    uuid = torch.cuda.get_device_properties(0).uuid
    return f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {uuid}"


def _meet(info: LaunchInfo, env: Env, timeout_s: float) -> tuple[str, dist.Store]:
    """The address and the key-value store through which the ranks find each other.

    On one machine the address is 127.0.0.1, so that a machine which cannot look up its own name
    works as well.
    """
    if info.world == 1:
        return "127.0.0.1", dist.HashStore()
    serve = info.rank == 0
    if has_master(env):
        host, port = env["MASTER_ADDR"], number(env, "MASTER_PORT")
        if info.launcher == "torchrun":
            if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
                host = "127.0.0.1"
            # torchrun may keep the store itself, so that it outlives failed workers.
            serve = serve and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    elif info.launcher == "slurm":
        host, port = slurm_address(env)
    elif info.launcher == "torchrun":
        raise ValueError(
            f"RANK={info.rank} and WORLD_SIZE={info.world} are set, MASTER_ADDR and "
            f"MASTER_PORT are not both: set them, or start with torchrun."
        )
    else:
        return _meet_by_mpi(info, timeout_s)
    return host, _tcp_store(info, host, port, serve, timeout_s)


def _meet_by_mpi(info: LaunchInfo, timeout_s: float) -> tuple[str, dist.Store]:
    """Rank 0 opens a store on a free port and tells the others by one MPI broadcast."""
    scripts_own = "mpi4py.MPI" in sys.modules
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library behind the wheel
        raise ValueError(
            f"mpiexec started {info.world} processes, but mpi4py is not usable "
            f'({_first_line(error)}). Either pip install "guided_diffusion_ip[mpi]", '
            f"or set MASTER_ADDR and MASTER_PORT, or start with "
            f"torchrun --nproc_per_node {info.world}."
        ) from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() != info.world:
        beside = os.path.join(sys.prefix, "bin", "mpiexec")
        use = beside if os.path.exists(beside) else "the mpiexec of that MPI"
        raise ValueError(
            f"mpiexec says {info.world} processes, MPI says {comm.Get_size()}: "
            f"mpiexec and mpi4py belong to different MPIs, mpi4py's is "
            f"{MPI.Get_library_version().splitlines()[0]}. Start with {use}, or with "
            f"torchrun --nproc_per_node {info.world}."
        )
    one_machine = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == info.world
    place = store = None
    if info.rank == 0:
        host = "127.0.0.1" if one_machine else _own_address()
        # Port 0: the system picks a free one while opening it; nobody can take it in between.
        store = _tcp_store(info, host, 0, True, timeout_s)
        place = host, store.port
    host, port = comm.bcast(place)
    if not scripts_own:
        # At exit MPI waits for all ranks: one that fails would hang instead of ending the job.
        MPI.Finalize()
    return host, store or _tcp_store(info, host, port, False, timeout_s)


def _own_address() -> str:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name
    # Debian maps the own name to 127.0.1.1, which other machines cannot use.
    return name if address.startswith("127.") else address


def _tcp_store(
    info: LaunchInfo, host: str, port: int, serve: bool, timeout_s: float
) -> dist.TCPStore:
    if not serve:
        _await_store(info, host, port, timeout_s)
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=serve,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        if serve:
            raise ValueError(
                f"rank 0 cannot listen on {host}:{port} ({_first_line(error)}): set "
                f"MASTER_PORT to a free port."
            ) from None
        raise _missing(info, [0], host, timeout_s) from None


def _await_store(info: LaunchInfo, host: str, port: int, timeout_s: float) -> None:
    """Until somebody listens at host:port. (PyTorch's own wait ignores Ctrl-C and prints.)"""
    wait = _Wait(info, host, timeout_s)
    while True:
        try:
            return socket.create_connection((host, port), timeout=5).close()
        except OSError:
            # One rank of a machine speaks for all of them: they do not know of each other yet.
            wait.go_on(lambda: [0], lambda _: info.local_rank == 0)
        time.sleep(0.2)


def _check_in(
    info: LaunchInfo, store: dist.Store, host: str, timeout_s: float
) -> tuple[list[str], list[str]]:
    """Each rank signs in and waits for all.

    Returns: in rank order, the GPU name each brought, and the address that `host` has for it.
    """
    keys = [f"rank{rank}" for rank in range(info.world)]

    def absent() -> list[int]:
        return [rank for rank, key in enumerate(keys) if not store.check([key])]

    def is_first_here(missing: list[int]) -> bool:
        return info.rank not in missing and set(range(info.rank)) <= set(missing)

    wait = _Wait(info, host, timeout_s)
    try:
        store.set(keys[info.rank], f"{_card_name()}\n{route(host, 0)[0]}")
        # One key to look for, not one for each rank. A rank that was started again counts twice.
        if store.add("signed in", 1) >= info.world and not absent():
            store.set("all", "")
        while not store.check(["all"]):  # store.wait warns when it ends, and lets no signal through
            wait.go_on(absent, is_first_here)
            time.sleep(0.1)
        cards, seen = zip(*(store.get(key).decode().split("\n") for key in keys))
        return list(cards), list(seen)
    except RuntimeError:  # rank 0, which keeps the store, has gone: its own message says why
        raise _missing(info, [0], host, timeout_s) from None


class _Wait:
    """A wait for other ranks that ends after timeout_s, and is not silent."""

    def __init__(self, info: LaunchInfo, host: str, timeout_s: float) -> None:
        self._info, self._host, self._timeout_s = info, host, timeout_s
        self._start, self._speak_at = time.monotonic(), _FIRST_WORD_S

    def go_on(self, absent: Callable[[], list[int]], speaks: Callable[[list[int]], bool]) -> None:
        """Called now and then; after 10 s, 20 s, 40 s, ... says who is awaited, if this rank
        speaks.

        Raises:
            TimeoutError: it has been long enough.
        """
        early_signals.end_if_terminated()
        passed = time.monotonic() - self._start
        if passed >= self._timeout_s:
            raise _missing(self._info, absent(), self._host, self._timeout_s)
        if passed >= self._speak_at:
            self._speak_at *= 2
            missing = absent()
            if missing and speaks(missing):
                print(
                    f"rank {self._info.rank} has been waiting for {_ranks(missing)} of "
                    f"{self._info.world} at {self._host} for {passed:.0f} s (the limit is "
                    f"{self._timeout_s:g} s: GUIDED_DIFFUSION_IP_START_TIMEOUT)",
                    file=sys.stderr,
                    flush=True,
                )


def _missing(info: LaunchInfo, absent: list[int], host: str, timeout_s: float) -> TimeoutError:
    ranks = _ranks(absent)
    return TimeoutError(
        f"{ranks} of {info.world} did not answer at {host} within {timeout_s:g} s "
        f"(launcher: {info.launcher}; this is rank {info.rank}). See the output of "
        f"{ranks}; start the same command on every machine; between machines, let "
        f"TCP connections through. GUIDED_DIFFUSION_IP_START_TIMEOUT sets the limit."
    )


def _ranks(numbers: list[int]) -> str:
    some = ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {some}"


def _first_collective(timeout_s: float) -> None:
    """Fails in finite time where ranks can meet but not exchange data; tells whether all are
    watched.
    """
    me = watchdog.current()
    watched = torch.full((1,), int(me is not None), device=_device)
    work = dist.all_reduce(watched, async_op=True)
    work.wait(timedelta(seconds=timeout_s))
    if me is not None:
        me.watches_all = int(watched) == dist.get_world_size()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
