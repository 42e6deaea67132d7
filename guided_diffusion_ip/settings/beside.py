"""What lies beside a checkpoint and says what it is."""

from __future__ import annotations

import os
from typing import Any

from .. import files
from ..training import checkpoint
from .flags import DESCRIBING, SECTIONS, SPEED_ONLY
from .yaml_file import Content, is_safetensors, is_state, read_yaml, values_from_yaml


def config_beside(weights: str) -> str:
    """What read_yaml finds the settings of a checkpoint in: its own header (.safetensors), the
    config.yaml beside it, or the stateNNNNNN.pt that was saved with it if there is no config.yaml
    or it is of another run; '' if none of them is there.

    The file itself is read, for its hash, only if config.yaml does not agree with the state of its
    step.
    """
    if is_safetensors(weights) and files.safetensors_config(weights):
        return weights
    path = _config_yaml(weights)
    usual = path if files.exists(path) else ""
    states = (checkpoint.saved_settings(state) for _, state in checkpoint.states_near(weights))
    if usual and not any(_differing(read_yaml(usual), saved, usual) for saved in states):
        return usual
    found = checkpoint.state_that_knows(weights) if files.exists(weights) else None
    if (
        found
        and (saved := checkpoint.saved_settings(found[2]))
        and (not usual or _differing(read_yaml(usual), saved, usual))
    ):
        return found[0]
    return usual


def _config_yaml(weights: str) -> str:
    return os.path.join(os.path.dirname(weights), "config.yaml")


def _differing(content: Content, saved: Content, path: str) -> dict[str, tuple[Any, Any]]:
    """{name: (value in `content`, value in `saved`)} where two settings describe another network,
    process or set of images; {} also if nothing is saved. The sections are given as read_yaml
    returns them.
    """
    if not saved:
        return {}
    here, there = (_description(sections, path) for sections in (content, saved))
    for name in ("preprocessing", "classes"):  # older states do not have them
        if known := saved.get("data", {}).get(name):
            here[name], there[name] = content.get("data", {}).get(name), known
    return {name: (here.get(name), there[name]) for name in there if here.get(name) != there[name]}


def _description(content: Content, path: str) -> dict[str, Any]:
    """What a network and its process are: every flag of their sections, and which sections there
    are.
    """
    values = {flag.name: flag.default for section in DESCRIBING for flag in SECTIONS[section]}
    values |= values_from_yaml(content, DESCRIBING, path)
    if "classifier" not in content and not values["class_cond"]:
        del values["num_classes"]  # says nothing about a network without classes
    kinds = {f"section {name}": name in content for name in ("super_res", "classifier")}
    return {name: value for name, value in (values | kinds).items() if name not in SPEED_ONLY}


def note_on_state(path: str, content: Content) -> tuple[str, ...]:
    """One line if `content` is not from the config.yaml that lies beside it."""
    usual = _config_yaml(path)
    if not is_state(path) or not files.exists(usual):
        return ()
    odd = [
        f"{name} {saved!r} instead of {here!r}"
        for name, (here, saved) in _differing(read_yaml(usual), content, usual).items()
    ]
    return (
        f"note: {usual} is not of the run that this checkpoint is from; its settings are those "
        f"saved with it in {path}: {', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''}",
    )
