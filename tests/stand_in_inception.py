"""Weights that stand in for those of the Inception network, which no repository can hold, and
images to go with them.

Every number comes from a seed; only the means and variances of the batch norms are stored
(tests/data/inception_bn_stats.npz), made once by a pass over such images, so that features differ
from image to image. ADM's published evaluator was run under TensorFlow on a graph with these very
weights: tests/data/inception_golden.json has what it gave.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from golden_tools import DATA

from guided_diffusion_ip.features import inception

SEED = 20151205
GOLDEN = json.loads((DATA / "inception_golden.json").read_text())


@functools.cache
def state_dict() -> dict[str, np.ndarray]:
    """Name -> array, float32: 94 convolutions with batch norms, and the classifier with the bias
    that features leave out.
    """
    shapes = inception.parameter_shapes()
    layers = [name.removesuffix(".conv.weight") for name in shapes if name.endswith(".conv.weight")]
    stored = np.load(DATA / "inception_bn_stats.npz")
    ends = np.cumsum([shapes[f"{layer}.bn.bias"][0] for layer in layers])[:-1]
    state = {}
    for i, (layer, mean, var) in enumerate(
        zip(layers, np.split(stored["mean"], ends), np.split(stored["var"], ends))
    ):
        shape, r = shapes[f"{layer}.conv.weight"], np.random.default_rng([SEED, i])
        scale = np.float32(math.sqrt(2 / math.prod(shape[1:])))
        state[f"{layer}.conv.weight"] = r.standard_normal(shape, dtype=np.float32) * scale
        state[f"{layer}.bn.weight"] = r.uniform(0.8, 1.2, shape[0]).astype(np.float32)
        state[f"{layer}.bn.bias"] = (0.1 * r.standard_normal(shape[0])).astype(np.float32)
        state[f"{layer}.bn.running_mean"], state[f"{layer}.bn.running_var"] = mean, var
    r = np.random.default_rng([SEED, 1000])
    state["fc.weight"] = np.float32(0.1) * r.standard_normal((1008, 2048), dtype=np.float32)
    state["fc.bias"] = r.standard_normal(1008, dtype=np.float32)
    return state


def write_pth(path: Path) -> Path:
    """A checkpoint, with the counters that torch.save brings along."""
    state = {name: torch.from_numpy(value) for name, value in state_dict().items()}
    state |= {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(0)
        for name in state
        if "running_var" in name
    }
    torch.save(state, path)
    return path


def images(kind: int, n: int, height: int, width: int) -> np.ndarray:
    """uint8 [n, height, width, 3]: coarse coloured grids with noise; kind 0 plays the reference, 1
    the samples.
    """
    cells, noise = (6, 9)[kind], (12, 24)[kind]
    rows, columns = np.arange(height) * cells // height, np.arange(width) * cells // width
    found = []
    for i in range(n):
        r = np.random.default_rng([77, kind, i])
        grid = r.integers(0, 256, (cells, cells, 3))[rows][:, columns]
        grid = grid + r.integers(-noise, noise + 1, (height, width, 3)) + r.integers(-40, 41)
        found.append(np.clip(grid, 0, 255).astype(np.uint8))
    return np.stack(found)


# ---- a frozen TensorFlow graph, byte by byte (protobuf.dev, "Encoding") ----


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def node(name: str, op: str, *inputs: str, **attributes: bytes) -> bytes:
    """A NodeDef as a field of the graph; attributes are AttrValues."""
    body = field(1, name) + field(2, op) + b"".join(field(3, i) for i in inputs)
    return field(
        1,
        body
        + b"".join(field(5, field(1, key) + field(2, value)) for key, value in attributes.items()),
    )


def tensor(shape: tuple[int, ...], numbers: bytes, dtype: int = 1) -> bytes:
    """A TensorProto; `numbers` is its field tensor_content or float_val, encoded."""
    return field(1, dtype) + field(2, b"".join(field(2, field(1, n)) for n in shape)) + numbers


def constant(name: str, array: np.ndarray, numbers: bytes | None = None) -> bytes:
    numbers = field(4, array.tobytes()) if numbers is None else numbers
    return node(name, "Const", dtype=field(6, 1), value=field(8, tensor(array.shape, numbers)))


def graph_nodes() -> Iterator[bytes]:
    """The nodes of classify_image_graph_def.pb that have to do with weights, and some others."""
    state = state_dict()
    yield node(
        "DecodeJpeg/contents",
        "Const",
        dtype=field(6, 7),
        value=field(8, field(1, 7) + field(2, b"") + field(8, b"")),
    )
    yield node(
        "ResizeBilinear/size",
        "Const",
        dtype=field(6, 3),
        value=field(8, tensor((2,), field(4, bytes(8)), 3)),
    )
    yield constant("Sub/y", np.float32(128), varint(5 << 3 | 5) + struct.pack("<f", 128))
    layers = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
    for scope, layer in zip(GOLDEN["scopes"], layers, strict=True):
        yield constant(
            f"{scope}/conv2d_params", state[f"{layer}.conv.weight"].transpose(2, 3, 1, 0)
        )
        yield node(
            f"{scope}/Conv2D",
            "Conv2D",
            "Mul",
            f"{scope}/conv2d_params",
            strides=field(1, field(3, 1)),
            T=field(6, 1),
        )
        for ours, theirs in (
            ("bias", "beta"),
            ("weight", "gamma"),
            ("running_mean", "moving_mean"),
            ("running_var", "moving_variance"),
        ):
            yield constant(f"{scope}/batchnorm/{theirs}", state[f"{layer}.bn.{ours}"])
        yield node(scope, "Relu", f"{scope}/Conv2D", T=field(6, 1))
    yield constant("softmax/weights", state["fc.weight"].T)
    yield constant("softmax/biases", state["fc.bias"], field(5, state["fc.bias"].tobytes()))
    yield node(
        "softmax/logits/MatMul",
        "MatMul",
        "pool_3/_reshape",
        "softmax/weights",
        transpose_a=field(5, 0),
    )


def write_pb(path: Path) -> Path:
    """A GraphDef with the names of the published graph's constants; TensorFlow's versions field at
    the end.
    """
    path.write_bytes(b"".join(graph_nodes()) + field(4, field(1, 8)))
    return path
