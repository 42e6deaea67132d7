"""Which output of an enlarging run belongs to which low-resolution image: names for its pictures,
and a table.

Image i is made from low-resolution image i mod N, in the order of the sorted names or of the npz's
rows.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence

from ..files import atomic_file

TABLE = "base_images.csv"
# Of a picture's name: file systems take 255 bytes, and there come an ending and a temporary name.
_LONGEST, _DEEPEST = 220, 32


def picture_names(base_names: Sequence[str], count: int) -> list[str]:
    """Names [count] for the pictures of images 0 .. count - 1, without extension: those of the
    files that they are made from.

    cat/001.jpg gives cat/001 and, enlarged again, cat/001~2, cat/001~3. No name comes twice (a.png
    and a.jpg give a and a~), and none leads out of the folder that it is meant for.

    Raises:
        ValueError: a name that no file of ours could have: too long, or in too many folders.
    """
    names: dict[str, None] = {}
    for i in range(count):
        time, base = divmod(i, len(base_names))
        # A zip may call its members ../../x.png.
        parts = [
            part
            for part in os.path.splitext(base_names[base])[0].split("/")
            if part not in ("", ".", "..")
        ]
        if len(parts) > _DEEPEST or max(map(len, map(os.fsencode, parts)), default=0) > _LONGEST:
            raise ValueError(
                f"{base_names[base][:80]}... cannot name a picture: it has {len(parts)} parts (at "
                f"most {_DEEPEST}), the longest of {max(map(len, map(os.fsencode, parts)))} bytes "
                f"(at most {_LONGEST}); rename it, or leave out --save_png"
            )
        name = "/".join(parts) + (f"~{time + 1}" if time else "")
        while name in names:
            name += "~"
        names[name] = None
    return list(names)


def write_table(out_dir: str, base_names: Sequence[object], count: int) -> str:
    """out_dir/base_images.csv: number of the image, number of the low-resolution image, its name or
    row. Returns the path.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "base_image", "base_name"])
    rows.writerows([i, i % len(base_names), base_names[i % len(base_names)]] for i in range(count))
    path = os.path.join(out_dir, TABLE)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    return path
