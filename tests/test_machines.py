"""Two machines: network namespaces of their own, joined by one cable. (Linux, root and `ip`; skipped where one is missing.)

As Debian installs them, each machine's own name is 127.0.1.1 to itself, which the other cannot reach.
"""
import os
import pathlib
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import launch
from test_distributed import TRAIN

TALK = """
import time, torch, torch.distributed as dist
from guided_diffusion_ip import dist_util
from guided_diffusion_ip.config import command

def main():
    dist_util.setup_dist(timeout_s=60)
    ranks = dist_util.all_gather_tensor(torch.tensor([dist_util.get_rank()]))
    print(dist_util.launch_info().launcher, ranks.tolist(), flush=True)
"""


class Machines:
    """Two of them, 10.99.0.1 (fd99::1) and 10.99.0.2 (fd99::2); names as seen from each are machine0 and machine1."""

    def __init__(self):
        self.names = [f"gdip{os.getpid()}m{i}" for i in range(2)]
        self.etc = [pathlib.Path("/etc/netns") / name for name in self.names]

    def build(self):
        for i, (name, etc) in enumerate(zip(self.names, self.etc)):
            ip("netns", "add", name)
            etc.mkdir(parents=True)
            other = f"10.99.0.{2 - i} machine{1 - i}\n"
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {os.uname().nodename} machine{i}\n{other}")
        ip("link", "add", "cable", "netns", self.names[0], "type", "veth", "peer", "name", "cable", "netns", self.names[1])
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
            return launch.run(["ip", "netns", "exec", name, *command], timeout, CUDA_VISIBLE_DEVICES="", **env)

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
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": "29500", **env}


def slurm_task(rank):
    env = {"JOB_ID": 7, "STEP_ID": 0, "STEP_NUM_TASKS": 2, "PROCID": rank, "LOCALID": 0, "NODEID": rank,
           "STEP_TASKS_PER_NODE": "1(x2)", "STEP_NODELIST": "machine[0-1]"}
    return {f"SLURM_{key}": str(value) for key, value in env.items()}


@pytest.mark.slow
def test_torchrun_trains_on_two_machines(machines, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "10.99.0.1",
               "--master_port", "29500", "--no_python", "--node_rank"]
    work = [sys.executable, str(script), str(tmp_path / "images.npz"), str(tmp_path), "4", "-1"]
    for done in machines.run([([*command, str(rank), *work], {}) for rank in range(2)]):
        assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["weights"] for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("name, env", [
    ("torchrun", by_hand), ("slurm", slurm_task), ("torchrun", lambda rank: by_hand(rank, "fd99::1")),
    ("torchrun", lambda rank: by_hand(rank, GLOO_SOCKET_IFNAME="cable"))], ids=["address", "names", "IPv6", "by user"])
def test_two_machines_find_the_way_to_each_other(machines, name, env):
    for done in machines.run([([sys.executable, "-c", TALK + "command(main)"], env(rank)) for rank in range(2)]):
        assert done.returncode == 0 and done.stdout == f"{name} [0, 1]\n", done.stderr


def test_an_interface_that_the_user_names_is_taken(machines):
    """A wrong one fails, with advice that names it; the right one would have been found."""
    for done in machines.run([([sys.executable, "-c", TALK + "command(main)"], by_hand(rank, GLOO_SOCKET_IFNAME="lo"))
                              for rank in range(2)]):
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
        assert "GLOO_SOCKET_IFNAME" in done.stderr and "exchange of data" in done.stderr, done.stderr


def test_a_cut_cable_ends_both_ranks(machines, tmp_path):
    code = TALK + "    for _ in range(1200): dist.all_reduce(torch.ones(3)); time.sleep(0.05); open(mark, 'w').close()\n"
    marks = [tmp_path / str(rank) for rank in range(2)]

    def cut():
        until = time.monotonic() + 60
        while time.monotonic() < until and not all(mark.exists() for mark in marks):
            time.sleep(0.1)
        ip("-n", machines.names[1], "link", "set", "cable", "down")

    try:
        ended = machines.run([([sys.executable, "-c", f"mark = {str(mark)!r}\n{code}command(main)"],
                               by_hand(rank, GUIDED_DIFFUSION_IP_TIMEOUT="5")) for rank, mark in enumerate(marks)],
                             meanwhile=cut)
    finally:
        ip("-n", machines.names[1], "link", "set", "cable", "up")
    for rank, done in enumerate(ended):
        assert marks[rank].exists() and done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert f"rank {1 - rank} of 2 " in done.stderr and f"this is rank {rank}" in done.stderr, done.stderr
