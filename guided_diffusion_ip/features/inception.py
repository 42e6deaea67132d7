"""The Inception network of 2015-12-05, whose features FID, sFID and Inception Score are made of
(Heusel et al. 2017).

The layers are torch-fidelity's; the way through them, and what is taken out where, is that of ADM's
evaluator (Dhariwal and Nichol 2021), which feeds images 0..255 to TensorFlow's graph behind its
JPEG decoder. Differences from torchvision's Inception: 1008 classes, average pools leave padding
out, the last block has a max pool, and TensorFlow 1's resize.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from ..allocator import keep_freed_memory

SIDE = 299  # of the images that the network sees
POOL_DIM, SPATIAL_DIM, CLASSES = 2048, 17 * 17 * 7, 1008


def layer_library() -> types.ModuleType:
    """The module of torch-fidelity that holds the layers, imported without the package around it.

    The package itself imports torchvision, whose compiled part does not load beside a torch from
    another index. So a bare package stands in for it meanwhile; afterwards sys.modules is as it
    was, and `import torch_fidelity` does what it did.

    Raises:
        ValueError: torch-fidelity is missing, or older than 0.4.
    """
    advice = "run: pip install 'guided_diffusion_ip[eval]'"
    try:
        version = library_version()
        found = importlib.util.find_spec("torch_fidelity")  # looks, and runs nothing
    except (importlib.metadata.PackageNotFoundError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"Inception features need the package torch-fidelity, which is not installed; {advice}"
        )
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (0, 4):
        raise ValueError(
            f"torch-fidelity is {version}, and Inception features need 0.4 or newer; {advice}"
        )
    bare = types.ModuleType("torch_fidelity")
    bare.__path__ = list(found.submodule_search_locations)
    before = _forget()
    sys.modules["torch_fidelity"] = bare
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    finally:
        _forget()
        sys.modules.update(before)


def library_version() -> str:
    """Of torch-fidelity, as installed."""
    return importlib.metadata.version("torch-fidelity")


def _forget() -> dict[str, types.ModuleType]:
    """Takes torch_fidelity and all below it out of sys.modules."""
    names = [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]
    return {name: sys.modules.pop(name) for name in names}


def resize(images: Tensor) -> Tensor:
    """[n, H, W, C] -> [n, 299, 299, C], float32: bilinear as TensorFlow 1 did it, without
    half-pixel centres or antialiasing.

    Bit for bit TensorFlow's on the CPU: columns first, on the rows of the input only, then rows,
    each as a + (b - a) w.
    """
    low, high, weight = _grid(images.shape[2], images.device)
    left, right = images.index_select(2, low), images.index_select(2, high)
    images = left + (right - left) * weight[:, None]
    low, high, weight = _grid(images.shape[1], images.device)
    upper, lower = images.index_select(1, low), images.index_select(1, high)
    return upper + (lower - upper) * weight[:, None, None]


@functools.lru_cache(maxsize=32)  # every batch asks for the same two; making one waits for the GPU
def _grid(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of 299 places: the pixel at or before it, the one after it, and how far it is from
    the first to the second.
    """
    with torch.inference_mode(False):  # they outlive the caller's mode
        place = torch.arange(SIDE, dtype=torch.float32) * float(np.float32(size) / np.float32(SIDE))
        low = place.long()
        return low.to(device), (low + 1).clamp_max(size - 1).to(device), (place - low).to(device)


class Inception(nn.Module):
    """The network; `layers` is `layer_library()`. Parameter names are those of torch-fidelity's and
    pytorch-fid's files.
    """

    def __init__(self, layers: types.ModuleType) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = layers.BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = layers.BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = layers.BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = layers.BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = layers.BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = layers.InceptionA(192, pool_features=32)
        self.Mixed_5c = layers.InceptionA(256, pool_features=64)
        self.Mixed_5d = layers.InceptionA(288, pool_features=64)
        self.Mixed_6a = layers.InceptionB(288)
        self.Mixed_6b = layers.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = layers.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = layers.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = layers.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = layers.InceptionD(768)
        self.Mixed_7b = layers.InceptionE_1(1280)
        self.Mixed_7c = layers.InceptionE_2(2048)
        # The evaluator multiplies with the weights alone: the graph's bias takes part in nothing.
        self.fc = nn.Linear(POOL_DIM, CLASSES, bias=False)

    def forward(self, images: Tensor, bf16: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [n, H, W, 3] -> float32 pool [n, 2048], spatial [n, 2023], logits without bias
        [n, 1008].

        spatial is the first 7 channels of Mixed_6d, 17x17, after its ReLU, in the order height,
        width, channel of the graph. With `bf16` the convolutions run in bfloat16.
        """
        x = (resize(images.float()) - 128) * 0.0078125
        # Channels last in memory, which convolutions on the CPU are faster with.
        x = x.permute(0, 3, 1, 2)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
            x = F.max_pool2d(x, 3, 2)
            for block in (
                self.Mixed_5b,
                self.Mixed_5c,
                self.Mixed_5d,
                self.Mixed_6a,
                self.Mixed_6b,
                self.Mixed_6c,
                self.Mixed_6d,
            ):
                x = block(x)
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1).float()
            for block in (self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
                x = block(x)
        pool = x.float().mean((2, 3))
        return pool, spatial, self.fc(pool)


def parameter_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that a checkpoint must hold."""
    return {
        name: tuple(value.shape)
        for name, value in _skeleton().state_dict().items()
        if not _is_counter(name)
    }


def build(state: dict[str, Tensor], device: torch.device | str = "cpu") -> Inception:
    """The network with the weights of `state`, which has all of `parameter_shapes()`; what else it
    has is left alone.
    """
    network = _skeleton()
    # Counters of training steps, which not every checkpoint has, and no result depends on.
    names = network.state_dict().keys()
    network.load_state_dict(
        {name: torch.tensor(0) if _is_counter(name) else state[name] for name in names}, assign=True
    )
    network.eval()
    for module in network.modules():
        conv, norm = getattr(module, "conv", None), getattr(module, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            # One pass over the features less per convolution; in float64, so that it costs no
            # accuracy.
            module.conv = fuse_conv_bn_eval(conv.double(), norm.double()).float()
            module.bn = nn.Identity()
    keep_freed_memory(device)
    network.to(device).requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _skeleton() -> Inception:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return Inception(layer_library())


def _is_counter(name: str) -> bool:
    return name.endswith(".num_batches_tracked")
