"""Freed memory stays in the process: the second round of the same allocations needs no pages from
the system.
"""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from guided_diffusion_ip.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() and keep_freed_memory()
def round_of_allocations():
    blocks = [torch.ones(n << 20) for n in (1, 2, 16, 16)]  # of 4 to 64 MB, which glibc maps by default
for _ in range(6):
    round_of_allocations()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    round_of_allocations()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    return int(
        subprocess.run(
            [sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_kept():
    kept, default = faults("keep"), faults("default")
    assert default > 1000  # or there is nothing to keep: a page has 4 to 64 KB, a round 140 MB
    assert kept < default / 4
