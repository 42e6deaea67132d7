"""One process or many: who started us, how the processes meet, and what they say to each other.

Scripts call `setup_dist()` first, then `dev()`, `get_rank()` and the collectives below, or
torch.distributed itself, and `cleanup()` last.

    launcher     the environment -> rank and world (torchrun, srun, mpiexec, nobody)
    rendezvous   the process group; the only file that imports mpi4py
    watchdog     a rank that dies or fails ends all others, which say who it was
    parent       a launcher that is gone ends its ranks, as a SIGTERM would
    endings      an error in one of several processes -> what it says, tells and exits with
    collectives  gather, broadcast, agree
    loading      a checkpoint file -> tensors, never code
"""

from .collectives import (
    all_gather_objects,
    all_gather_rows,
    all_gather_tensor,
    any_rank,
    barrier,
    broadcast_object,
    check_in_sync,
    from_main,
    start_gather,
    sync_params,
)
from .endings import end_process
from .launcher import LaunchInfo, env_rank, launch_info
from .loading import load_state_dict, load_state_dict_once
from .rendezvous import cleanup, dev, get_rank, get_world_size, is_main, say, setup_dist
from .watchdog import absent_ranks, report_failure

__all__ = [
    "LaunchInfo",
    "absent_ranks",
    "all_gather_objects",
    "all_gather_rows",
    "all_gather_tensor",
    "any_rank",
    "barrier",
    "broadcast_object",
    "check_in_sync",
    "cleanup",
    "dev",
    "end_process",
    "env_rank",
    "from_main",
    "get_rank",
    "get_world_size",
    "is_main",
    "launch_info",
    "load_state_dict",
    "load_state_dict_once",
    "report_failure",
    "say",
    "setup_dist",
    "start_gather",
    "sync_params",
]
