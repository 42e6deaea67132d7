"""Two machines: network namespaces of their own, joined by one cable. (Needs Linux, root and `ip`.)

As Debian does it, each machine's own name is 127.0.1.1 to itself, which the other cannot reach.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import launch
import numpy as np
import pytest
import torch
from test_distributed import TRAIN

TALK = """
import sys, time, torch, torch.distributed as dist
from guided_diffusion_ip import dist_util
from guided_diffusion_ip.settings.config import command

def main():
    dist_util.setup_dist(timeout_s=60)
    ranks = dist_util.all_gather_tensor(torch.tensor([dist_util.get_rank()]))
    print(dist_util.launch_info().launcher, ranks.tolist(), flush=True)
"""


PYTHON = [sys.executable, "-c", TALK + "command(main)"]


class Machines:
    """Two of them: machine0 is 10.99.0.1 and fd99::1, machine1 10.99.0.2 and fd99::2."""

    def __init__(self):
        self.names = [f"gdip{os.getpid()}m{i}" for i in range(2)]
        self.etc = [pathlib.Path("/etc/netns") / name for name in self.names]

    def build(self):
        for i, (name, etc) in enumerate(zip(self.names, self.etc)):
            ip("netns", "add", name)
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(
                f"127.0.0.1 localhost\n"
                f"127.0.1.1 {os.uname().nodename} machine{i}\n"
                f"10.99.0.{2 - i} machine{1 - i}\n"
            )
        first, second = self.names
        ip(
            "link",
            "add",
            "cable",
            "netns",
            first,
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            second,
        )
        for i, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"10.99.0.{i + 1}/24", "dev", "cable")
            ip("-n", name, "address", "add", f"fd99::{i + 1}/64", "dev", "cable", "nodad")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")

    def remove(self):
        for name, etc in zip(self.names, self.etc):
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)
            shutil.rmtree(etc, ignore_errors=True)

    def run(self, commands, timeout=90, meanwhile=lambda: None):
        """One command on each machine, each with an environment; both CompletedProcess."""

        def on(name, command, env):
            command = ["ip", "netns", "exec", name, *command]
            return launch.run(command, timeout, CUDA_VISIBLE_DEVICES="", **env)

        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(on, name, *each) for name, each in zip(self.names, commands)]
            meanwhile()
            return [future.result() for future in done]


def ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines():
    if not shutil.which("ip") or not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("making network namespaces needs root and ip (iproute2)")
    pair = Machines()
    try:
        try:
            pair.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield pair
    finally:
        pair.remove()


def by_hand(rank, address="10.99.0.1", **env):
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": address,
        "MASTER_PORT": "29500",
        **env,
    }


def slurm_task(rank):
    env = {
        "JOB_ID": 7,
        "STEP_ID": 0,
        "STEP_NUM_TASKS": 2,
        "PROCID": rank,
        "LOCALID": 0,
        "NODEID": rank,
        "STEP_TASKS_PER_NODE": "1(x2)",
        "STEP_NODELIST": "machine[0-1]",
    }
    return {f"SLURM_{key}": str(value) for key, value in env.items()}


@pytest.mark.slow
def test_torchrun_trains_on_two_machines(machines, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "10.99.0.1",
        "--master_port",
        "29500",
        "--no_python",
        "--node_rank",
    ]
    work = [sys.executable, str(script), str(tmp_path / "images.npz"), str(tmp_path), "4", "-1"]
    for done in machines.run([([*command, str(rank), *work], {}) for rank in range(2)]):
        assert done.returncode == 0, done.stderr
    first, second = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"]))


@pytest.mark.parametrize(
    "name, env",
    [
        pytest.param("torchrun", by_hand, id="address"),
        pytest.param("slurm", slurm_task, id="names"),
        pytest.param(
            "torchrun", lambda rank: by_hand(rank, "fd99::1"), id="IPv6", marks=pytest.mark.slow
        ),
        pytest.param(
            "torchrun",
            lambda rank: by_hand(rank, GLOO_SOCKET_IFNAME="cable"),
            id="by user",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_machines_find_the_way_to_each_other(machines, name, env):
    for done in machines.run([(PYTHON, env(rank)) for rank in range(2)]):
        assert done.returncode == 0 and done.stdout == f"{name} [0, 1]\n", done.stderr


@pytest.mark.slow
def test_an_interface_that_the_user_names_is_taken(machines):
    """A wrong one fails, with advice that names it; the right one would have been found."""
    wrong = {"GLOO_SOCKET_IFNAME": "lo"}
    for done in machines.run([(PYTHON, by_hand(rank, **wrong)) for rank in range(2)]):
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
        assert "GLOO_SOCKET_IFNAME (here: lo)" in done.stderr, done.stderr
        assert "their first exchange of data failed" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_cut_cable_ends_both_ranks(machines, tmp_path):
    code = (
        TALK
        + """
    for _ in range(1200):
        dist.all_reduce(torch.ones(3))
        time.sleep(0.05)
        open(sys.argv[1], "w").close()
"""
    )
    marks = [tmp_path / str(rank) for rank in range(2)]

    def cut():
        until = time.monotonic() + 60
        while time.monotonic() < until and not all(mark.exists() for mark in marks):
            time.sleep(0.1)
        ip("-n", machines.names[1], "link", "set", "cable", "down")

    try:
        ended = machines.run(
            [
                (
                    [sys.executable, "-c", code + "command(main)", str(mark)],
                    by_hand(rank, GUIDED_DIFFUSION_IP_TIMEOUT="5"),
                )
                for rank, mark in enumerate(marks)
            ],
            meanwhile=cut,
        )
    finally:
        ip("-n", machines.names[1], "link", "set", "cable", "up")
    for rank, done in enumerate(ended):
        assert marks[rank].exists() and done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        assert f"rank {1 - rank} of 2 " in done.stderr, done.stderr
        assert f"this is rank {rank}" in done.stderr, done.stderr
