"""Freed memory stays in the process: the second round of the same allocations needs no pages from the system."""
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from guided_diffusion_ip.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() and keep_freed_memory()
def round_of_allocations():
    blocks = [torch.ones(1 << 24) for _ in range(2)]  # of 64 MB, which glibc maps by default
for _ in range(4):
    round_of_allocations()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    round_of_allocations()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_kept():
    faults = {how: int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout)
              for how in ("keep", "default")}
    assert faults["keep"] < faults["default"] / 4, faults
