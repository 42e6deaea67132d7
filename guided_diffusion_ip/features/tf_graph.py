"""Frozen TensorFlow graphs without TensorFlow: the weights of the Inception network out of a
GraphDef.

A GraphDef is a protocol buffer: fields of (number, wire type, content), nested (protobuf.dev,
"Encoding"; in tensorflow/core/framework: graph.proto, node_def.proto, attr_value.proto,
tensor.proto). Nothing is copied and nothing is trusted: arrays are views of the file, and every
length is compared with what is there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np

from ..files import open_binary

MAX_FILE = 1 << 30  # bytes; a GraphDef may have twice that, the Inception graph has a tenth
FLOAT = 1  # TensorFlow's DT_FLOAT
MAX_RANK, MAX_ELEMENTS = 8, 1 << 40  # what numpy can describe, as a view of one number if need be


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, content) of a protocol buffer's fields: int for varints, else the bytes.

    Raises:
        ValueError: not a protocol buffer, or not all of one.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if not number:
            raise ValueError("a field with the number 0")
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        if size > len(message) - at:
            raise ValueError(f"a field of {size} bytes where {len(message) - at} are left")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at byte `at`, and where it ends."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), message[at : at + 10]):
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value & ((1 << 64) - 1), at
    raise ValueError("a number that does not end")


def _last(message: memoryview, number: int) -> memoryview:
    """The message or text in field `number`, the last one if there are several, as protocol buffers
    want it; else empty.
    """
    found = memoryview(b"")
    for i, value in fields(message):
        if i == number:
            found = _bytes(value)
    return found


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where text or a message should be")
    return value


def _int(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("text or a message where a number should be")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)).decode("utf-8", "replace")


def read_inception(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The weights in a graph such as classify_image_graph_def.pb, under their names in PyTorch's
    checkpoints, as far as there.

    Kernels become [out, in, height, width] and the classifier [out, in]; float32, read-only views
    of the file's content.

    Raises:
        ValueError: not a GraphDef, cut short, or with a constant whose values do not fit its shape.
    """
    with open_binary(path) as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ValueError(f"{path}: larger than {MAX_FILE >> 20} MiB, which no Inception graph is")
    names, state = _names(), {}
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}
    try:
        for number, node in fields(memoryview(content)):
            if number != 1:  # GraphDef.node
                continue
            name, value = _constant(_bytes(node))
            if name in names and len(value):
                array = _tensor(value, name)
                state[names[name]] = array.transpose(axes.get(array.ndim))
    except ValueError as error:
        raise ValueError(
            f"{path}: no frozen TensorFlow graph, or not all of one ({error}); download it again"
        ) from None
    return state


def _constant(node: memoryview) -> tuple[str, memoryview]:
    """Name and TensorProto of a NodeDef; nothing for one that is no constant."""
    name, op, tensor = "", "", memoryview(b"")
    for number, content in fields(node):
        if number == 1:
            name = _text(content)
        elif number == 2:
            op = _text(content)
        # attr: map<string, AttrValue>
        elif number == 5 and _text(_last(_bytes(content), 1)) == "value":
            tensor = _last(_last(_bytes(content), 2), 8)
    return (name, tensor) if op == "Const" else ("", memoryview(b""))


def _tensor(message: memoryview, name: str) -> np.ndarray:
    """A TensorProto of float32."""
    dtype, content, values = 0, memoryview(b""), bytearray()
    shape: list[int] = []
    for number, value in fields(message):
        if number == 1:
            dtype = _int(value)
        elif number == 2:
            shape = _shape(_bytes(value), name)
        elif number == 4:
            content = _bytes(value)
        elif number == 5:  # float_val, packed or one by one
            values += _bytes(value)
    if dtype != FLOAT:
        raise ValueError(f"{name} is of type {dtype}, not float32")
    data = content if len(content) else values
    if len(data) == 4 * math.prod(shape):
        return np.frombuffer(data, "<f4").reshape(shape)
    if len(data) == 4:  # one number stands for all: no memory is taken, whatever the shape claims
        return np.broadcast_to(np.frombuffer(data, "<f4"), shape)
    raise ValueError(f"{name} has {len(data)} bytes for the shape {shape}")


def _shape(message: memoryview, name: str) -> list[int]:
    """A TensorShapeProto."""
    shape: list[int] = []
    for number, dim in fields(message):
        if number == 2:
            size = next((n for i, n in fields(_bytes(dim)) if i == 1), 0)
            if isinstance(size, int):
                shape.append(size)
            if (
                len(shape) > MAX_RANK
                or not isinstance(size, int)
                or math.prod(n or 1 for n in shape) > MAX_ELEMENTS
            ):
                raise ValueError(f"{name} has an impossible shape")
    return shape


def _names() -> dict[str, str]:
    """Node of the graph -> entry of a checkpoint."""
    names = {"softmax/weights": "fc.weight", "softmax/biases": "fc.bias"}
    for scope, layer in _layers().items():
        names |= {
            f"{scope}/conv2d_params": f"{layer}.conv.weight",
            f"{scope}/batchnorm/gamma": f"{layer}.bn.weight",
            f"{scope}/batchnorm/beta": f"{layer}.bn.bias",
            f"{scope}/batchnorm/moving_mean": f"{layer}.bn.running_mean",
            f"{scope}/batchnorm/moving_variance": f"{layer}.bn.running_var",
        }
    return names


def _layers() -> dict[str, str]:
    """Scope of a convolution in the graph -> name of the layer in checkpoints.

    A tower's convolutions are conv, conv_1, conv_2, ... in the graph, however they are called in
    checkpoints.
    """
    a = {
        "": "1x1",
        "tower/": "5x5_1 5x5_2",
        "tower_1/": "3x3dbl_1 3x3dbl_2 3x3dbl_3",
        "tower_2/": "_pool",
    }
    b = {"": "3x3", "tower/": "3x3dbl_1 3x3dbl_2 3x3dbl_3"}
    c = {
        "": "1x1",
        "tower/": "7x7_1 7x7_2 7x7_3",
        "tower_1/": "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5",
        "tower_2/": "_pool",
    }
    d = {"tower/": "3x3_1 3x3_2", "tower_1/": "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"}
    e = {
        "": "1x1",
        "tower/": "3x3_1",
        "tower/mixed/": "3x3_2a 3x3_2b",
        "tower_1/": "3x3dbl_1 3x3dbl_2",
        "tower_1/mixed/": "3x3dbl_3a 3x3dbl_3b",
        "tower_2/": "_pool",
    }
    blocks = (
        ("5b", a),
        ("5c", a),
        ("5d", a),
        ("6a", b),
        ("6b", c),
        ("6c", c),
        ("6d", c),
        ("6e", c),
        ("7a", d),
        ("7b", e),
        ("7c", e),
    )
    stem = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
    layers = {_numbered("conv", i): f"Conv2d_{name}" for i, name in enumerate(stem)}
    for i, (block, towers) in enumerate(blocks):
        for tower, names in towers.items():
            for j, name in enumerate(names.split()):
                place = f"{_numbered('mixed', i)}/{tower}{_numbered('conv', j)}"
                layers[place] = f"Mixed_{block}.branch{name}"
    return layers


def _numbered(name: str, i: int) -> str:
    """TensorFlow's way of making names unique."""
    return f"{name}_{i}" if i else name
