"""Damage: of bytes, of YAML, of the headers of an npz, of state_dicts, of flags."""

from __future__ import annotations

import datetime
import io
import math
import struct
import zipfile
from typing import Any

import numpy as np
import torch
import yaml

Rng = np.random.Generator

NUMBERS = (
    *("0", "-1", "1", "2", "3", "7", "1e20", "100000000000000000000", "-0.0", "nan", "inf", "-inf"),
    *("1e-300", "1e308", "1e400", "0.5", "2147483648", "4611686018427387904", "0x10", "1_000", ""),
    *("9" * 400, "8x8", "8x", "0x0", "99999x99999"),
)
WORDS = (
    *("true", "False", "null", "~", "auto", "published", "cosine", "linear", "adm", "edm", "none"),
    *(
        "a,b",
        "1,2",
        ",",
        "1,,2",
        "*",
        "../../x",
        "/dev/null",
        "/",
        ".",
        "\x1b[31m",
        "Ä猫",
        "x" * 5000,
    ),
    *("caf\udce9", "%s%n", "{0}", "${HOME}", "-", "--", "gs://", "2020-13-45", "[1, 2]", "{a: 1}"),
    *("'", '"', "\t", "ddim10", "10@5", "@", "1.0.0", "!!int abc", "&a [*a]", "<<: 1", "|", "#"),
)


def pick(rng: Rng, options: Any) -> Any:
    options = list(options)
    return options[int(rng.integers(len(options)))]


def damaged(rng: Rng, data: bytes) -> bytes:
    """Bytes with some of them changed, left out, doubled, moved or replaced."""
    for _ in range(int(rng.integers(1, 4))):
        at, n = (
            int(rng.integers(0, len(data) + 1)),
            int(rng.integers(1, 1 + max(1, len(data) // 8))),
        )
        kind = int(rng.integers(8))
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[at + n :]
        elif kind == 2:
            data = data[:at] + data[at : at + n] * 2 + data[at + n :]
        elif kind == 3:
            data = data[:at] + rng.bytes(min(n, 64)) + data[at:]
        elif kind == 4:
            data = data[:at] + bytes(min(n, 64)) + data[at + min(n, 64) :]
        else:
            flipped = bytearray(data)
            for where in rng.integers(0, max(1, len(data)), int(rng.integers(1, 9))):
                if len(flipped):
                    flipped[int(where)] = int(rng.integers(256))
            data = bytes(flipped)
    return data


def damaged_text(rng: Rng, text: str, is_yaml: bool = True) -> bytes:
    """YAML, CSV or JSON with values, keys or lines exchanged; at times its bytes damaged too."""
    if is_yaml and rng.random() < 0.6:
        return odd_content(rng, text)
    lines = text.splitlines() or [""]
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(lines)))
        word = pick(rng, NUMBERS if rng.random() < 0.5 else WORDS)
        kind = int(rng.integers(7))
        key, colon, value = lines[at].partition(":")
        if kind == 0:
            lines[at] = f"{key}: {word}"
        elif kind == 1:
            lines[at] = f"{word}{colon}{value}"
        elif kind == 2:
            lines.insert(at, f"{word}: {pick(rng, NUMBERS)}")
        elif kind == 3:
            lines[at] = lines[at].replace(" ", word, 1) if " " in lines[at] else word
        elif kind == 4:
            lines[at] = ",".join(word if rng.random() < 0.4 else p for p in lines[at].split(","))
        elif kind == 5:
            lines[at] = f"{key}: [{word}, {value}]"
        else:
            lines[at] = lines[at] * int(rng.integers(2, 40))
    data = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    return damaged(rng, data) if rng.random() < 0.3 else data


DESCRIPTIONS = (
    *("|u1", "<f4", "<i8", "<U8", "|S4", "|O", "|b1", "<c16", "<f2", "|V7", ">i2", "<U99999999"),
    *("zzz", "", "<M8[s]", "|u1' * 3, '"),
)


def odd_npz(rng: Rng, arrays: dict[str, np.ndarray]) -> bytes:
    """An npz with one header, key or shape unlike what is expected."""
    file = io.BytesIO()
    odd = pick(rng, arrays)
    kind = pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(file, "w", kind) as packed:
        for key, array in arrays.items():
            descr, shape = array.dtype.str, array.shape
            order = False
            if key == odd:
                what = int(rng.integers(6))
                sides = list(shape)
                if what == 0:
                    descr = pick(rng, DESCRIPTIONS)
                elif what == 1 and sides:
                    sides[int(rng.integers(len(sides)))] = int(
                        pick(rng, (0, -1, 1, 2, 10**6, 10**12, 10**20, 2**63))
                    )
                elif what == 2:
                    sides = sides[: int(rng.integers(len(sides) + 1))]
                elif what == 3:
                    sides = [*sides, int(rng.integers(1, 4))]
                elif what == 4:
                    key = pick(rng, ("arr_1", "arr_0", "mu", "x", "preprocessing", "../y", "n"))
                else:
                    order = True
                shape = tuple(sides)
                array = _of_that_size(rng, array, descr, shape)
            text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape!r}, }}"
            if key == odd and rng.random() < 0.1:
                text = pick(rng, ("{", "(" * 900, "os", text[:-4], text * 2, "\xff"))
            header = text.encode("latin-1", "replace")
            header += b" " * (-(len(header) + 11) % 64) + b"\n"
            packed.writestr(
                f"{key}.npy",
                b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + array.tobytes(),
            )
    return file.getvalue()


def _of_that_size(rng: Rng, array: np.ndarray, descr: str, shape: tuple[int, ...]) -> np.ndarray:
    """Mostly as many bytes as the header announces, so that more than its size is looked at."""
    try:
        size = math.prod(shape) * np.dtype(descr).itemsize
    except (TypeError, ValueError):
        return array
    if not 0 <= size <= 1 << 20 or rng.random() < 0.3:
        return array
    data = np.frombuffer(array.tobytes() or b"\0", np.uint8)
    return np.resize(data, size)


def odd_content(rng: Rng, text: str) -> bytes:
    """YAML that is valid: with a value or a key of another kind somewhere."""
    content = yaml.safe_load(text)
    for _ in range(int(rng.integers(1, 3))):
        at, places = content, []
        while isinstance(at, (dict, list)) and at:
            key = pick(rng, at if isinstance(at, dict) else range(len(at)))
            places.append((at, key))
            at = at[key]
        if not places:
            break
        home, key = pick(rng, places)
        value = pick(
            rng,
            (
                *(0, -1, 1, 2, 3, 10**9, 2**62, 0.5, -0.5, 1e30, float("nan"), float("inf"), True),
                *(None, "", "x", "1e5", "é", [], {}, [1], [None], {"a": 1}, [[1]], [1.0] * 3),
                *(
                    ["a", 1],
                    {1: 2},
                    [float("nan")],
                    "x" * 300,
                    "ddim5",
                    "0",
                    datetime.date(2020, 1, 1),
                ),
            ),
        )
        if isinstance(home, dict) and rng.random() < 0.2:
            home[pick(rng, (1, None, "x", True, "lamda", 1.5))] = home.pop(key)
        elif rng.random() < 0.1:
            del home[key]
        else:
            home[key] = value
    return yaml.safe_dump(content, sort_keys=False).encode()


def odd_state(rng: Rng, state: dict[str, torch.Tensor]) -> dict[Any, Any]:
    """A state_dict with tensors that are missing, renamed or of another shape or kind."""
    state: dict[Any, Any] = dict(state)
    for _ in range(int(rng.integers(1, 4))):
        name = pick(rng, [n for n in state if isinstance(n, str)] or [""])
        value = state.get(name, torch.zeros(1))
        kind = int(rng.integers(12))
        if kind == 0:
            state.pop(name, None)
        elif kind == 1:
            state[pick(rng, (3, None, "", "module." + str(name), ("a",), "x" * 9999))] = value
        elif kind == 2:
            state[name] = torch.zeros(pick(rng, ((), (0,), (1,), (3, 3), (2, 0, 2), (1,) * 9)))
        elif kind == 3:
            state[name] = pick(rng, (None, 3, "x", [1], {"a": 1}, torch.float32))
        elif kind == 4:
            state[name] = torch.zeros(4).to_sparse()
        elif kind == 5:
            state[name] = torch.zeros(4, dtype=pick(rng, (torch.complex64, torch.bool, torch.int8)))
        elif kind == 6:
            state[name] = torch.zeros(4, device="meta")
        elif kind == 7 and isinstance(value, torch.Tensor) and value.ndim:
            state[name] = value.transpose(0, -1)
        elif kind == 8 and isinstance(value, torch.Tensor) and value.is_floating_point():
            state[name] = torch.full_like(value, pick(rng, (float("nan"), float("inf"), 1e30)))
        elif kind == 9:
            state = {n: v for n, v in state.items() if rng.random() < 0.5}
        elif kind == 10:
            state = {n: v for n, v in state.items() if not str(n).startswith(str(name)[:14])}
        else:
            state = {f"{pick(rng, ('', 'a.', 'model.'))}{n}": v for n, v in state.items()}
    return state
