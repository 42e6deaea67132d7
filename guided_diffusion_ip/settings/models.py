"""Networks and processes by name: the registry of networks, and what makes both from flags.

A network is called as model(x, t, **cond); see networks/protocol.py for what it must have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..diffusion.respace import SpacedDiffusion
from ..interop.adm_checkpoint import load_for_sampling
from ..interop.diffusers_models import ddpm_unet
from ..networks.unet import EncoderUNetModel, SuperResModel
from .config import Config
from .edm import edm_network
from .factories import create_classifier, create_gaussian_diffusion, create_model, sr_create_model
from .flags import SECTIONS
from .own_network import creator, find_class, is_own
from .solver import goes_along_sigma, sampling_precision
from .yaml_file import nearest

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class NetworkEntry:
    """How a network is made from flags.

    Args:
        create: called with those flags of `sections` that it names, or all if it takes any.
        steps: a process with T steps trains and samples it; else it is a denoiser by itself.
        absent: flags that it has no use for, with the value that means "not"; another value is
            refused in the words of `refusal`.
        unread: flags that it has no use for and whose value does not matter.
    """

    create: Callable[..., nn.Module]
    sections: tuple[str, ...] = ("model",)
    steps: bool = True
    absent: Flags = field(default_factory=dict)
    refusal: str = ""
    unread: tuple[str, ...] = ()


# What ADM's U-Net added to DDPM's.
_OF_ADM = {"resblock_updown": False, "use_new_attention_order": False}
NETWORKS: dict[str, NetworkEntry] = {
    "adm": NetworkEntry(create_model),
    "edm": NetworkEntry(
        edm_network,
        ("model", "edm"),
        steps=False,
        absent={"learn_sigma": False, "null_class": False, **_OF_ADM},
        refusal="--{first} {value} belongs to ADM's U-Net, and EDM's networks have no such thing: "
        "leave it out",
    ),
    "ddpm": NetworkEntry(
        ddpm_unet,
        absent=_OF_ADM,
        refusal="--framework ddpm has no {names}: its network is that of Ho et al. (2020), which "
        "--framework adm extends",
        # Half precision is for load_for_sampling; the others have values that nobody gave.
        unread=(
            "num_heads",
            "num_head_channels",
            "num_heads_upsample",
            "use_scale_shift_norm",
            "use_fp16",
        ),
    ),
}


def network_entry(framework: str, flags: Flags) -> NetworkEntry:
    """The entry of a network, for which these flags were given.

    Raises:
        ValueError: an unknown name, or a flag that this network does not have.
    """
    if is_own(framework):
        return NetworkEntry(creator(find_class(framework), framework))
    if framework not in NETWORKS:
        raise ValueError(
            f"unknown framework {framework!r}: use one of {', '.join(NETWORKS)}, or "
            "module:Class for one of your own"
        )
    entry = NETWORKS[framework]
    refused = [name for name, off in entry.absent.items() if flags.get(name, off) != off]
    if refused:
        raise ValueError(
            entry.refusal.format(
                first=refused[0], value=flags[refused[0]], names=" and no ".join(refused)
            )
        )
    return entry


def register_network(name: str, make: Callable[..., nn.Module]) -> None:
    """Add a network of your own under a name that --network and --framework take from here on.

    Args:
        make: a class or function that names the flags it wants, such as image_size, in_channels,
            out_channels, num_channels, num_classes, dropout; see networks/protocol.py.
    """
    NETWORKS[name] = NetworkEntry(creator(make, name))


def create_network(flags: Flags) -> nn.Module:
    """The network that flags describe; those left out have their defaults."""
    entry = network_entry(flags.get("framework", "adm"), flags)
    return entry.create(**_named_by(entry.create, entry.sections, flags))


def create_model_and_diffusion(
    *, framework: str = "adm", **flags: Any
) -> tuple[nn.Module, SpacedDiffusion]:
    """Network and process from flags; those left out have their defaults.

    Args:
        framework: a name in NETWORKS, of a network that has a process with T steps.

    Raises:
        TypeError: a flag that neither knows.
        ValueError: input_pertub and input_perturbation given with different values, EDM (which has
            no such process), or what the factories refuse.
    """
    entry = network_entry(framework, flags)
    if not entry.steps:
        raise ValueError(
            f"framework {framework!r} has no process with T steps: "
            f"{' and '.join(name for name, other in NETWORKS.items() if other.steps)} have; see "
            "create_edm_denoiser"
        )
    useless = {*entry.absent, *entry.unread}
    if not flags.get("network_args"):
        useless.add("network_args")
    flags = {name: value for name, value in flags.items() if name not in useless}
    return _create_both("create_model_and_diffusion", entry.create, entry.sections, flags)


def sr_create_model_and_diffusion(**flags: Any) -> tuple[SuperResModel, SpacedDiffusion]:
    """As create_model_and_diffusion, with large_size and small_size instead of image_size."""
    return _create_both(
        "sr_create_model_and_diffusion", sr_create_model, ("model", "super_res"), flags
    )


def create_classifier_and_diffusion(**flags: Any) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """As create_model_and_diffusion, for a classifier."""
    return _create_both(
        "create_classifier_and_diffusion", create_classifier, ("model", "classifier"), flags
    )


def _named_by(
    create: Callable[..., Any], sections: tuple[str, ...], flags: Flags
) -> dict[str, Any]:
    """Those flags of the sections that `create` has parameters for."""
    defaults = {flag.name: flag.default for name in sections for flag in SECTIONS[name]}
    parameters = inspect.signature(create).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {
        name: flags.get(name, default)
        for name, default in defaults.items()
        if takes_any or name in parameters
    }


def _create_both(
    name: str, create: Callable[..., nn.Module], sections: tuple[str, ...], flags: Flags
) -> tuple[Any, SpacedDiffusion]:
    """create(...) with the flags that it takes, and the process with the others; learn_sigma
    belongs to both.
    """
    network_flags = _named_by(create, sections, flags)
    process_names = [flag.name for flag in SECTIONS["diffusion"]] + [
        "learn_sigma",
        "timestep_respacing",
        "eps_scaler",
        "eps_scaler_k",
        "input_pertub",
    ]
    for key in flags:
        if key not in network_flags and key not in process_names:
            raise TypeError(
                f"{name} got an unknown flag {key!r}."
                + nearest(key, [*network_flags, *process_names])
            )
    process_flags = {key: flags[key] for key in process_names if key in flags}
    process_flags["steps"] = process_flags.pop("diffusion_steps", 1000)
    return create(**network_flags), create_gaussian_diffusion(**process_flags)


def network_flags(cfg: Config) -> dict[str, Any]:
    """What makes the network of a script."""
    sections = ["model"]
    if "large_size" in cfg.values:
        sections.append("super_res")
    elif cfg.values.get("framework") == "edm" and "precond" in cfg.values:
        sections.append("edm")
    return {name: value for section in sections for name, value in cfg.section(section).items()}


def process_flags(cfg: Config) -> dict[str, Any]:
    """What makes the process that samples the network: respaced, with its lambda(t); for solvers
    along sigma the whole process, since these choose noise levels and scale epsilon themselves. {}
    for EDM's models, which have none.

    Raises:
        ValueError: an EDM model for a script that needs a process.
    """
    if cfg.values.get("framework") == "edm":
        if "edm_steps" not in cfg.values:
            raise ValueError(
                f"{cfg.script} works on a process with T steps, and EDM's models (--framework edm) "
                "have none: image_sample samples them"
            )
        return {}
    flags = cfg.sampling_process()
    if "use_ddim" not in cfg.values or not goes_along_sigma(cfg):
        flags |= {
            "timestep_respacing": cfg.timestep_respacing,
            "eps_scaler": cfg.values.get("eps_scaler", 1.0),
            "eps_scaler_k": cfg.values.get("eps_scaler_k", 0.0),
        }
    return flags


def create_for_sampling(network: Flags, process: Flags) -> tuple[nn.Module, Any]:
    """The network, without weights, and what samples it: its process; without one, the network
    itself, a denoiser.

    Args:
        network, process: as network_flags and process_flags return them.
    """
    if "large_size" in network:
        return sr_create_model_and_diffusion(**network, **process)
    if process:
        return create_model_and_diffusion(**network, **process)
    # load_for_sampling converts it, to what sampling_precision says.
    model = create_network({**network, "use_fp16": False})
    return model, model


def load_model_and_diffusion(cfg: Config) -> tuple[nn.Module, SpacedDiffusion]:
    """The network in --model_path, ready to be called, and the process to sample it by; after
    setup_dist.
    """
    flags = network_flags(cfg)
    model, diffusion = create_for_sampling(flags, process_flags(cfg))
    load_for_sampling(model, cfg.model_path, flags, sampling_precision(cfg), cfg.given)
    return model, diffusion
