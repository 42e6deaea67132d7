"""safetensors files: tensors, and beside them in the header the config.yaml that says what they
are. Reading one runs nothing.

The library is an extra: pip install 'guided_diffusion_ip[convert]'.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from .. import files

State = dict[str, Tensor]


def write_safetensors(path: str | os.PathLike, state: State, config_yaml_text: str) -> None:
    """Write the tensors, bit by bit as they are, and the config; the file appears whole or not at
    all.

    Raises:
        ValueError: the library is missing, or something in `state` is no tensor.
    """
    library = _library(path)
    odd = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ValueError(
            f"{odd} is {type(state[odd]).__name__}: a safetensors file holds tensors only"
        )
    seen: set[int] = set()
    own = {}
    for (
        name,
        value,
    ) in state.items():  # every tensor is stored by itself: those that share memory need a copy
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        own[name] = value.clone() if place in seen else value
        seen.add(place)
    content = library.torch.save(own, {files.CONFIG_IN_HEADER: config_yaml_text, "format": "pt"})
    with files.atomic_file(path) as file:
        file.write(content)


def read_safetensors(path: str | os.PathLike) -> tuple[State, str]:
    """The tensors (on the CPU), and the config as YAML text; "" if somebody else wrote the file and
    it has none.

    Raises:
        ValueError: no such file, damaged, no safetensors file, or the library is missing.
    """
    library = _library(path)
    config = files.safetensors_config(path)
    try:
        if files.is_remote(path):
            with files.open_binary(path) as file:
                return library.torch.load(file.read()), config
        with library.safe_open(os.fspath(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, config
    # Numbers of a kind that torch does not have make the second and third.
    except (library.SafetensorError, AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path}: damaged, or no safetensors file ({' '.join(str(error).split())[:100]}); copy "
            "or download it again"
        ) from None


def _library(path: str | os.PathLike) -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ValueError(
            f"{path}: safetensors files need the library: pip install "
            "'guided_diffusion_ip[convert]' (or pip install safetensors)"
        ) from None
    return safetensors
