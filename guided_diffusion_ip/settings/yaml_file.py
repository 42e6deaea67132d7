"""Config files: sections of keys, each a flag.

A YAML file has the sections of SECTIONS, one named after a script for the flags that only it has,
`paper` (published numbers: for people and tables, and for `--eps_scaler published`) and, in the
config.yaml of a training run, `data` (how its images were prepared, and their classes). A script
reads only its own sections; a key that is not a flag of the section is an error that names the
nearest one.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable
from typing import Any

from .. import files
from ..training import checkpoint
from ..yaml_text import parse_yaml, read_yaml_stream
from .flags import SCRIPTS, SECTIONS

Content = dict[str, dict[str, Any]]  # {section: {key: value}}

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?', or '' if nothing is like it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def _where_configs_are(path: str) -> str:
    """What to say of the folder configs/ beside this package, '' where there is none (not in a
    clone).
    """
    folder = os.path.join(os.path.dirname(_PACKAGE), "configs")
    same_name = os.path.join(folder, os.path.basename(path))
    if os.path.isfile(same_name):
        return f"; did you mean {same_name}?"
    return f"; {folder} holds the papers' settings" if os.path.isdir(folder) else ""


def read_yaml(path: str) -> Content:
    """A config file, or the config in the header of a .safetensors or in a stateNNNNNN.pt, as
    {section: {key: value}}.

    Raises:
        ValueError: missing, not YAML, or with sections that are unknown.
    """
    if not files.exists(path) or os.path.isdir(path):
        raise ValueError(
            f"config file {path} does not exist (seen from {os.getcwd()}){_where_configs_are(path)}"
        )
    if is_state(path):
        return checkpoint.saved_settings(checkpoint.read_state(path))
    if is_safetensors(path):
        content = parse_yaml(files.safetensors_config(path), path) or {}
    else:
        with files.open_binary(path) as file:
            content = read_yaml_stream(file, path) or {}
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected the sections {', '.join(SECTIONS)}, found {type(content).__name__}"
        )
    known = [
        *SECTIONS,
        *(name for name, script in SCRIPTS.items() if script.extra),
        "data",
        "paper",
    ]
    for section, keys in content.items():
        if section not in known:
            raise ValueError(
                f"{path}: unknown section {section!r}; allowed: {', '.join(known)}."
                + nearest(str(section), known)
            )
        if keys is not None and not isinstance(keys, dict):
            raise ValueError(f"{path}: section {section} must hold 'key: value' lines")
    return {section: keys or {} for section, keys in content.items()}


def values_from_yaml(
    content: Content, sections: Iterable[str], path: str, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """The values of some sections, converted and checked: {flag name: value}.

    Args:
        ignore: flags to leave out; a script's own section may have a flag of such a name.
    """
    values: dict[str, Any] = {}
    for section in sections:
        left_out = ignore if section in SECTIONS else ()
        declared = SECTIONS[section] if section in SECTIONS else SCRIPTS[section].extra
        flags = {name: flag for flag in declared for name in (flag.name, *flag.aliases)}
        for key, raw in content.get(section, {}).items():
            if key not in flags:
                raise ValueError(
                    f"{path}: unknown key {key!r} in section {section}." + nearest(str(key), flags)
                )
            flag = flags[key]
            try:
                value = flag.convert(raw)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{path}: {section}.{key}: {error}") from None
            if flag.name in left_out:
                continue
            if flag.name in values and values[flag.name] != value:
                raise ValueError(
                    f"{path}: {key} and another spelling of it have different values: keep one"
                )
            values[flag.name] = value
    return values


def is_state(path: str) -> bool:
    """A stateNNNNNN.pt, which has the settings of its run in it."""
    return path.endswith(".pt")


def is_safetensors(path: str) -> bool:
    return path.lower().endswith(".safetensors")
