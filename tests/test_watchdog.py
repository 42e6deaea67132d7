"""A rank that ends ends the others, which name it. Real processes without a launcher: one would end
the survivors itself.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import launch
import pytest

from guided_diffusion_ip.dist_util import watchdog

START = """
import ctypes, os, signal, sys, time, torch, torch.distributed as dist
from guided_diffusion_ip import dist_util
from guided_diffusion_ip.settings.config import command

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def exchange(seconds=60):
    for _ in range(int(seconds * 20)):
        dist.all_reduce(torch.ones(3))
        time.sleep(0.05)

def main():
    dist_util.setup_dist()
    rank = dist_util.get_rank()
    print("here", flush=True)
"""


# Importing torch takes seconds: done once, in a process that forks the ranks. Each goes on as if it
# had been started itself.
NURSERY = """
import json, os, sys, torch, guided_diffusion_ip.settings.config, guided_diffusion_ip.dist_util
torch.set_num_threads(1)
for line in sys.stdin:
    order = json.loads(line)
    if "poll" in order:
        pid, status = os.waitpid(order["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.environ.update(order["env"])
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = [order["script"]]
        code = compile(open(order["script"]).read(), order["script"], "exec")
        break
    print(json.dumps(pid), flush=True)
else:
    sys.exit()
exec(code)
"""


class Nursery:
    def __init__(self):
        env = {**launch.clean_env(), "CUDA_VISIBLE_DEVICES": ""}
        env.pop("GUIDED_DIFFUSION_IP_TIMEOUT", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Ranks:
    """`world` processes that run the same main(); `body` is the rest of it."""

    def __init__(self, nursery, folder, world, body, end="command(main)", **env):
        self.nursery = nursery
        folder.mkdir()
        script = folder / "main.py"
        script.write_text(START + textwrap.indent(textwrap.dedent(body), "    ") + f"\n{end}\n")
        env = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(launch.free_port()),
            **env,
        }
        self.logs = [folder / f"rank{rank}.txt" for rank in range(world)]
        self.codes = {}
        self.pids = [
            nursery.ask(script=str(script), log=str(log), env={**env, "RANK": str(rank)})
            for rank, log in enumerate(self.logs)
        ]
        self.wait_for(
            lambda: all(log.exists() and "here" in log.read_text() for log in self.logs), 30
        )

    def wait_for(self, condition, seconds):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, [log.read_text() for log in self.logs if log.exists()]
            time.sleep(0.05)

    def has_ended(self, rank):
        if rank not in self.codes:
            code = self.nursery.ask(poll=self.pids[rank])
            if code is not None:
                self.codes[rank] = code
        return rank in self.codes

    def send(self, rank, number):
        if not self.has_ended(rank):
            os.kill(self.pids[rank], number)

    def end(self, *ranks, within):
        """[(exit code, output)] of ranks that must end within so many seconds."""
        self.wait_for(lambda: all([self.has_ended(rank) for rank in ranks]), within)
        return [(self.codes[rank], self.logs[rank].read_text()) for rank in ranks]


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(10)


@pytest.fixture
def ranks(nursery, tmp_path):
    started = []

    def start(*args, **env):
        started.append(Ranks(nursery, tmp_path / str(len(started)), *args, **env))
        return started[-1]

    yield start
    for run in started:
        for rank in range(len(run.pids)):
            run.send(rank, signal.SIGKILL)
        run.wait_for(lambda: all([run.has_ended(rank) for rank in range(len(run.pids))]), 10)


def one_error(output):
    lines = [line for line in output.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and "Traceback" not in output, output
    return lines[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_in_the_middle_of_collectives_ends_the_other(ranks, victim):
    run = ranks(2, "exchange()")
    time.sleep(0.3)
    run.send(victim, signal.SIGKILL)
    [(code, output)] = run.end(1 - victim, within=10)
    line = one_error(output)
    assert (
        code == 1 and f"rank {victim} of 2 is gone" in line and f"this is rank {1 - victim}" in line
    ), output


def test_ranks_that_are_not_in_a_collective_are_ended_too(ranks):
    killed = ranks(2, "time.sleep(60)")
    killed.send(1, signal.SIGKILL)
    # A forked child that lives on keeps its parent's sockets open; data loaders have such.
    forked = ranks(
        2,
        """
        import multiprocessing
        if rank == 1:
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,)).start()
            die()
        time.sleep(60)
    """,
    )
    failed = ranks(
        2, "if rank == 1: {}['missing key']\ntime.sleep(60)", "main()"
    )  # a script of somebody else's
    for run in (killed, forked):
        [(code, output)] = run.end(0, within=10)
        assert code == 1 and "rank 1 of 2 is gone" in one_error(output), output
    (code0, output0), (code1, output1) = failed.end(0, 1, within=10)
    assert code1 == 1 and "Traceback" in output1
    assert code0 == 1 and "rank 1 of 2 failed: KeyError: 'missing key'" in one_error(output0)


def test_both_survivors_name_the_rank_that_died(ranks):
    run = ranks(
        3,
        """
        exchange(0.3)
        if rank == 1: die()
        if rank == 2: dist.recv(torch.ones(1), src=1)
        if rank == 0:
            time.sleep(2)
            assert dist_util.absent_ranks()[0] == [1]  # and not rank 2, whose end is a consequence
        exchange()
    """,
    )
    for code, output in run.end(0, 2, within=10):
        assert code == 1 and "rank 1 of 3 is gone" in one_error(output), output


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_users_mistake_on_one_rank_is_shown_by_the_other(ranks, culprit):
    run = ranks(2, f"if rank == {culprit}: raise ValueError('bad image x.png')\ndist.barrier()")
    found = run.end(0, 1, within=10)
    assert found[culprit][0] == 2 and "error: bad image x.png" in found[culprit][1], found
    code, output = found[1 - culprit]
    assert (
        code == 1
        and f"rank {culprit} of 2 failed: bad image x.png; this is rank {1 - culprit}"
        in one_error(output)
    )


def test_a_mistake_on_all_ranks_is_shown_once_or_twice_and_exits_2(ranks):
    run = ranks(3, "raise ValueError('no such folder: y')")
    found = run.end(0, 1, 2, within=10)
    assert [code for code, _ in found] == [2, 2, 2], found
    assert found[0][1].splitlines()[-1] == "error: no such folder: y"
    assert sum("no such folder" in output for _, output in found) <= 2, found


def test_a_stopped_rank_is_named_after_the_limit(ranks):
    waiting = ranks(
        3,
        "dist.barrier()\nif rank == 1: time.sleep(60)\ndist.barrier()",
        GUIDED_DIFFUSION_IP_TIMEOUT="5",
    )
    without_hub = ranks(
        2,
        "dist.barrier()\nif rank == 0: time.sleep(60)\ndist.barrier()",
        GUIDED_DIFFUSION_IP_TIMEOUT="5",
    )
    # The whole job, as schedulers do.
    suspended = ranks(
        2,
        "exchange(3)\nprint(dist_util.absent_ranks(0))\ndist.barrier()",
        GUIDED_DIFFUSION_IP_TIMEOUT="5",
    )
    time.sleep(0.5)
    for rank in (0, 1):
        suspended.send(rank, signal.SIGSTOP)
    waiting.send(1, signal.SIGSTOP)
    without_hub.send(0, signal.SIGSTOP)
    begin = time.monotonic()
    for run, stopped, others in ((waiting, 1, (0, 2)), (without_hub, 0, (1,))):
        for code, output in run.end(*others, within=18):
            line = one_error(output)
            assert (
                code == 1
                and f"rank {stopped} of {len(run.pids)} has not been heard of for 5 s" in line
            ), output
    assert time.monotonic() - begin > 6
    for rank in (0, 1):
        suspended.send(rank, signal.SIGCONT)
        time.sleep(1)
    assert suspended.end(0, 1, within=15) == [(0, "here\n([], '')\n")] * 2


def test_ranks_that_end_seconds_apart_are_quiet(ranks):
    # PyDLL keeps the interpreter's lock: nothing else in the process runs meanwhile.
    body = """
        exchange(0.1)
        if rank == {}:
            ctypes.PyDLL(None).usleep(3_500_000)
            time.sleep(1.5)
            assert "has ended as if all was done" in dist_util.absent_ranks(0)[1]
        if rank == 0: dist_util.cleanup()
    """
    for run in [
        ranks(2, body.format(late), end, GUIDED_DIFFUSION_IP_TIMEOUT="5")
        for late in (0, 1)
        for end in ("command(main)", "main()")
    ]:
        assert run.end(0, 1, within=15) == [(0, "here\n"), (0, "here\n")]


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_works_is_waited_for_beyond_the_limit_of_collectives(ranks, late):
    """As at the end of sampling, where one rank has a batch more, or joins files alone."""
    run = ranks(
        2,
        f"""
        for _ in range(3): dist_util.barrier()
        if rank == {late}: time.sleep(8)
        dist_util.barrier()
        print("together", flush=True)
        dist_util.barrier()
    """,
        "dist_util.rendezvous._COLLECTIVE_S = 1.0\ncommand(main)",
        GUIDED_DIFFUSION_IP_TIMEOUT="5",
    )
    time.sleep(6.5)  # the limit is the larger of the two
    assert "together" not in run.logs[1 - late].read_text()
    assert run.end(0, 1, within=20) == [(0, "here\ntogether\n")] * 2


@pytest.mark.parametrize(
    "lost, body, words",
    [
        (0, "die()", "is gone"),
        (1, "die()", "is gone"),
        (1, "raise ValueError('no room')", "failed: no room"),
        (1, "return", "has ended as if all was done"),
        (0, "return", "has ended as if all was done"),
    ],
)
def test_a_rank_that_is_not_coming_any_more_ends_the_wait(ranks, lost, body, words):
    run = ranks(3, f"if rank == {lost}:\n    time.sleep(0.5)\n    {body}\ndist_util.barrier()")
    for code, output in run.end(*({0, 1, 2} - {lost}), within=15):
        assert code == 1 and f"rank {lost} of 3 {words}" in one_error(output), output


def test_what_the_functions_say(ranks):
    run = ranks(
        3,
        """
        assert dist_util.absent_ranks(0) == ([], "")
        dist.barrier()
        if rank == 1: dist_util.cleanup(); return
        if rank == 2: dist_util.report_failure("out of\\nwool"); time.sleep(60)
        found, sentence = dist_util.absent_ranks(5)
        assert found == [2] and sentence == "rank 2 of 3 failed: out of wool", (found, sentence)
        assert dist_util.report_failure("too late") == (2, "failed: out of wool")
    """,
    )
    (code, output), _ = run.end(0, 1, within=10)
    assert code == 0, output


def test_a_stranger_at_the_port_is_not_listened_to():
    hub = watchdog._Hub(0, 2, 300, "127.0.0.1")
    hub.start()
    try:
        for text in (
            b'{"failed": "x"}\n',
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"token": "?", "rank": 1}\n{"failed": "x"}\n',
            b"5\n",
        ):
            with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
                stranger.sendall(text)
        time.sleep(0.2)
        assert hub.failure is None and hub._thread.is_alive() and hub.absent(0) == ([], "")
        friend = watchdog._Spoke(1, 2, 300, "127.0.0.1", hub.port, hub.token)
        friend.start()
        assert friend.report("x") == (1, "failed: x")
        friend.close()
    finally:
        hub.close()
    assert not hub._thread.is_alive() and not friend._thread.is_alive()


@pytest.mark.parametrize(
    "body, code, word",
    [
        ("raise ValueError('mistake')", 2, "error: mistake"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise KeyError('bug')", 1, "Traceback"),
        ("assert dist_util.absent_ranks() == ([], '')", 0, ""),
        ("dist_util.report_failure('x')", 0, ""),
    ],
)
def test_one_process_has_no_watchdog_and_keeps_its_exit_codes(ranks, body, code, word):
    [(found, output)] = ranks(1, body).end(0, within=10)
    assert found == code and word in output, output


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf", "4.9"])
def test_a_wrong_limit_is_an_error(text):
    with pytest.raises(
        ValueError, match=re.escape(f"GUIDED_DIFFUSION_IP_TIMEOUT is '{text}', must be")
    ):
        watchdog.silence_limit({"GUIDED_DIFFUSION_IP_TIMEOUT": text})
    assert (
        watchdog.silence_limit({"GUIDED_DIFFUSION_IP_TIMEOUT": "5"}) == 5
        and watchdog.silence_limit({}) == 300
    )
