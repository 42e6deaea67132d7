"""npz files larger than memory: written member by member from chunks, read row by row.

An npz is a zip of `.npy` files. Ours are stored uncompressed (images hardly compress), which lets
a reader map the pixels instead of loading them. Files appear under their final name only when they
are complete: they are written under a temporary one, flushed to disk and renamed. Nothing here ever
unpickles: an array of Python objects is an error.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO

import numpy as np
from numpy.lib import format as npy

from ..files import DAMAGED_ZIP, atomic_file

_CHUNK_BYTES = 1 << 24  # 16 MB: few system calls, little memory
_LOCAL_HEADER = 30  # fixed part of a zip member's local header, before its name and extra field


class NpzWriter:
    """Write an npz that need not fit in memory, to be used in a `with` block.

        with NpzWriter("samples.npz") as out:
            out.write("arr_0", (n, h, w, c), np.uint8, chunks)

    `path` appears (or is replaced) when the block ends well; if it raises, nothing is left behind.
    The bytes depend on the contents only, not on the time of writing.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self._zip: zipfile.ZipFile | None = None

    def __enter__(self) -> NpzWriter:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(atomic_file(self.path))
            self._zip = stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED))
            self._stack = stack.pop_all()
        return self

    def write(
        self, key: str, shape: Sequence[int], dtype: np.dtype | type, chunks: Iterable[np.ndarray]
    ) -> None:
        """Add the array `key` of the given shape; `chunks` are its consecutive rows.

        Raises:
            ValueError: a chunk of another dtype or row shape, or too few or too many rows.
        """
        assert self._zip is not None, "NpzWriter.write works inside its `with` block"
        shape, dtype = tuple(int(side) for side in shape), np.dtype(dtype)
        if dtype.hasobject:
            raise ValueError(f"{self.path}: {key} has dtype {dtype}: Python objects are not stored")
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        rows = 0
        member = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
        with self._zip.open(member, "w", force_zip64=True) as out:
            npy.write_array_header_1_0(out, header)
            for chunk in chunks:
                chunk = np.asarray(chunk)
                if chunk.dtype != dtype or chunk.shape[1:] != shape[1:] or chunk.ndim != len(shape):
                    raise ValueError(
                        f"{self.path}: {key} was announced as {dtype} {list(shape)}, "
                        f"but a chunk is {chunk.dtype} {list(chunk.shape)}"
                    )
                rows += len(chunk) if shape else 1  # a single number has no rows
                # Seen as bytes by numpy: memoryview cannot do it for text.
                out.write(np.ascontiguousarray(chunk).view(np.uint8).data if chunk.size else b"")
        if rows != (shape[0] if shape else 1):
            raise ValueError(f"{self.path}: {key} was announced as {list(shape)}, got {rows} rows")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._zip = None
        self._stack.__exit__(kind, error, trace)


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays that are in memory, uncompressed and atomically, as `NpzWriter` does."""
    with NpzWriter(path) as out:
        for key, array in arrays.items():
            array = np.asarray(array)
            out.write(key, array.shape, array.dtype, [array])


def merge_npz(
    path: str | os.PathLike,
    shard_paths: Sequence[str | os.PathLike],
    n: int,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Join the first `n` rows of the shards, in the order given, into one npz; memory stays flat.

    Every key of the first shard (`arr_0` uint8 [N, H, W, C], maybe `arr_1` int64 [N]) is joined;
    the arrays `extra` are added as they are. One shard is open at a time: there may be more of them
    than a process may open files (often 1024).

    Raises:
        ValueError: fewer than n rows in all, or shards whose keys, dtypes or row shapes differ.
    """
    if not shard_paths:
        raise ValueError(f"{path}: there are no shards to merge")
    with NpzReader(shard_paths[0]) as first:
        row_kinds = {key: (first.dtype(key), first.shape(key)[1:]) for key in first.keys}
    totals = dict.fromkeys(row_kinds, 0)
    for shard in shard_paths:  # headers only, so that nothing is written of shards that do not fit
        with NpzReader(shard) as reader:
            if reader.keys != list(row_kinds):
                raise ValueError(
                    f"{reader.path} has the arrays {reader.keys}, but "
                    f"{os.fspath(shard_paths[0])} has {list(row_kinds)}"
                )
            for key, (dtype, row) in row_kinds.items():
                if (reader.dtype(key), reader.shape(key)[1:]) != (dtype, row):
                    raise ValueError(
                        f"{reader.path}: {key} has rows {reader.dtype(key)} "
                        f"{list(reader.shape(key)[1:])}, but {dtype} {list(row)} in "
                        f"{os.fspath(shard_paths[0])}"
                    )
                totals[key] += reader.shape(key)[0]
    for key, total in totals.items():
        if total < n:
            raise ValueError(
                f"{path}: {n} rows wanted, but the {len(shard_paths)} shards hold "
                f"only {total} of {key}"
            )
    with NpzWriter(path) as out:
        for key, (dtype, row) in row_kinds.items():
            out.write(key, (n, *row), dtype, _first_rows(shard_paths, key, n))
        for key, array in (extra or {}).items():
            out.write(key, array.shape, array.dtype, [array])


def _first_rows(paths: Sequence[str | os.PathLike], key: str, n: int) -> Iterator[np.ndarray]:
    for path in paths:
        if n <= 0:
            return
        with NpzReader(path) as reader:
            rows = min(n, reader.shape(key)[0])
            yield from reader.chunks(key, stop=rows)
        n -= rows


def read_arrays(file: IO[bytes], keys: Iterable[str], where: str) -> dict[str, np.ndarray]:
    """Those of the arrays that are in an npz that is open already, as one within an archive is.

    Raises:
        ValueError: damaged, or made of Python objects; names it as `where`.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys if key in arrays.files}
    # Damaged headers and streams make NumPy raise anything, a MemoryError for a shape among it.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{where} cannot be read: {reason}") from error


class NpzReader:
    """Rows of the arrays in an npz, without loading the rest.

    `keys` lists the arrays. Uncompressed ones can be memory-mapped; compressed ones are
    decompressed as a stream, so read them forwards (going back starts again from the top).

    Raises:
        ValueError: no such file, not an npz, or an array that only pickle could read.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        try:
            self._zip = zipfile.ZipFile(self.path)
        except DAMAGED_ZIP as error:
            raise ValueError(f"{self.path} cannot be read as an npz file: {error}") from error
        self._members = {
            info.filename.removesuffix(".npy"): info
            for info in self._zip.infolist()
            if info.filename.endswith(".npy")
        }
        self.keys = list(self._members)
        self._headers: dict[str, tuple[tuple[int, ...], np.dtype, int]] = {}
        self._streams: dict[str, IO[bytes]] = {}
        self._maps: dict[str, np.ndarray] = {}

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the array, from its header alone."""
        return self._header(key)[0]

    def dtype(self, key: str) -> np.dtype:
        """Number type of the array, from its header alone."""
        return self._header(key)[1]

    def rows(self, key: str, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop-1 as an array of their own (a copy)."""
        shape, dtype, offset = self._header(key)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"{self.path}: {key} {list(shape)} has no rows {start}:{stop}")
        row = math.prod(shape[1:])
        count, skip = (stop - start) * row, start * row * dtype.itemsize
        if self._stored(key):  # read, not mapped: touched pages of a map count as memory in use
            data = np.fromfile(self.path, dtype, count, offset=self._offset(key) + skip)
        else:
            data = np.frombuffer(
                self._decompress(key, offset + skip, count * dtype.itemsize), dtype
            ).copy()
        if len(data) != count:
            raise ValueError(f"{self.path}: {key} ends before row {stop}: the file is cut short")
        return data.reshape(stop - start, *shape[1:])

    def whole(self, key: str, most: int) -> np.ndarray:
        """The array, also a single number or text, if it has at most so many bytes.

        Raises:
            ValueError: it has more, or is damaged.
        """
        shape, dtype, offset = self._header(key)
        size = math.prod(shape) * dtype.itemsize
        if size > most:
            raise ValueError(
                f"{self.path}: {key} is {dtype} {list(shape)}; at most {most:,} bytes are expected"
            )
        data = self._decompress(key, offset, size)
        if len(data) != size:
            raise ValueError(f"{self.path}: {key} is cut short")
        return np.frombuffer(data, dtype).reshape(shape).copy()

    def chunks(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Consecutive rows, about 16 MB at a time."""
        shape, dtype, _ = self._header(key)
        stop = shape[0] if stop is None else stop
        row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
        rows = max(1, _CHUNK_BYTES // row_bytes)
        for first in range(start, stop, rows):
            yield self.rows(key, first, min(first + rows, stop))

    def mapped(self, key: str) -> np.ndarray | None:
        """The whole array as a read-only memory map, or None where it is compressed or empty."""
        shape, dtype, _ = self._header(key)
        if not self._stored(key) or 0 in shape:
            return None
        if key not in self._maps:
            try:
                self._maps[key] = np.memmap(self.path, dtype, "r", self._offset(key), shape)
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.path}: {key} is damaged: {error}") from error
        return self._maps[key]

    def close(self) -> None:
        """Close the file. Arrays handed out stay valid."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._maps.clear()
        self._zip.close()

    def __enter__(self) -> NpzReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}  # for worker processes: open again instead of copying the pixels

    def __setstate__(self, state: dict[str, str]) -> None:
        NpzReader.__init__(self, state["path"])

    def _stored(self, key: str) -> bool:
        info = self._members[key]
        return info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1  # 1: encrypted

    def _offset(self, key: str) -> int:
        """Where in the file the first row of a stored array begins."""
        start = self._members[key].header_offset
        with open(self.path, "rb") as file:
            file.seek(start)
            fixed = file.read(_LOCAL_HEADER)
        # The lengths of name and extra field may differ from those in the zip's directory.
        variable = int.from_bytes(fixed[26:28], "little") + int.from_bytes(fixed[28:30], "little")
        return start + _LOCAL_HEADER + variable + self._header(key)[2]

    def _decompress(self, key: str, start: int, count: int) -> bytes:
        try:
            if key not in self._streams:
                self._streams[key] = self._zip.open(self._members[key])
            self._streams[key].seek(start)
            return self._streams[key].read(count)[:count]
        except DAMAGED_ZIP as error:
            raise ValueError(f"{self.path}: {key} is damaged: {error}") from error

    def _header(self, key: str) -> tuple[tuple[int, ...], np.dtype, int]:
        """(shape, dtype, bytes before the first row)."""
        if key not in self._members:
            raise ValueError(f"{self.path} has no array {key!r}; it has {self.keys}")
        if key not in self._headers:
            try:
                with self._zip.open(self._members[key]) as file:
                    version = npy.read_magic(file)
                    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
                    sides, fortran, dtype = read[version](file)
                    offset = file.tell()
            except MemoryError:
                raise ValueError(f"{self.path}: {key} has a header too large to be one") from None
            # The header is a Python expression, and damaged ones make its parser raise anything.
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ValueError(f"{self.path}: {key} is not a readable array: {reason}") from error
            shape = tuple(map(int, sides))
            announced = offset + math.prod(shape) * dtype.itemsize
            held = self._members[key].file_size
            if min(shape, default=0) < 0 or announced > held and not dtype.hasobject:
                raise ValueError(
                    f"{self.path}: {key} is announced as {dtype} {list(shape)[:8]}, which the "
                    f"{held:,} bytes of it cannot hold: the file is damaged or cut short"
                )
            if dtype.hasobject:
                raise ValueError(
                    f"{self.path}: {key} holds Python objects, which could run code "
                    "when read: save plain numbers"
                )
            if fortran and len(shape) > 1:
                raise ValueError(
                    f"{self.path}: {key} is stored column by column: save "
                    "numpy.ascontiguousarray(...) of it"
                )
            self._headers[key] = (shape, dtype, offset)
        return self._headers[key]
