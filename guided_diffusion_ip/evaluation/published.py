"""What a paper states for samples made with given settings, and the settings beside samples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..yaml_text import read_yaml_file


def published_values(paper: Mapping[str, Any], made_with: Mapping[str, Any]) -> dict[str, float]:
    """{"fid": what the paper states} for samples made with these settings, {} if it has no number
    for them.

    By number of steps: `fid_ddpm` (or `fid_without`) at lambda = 1, `fid_eps_scaler` at the paper's
    own lambda, `eps_scaler`. Heun's and Euler's: `fid_heun`, `fid_eps_scaler_heun`,
    `eps_scaler_heun`, and so on. Of samples that a classifier guided with the paper's
    `classifier_scale`: `fid_guided` (or `fid_guided_without`), `fid_guided_eps_scaler`.
    """
    if not made_with or made_with.get("use_ddim") or made_with.get("guidance_scale", 1) != 1:
        return {}
    if guided := made_with.get("classifier_scale", 0):
        if guided != paper.get("classifier_scale"):
            return {}
        paper = {
            "eps_scaler": paper.get("eps_scaler"),
            "fid_ddpm": paper.get("fid_guided"),
            "fid_without": paper.get("fid_guided_without"),
            "fid_eps_scaler": paper.get("fid_guided_eps_scaler"),
        }
    kind = made_with.get("sampler", "ddpm")
    own = "" if kind == "ddpm" else f"_{kind}"
    steps = str(
        made_with.get("edm_steps")
        if own
        else made_with.get("timestep_respacing") or made_with.get("diffusion_steps")
    )

    def at(name: str) -> float | None:
        return {str(key): value for key, value in (paper.get(name) or {}).items()}.get(steps)

    b, k = made_with.get("eps_scaler", 1.0), made_with.get("eps_scaler_k", 0.0)
    if own and (
        made_with.get("S_churn")
        or any(
            made_with.get(name)
            for name in ("discretization", "noise_level_schedule", "noise_level_scaling")
        )
    ):
        return {}
    if k == 0 and b == 1:
        value = at(f"fid_{kind}") or (None if own else at("fid_without"))
    elif k == 0 and b == at(f"eps_scaler{own}"):
        value = at(f"fid_eps_scaler{own}")
    else:
        value = None
    return {} if value is None else {"fid": float(value)}


def settings_beside(path: str) -> dict[str, Any]:
    """What the images were made with: settings.yaml in their folder, {} if there is none."""
    beside = os.path.join(
        path if os.path.isdir(path) else os.path.dirname(path) or ".", "settings.yaml"
    )
    if not os.path.isfile(beside):
        return {}
    try:
        settings = read_yaml_file(beside)
    except (ValueError, OSError):
        return {}  # somebody else's file
    return settings if isinstance(settings, dict) else {}
