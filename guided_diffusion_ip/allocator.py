"""What the C library does with memory that tensors on a CPU give back."""

from __future__ import annotations

import ctypes
import functools
import platform

import torch

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory(device: torch.device | str = "cpu") -> bool:
    """Keep freed memory in the process instead of returning it to the system; False where that
    cannot be, or on a GPU.

    Steps of training and calls of a network free and take the same blocks again and again. By
    default glibc returns large ones at once, and the system has to map and clear them again, page
    by page: some 80,000 page faults a step for the CIFAR-10 network at 64 channels, batch 16
    (docs/performance.md has what they cost). The peak of memory stays what it is; what other
    programs could have between two steps, they cannot. A user's own MALLOC_ settings are overruled.
    """
    return torch.device(device).type == "cpu" and _never_return()


@functools.cache
def _never_return() -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No mapping of single blocks, whatever their size (a threshold would end at 32 MB), and no
    # trimming of the heap's end.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
