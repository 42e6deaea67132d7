"""Read pickles that hold nothing but dicts, lists, text and arrays of numbers, without being able to run anything else.

CIFAR-10 and the downsampled ImageNet are published as pickles. A pickle is a program: it names functions and calls them. Here
the names that numpy writes are bound to stand-ins of our own, which keep bytes, and every other name is refused; not even
numpy's own functions are called before the whole pickle has been read.
"""
from __future__ import annotations

import pickle
from typing import IO, Any

import numpy as np

_TYPES = ("u1", "i1", "b1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")


class _Refused(ValueError):
    """The pickle wants something that no set of images needs."""


class _Type:
    """Stands for numpy.dtype."""

    def __init__(self, code: Any = "u1", *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.order = "<"
        if self.code not in _TYPES:
            raise _Refused(f"an array of {self.code!r}, which is no plain number")

    def __setstate__(self, state: tuple) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        self.order = {"|": "<", "<": "<", ">": ">"}[order]


class _Array:
    """Stands for numpy.ndarray: what one is made of."""

    def __init__(self, *_: Any) -> None:
        self.parts: tuple[Any, Any, Any, bool] | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        self.parts = (data, kind, shape, bool(fortran))

    def array(self) -> np.ndarray:
        """The numbers; not a copy, and not writable."""
        data, kind, shape, fortran = self.parts
        if not isinstance(data, (bytes, bytearray)) or not isinstance(kind, _Type):
            raise _Refused(f"an array made of {type(data).__name__}")
        flat = np.frombuffer(data, np.dtype(kind.order + kind.code))
        return flat.reshape(tuple(int(side) for side in shape), order="F" if fortran else "C")


def _from_buffer(data: Any, kind: Any, shape: Any, order: str) -> _Array:
    """Stands for numpy._core.numeric._frombuffer, which pickle protocol 5 names."""
    array = _Array()
    array.parts = (data, kind, shape, order == "F")
    return array


def _encoded(text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    """Stands for _codecs.encode, by which protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}, which could run code") from None


def load_batch(file: IO[bytes], name: str) -> dict[str, Any]:
    """The dict in a pickle of any protocol, also one that Python 2 wrote; keys become text.

    Values are arrays of numbers (read-only), lists, text, bytes and numbers.

    Args:
        file: open for reading. name: what to call it in an error.

    Raises:
        ValueError: damaged, no dict, or a pickle that asks for anything else; it has not been run.
    """
    try:
        content = _Unpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise _Refused(f"{type(content).__name__} instead of a dict")
        return {_text(key): value.array() if isinstance(value, _Array) else _plain(value) for key, value in content.items()}
    except MemoryError:
        raise
    except _Refused as error:
        raise ValueError(f"{name}: refused, because this pickle holds {error}: only dicts of arrays, lists and text are read "
                         "(download the file again from its page)") from error
    # A damaged pickle can fail in any step of its program, with any exception.
    except Exception as error:
        raise ValueError(f"{name} is damaged: {' '.join(str(error).split())} (download it again)") from error


def _text(key: Any) -> str:
    return key.decode("ascii") if isinstance(key, bytes) else str(key)


def _plain(value: Any) -> Any:
    if isinstance(value, list) and not all(isinstance(item, (int, bytes, str)) for item in value):
        raise _Refused("a list of something else than numbers and text")
    if not isinstance(value, (list, int, float, str, bytes)):
        raise _Refused(f"{type(value).__name__}")
    return value
