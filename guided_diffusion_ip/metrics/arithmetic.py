"""float32 that is float32: GPUs and some CPUs compute its products with fewer digits unless told not to."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ieee_float32() -> Iterator[None]:
    """Convolutions and matrix products of float32 in float32, not in TF32 or bfloat16, as long as this lasts.

    cuDNN's convolutions are in TF32 unless told otherwise, which has 10 bits of mantissa.
    """
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch >= 2.9: a word for each operation
        switches = [(place, "fp32_precision", "ieee") for place in (
            backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)]
    else:
        switches = [(backends.cudnn, "allow_tf32", False)]
    before = [getattr(place, name) for place, name, _ in switches]
    matmul = None
    with contextlib.suppress(RuntimeError):  # not to be asked where the caller has used the newer switches
        matmul = torch.get_float32_matmul_precision()
    try:
        # The old switch too: torch raises where the two contradict each other. It moves the others, so it is first.
        torch.set_float32_matmul_precision("highest")
        for place, name, value in switches:
            setattr(place, name, value)
        yield
    finally:
        if matmul:
            torch.set_float32_matmul_precision(matmul)
        for (place, name, _), value in zip(switches, before):
            setattr(place, name, value)
