"""The YAML with lambda(t) that scripts/calibrate_eps.py writes and `--eps_schedule FILE` of every
sampler reads.

    steps: 20                        # T', optional: refused for another number of steps
    lambda: [1.004, ..., 1.0]        # T' values, index 0 = last, clean step
    b: 1.0123                        # a constant, or with k: lambda(t) = k t + b
    k: 0.0
    kb: {k: 0.0005, b: 1.004}        # a line, beside a constant b
    use: lambda                      # which of them counts: lambda, b (with k), or kb; default: the
                                     # first that is there

    settings: {use_ddim: false, ...} # what it was calibrated for; compared with what it is used
                                     # for, where it is there

Other keys are for people and are not read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import yaml

from ..diffusion.respace import space_timesteps
from ..files import atomic_file
from ..yaml_text import read_yaml_file

FORMS = ("lambda", "b", "kb")
_CHECKED = (
    "eta",
    "diffusion_steps",
    "timestep_respacing",
    "model_sha256",
)  # by check_origin, each in its own way


def read_schedule(path: str | os.PathLike, num_timesteps: int) -> tuple[float | list[float], float]:
    """(eps_scaler, eps_scaler_k) as GaussianDiffusion takes them.

    Raises:
        ValueError: no such file, not of this form, or made for another number of steps.
    """
    content = _load(path)
    use = content.get("use") or next((form for form in FORMS if form in content), None)
    if use not in FORMS or use not in content:
        raise ValueError(
            f"{path} has no {use or 'lambda, b or kb'}: it needs one of lambda (a list with one "
            "value per step), b (with or without k) or kb, and 'use' may name one of those that "
            "are there"
        )
    steps = content.get("steps", num_timesteps)
    if steps != num_timesteps:
        raise ValueError(
            f"{path} was made for {steps} steps, but sampling has {num_timesteps}: calibrate for "
            f"them (scripts/calibrate_eps.py), or sample with --timestep_respacing {steps}"
        )
    if use == "lambda":
        values = content["lambda"]
        if not isinstance(values, list) or len(values) != num_timesteps:
            found = f"{len(values)} values" if isinstance(values, list) else repr(values)
            raise ValueError(
                f"{path}: lambda has {found}, but sampling has {num_timesteps} steps: give one "
                "value per step (index 0 = last, clean step)"
            )
        return [_number(path, "lambda", value) for value in values], 0.0
    if use == "kb":
        line = content["kb"]
        if not isinstance(line, dict) or set(line) != {"k", "b"}:
            raise ValueError(f"{path}: kb is {line!r}, expected {{k: NUMBER, b: NUMBER}}")
        return _number(path, "kb.b", line["b"]), _number(path, "kb.k", line["k"])
    return _number(path, "b", content["b"]), _number(path, "k", content.get("k", 0.0))


def check_origin(path: str | os.PathLike, sampler: str, wanted: Mapping[str, Any]) -> list[str]:
    """Warnings about what the schedule was calibrated with and is not used with; [] for one that
    was written by hand.

    Args:
        sampler: the name of the solver.
        wanted: eta, diffusion_steps, timestep_respacing, model_sha256 ('' if unknown), and whatever
            else is to be compared.

    Raises:
        ValueError: it was calibrated for another sampler or respacing, for which its lambdas mean
            nothing.
    """
    made_for = _load(path).get("settings")
    if not isinstance(made_for, dict):
        return []
    again = "calibrate for it (scripts/calibrate_eps.py)"
    kind = sampler
    if isinstance(made_for.get("sampler"), str):
        kind = made_for["sampler"]
    elif isinstance(made_for.get("use_ddim"), bool):
        kind = "ddim" if made_for["use_ddim"] else "ddpm"
    if kind != sampler:
        raise ValueError(
            f"{path} was calibrated for {kind.upper()}, and {sampler.upper()} is asked for: "
            f"{again}, or sample by {kind.upper()}"
        )
    if kind == "ddim" and made_for.get("eta", wanted["eta"]) != wanted["eta"]:
        raise ValueError(
            f"{path} was calibrated for DDIM with --eta {made_for['eta']}, and --eta "
            f"{wanted['eta']:g} is asked for: {again}"
        )
    along_process = "edm_steps" not in wanted
    known = {"diffusion_steps", "timestep_respacing"} <= set(made_for)
    if along_process and known and _timesteps(made_for) != _timesteps(wanted):
        was, asked = (
            made_for["timestep_respacing"] or "of all steps",
            wanted["timestep_respacing"] or "all",
        )
        raise ValueError(
            f"{path} was calibrated for --timestep_respacing {was}, which are other steps than "
            f"{asked}: {again}, or sample with those"
        )
    notes = []
    if (
        wanted["model_sha256"]
        and made_for.get("model_sha256", wanted["model_sha256"]) != wanted["model_sha256"]
    ):
        notes.append(
            f"{path} was calibrated for another checkpoint ({made_for.get('model_path', '?')}, of "
            "another content): its lambdas may be too large or too small for this one"
        )
    notes += [
        f"{path} was calibrated with --{name} {made_for[name]}, and {wanted[name]} is asked for: "
        "its lambdas may not fit"
        for name in wanted
        if name not in _CHECKED and made_for.get(name, wanted[name]) != wanted[name]
    ]
    return notes


def _timesteps(settings: Mapping[str, Any]) -> set[int]:
    steps = int(settings["diffusion_steps"])
    return space_timesteps(steps, settings["timestep_respacing"] or [steps])


def _load(path: str | os.PathLike) -> dict[str, Any]:
    try:
        content = read_yaml_file(os.fspath(path), f"--eps_schedule {path}")
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(
            f"--eps_schedule {path}: there is no such file; scripts/calibrate_eps.py makes one"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"--eps_schedule {path} must hold 'key: value' lines such as 'b: 1.01', found "
            f"{type(content).__name__}"
        )
    return content


def _number(path: str | os.PathLike, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{path}: {name} must be made of numbers such as 1.01, found {value!r}")
    return float(value)


def write_schedule(path: str | os.PathLike, content: dict[str, Any], comment: str = "") -> None:
    """Write `content` under `comment`; the file appears whole or not at all."""
    text = "".join(f"# {line}\n" for line in comment.splitlines())
    with atomic_file(path) as file:
        file.write((text + yaml.safe_dump(content, sort_keys=False, width=120)).encode())
