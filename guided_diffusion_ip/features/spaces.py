"""The feature spaces by name: a new one is a file with a class like PixelSpace, and a line in
SPACES.

A space without a name: anything that satisfies `FeatureSpace` can be passed to
`evaluation.evaluate.evaluate`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .inception_space import InceptionSpace
from .onnx_space import OnnxSpace
from .pixels import PixelSpace
from .random_network import RandomNetworkSpace
from .space import Features, FeatureSpace
from .wavelets import WaveletSpace

__all__ = ["SPACES", "Features", "FeatureSpace", "PixelSpace", "SpaceSettings", "open_features"]

PRECISIONS = ("fp32", "bf16")
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ts")


@dataclass(frozen=True)
class SpaceSettings:
    """What a space may need to be opened.

    Args:
        spec: the name, or the path of the file.
        inception_weights, allow_download: as of `inception_weights.resolve`.
        log: receives lines for the user.
    """

    spec: str
    device: torch.device
    precision: str = "fp32"
    inception_weights: str = ""
    allow_download: bool = False
    log: Callable[[str], object] = print


@dataclass(frozen=True)
class SpaceEntry:
    """How a space is opened, and the number formats that it knows."""

    open: Callable[[SpaceSettings], FeatureSpace]
    precisions: tuple[str, ...] = ("fp32",)


# By name, or by the suffix of a file.
SPACES: dict[str, SpaceEntry] = {
    "inception": SpaceEntry(
        lambda s: InceptionSpace(
            s.inception_weights, s.device, s.precision, s.allow_download, s.log
        ),
        PRECISIONS,
    ),
    "pixels": SpaceEntry(lambda s: PixelSpace()),
    "wavelets": SpaceEntry(lambda s: WaveletSpace()),
    "random": SpaceEntry(lambda s: RandomNetworkSpace(s.device)),
    ".onnx": SpaceEntry(lambda s: OnnxSpace(s.spec, s.device)),
}


def open_features(
    spec: str | os.PathLike,
    *,
    device: torch.device | str,
    precision: str = "fp32",
    inception_weights: str = "",
    allow_download: bool = False,
    log: Callable[[str], object] = print,
) -> FeatureSpace:
    """The feature space that `spec` names: inception, pixels, or the path of an ONNX file.

    Args:
        precision: fp32, or bf16 for Inception's convolutions in bfloat16: faster, and not for
            figures to publish.
        inception_weights, allow_download: as of `inception_weights.resolve`.

    Raises:
        ValueError: an unknown spec, a missing or damaged file, a missing package.
    """
    spec = os.fspath(spec)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; allowed: {', '.join(PRECISIONS)}")
    entry = SPACES.get(spec) or SPACES.get(os.path.splitext(spec)[1].lower())
    if precision not in (entry.precisions if entry else ("fp32",)):
        raise ValueError(f"precision {precision} is for inception features; with {spec}, use fp32")
    if entry is None:
        raise ValueError(_unknown(spec))
    return entry.open(
        SpaceSettings(spec, torch.device(device), precision, inception_weights, allow_download, log)
    )


def _unknown(spec: str) -> str:
    names = ", ".join(name for name in SPACES if not name.startswith("."))
    suffixes = " or ".join(name for name in SPACES if name.startswith("."))
    allowed = f"allowed: {names}, or the path of a file that ends in {suffixes}"
    if spec.lower().endswith(_PICKLES):
        return (
            f"features from {spec} are refused: such a file can run code when it is read, and "
            f"holds no network otherwise; export the network to ONNX (torch.onnx.export); {allowed}"
        )
    return f"there are no features called {spec!r}; {allowed}"
