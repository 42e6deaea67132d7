"""A real Slurm of one node: its daemons on loopback, all their files in a temporary folder.

Minutes long, because Slurm counts time limits in minutes. docs/launching.md says what it needs.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from test_resume import FLAGS, TRAIN, same

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
FOUND = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in PROGRAMS}
MISSING = ", ".join(name for name in PROGRAMS if not FOUND[name])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=(
            f"not installed: {MISSING} (Debian's packages are munge, slurmctld, slurmd, "
            "slurm-client)"
        ),
    ),
]

SETTINGS = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""


class Slurm:
    def __init__(self, folder):
        self.folder, self.daemons = folder, []
        self.env = {
            **launch.clean_env(),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def start(self):
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        ports = {name: launch.free_port() for name in ("ctld_port", "d_port")}
        host = socket.gethostname().split(".")[0]
        (self.folder / "slurm.conf").write_text(
            SETTINGS.format(host=host, user=getpass.getuser(), folder=self.folder, **ports)
        )
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            *(f"--{option}={self.folder / name}" for option, name in files.items()),
        )
        self._until(lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        self._until(lambda: "idle" in self("sinfo", "--noheader", "--format=%T"))

    def _daemon(self, name, *args):
        with open(self.folder / f"{name}.out", "w") as out:
            self.daemons.append(
                subprocess.Popen(
                    [FOUND[name], *args],
                    env=self.env,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def _until(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            alive = all(daemon.poll() is None for daemon in self.daemons)
            assert alive and time.monotonic() < end, self.logs()
            time.sleep(0.2)

    def stop(self):
        with contextlib.suppress(AssertionError):
            self("scancel", "--user", getpass.getuser())
            self._until(lambda: not self("squeue", "--noheader"), 30)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()

    def logs(self):
        texts = (
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in self.folder.glob("*.*")
            if path.suffix in (".log", ".out")
        )
        return "\n".join(texts)

    def __call__(self, *command, timeout=60):
        """What a command of Slurm's prints; it must end well."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture
def command(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 10, 10, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    return [
        sys.executable,
        TRAIN,
        *FLAGS,
        "--data_dir",
        str(tmp_path / "images.npz"),
        "--batch_size",
        "2",
        "--ema_rate",
        "0.9",
        "--dropout",
        "0.1",
        "--schedule_sampler",
        "loss-second-moment",
        "--num_workers",
        "1",
        "--save_interval",
        "1000000",
    ]


def test_its_daemons_listen_on_loopback_only(slurm):
    sockets = {
        os.readlink(link)
        for daemon in slurm.daemons
        for link in Path(f"/proc/{daemon.pid}/fd").iterdir()
    }
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    places = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    assert len(places) == 2 and all(place.startswith("0100007F:") for place in places), places


def test_a_job_is_told_of_its_limit_and_goes_on_bit_for_bit(slurm, command, tmp_path):
    """The recipe of docs/training.md. The first start has no end; those after it make 20 steps."""
    run, job, out = tmp_path / "run", tmp_path / "train.sbatch", tmp_path / "job.txt"
    (tmp_path / "steps").write_text("1000000")
    job.write_text(f"""#!/bin/bash
#SBATCH --ntasks=2 --time=2 --signal=USR1@60 --requeue --open-mode=append --output={out}
srun {" ".join(command)} --out_dir {run} --resume auto --max_steps $(cat {tmp_path}/steps)
echo "srun ended with $? after start ${{SLURM_RESTART_COUNT:-0}}"
if [ -z "$SLURM_RESTART_COUNT" ]; then
    saved=$(basename $(ls {run}/state*.pt | tail -n 1) | tr -dc 0-9)
    echo $((10#$saved + 20)) > {tmp_path}/steps
fi
[ -e {run}/state$(printf %06d $(cat {tmp_path}/steps)).pt ] || scontrol requeue $SLURM_JOB_ID
""")
    slurm("sbatch", str(job))
    slurm._until(lambda: not slurm("squeue", "--noheader"), 600)
    said, last = out.read_text(), int((tmp_path / "steps").read_text())
    assert "SIGUSR1: stopped after step" in said and f"continuing from {run}" in said, said
    assert said.count("srun ended with") == said.count("srun ended with 0") > 1, said
    assert f"step {last}: saved" in said, said

    whole = tmp_path / "whole"
    assert f"training ended after {last} steps" in slurm(
        "srun", "-n", "2", *command, "--out_dir", str(whole), "--max_steps", str(last), timeout=400
    )
    for name in ("model", "ema_0.9_", "opt"):
        one, two = (
            torch.load(folder / f"{name}{last:06d}.pt", weights_only=True)
            for folder in (whole, run)
        )
        assert same(one, two), f"{name} differs"
