"""Checkpoints of others into a .pt with its config.yaml, and a .pt with its config.yaml into one
safetensors file.

    python scripts/convert_checkpoint.py edm-cifar10-32x32-uncond-vp.pkl edm_cifar10  # EDM's
    python scripts/convert_checkpoint.py model-790000.ckpt ddim_cifar10                    # DDIM's
    python scripts/convert_checkpoint.py runs/cifar10/ema_0.9999_500000.pt cifar10.safetensors
    python scripts/convert_checkpoint.py ADM_cifar10.pt cifar10.safetensors \\
        --config configs/cifar10.yaml
    python scripts/convert_checkpoint.py cifar10.safetensors cifar10

Weights in half precision become float32, unless --half True asks for a safetensors file of half
the size. The network that the config describes is built, and must
take the weights, before anything is written. See docs/checkpoints.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from guided_diffusion_ip import dist_util, files, script_util
from guided_diffusion_ip.interop.adm_checkpoint import (
    infer_architecture,
    is_classifier,
    require_fit,
    require_state_dict,
)
from guided_diffusion_ip.interop.ddim_checkpoint import convert_ddim_state, is_ddim_state
from guided_diffusion_ip.interop.edm_pickle import edm_flags, read_edm_pickle
from guided_diffusion_ip.interop.safetensors_file import read_safetensors, write_safetensors
from guided_diffusion_ip.settings.beside import config_beside
from guided_diffusion_ip.settings.config import Config, command, parse
from guided_diffusion_ip.settings.flags import SCRIPTS
from guided_diffusion_ip.settings.models import create_for_sampling, network_flags, process_flags
from guided_diffusion_ip.settings.yaml_file import read_yaml, values_from_yaml

State = dict[str, Tensor]


@dataclass
class Found:
    """A checkpoint: what it is (for people), its weights, and the config that describes it.

    Args:
        text: the config as YAML. content: the same, parsed. file: what the .pt is called; "" to
            write a .safetensors.
    """

    what: str
    state: State
    text: str
    content: dict[str, dict[str, Any]]
    file: str


def main() -> None:
    cfg = parse("convert_checkpoint", __doc__)
    if not cfg.source or not cfg.out:
        raise ValueError(
            "give what to convert and what to write: convert_checkpoint.py "
            "edm-cifar10-32x32-uncond-vp.pkl edm_cifar10 (see --help)"
        )
    found = find(cfg)
    paths = choose_paths(found, cfg)
    numbers = sorted({str(value.dtype).removeprefix("torch.") for value in found.state.values()})
    network, script = build(found, cfg.source)
    number = torch.float16 if cfg.half else torch.float32
    found.state = {name: as_number(found.state[name], number) for name in network.state_dict()}
    print(
        f"{cfg.source}: {found.what}, {script_util.parameter_count(network):,} parameters, "
        f"{' and '.join(numbers)}"
    )
    write(found, paths)
    print(
        f"{' and '.join(paths)}: {'float16, rounded' if cfg.half else 'float32'}; written, read "
        "again, and taken by the network that the config describes"
    )
    flag, more = SCRIPTS_OF[script]
    print(f"next: python scripts/{script}.py {flag} {paths[-1]}{more}")


# What samples a checkpoint: the flag that takes it, and what else it needs.
SCRIPTS_OF = {
    "image_sample": ("--model_path", " --num_samples 64"),
    "super_res_sample": ("--model_path", " --base_samples IMAGES.npz"),
    "classifier_sample": ("--classifier_path", " --model_path MODEL.pt"),
}


def find(cfg: Config) -> Found:
    """What the source is, by its name and content.

    Raises:
        ValueError: it cannot be read, or flags were given that it has no use for.
    """
    stem, kind = os.path.splitext(os.path.basename(cfg.source))
    kind = kind.lower()
    if kind == ".pkl":
        refuse_flags(cfg, "EDM's .pkl says by itself what it is", "config", "image_size")
        checkpoint = read_edm_pickle(cfg.source)
        name = stem.removeprefix("edm-").removeprefix("edm_")
        return described(
            f"EDM's {checkpoint.precond}", checkpoint.state, edm_flags(checkpoint), f"edm_{name}.pt"
        )
    if kind == ".safetensors":
        refuse_flags(cfg, "a safetensors file comes with its config", "image_size")
        return Found(
            "safetensors", read_safetensors(cfg.source)[0], *find_config(cfg), f"{stem}.pt"
        )
    state = dist_util.load_state_dict(cfg.source)
    if is_ddim_state(state):
        refuse_flags(cfg, "a checkpoint of DDIM's code says by itself what it is", "config")
        side = min(script_util.parse_image_size(cfg.image_size)) if cfg.image_size else None
        weights, flags = convert_ddim_state(state, side)
        if "image_size" not in flags["model"]:
            raise ValueError(
                f"{cfg.source}: this network does not attend anywhere, so that its weights do not "
                "tell for which images it is: add --image_size"
            )
        return described(
            "a checkpoint of DDIM's code (averaged weights, if it has both)",
            weights,
            flags,
            f"ddim_{stem}.pt",
        )
    refuse_flags(cfg, "the config says how large the images are", "image_size")
    require_state_dict(state, cfg.source)
    text, content = find_config(cfg)
    return Found("a state_dict", state, text, content, "")


def refuse_flags(cfg: Config, reason: str, *names: str) -> None:
    """ValueError if one of the flags was given."""
    given = [
        f"--{name}" for name in names if (cfg.config_path if name == "config" else cfg.values[name])
    ]
    if given:
        raise ValueError(f"{cfg.source}: {reason}: leave {' and '.join(given)} out")


def described(what: str, state: State, flags: dict[str, dict[str, Any]], file: str) -> Found:
    """A checkpoint whose config has to be written first."""
    return Found(what, state, yaml.safe_dump(flags, sort_keys=False), flags, file)


def find_config(cfg: Config) -> tuple[str, dict[str, dict[str, Any]]]:
    """The text and content of --config, else of what the checkpoint has beside or in it."""
    path = cfg.config_path or config_beside(cfg.source)
    if not path:
        raise ValueError(
            f"{cfg.source} has no config.yaml beside it (or in its header) that says which network "
            "it is: add --config FILE; configs/ holds the published settings"
        )
    content = read_yaml(path)
    if path == cfg.source:
        return files.safetensors_config(path), content
    if path.endswith(".pt"):  # the settings that were saved with the checkpoint
        return yaml.safe_dump(content, sort_keys=False), content
    with files.open_binary(path) as file:
        return file.read().decode(), content


def choose_paths(found: Found, cfg: Config) -> list[str]:
    """The files to write, the one with the weights last.

    Raises:
        ValueError: the name does not fit, or a file is there already.
    """
    if files.is_remote(cfg.out):
        raise ValueError(
            f"results cannot go to {cfg.out}: give a path of this machine, and copy it afterwards"
        )
    single = cfg.out.lower().endswith(".safetensors")
    if found.file and (single or os.path.isfile(cfg.out)):
        raise ValueError(
            f"{cfg.source} becomes a .pt and its config.yaml: give a folder for both instead of "
            f"{cfg.out}"
        )
    if not found.file and (not single or os.path.isdir(cfg.out)):
        raise ValueError(
            f"{cfg.source} is {found.what} already: give a name that ends in .safetensors instead "
            f"of {cfg.out}, to make it one file with its config"
        )
    if found.file and cfg.half:
        raise ValueError("--half True is for NAME.safetensors: a .pt is kept in float32")
    paths = (
        [os.path.join(cfg.out, name) for name in ("config.yaml", found.file)]
        if found.file
        else [cfg.out]
    )
    there = [path for path in paths if os.path.exists(path)]
    if there and not cfg.overwrite:
        raise ValueError(
            f"{' and '.join(there)}: there already; choose another name, or --overwrite True"
        )
    return paths


def build(found: Found, path: str) -> tuple[nn.Module, str]:
    """The network that the config describes, without memory for its weights, and the script that
    samples it.

    Raises:
        ValueError: the config describes no network, or another one than the weights need.
    """
    with torch.device("meta"):
        if is_classifier(found.state):
            script = "classifier_sample"
            cfg = settings(script, found.content, path)
            flags = {
                name: getattr(cfg, name) for name in ("image_size", "in_channels", "num_classes")
            }
            flags |= cfg.section("classifier")
            network = script_util.create_classifier(**flags)
        elif infer_architecture(found.state).get("super_resolution"):
            script = "super_res_sample"
            cfg = settings(script, found.content, path)
            flags = {**cfg.section("model"), **cfg.section("super_res")}
            network = script_util.sr_create_model_and_diffusion(**flags)[0]
        else:
            script = "image_sample"
            cfg = settings(script, found.content, path)
            flags = cfg.section("model")
            network = create_for_sampling(network_flags(cfg), process_flags(cfg))[0]
    require_fit(network, found.state, path, flags)
    return network, script


def settings(script: str, content: dict[str, dict[str, Any]], path: str) -> Config:
    """The settings of a sampling script for the network that a config describes, without those of
    its section sample.
    """
    spec = SCRIPTS[script]
    sections = [name for name in spec.sections if name != "sample"]
    defaults = {flag.name: flag.default for flag in spec.flags()}
    return Config(script, {**defaults, **values_from_yaml(content, sections, path, spec.without)})


def as_number(value: Tensor, number: torch.dtype) -> Tensor:
    """Numbers with a fraction in the format `number`, others as they are."""
    return value.to(number) if value.is_floating_point() else value


def write(found: Found, paths: list[str]) -> None:
    """Write the files, read them again, and compare.

    Raises:
        ValueError: what was written is not what comes back.
    """
    if found.file:
        with files.atomic_file(paths[0]) as file:
            file.write(found.text.encode())
        with files.atomic_file(paths[1]) as file:
            torch.save(found.state, file)
        read_yaml(paths[0])
        state = dist_util.load_state_dict(paths[1])
    else:
        write_safetensors(paths[0], found.state, found.text)
        state, text = read_safetensors(paths[0])
        if text != found.text:
            state = {}
    if state.keys() != found.state.keys() or not all(
        same_bits(state[name], value) for name, value in found.state.items()
    ):
        raise ValueError(f"{paths[-1]} does not hold what was written to it: is the disk damaged?")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, also where both are not a number."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(*(x.flatten().contiguous().view(torch.uint8) for x in (a, b)))
    )


if __name__ == "__main__":
    command(main)
