"""EDM's published networks: pickles that carry the source of their classes along. Nothing of that
is ever run.

EDM (arXiv 2206.00364) publishes a dict with a network under `ema`. An object of one of its classes
is stored as a call of `torch_utils.persistence._reconstruct_persistent_obj` with a dict: the text
of a Python module, the class's name in it, and the object's `__dict__`. Reading that with pickle
executes the text. Here the text is dropped, and what is left are names of classes, arguments of
constructors, and tensors.

    checkpoint = read_edm_pickle("edm-cifar10-32x32-uncond-vp.pkl")
    denoiser = create_edm_denoiser(checkpoint.precond, **checkpoint.init_kwargs)
    denoiser.load_state_dict(checkpoint.state)
"""

from __future__ import annotations

import inspect
import io
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..diffusion.denoiser import PRECONDITIONINGS
from ..preparation.safe_pickle import NUMBERS, Buildable, Refused, SafeUnpickler, explained
from .edm_networks import DEFAULT_NETWORK, EDM_NETWORKS, NETWORKS

_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class EDMCheckpoint:
    """What is taken from a pickle: the class of the network, how it was made, its state_dict (in
    the file's number formats).
    """

    precond: str
    init_kwargs: dict[str, Any]
    state: dict[str, Tensor]


class _Object(Buildable):
    """An object of a class that is known by name only."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def build(self, state: Any) -> None:
        if type(state) is not dict or self.state:
            raise Refused(f"a state for {self.class_name} that is no dict, or a second one")
        self.state = state


def _persistent(record: Any) -> _Object:
    """Stands for torch_utils.persistence._reconstruct_persistent_obj; record["module_src"] is not
    looked at.
    """
    if type(record) is not dict or record.get("type") != "class":
        raise Refused("a persistent object that is no class")
    class_name, state = record.get("class_name"), record.get("state")
    if type(class_name) is not str or not class_name.isidentifier() or type(state) is not dict:
        raise Refused("a persistent object without class_name and state")
    return _Object(class_name, state)


def _dict(items: Any = ()) -> dict:
    """Stands for collections.OrderedDict and dnnlib.util.EasyDict; what is in them usually comes by
    SETITEMS.
    """
    if len(items):
        raise Refused("a dict made of something else than keys and values")
    return {}


def _set(items: Any = ()) -> set[str]:
    """Stands for set, as protocols 2 and 3 write it."""
    if type(items) not in (list, tuple) or not all(type(item) is str for item in items):
        raise Refused("a set of something else than names")
    return set(items)


@dataclass(frozen=True)
class _Storage:
    numbers: torch.UntypedStorage
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.numbers.nbytes() // self.dtype.itemsize


def _storage(data: Any) -> _Storage:
    """Stands for torch.storage._load_from_bytes, whose bytes are a file of torch.save; it may hold
    one storage only.
    """
    if type(data) is not bytes:
        raise Refused(f"a storage made of {type(data).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TypedStorage is deprecated, and what these files hold
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if isinstance(found, torch.storage.TypedStorage):
                found = _Storage(found.untyped(), found.dtype)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise Refused(
            f"{name[1]} inside a storage, which could run code"
            if name
            else "a storage that is damaged"
        ) from None
    if not isinstance(found, _Storage) or found.numbers.device.type != "cpu":
        raise Refused(f"{type(found).__name__} in the place of a storage")
    return found


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Stands for torch._utils._rebuild_tensor_v2. The tensor lies within its storage, and is not
    larger.
    """
    if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple:
        raise Refused("a tensor without storage, size and stride")
    if (
        len(size) != len(stride)
        or len(size) > _MOST_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 1 << 48 for n in (offset, *size, *stride))
    ):
        raise Refused("a tensor whose size makes no sense")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else 0
    if count > len(storage) or last >= max(len(storage), 1):
        raise Refused(f"a tensor {'x'.join(map(str, size))} in a storage of {len(storage)} numbers")
    return torch.empty(0, dtype=storage.dtype).set_(
        storage.numbers, offset if count else 0, size, stride
    )


def _parameter(data: Any, *_: Any) -> Tensor:
    """Stands for torch._utils._rebuild_parameter."""
    if type(data) is not Tensor:
        raise Refused(f"a parameter made of {type(data).__name__}")
    return data


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **NUMBERS,
    ("collections", "OrderedDict"): _dict,
    ("dnnlib.util", "EasyDict"): _dict,
    **{(module, "set"): _set for module in ("builtins", "__builtin__")},
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    # The containers within EDM's networks are torch's own, and not stored as persistent objects.
    ("torch.nn.modules.container", "ModuleDict"): lambda: _Object("ModuleDict", {}),
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


def read_edm_pickle(path: str | os.PathLike) -> EDMCheckpoint:
    """The network in a .pkl of EDM's form: `ema`, else `net`, else the pickled object itself.
    Nothing in the file is executed.

    Raises:
        ValueError: damaged, not of this form, or naming anything but tensors, arrays, containers
            and persistent objects.
        OSError: the file cannot be read.
    """
    name = os.fspath(path)
    with (
        files.open_binary(path) as file,
        explained(name, "tensors, arrays, containers and EDM's objects without their code"),
    ):
        if file.read(4) == b"PK\x03\x04":
            raise Refused("a zip archive in its place (a .pt file of torch.save?)")
        file.seek(0)
        content = SafeUnpickler(file, _ALLOWED).load()
        if isinstance(content, dict):
            content = next(
                (content[key] for key in ("ema", "net") if content.get(key) is not None), content
            )
        if not isinstance(content, _Object):
            raise Refused(f"{type(content).__name__}, and no network under 'ema' or 'net'")
        return EDMCheckpoint(content.class_name, _init_kwargs(content), _state_dict(content))


def _init_kwargs(network: _Object) -> dict[str, Any]:
    given = _part(network, "_init_kwargs")
    if network.state.get("_init_args", ()) not in ((), []):
        raise Refused("arguments of a constructor without their names")
    for key, value in given.items():
        items = value if type(value) in (list, tuple) else [value]
        if not all(type(item) in (bool, int, float, str, type(None)) for item in items):
            raise Refused(
                f"the argument {key} of a constructor, which is neither number nor text nor a list "
                "of such"
            )
    return {key: list(value) if type(value) is tuple else value for key, value in given.items()}


def _part(module: _Object, name: str) -> dict[str, Any]:
    """A dict with names as keys out of an object's __dict__; {} if it is not there."""
    part = module.state.get(name, {})
    if type(part) is not dict or not all(type(key) is str for key in part):
        raise Refused(f"{name} of {module.class_name} that is no dict of names")
    return part


def _state_dict(network: _Object) -> dict[str, Tensor]:
    """What network.state_dict() would be: names in the same order, tensors that own
    their numbers.
    """
    state: dict[str, Tensor] = {}
    for name, value in _tensors(network, "", set()):
        if name in state:
            raise Refused(f"two tensors with the name {name}")
        state[name] = value
    if not state:
        raise Refused(f"{network.class_name} without any tensor")
    # A few numbers that are shown under many names would fill the memory when each of them gets its
    # own.
    room = sum(
        {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in state.values()
        }.values()
    )
    if sum(value.numel() * value.itemsize for value in state.values()) > room:
        raise Refused("tensors that share their numbers with each other")
    return {
        name: value
        if value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        else value.clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as torch lists them: parameters, buffers, then the modules inside."""
    if not isinstance(module, _Object):
        raise Refused(f"{type(module).__name__} as a part of the network")
    if id(module) in seen:  # would never end, or grow like 2^n
        raise Refused(f"a module, {prefix.rstrip('.')}, that is in the network twice")
    seen.add(id(module))
    temporary = module.state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, value in _part(module, kind).items():
            if value is None or kind == "_buffers" and name in temporary:
                continue
            if type(value) is not Tensor:
                raise Refused(f"{type(value).__name__} as the tensor {prefix}{name}")
            yield prefix + name, value
    for name, part in _part(module, "_modules").items():
        if part is not None:
            yield from _tensors(part, f"{prefix}{name}.", seen)


_PRECONDS = {kind.__name__: name for name, kind in PRECONDITIONINGS.items()}
_FLAGS = {  # section -> flag -> the name that EDM's constructors have for it
    "model": {
        "image_size": "img_resolution",
        "in_channels": "img_channels",
        "num_channels": "model_channels",
        "channel_mult": "channel_mult",
        "num_res_blocks": "num_blocks",
        "attention_resolutions": "attn_resolutions",
        "dropout": "dropout",
        "use_fp16": "use_fp16",
    },
    "edm": {
        "augment_dim": "augment_dim",
        "label_dropout": "label_dropout",
        "sigma_data": "sigma_data",
    },
}


def edm_flags(checkpoint: EDMCheckpoint) -> dict[str, dict[str, Any]]:
    """Sections model and edm of a config.yaml that describes the network.

    Raises:
        ValueError: a class that is not known, or settings for which there is no flag, by name.
    """
    if checkpoint.precond not in _PRECONDS:
        raise ValueError(
            f"the network is a {checkpoint.precond}, which is no preconditioning of EDM's: "
            f"{', '.join(_PRECONDS)} are read"
        )
    precond = _PRECONDS[checkpoint.precond]
    settings, defaults = _settings(checkpoint, precond)
    name = _network_name(settings)
    with_flag = {
        *EDM_NETWORKS[name],
        "label_dim",
        *_FLAGS["model"].values(),
        *_FLAGS["edm"].values(),
    }
    has = {"model_type", "img_resolution", "img_channels", *defaults}
    odd = [
        f"{key} {value!r}"
        for key, value in settings.items()
        if key not in has or key not in with_flag and value != defaults[key]
    ]
    if odd:
        raise ValueError(
            f"the network was made with {', '.join(odd)}, for which there is no flag: build it in "
            "Python, by create_edm_denoiser(checkpoint.precond, **checkpoint.init_kwargs)"
        )
    for key, value in settings.items():
        most = 1000 if key == "num_blocks" else 10**7
        large = [n for n in _numbers(value) if most < abs(n) < math.inf]
        if large:
            raise ValueError(
                f"the network was made with {key} {str(large[0])[:30]}, which is beyond reason"
            )
    labels = settings["label_dim"]
    model = {flag: _as_flag(settings[key]) for flag, key in _FLAGS["model"].items()}
    model |= {"class_cond": bool(labels), **({"num_classes": labels} if labels else {})}
    edm = {flag: settings[key] for flag, key in _FLAGS["edm"].items() if key in settings}
    return {
        "model": {"framework": "edm", **model},
        "edm": {"precond": precond, "edm_network": name, **edm},
    }


def _numbers(value: Any) -> list[float]:
    """The numbers in a setting, which is one or a list of them, or none."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [n for n in values if isinstance(n, (int, float)) and not isinstance(n, bool)]


def _settings(checkpoint: EDMCheckpoint, precond: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the network was made, with the defaults of its classes for what was left out; and those
    defaults.
    """
    given = checkpoint.init_kwargs
    model_type = given.get("model_type", DEFAULT_NETWORK[precond])
    if type(model_type) is not str or model_type not in NETWORKS:
        raise ValueError(
            f"the network is a {model_type!r}, which is not known: {', '.join(NETWORKS)} are"
        )
    missing = [key for key in ("img_resolution", "img_channels") if key not in given]
    if missing:
        raise ValueError(
            f"the file does not say with which {' and '.join(missing)} the network was made"
        )
    defaults: dict[str, Any] = {"label_dim": 0, "use_fp16": False}
    for kind in (PRECONDITIONINGS[precond], NETWORKS[model_type]):
        defaults |= {
            key: list(p.default) if isinstance(p.default, tuple) else p.default
            for key, p in inspect.signature(kind).parameters.items()
            if p.default is not p.empty and p.default is not None
        }
    return {**defaults, **given, "model_type": model_type}, defaults


def _network_name(settings: dict[str, Any]) -> str:
    """Which of EDM_NETWORKS it is."""
    for name, parts in EDM_NETWORKS.items():
        if all(settings.get(key) == value for key, value in parts.items()):
            return name
    found = ", ".join(f"{key} {settings[key]!r}" for key in EDM_NETWORKS["ddpmpp"])
    raise ValueError(
        f"the network was made with {found}, and --edm_network names no such network; "
        f"{', '.join(EDM_NETWORKS)} are there"
    )


def _as_flag(value: Any) -> Any:
    """Lists are text in our flags: 1,2,2."""
    return ",".join(f"{item}" for item in value) if isinstance(value, list) else value
