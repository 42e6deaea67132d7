"""A network of the user's own: --network my_module:MyNet.

Importing a module runs its code, so that the user has to name it: a config file that does is not
obeyed.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..sizes import parse_size
from ..yaml_text import parse_yaml
from .factories import number_of_labels
from .yaml_file import nearest


def is_own(name: str) -> bool:
    """Is it of the form module:Class?"""
    return re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", name) is not None


def require_named_by_user(name: str, named: bool, source: str) -> None:
    """Refuse a network of the user's own that only a file names.

    Raises:
        ValueError: it is one, and `named` is False.
    """
    if is_own(name) and not named:
        raise ValueError(
            f"{source} names a network of its own, {name}, whose code would be run: give --network "
            f"{name} as well if you trust it"
        )


def find_class(name: str) -> Callable[..., nn.Module]:
    """Import module:Class; the current folder is searched too.

    Raises:
        ValueError: there is no such module, or nothing of that name in it.
    """
    module, _, path = name.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ValueError(
            f"--network {name}: there is no module {error.name} (seen from {here}; PYTHONPATH "
            "names other folders)"
        ) from None
    finally:
        if added:
            sys.path.remove(here)
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(
                f"--network {name}: {module} has no {path}." + nearest(part, vars(found))
            )
        found = getattr(found, part)
    return found


def creator(make: Callable[..., nn.Module], name: str) -> Callable[..., nn.Module]:
    """What calls `make`, a class or a function, with those of our flags that it names, and with
    --network_args.
    """

    def create(**flags: Any) -> nn.Module:
        values = _offered(flags)
        given = parse_yaml(flags.get("network_args") or "{}", "--network_args")
        parameters = inspect.signature(make).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in given:
            if key not in parameters and not takes_any:
                raise ValueError(
                    f"--network_args: {name} takes no {key!r}." + nearest(str(key), parameters)
                )
        arguments = {key: value for key, value in values.items() if key in parameters} | given
        required = [
            p.name
            for p in parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if missing := [key for key in required if key not in arguments]:
            raise ValueError(
                f"--network {name} needs {', '.join(missing)}, which no flag gives: give "
                f'--network_args "{{{missing[0]}: ...}}"'
            )
        network = make(**arguments)
        if not isinstance(network, nn.Module):
            raise ValueError(
                f"--network {name} makes a {type(network).__name__}, which is no torch.nn.Module"
            )
        return network

    return create


def _offered(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What a network may ask for by naming it: our flags of the model, the size as a number or a
    pair, out_channels, and num_classes as the number of labels, None without classes.
    """
    height, width = parse_size(flags["image_size"])
    labels = number_of_labels(flags["class_cond"], flags["num_classes"], flags["null_class"])
    return {
        **{name: value for name, value in flags.items() if name != "network_args"},
        "image_size": height if height == width else (height, width),
        "out_channels": flags["in_channels"] * (2 if flags["learn_sigma"] else 1),
        "num_classes": labels,
    }
