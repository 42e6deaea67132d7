"""dist_util: launchers as a table of environments, then real processes under two launchers."""

import os
import pickle
import socket
import sys
import textwrap
import types
from concurrent.futures import ThreadPoolExecutor

import launch
import pytest
import torch

from guided_diffusion_ip import dist_util, logger
from guided_diffusion_ip.dist_util import rendezvous
from guided_diffusion_ip.dist_util.launcher import (
    LaunchInfo,
    choose_gpu,
    expand_nodelist,
    slurm_address,
)


def torchrun_env(rank, world, local_rank, local_world, **more):
    return {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_world,
        "TORCHELASTIC_RUN_ID": "none",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": 29500,
        **more,
    }


def openmpi_env(rank, world, local_rank, local_world, **more):
    return {
        "OMPI_COMM_WORLD_RANK": rank,
        "OMPI_COMM_WORLD_SIZE": world,
        "PMIX_RANK": rank,
        "OMPI_COMM_WORLD_LOCAL_RANK": local_rank,
        "OMPI_COMM_WORLD_LOCAL_SIZE": local_world,
        **more,
    }


BATCH = {
    "SLURM_JOB_ID": 71,
    "SLURM_PROCID": 0,
    "SLURM_LOCALID": 0,
    "SLURM_NTASKS": 8,
    "SLURM_NODEID": 0,
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "n[1-2]",
}
SRUN = {
    **BATCH,
    "SLURM_PROCID": 5,
    "SLURM_LOCALID": 1,
    "SLURM_NODEID": 1,
    "SLURM_STEP_ID": 0,
    "SLURM_STEP_NUM_TASKS": 8,
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}

LAUNCHES = {
    "plain python": ({}, LaunchInfo("none", 0, 1, 0, 1)),
    "torchrun": (torchrun_env(5, 8, 1, 4), LaunchInfo("torchrun", 5, 8, 1, 4)),
    "by hand": (
        {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1},
        LaunchInfo("torchrun", 1, 2, 1, 2),
    ),
    "one process per pod": (
        {"RANK": 3, "WORLD_SIZE": 4, "MASTER_ADDR": "job-0", "MASTER_PORT": 1},
        LaunchInfo("torchrun", 3, 4, 0, 1),
    ),
    "stale RANK without a place to meet": ({"WORLD_SIZE": 2, "RANK": 0}, LaunchInfo("none")),
    "srun": (SRUN, LaunchInfo("slurm", 5, 8, 1, 4)),
    "srun, uneven nodes": (
        {
            **SRUN,
            "SLURM_STEP_NUM_TASKS": 11,
            "SLURM_PROCID": 9,
            "SLURM_NODEID": 2,
            "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
        },
        LaunchInfo("slurm", 9, 11, 1, 3),
    ),
    "srun of a part of the job": (
        {
            **BATCH,
            "SLURM_STEP_ID": 1,
            "SLURM_STEP_NUM_TASKS": 2,
            "SLURM_PROCID": 1,
            "SLURM_LOCALID": 1,
        },
        LaunchInfo("slurm", 1, 2, 1, 2),
    ),
    "python in a job script": (BATCH, LaunchInfo("none")),
    "python in salloc's shell": (
        {**BATCH, "SLURM_STEP_ID": 4294967290, "SLURM_STEP_NUM_TASKS": 1},
        LaunchInfo("slurm", 0, 1, 0, 1),
    ),
    "torchrun inside srun": (
        {**SRUN, **torchrun_env(2, 4, 0, 2)},
        LaunchInfo("torchrun", 2, 4, 0, 2),
    ),
    "Open MPI": (openmpi_env(3, 4, 1, 2), LaunchInfo("openmpi", 3, 4, 1, 2)),
    "Open MPI inside a job script": (
        {**BATCH, **openmpi_env(3, 8, 3, 4)},
        LaunchInfo("openmpi", 3, 8, 3, 4),
    ),
    "Open MPI inside a step": (
        {**SRUN, **openmpi_env(3, 4, 3, 4)},
        LaunchInfo("openmpi", 3, 4, 3, 4),
    ),
    "MPICH": (
        {"PMI_RANK": 1, "PMI_SIZE": 2, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2},
        LaunchInfo("mpich", 1, 2, 1, 2),
    ),
    "MPICH inside Slurm, started through a step of one task per node": (
        {
            **BATCH,
            "SLURM_STEP_ID": 0,
            "SLURM_STEP_NUM_TASKS": 2,
            "PMI_RANK": 6,
            "PMI_SIZE": 8,
            "MPI_LOCALRANKID": 2,
            "MPI_LOCALNRANKS": 4,
        },
        LaunchInfo("mpich", 6, 8, 2, 4),
    ),
    "srun --mpi=pmi2": ({**SRUN, "PMI_RANK": 5, "PMI_SIZE": 8}, LaunchInfo("slurm", 5, 8, 1, 4)),
    "PMI without machines": ({"PMI_RANK": 1, "PMI_SIZE": 4}, LaunchInfo("pmi", 1, 4, 1, 4)),
    "PMIx": ({"PMIX_RANK": 1, "WORLD_SIZE": 4}, LaunchInfo("pmi", 1, 4, 1, 4)),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launchers_are_told_apart_by_their_environment(name, monkeypatch):
    env, expected = LAUNCHES[name]
    env = {key: str(value) for key, value in env.items()}
    assert dist_util.launch_info(env) == expected
    assert dist_util.env_rank(env) == expected.rank
    if "stale" not in name:  # the logger must agree on who prints
        monkeypatch.setattr(os, "environ", env)
        assert logger.get_rank_without_mpi_import() == expected.rank


@pytest.mark.parametrize(
    "env, words",
    [
        (torchrun_env("x", 2, 0, 1), ["RANK", "'x'"]),
        (torchrun_env(2, 2, 0, 1), ["rank=2", "world=2"]),
        ({"OMPI_COMM_WORLD_RANK": 1}, ["OMPI_COMM_WORLD_SIZE"]),
        ({"PMIX_RANK": 1}, ["PMIX_RANK", "WORLD_SIZE"]),
    ],
)
def test_contradictory_environments_are_errors(env, words):
    with pytest.raises(ValueError) as caught:
        dist_util.launch_info({key: str(value) for key, value in env.items()})
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("node1", ["node1"]),
        ("node[01-03,07],other", ["node01", "node02", "node03", "node07", "other"]),
        ("a,b", ["a", "b"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]-ib", ["n098-ib", "n099-ib", "n100-ib", "n101-ib"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("", []),
    ],
)
def test_nodelists_expand(text, hosts):
    assert expand_nodelist(text) == hosts


def test_slurm_ranks_agree_on_an_address():
    env = {
        "SLURM_JOB_ID": "4000123",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NODELIST": "gpu[07-09]",
        "SLURM_JOB_NODELIST": "gpu[01-09]",
    }
    host, port = slurm_address(env)
    assert host == "gpu07" and 15000 <= port < 32768
    assert slurm_address({**env, "SLURM_STEP_ID": "3"}) != (host, port)
    assert slurm_address({"SLURM_JOB_NODELIST": "gpu3"})[0] == "127.0.0.1"
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        slurm_address({})


def test_gpus():
    def gpu(visible, cards=("",) * 4, local_rank=1, local_world=4, launcher="openmpi"):
        info = LaunchInfo(launcher, local_rank, 4, local_rank, local_world)
        return choose_gpu(info, visible, list(cards))

    assert gpu(4) == 1 and gpu(8) == 1
    assert gpu(1, cards="abcd") == 0  # srun --gpus-per-task=1: to each its own
    for launcher, command in (
        ("openmpi", "mpiexec -n 2 python"),
        ("torchrun", "torchrun --nproc_per_node 2"),
        ("slurm", "srun --ntasks-per-node=2"),
    ):
        with pytest.raises(ValueError) as caught:
            gpu(2, launcher=launcher)
        assert "4 processes" in str(caught.value) and "2 visible" in str(caught.value)
        assert command in str(caught.value)
    with pytest.raises(ValueError, match="4 processes on this machine but 1 visible"):
        gpu(1, cards="aabc")


@pytest.mark.parametrize(
    "cuda, nccl, backend", [(True, True, "nccl"), (True, False, "gloo"), (False, True, "gloo")]
)
def test_nccl_is_taken_where_there_is_one(cuda, nccl, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    assert rendezvous._backend() == backend


# ---- one process ----


def test_a_single_process_has_a_group_and_every_collective_is_the_identity():
    code = """
        import os, torch, torch.distributed as dist
        before = dict(os.environ)
        from guided_diffusion_ip import dist_util
        assert dist_util.get_rank() == 0 and dist_util.get_world_size() == 1
        dist_util.setup_dist()
        first = dist.group.WORLD
        dist_util.setup_dist()
        assert dist.group.WORLD is first and dist.get_world_size() == 1 and dist.get_rank() == 0
        x = torch.arange(3.0, requires_grad=True)
        dist.all_reduce(torch.ones(2)); dist.barrier()  # as existing scripts do
        assert dist_util.all_gather_tensor(x) is x and dist_util.broadcast_object(x) is x
        dist_util.sync_params([x]); dist_util.check_in_sync([("x", x)]); dist_util.barrier()
        assert dist_util.is_main() and str(dist_util.dev()) == "cpu"
        dist_util.cleanup(); assert not dist.is_initialized()
        dist_util.setup_dist(); assert dist.is_initialized()
        changed = {k for k in os.environ.keys() | before if os.environ.get(k) != before.get(k)}
        assert changed <= {"GLOO_SOCKET_IFNAME"}, changed
        import sys
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and "mpi4py" not in sys.modules
    """
    done = launch.run([sys.executable, "-c", textwrap.dedent(code)], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="timeout_s"):
        dist_util.setup_dist(timeout_s=0)
    with pytest.raises(ValueError, match="reshape"):
        dist_util.all_gather_tensor(torch.tensor(1.0))


# ---- two processes ----

TALK = """
    import os, sys, torch, torch.distributed as dist
    cuda = os.environ.get("CUDA_VISIBLE_DEVICES")
    import socket
    def lookup(*args, **kwargs): raise AssertionError("hostname lookup")
    socket.gethostbyname = lookup
    from guided_diffusion_ip import dist_util as du
    du.setup_dist(timeout_s=30); du.setup_dist()
    rank = du.get_rank()
    assert du.get_world_size() == 2 == dist.get_world_size() and du.is_main() == (rank == 0)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == cuda
    assert du.broadcast_object({"from": rank}) == {"from": 0}
    got = du.all_gather_tensor(torch.full((2, 3), float(rank)).t().contiguous().t())
    assert got.shape == (4, 3) and got[:, 0].tolist() == [0, 0, 1, 1], got
    assert du.all_gather_tensor(torch.tensor([rank == 1])).tolist() == [False, True]
    first, second = (du.start_gather(torch.tensor([[rank, n]])) for n in range(2))
    assert du.broadcast_object(rank) == 0  # others may be spoken of meanwhile
    assert (second().tolist(), first().tolist()) == ([[0, 1], [1, 1]], [[0, 0], [1, 0]])

    strided = torch.arange(6.0).view(1, 3, 2, 1).to(memory_format=torch.channels_last)
    content = {"a": [torch.tensor(rank == 0), torch.zeros(0)], 3: (strided, torch.tensor([1.5]).bfloat16(), "text"), "none": None}
    got = du.from_main(lambda: content if rank == 0 else 1 / 0, "cpu")
    assert got["a"][0] and got["a"][1].shape == (0,) and got["none"] is None and got[3][2] == "text"
    assert torch.equal(got[3][0], strided) and got[3][0].stride() == strided.stride() and got[3][1].dtype == torch.bfloat16
    for fails in (ValueError("no such thing"), FileNotFoundError(2, "No such file", "x.pt")):
        def fail(): raise fails
        try: du.from_main(fail)
        except (ValueError, OSError) as error: assert str(error) == str(fails) and type(error) in (type(fails), ValueError)
        else: raise AssertionError("an error of rank 0 went unnoticed")

    torch.manual_seed(rank)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8),
                              torch.nn.Linear(5, 5).half())
    net.to(memory_format=torch.channels_last)
    try: du.check_in_sync(net.named_parameters())
    except RuntimeError as error: assert "0.weight" in str(error) and "rank 1" in str(error), error
    else: raise AssertionError("a difference went unnoticed")
    du.sync_params(net.parameters())
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())
    du.check_in_sync(net.state_dict())
    assert bool((net[0].weight == du.broadcast_object(net[0].weight.detach())).all())

    net[1].running_var[3] += rank * 1e-7  # one bit, in the middle
    try: du.check_in_sync(net.state_dict())
    except RuntimeError as error: assert "1.running_var" in str(error), error
    else: raise AssertionError("a difference went unnoticed")
    try: du.check_in_sync([torch.ones(1)] * (1 + rank))
    except RuntimeError as error: assert "[1, 2]" in str(error), error
    else: raise AssertionError("a difference went unnoticed")

    du.barrier()
    assert du.collectives.watchdog.current().watches_all
    du.cleanup(); du.setup_dist(timeout_s=30)  # MPI is asked once only, yet they meet again
    assert du.all_gather_tensor(torch.tensor([rank])).tolist() == [0, 1]
    du.cleanup()
    print(f"rank {rank} is done")
"""


@pytest.mark.parametrize("start", [launch.mpiexec, launch.torchrun])
def test_two_processes_talk(start):
    done = start(2, ["-c", textwrap.dedent(TALK)], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "rank 0 is done" in done.stdout and "rank 1 is done" in done.stdout


def test_beside_another_backend_hosts_have_a_group_of_their_own_from_the_start():
    """As beside NCCL. Made and connected by setup_dist, with the limit of later collectives."""
    code = """
        import datetime, torch, torch.distributed as dist
        import torch.testing._internal.distributed.fake_pg
        from guided_diffusion_ip import dist_util as du
        from guided_diffusion_ip.dist_util import rendezvous
        rendezvous._backend = lambda: "fake"  # exchanges nothing
        for _ in range(2):
            du.setup_dist(timeout_s=30)
            group = rendezvous._control
            assert dist.get_backend() == "fake" and dist.get_backend(group) == "gloo"
            options = group._get_backend(torch.device("cpu")).options
            assert options._timeout == datetime.timedelta(seconds=2000)
            assert du.any_rank(du.get_rank() == 1, False) == [True, False]
            assert rendezvous._control is group
            # A gloo group that is still held when the interpreter ends can abort it.
            del group, options
            du.cleanup()
            assert rendezvous._control is None
    """
    done = launch.torchrun(
        2,
        ["-c", textwrap.dedent(code)],
        CUDA_VISIBLE_DEVICES="",
        GUIDED_DIFFUSION_IP_TIMEOUT="2000",
    )
    assert done.returncode == 0, done.stderr


def test_tasks_of_a_slurm_step_meet_by_themselves():
    code = """
        import torch
        from guided_diffusion_ip import dist_util as du
        du.setup_dist(timeout_s=20)
        ranks = du.all_gather_tensor(torch.tensor([du.get_rank()]))
        print(du.launch_info().launcher, ranks.tolist())
        du.cleanup()
    """

    def task(rank):
        env = {
            "JOB_ID": os.getpid(),
            "STEP_ID": 0,
            "STEP_NUM_TASKS": 2,
            "PROCID": rank,
            "LOCALID": rank,
            "NODEID": 0,
            "STEP_TASKS_PER_NODE": "2",
            "STEP_NODELIST": "no-such-host",
        }
        return launch.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            CUDA_VISIBLE_DEVICES="",
            **{f"SLURM_{key}": str(value) for key, value in env.items()},
        )

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(task, range(2)):
            assert done.returncode == 0 and done.stdout == "slurm [0, 1]\n", done.stderr


@pytest.mark.parametrize("start", [launch.mpiexec, launch.torchrun])
def test_a_rank_that_fails_ends_the_job(start):
    code = """
        from guided_diffusion_ip import dist_util
        dist_util.setup_dist(timeout_s=30)
        if dist_util.get_rank() == 1:
            raise ValueError("rank 1 gives up")
        __import__("time").sleep(60)  # busy, hence without a broken connection to notice
    """
    done = start(2, ["-c", textwrap.dedent(code)], timeout=40, CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0 and "rank 1 gives up" in done.stderr


def lonely(rank, world=2, timeout_s=5, **env):
    code = f"from guided_diffusion_ip import dist_util; dist_util.setup_dist(timeout_s={timeout_s})"
    return launch.run(
        [sys.executable, "-c", code],
        timeout=40,
        CUDA_VISIBLE_DEVICES="",
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        **{"MASTER_PORT": str(launch.free_port()), **env},
    )


def test_absent_ranks_are_named():
    done = lonely(rank=0)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "TimeoutError: rank 1 of 2" in last, done.stderr
    assert "5 s" in last and "torchrun" in last
    assert "ranks 1, 2 of 3" in lonely(rank=0, world=3, timeout_s=1).stderr
    done = lonely(rank=1, timeout_s=1)
    assert done.returncode != 0 and "TimeoutError: rank 0 of 2" in done.stderr, done.stderr


def test_the_wait_for_a_missing_rank_is_not_silent():
    code = """
        from guided_diffusion_ip import dist_util
        from guided_diffusion_ip.settings.config import command
        command(dist_util.setup_dist)
    """

    def alone(rank):
        return launch.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            CUDA_VISIBLE_DEVICES="",
            RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(launch.free_port()),
            GUIDED_DIFFUSION_IP_START_TIMEOUT="11",
        )

    with ThreadPoolExecutor(2) as pool:
        for rank, done in enumerate(pool.map(alone, range(2))):
            assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
            word, error = done.stderr.splitlines()
            assert f"rank {rank} has been waiting for rank {1 - rank} of 2 at 127.0.0.1" in word
            assert f"error: rank {1 - rank} of 2 did not answer at 127.0.0.1 within 11 s" in error
            assert all("GUIDED_DIFFUSION_IP_START_TIMEOUT" in line for line in (word, error))


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf"])
def test_a_wrong_limit_of_the_start_is_an_error(text):
    name = "GUIDED_DIFFUSION_IP_START_TIMEOUT"
    with pytest.raises(ValueError, match=f"{name} is '{text}', must be a number of seconds"):
        rendezvous._start_limit({name: text})
    assert rendezvous._start_limit({name: "0.5"}) == 0.5 and rendezvous._start_limit({}) == 300


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = lonely(rank=0, MASTER_PORT=port)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0 and port in last and "MASTER_PORT" in last


# ---- MPI in trouble ----

MPI_LAUNCH = LaunchInfo("openmpi", 0, 4, 0, 4)


def test_without_mpi4py_the_remedies_are_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError) as caught:
        rendezvous._meet(MPI_LAUNCH, {}, 5)
    for remedy in (
        'pip install "guided_diffusion_ip[mpi]"',
        "MASTER_ADDR",
        "torchrun --nproc_per_node 4",
    ):
        assert remedy in str(caught.value)


def test_mpiexec_of_another_mpi_is_recognised(monkeypatch):
    comm = types.SimpleNamespace(Get_size=lambda: 1)
    mpi = types.SimpleNamespace(
        COMM_WORLD=comm, Get_library_version=lambda: "Toy MPI 1.2\nand more"
    )
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi))
    with pytest.raises(ValueError) as caught:
        rendezvous._meet(MPI_LAUNCH, {}, 5)
    message = str(caught.value)
    assert "mpiexec says 4" in message and "MPI says 1" in message and "Toy MPI 1.2." in message
    assert "mpiexec" in message.split("Start with")[1]


def test_master_address_makes_mpi4py_needless():
    code = """
        import sys
        sys.modules["mpi4py"] = None
        from guided_diffusion_ip import dist_util
        dist_util.setup_dist(timeout_s=20)
        assert dist_util.get_world_size() == 2 and dist_util.launch_info().launcher != "none"
        dist_util.cleanup()
    """
    done = launch.mpiexec(
        2,
        ["-c", textwrap.dedent(code)],
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(launch.free_port()),
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr


# ---- checkpoints ----


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_loads(tmp_path):
    path = tmp_path / "model.pt"
    state = {"w": torch.randn(3, 2), "b": torch.zeros(4, dtype=torch.float16)}
    torch.save(state, path)
    got = dist_util.load_state_dict(path, map_location=dist_util.dev())
    assert got.keys() == state.keys() and all(torch.equal(got[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2)),
        lambda x, path: path.write_bytes(pickle.dumps(x)),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_cannot_run_code(save, tmp_path):
    path, mark = tmp_path / "evil.pt", tmp_path / "mark"
    save({"w": Bomb(mark)}, path)
    with pytest.raises(ValueError) as caught:
        dist_util.load_state_dict(path)
    assert not mark.exists()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if save is torch.save:
        assert "open" in str(caught.value) and "refused" in str(caught.value)
        torch.load(path, weights_only=False)
        assert mark.exists(), "the bomb is a dud: the test proves nothing"


@pytest.mark.parametrize("content", ["half", "cut header", "empty", "text", "missing", "folder"])
def test_an_unreadable_checkpoint_is_one_line_with_the_path(content, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.randn(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(
        {"half": data[: len(data) // 2], "cut header": data[:3], "text": b"hello " * 30}.get(
            content, b""
        )
    )
    if content in ("missing", "folder"):
        path.unlink()
    if content == "folder":
        path.mkdir()
    with pytest.raises(ValueError) as caught:
        dist_util.load_state_dict(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
