"""Read pickles that hold nothing but plain containers and arrays of numbers, without being able to
run anything else.

CIFAR-10 and the downsampled ImageNet are published as pickles, and so are EDM's networks
(interop/edm_pickle.py). A pickle is a program: it names functions and calls them. The machine here
has no instruction that imports or calls anything: a name stands for a function of ours that keeps
what it is given, and every other name is refused; not even numpy's own functions are called before
the whole pickle has been read.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

_TYPES = ("u1", "i1", "b1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")


class Refused(ValueError):
    """The pickle wants something that its kind of file does not need; the text says what, after
    'this pickle holds'.
    """


class Buildable:
    """What the instruction BUILD may hand a state to; a pickle sets no other attributes."""

    def build(self, state: Any) -> None:
        """Take the state; Refused if it is not what this object is made of."""
        raise NotImplementedError


class _Type(Buildable):
    """Stands for numpy.dtype."""

    def __init__(self, code: Any = "u1", *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.order = "<"
        if self.code not in _TYPES:
            raise Refused(f"an array of {self.code!r:.40}, which is no plain number")

    def build(self, state: tuple) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        self.order = {"|": "<", "<": "<", ">": ">"}[order]


class Array(Buildable):
    """Stands for numpy.ndarray: what one is made of."""

    def __init__(self, *_: Any) -> None:
        self.parts: tuple[Any, Any, Any, bool] | None = None

    def build(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        self.parts = (data, kind, shape, bool(fortran))

    def array(self) -> np.ndarray:
        """The numbers; not a copy, and not writable."""
        if self.parts is None:
            raise Refused("an array made of nothing")
        data, kind, shape, fortran = self.parts
        if not isinstance(data, (bytes, bytearray)) or not isinstance(kind, _Type):
            raise Refused(f"an array made of {type(data).__name__}")
        flat = np.frombuffer(data, np.dtype(kind.order + kind.code))
        return flat.reshape(tuple(int(side) for side in shape), order="F" if fortran else "C")


def _from_buffer(data: Any, kind: Any, shape: Any, order: str) -> Array:
    """Stands for numpy._core.numeric._frombuffer, which pickle protocol 5 names."""
    array = Array()
    array.parts = (data, kind, shape, order == "F")
    return array


def _scalar(kind: Any, data: Any) -> int | float | bool:
    """Stands for numpy._core.multiarray.scalar: one number."""
    return _from_buffer(data, kind, (), "C").array().item()


def _encoded(text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    """Stands for _codecs.encode, by which protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"bytes encoded as {encoding!r:.40}")
    return text.encode("latin1")


NUMBERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


@dataclass(frozen=True)
class _Name:
    """A name that the pickle may use, and the function of ours that it stands for."""

    text: str
    make: Callable[..., Any]


def _require(value: Any, kind: type, instruction: str) -> Any:
    """`value`, if it is exactly a `kind`: subclasses and lookalikes could do things of
    their own.
    """
    if type(value) is not kind:
        raise Refused(
            f"{instruction} on {type(value).__name__}, where only {kind.__name__} is expected"
        )
    return value


def _keys(items: Iterable[Any]) -> Iterable[Any]:
    """The items, if they are text or numbers. (The hash of tuples in tuples in tuples overflows the
    stack of the process.)
    """
    items = list(items)
    for item in items:
        if type(item) not in (str, bytes, int, float, bool, type(None)):
            raise Refused(f"{type(item).__name__} as a key or in a set")
    return items


def _update(target: Any, items: Sequence[Any], instruction: str) -> None:
    """Put [key, value, key, value, ...] into a dict."""
    _require(target, dict, instruction).update(zip(_keys(items[::2]), items[1::2], strict=True))


class _Instructions(dict):
    """From the byte of an instruction to what carries it out; all that are not listed are refused
    by name.
    """

    def __missing__(self, byte: int) -> Callable[[Any], None]:
        known = next((op for op in pickletools.opcodes if op.code == chr(byte)), None)

        def refuse(_: Any) -> None:
            if known is None:
                raise pickle.UnpicklingError(
                    f"no instruction of a pickle begins with the byte {byte}"
                )
            raise Refused(f"the instruction {known.name}, which could run code")

        return refuse


class _Whole:
    """A file that never gives less than it was asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) != size:
            raise EOFError
        return data

    def readline(self) -> bytes:
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line


# What moves plain data; taken over from Python's own machine, the one written in Python, which
# these are written for.
_PLAIN = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG "
    "LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES "
    "BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 "
    "TUPLE3 EMPTY_LIST LIST EMPTY_DICT EMPTY_SET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT "
    "MEMOIZE GLOBAL STACK_GLOBAL"
).split()


class SafeUnpickler(pickle._Unpickler):
    """Reads a pickle of any protocol.

    It is the machine in Python rather than the one in C because its instructions can be replaced
    one by one, and because a number in a damaged file cannot make it fill memory with an empty
    table.

    Args:
        file: open for reading. allowed: what each name stands for. encoding: of Python 2's text,
            "bytes" to keep it.
    """

    # What the instructions work with, of Python's machine.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    dispatch = _Instructions(
        {
            getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
            for name in _PLAIN
        }
    )

    def __init__(
        self,
        file: IO[bytes],
        allowed: Mapping[tuple[str, str], Callable[..., Any]],
        encoding: str = "ASCII",
    ) -> None:
        super().__init__(_Whole(file), encoding=encoding)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> _Name:
        """The stand-in for a name; Refused if there is none."""
        text = f"{module}.{name}"
        if (module, name) not in self.allowed:
            raise Refused(f"{text:.120}, which could run code")
        return _Name(text, self.allowed[module, name])

    def _call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.append(_require(function, _Name, "a call").make(*_require(args, tuple, "arguments")))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Buildable):
            raise Refused(f"a state for {type(target).__name__}, which has none")
        target.build(state)

    def _old_instance(self) -> None:
        # It names a class without asking for it first, so that the name is worth telling.
        self.find_class(*(self.readline()[:-1].decode("ascii") for _ in range(2)))
        raise Refused("the instruction INST, which could run code")

    def _append(self) -> None:
        value = self.stack.pop()
        _require(self.stack[-1], list, "APPEND").append(value)

    def _extend(self) -> None:
        items = self.pop_mark()
        _require(self.stack[-1], list, "APPENDS").extend(items)

    def _dict(self) -> None:
        new: dict[Any, Any] = {}
        _update(new, self.pop_mark(), "DICT")
        self.append(new)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _update(self.stack[-1], (key, value), "SETITEM")

    def _set_items(self) -> None:
        items = self.pop_mark()
        _update(self.stack[-1], items, "SETITEMS")

    def _add_items(self) -> None:
        items = self.pop_mark()
        _require(self.stack[-1], set, "ADDITEMS").update(_keys(items))

    def _frozen_set(self) -> None:
        self.append(frozenset(_keys(self.pop_mark())))

    def _byte_array(self) -> None:
        # Python's own makes room, all zero, for as many bytes as the file claims to have.
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch.update(
        {
            code[0]: function
            for code, function in (
                (pickle.REDUCE, _call),
                (pickle.NEWOBJ, _call),
                (pickle.BUILD, _build),
                (pickle.INST, _old_instance),
                (pickle.APPEND, _append),
                (pickle.APPENDS, _extend),
                (pickle.DICT, _dict),
                (pickle.SETITEM, _set_item),
                (pickle.SETITEMS, _set_items),
                (pickle.ADDITEMS, _add_items),
                (pickle.FROZENSET, _frozen_set),
                (pickle.BYTEARRAY8, _byte_array),
            )
        }
    )


@contextlib.contextmanager
def explained(name: str, only: str) -> Iterator[None]:
    """Turn whatever reading a pickle raises into a ValueError of one line. only: what such a pickle
    may hold.
    """
    try:
        yield
    except Refused as error:
        raise ValueError(
            f"{name}: refused, because this pickle holds {_line(error)}: only {only} are read "
            "(download the file again from its page)"
        ) from error
    except MemoryError:
        raise ValueError(
            f"{name} is damaged, or too large for the memory of this machine (download it again)"
        ) from None
    # A damaged pickle can fail in any step of its program, with any exception.
    except Exception as error:
        text = (
            "it ends too early"
            if isinstance(error, EOFError)
            else _line(error) or type(error).__name__
        )
        raise ValueError(f"{name} is damaged: {text} (download it again)") from error


def _line(error: Exception) -> str:
    """An error's text in one line that a terminal can show: names in it come out of the file."""
    line = " ".join(str(error).split())[:300]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def load_batch(file: IO[bytes], name: str) -> dict[str, Any]:
    """The dict in a pickle of any protocol, also one that Python 2 wrote; keys become text.

    Values are arrays of numbers (read-only), lists, text, bytes and numbers.

    Args:
        file: open for reading. name: what to call it in an error.

    Raises:
        ValueError: damaged, no dict, or a pickle that asks for anything else; it has not been run.
    """
    with explained(name, "dicts of arrays, lists and text"):
        content = SafeUnpickler(file, NUMBERS, encoding="bytes").load()
        if not isinstance(content, dict):
            raise Refused(f"{type(content).__name__} instead of a dict")
        return {
            _text(key): value.array() if isinstance(value, Array) else _plain(value)
            for key, value in content.items()
        }


def _text(key: Any) -> str:
    return key.decode("ascii") if isinstance(key, bytes) else str(key)


def _plain(value: Any) -> Any:
    if isinstance(value, list) and not all(isinstance(item, (int, bytes, str)) for item in value):
        raise Refused("a list of something else than numbers and text")
    if not isinstance(value, (list, int, float, str, bytes)):
        raise Refused(f"{type(value).__name__}")
    return value
