"""Another guided_diffusion package that a script would have found: a copy of one that ours stands
for, or changed?

Known are all versions of openai's package and of its improved_diffusion, and those of the IP and ES
papers, by digests of their syntax trees: comments, docstrings and layout do not count, everything
else does.
"""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterable

# Module -> digests of its versions.
KNOWN: dict[str, tuple[str, ...]] = {
    "dist_util": ("0d1f822b1090f1d1", "64c818a837b9e43b", "f7693682bc9ef93d", "ffc95d78c57757e5"),
    "fp16_util": (
        "ae6495dbd5bf378b",
        "f46f9f6646cf657b",
        "d692a1bf6044c107",
        "a1f6fd22793722dd",
        "c05bf1613976e489",
    ),
    "gaussian_diffusion": (
        "6a9aac13e8f8d4c2",
        "34754b5ca52378a1",
        "e9e500c7c066f499",
        "31249da837452024",
    ),
    "image_datasets": (
        "98f069416a991787",
        "b4c90d79fd264bd2",
        "0128a729fda662b4",
        "f2067bb2af2d9254",
    ),
    "logger": ("1ad90d207527c99d",),
    "losses": ("618689fe87c1920c",),
    "nn": ("3814afa810f14833",),
    "resample": ("e6065230b4dc1636",),
    "respace": ("c01b508bf38eaf48", "76250d56cc97ed47"),
    "script_util": (
        "b818646dc0f886de",
        "1bb243c4684cb294",
        "75a032f2ce4c3337",
        "ede8ce1c939a2f6b",
        "0bc9620e602ec42c",
        "42e058ee82ed661d",
    ),
    "train_util": ("50dd750f007a5c7c", "89e52731cad1ab62", "5e8eb2d3c9535035"),
    "unet": ("566e8240705f4e23", "0fde4452d11af45e", "613b261cba2b80d2"),
}


def find_package(folders: Iterable[str], name: str) -> str | None:
    """The folder of the first package `name`, with modules of those names, in one of these folders;
    it may lie one deeper (a checkout, name/name).
    """
    for folder in folders:
        for path in (os.path.join(folder, name, name), os.path.join(folder, name)):
            if os.path.isdir(path) and not KNOWN.keys().isdisjoint(modules_of(path)):
                return path
    return None


def modules_of(folder: str) -> list[str]:
    """The names of a package's modules, __init__ left out."""
    files = [file.removesuffix(".py") for file in os.listdir(folder) if file.endswith(".py")]
    return sorted(name for name in files if name != "__init__")


def changed_modules(folder: str) -> list[str]:
    """The modules of a package that are in no known version of guided_diffusion."""
    return [
        name
        for name in modules_of(folder)
        if digest(os.path.join(folder, f"{name}.py")) not in KNOWN.get(name, ())
    ]


def digest(path: str) -> str:
    """A digest of a file's syntax tree; "" of what is not Python."""
    with open(path, "rb") as file:
        source = file.read()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()[:16]


def _plain(node: object) -> object:
    """A syntax tree as nested tuples, without docstrings and without what is empty: versions of
    Python differ in which empty fields they have.
    """
    if isinstance(node, list):
        return tuple(_plain(item) for item in node if not _is_text(item))
    if not isinstance(node, ast.AST):
        return repr(node)
    values = ((name, value) for name, value in ast.iter_fields(node) if name != "kind")
    parts = [(name, _plain(value)) for name, value in values if value is not None and value != []]
    return type(node).__name__, *parts


def _is_text(node: object) -> bool:
    """Is it a statement that is a string and nothing else, such as a docstring?"""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
