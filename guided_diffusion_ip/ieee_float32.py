"""float32 that is float32: GPUs and some CPUs compute its products with fewer digits by default."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def ieee_float32() -> Iterator[None]:
    """Convolutions and matrix products of float32 in float32, not in TF32 or bfloat16, as long as
    this lasts.

    cuDNN's convolutions are in TF32 by default, which has 10 bits of mantissa. An
    autocast around it is off within: that of a training run must not reach the metrics.
    """
    backends: Any = torch.backends  # whose attributes differ between releases
    switches = []
    if hasattr(backends.cudnn, "conv"):  # torch >= 2.9: a word for each operation
        switches = [
            (place, "ieee")
            for place in (
                backends.cudnn.conv,
                backends.cudnn.rnn,
                backends.cuda.matmul,
                backends.mkldnn.conv,
                backends.mkldnn.matmul,
            )
        ]
    before = [place.fp32_precision for place, _ in switches]
    cudnn = _cudnn_tf32()
    matmul = None
    # Not to be asked where the caller has used the newer switches.
    with contextlib.suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as autocasts:
        for kind in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            autocasts.enter_context(torch.autocast(kind, enabled=False))
        try:
            # The old switches too: torch raises where old and new contradict each other, if anyone
            # asks, such as torch.backends.cudnn.flags(). They move the new ones, so they are first.
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = False
            for place, word in switches:
                place.fp32_precision = word
            yield
        finally:
            if matmul:
                torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = cudnn
            for (place, _), word in zip(switches, before):
                place.fp32_precision = word


def _cudnn_tf32() -> bool:
    """cuDNN's old switch; moves the new ones where they contradict it, since it may not be asked
    then.
    """
    cudnn: Any = torch.backends.cudnn
    with contextlib.suppress(RuntimeError):
        return cudnn.allow_tf32
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"
    with contextlib.suppress(RuntimeError):
        return cudnn.allow_tf32  # no contradiction to tf32: it is True
    return False
