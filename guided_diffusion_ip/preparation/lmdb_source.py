"""Images in an LMDB folder, as LSUN is published: key -> the bytes of a webp or jpeg file."""

from __future__ import annotations

import os
import struct
from typing import Any

from PIL import Image

from ..data.image_io import decode_image
from ..data.image_source import Source

_MAGIC = 0xBEEFC0DE
# Of a page with a description: a header of 16 bytes, the magic number, version, address and size of
# the map; two tables of 48 bytes, the first of which begins with the size of a page; the number of
# the last page, and that of the transaction.
_META = struct.Struct("<16x I 4x 16x I 44x 48x Q Q")


def lmdb_package() -> Any:
    """The module lmdb.

    Raises:
        ValueError: not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(
            "LSUN is published as an LMDB, which needs the lmdb package: pip install lmdb "
            "(or the extra [lsun])"
        ) from error
    return lmdb


def refuse_truncated(path: str) -> None:
    """Raises ValueError where a data.mdb is shorter than it says that it is: LMDB maps the file,
    and reading beyond its end kills the process.

    Each of the two first pages describes the file as one transaction left it; the later one counts.
    Little-endian, 64 bits, as LMDB writes on such machines.
    """
    with open(path, "rb") as file:
        first = file.read(_META.size)
        length = os.fstat(file.fileno()).st_size
        found = [_META.unpack(first)] if len(first) == _META.size else []
        if found and 512 <= found[0][1] <= 65536:
            file.seek(found[0][1])
            second = file.read(_META.size)
            found += [_META.unpack(second)] if len(second) == _META.size else []
    metas = [meta for meta in found if meta[0] == _MAGIC]
    if len(metas) < 2:
        raise ValueError(f"{path} is no LMDB file, or damaged: copy or download it again")
    _, page, last, _ = max(metas, key=lambda meta: meta[3])
    if (last + 1) * page > length:
        raise ValueError(
            f"{path} has {length:,} bytes of {(last + 1) * page:,}: it is cut short; copy or "
            "download it again"
        )


class LmdbSource(Source):
    """The images of an LMDB folder, in the order of their keys; `names` are the keys.

    Raises:
        ValueError: the lmdb package is missing, or there is no database of images.
    """

    kind = "lmdb"

    def __init__(self, path: str) -> None:
        self.path = path
        self._env: Any = None
        self._owner = 0  # the process that has opened it
        if not os.path.isfile(os.path.join(path, "data.mdb")):
            packed = " (unpack the zip first)" if path.lower().endswith(".zip") else ""
            raise ValueError(f"{path} is no LMDB folder, which has a file data.mdb{packed}")
        refuse_truncated(os.path.join(path, "data.mdb"))
        try:
            with self._open().begin() as transaction, transaction.cursor() as cursor:
                # latin-1 maps bytes to characters one to one, whatever the keys are.
                names = [key.decode("latin-1") for key in cursor.iternext(keys=True, values=False)]
        except lmdb_package().Error as error:
            raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error
        super().__init__(path, names, class_cond=False)

    def image(self, i: int, channels: int) -> Image.Image:
        name = f"{self.path}: key {self.names[i]}"
        try:
            with self._open().begin(buffers=False) as transaction:
                data = transaction.get(self.names[i].encode("latin-1"))
        except lmdb_package().Error as error:
            raise ValueError(f"{name} is damaged: {error}") from error
        if data is None:
            raise ValueError(f"{name} is not there any more")
        return decode_image(data, channels, name)

    def close(self) -> None:
        if self._env is not None and self._owner == os.getpid():
            self._env.close()
        self._env = None

    def _open(self) -> Any:
        lmdb = lmdb_package()
        if self._env is None or self._owner != os.getpid():  # an environment must not cross a fork
            try:
                self._env = lmdb.open(
                    self.path, readonly=True, lock=False, create=False, readahead=False
                )
            except lmdb.Error as error:
                raise ValueError(f"{self.path} cannot be read as an LMDB: {error}") from error
            self._owner = os.getpid()
        return self._env

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_env": None}
