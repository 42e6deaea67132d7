"""The numbers of an evaluation: a table for people, the published evaluator's lines for its
parsers, JSON for programs.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import yaml

from .. import __version__, files
from ..data.image_set import Images
from .evaluate import TITLES, Metric, Result


def table(
    result: Result, published: Mapping[str, float], pr_arithmetic: str, features: Mapping[str, Any]
) -> str:
    """Aligned columns: metric, value, samples, reference images, published value where there is
    one; features and warnings below.

    Only Inception's Frechet distance is called FID.
    """
    rows = [["metric", "value", "samples", "reference"] + ["published"] * bool(published)]
    for name, metric in result.metrics.items():
        title = metric.label or TITLES[name]
        if features["name"] != "inception":
            title = title.replace("FID", "Frechet distance")
        if name in ("prec", "recall"):
            title += f" ({pr_arithmetic})"
        value = f"{metric.value:.6g}" + (
            f" +- {metric.spread:.2g}" if metric.spread is not None else ""
        )
        n_ref = {0: "-", None: "?"}.get(metric.n_ref, str(metric.n_ref))
        paper = [f"{published[name]:g}" if name in published else ""] * bool(published)
        rows.append([title, value, str(metric.n), n_ref, *paper])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])),
            ]
        ).rstrip()
        for row in rows
    ]
    known = [
        f"{key} {features[key]}"
        for key in ("file", "weights", "sha256", "precision")
        if features.get(key)
    ]
    lines.append("features: " + ", ".join([features["name"], *known]))
    return "\n".join(lines + [f"warning: {warning}" for warning in dict.fromkeys(result.warnings)])


def published_lines(metrics: Mapping[str, Metric]) -> str:
    """The lines that the published evaluator prints, in its order, for programs that read them."""
    order = ("is", "fid", "sfid", "prec", "recall")
    return "\n".join(f"{TITLES[name]}: {metrics[name].value}" for name in order if name in metrics)


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
    with open(beside, encoding="utf-8") as file:
        try:
            settings = yaml.safe_load(file)
        except yaml.YAMLError:
            return {}  # somebody else's file
    return settings if isinstance(settings, dict) else {}


def describe_set(path: str, images: Images | None, preprocessing: str) -> dict[str, Any]:
    """A set of images as it goes into the JSON: name, hash of the file (folders: of names and
    bytes), number and size.
    """
    known = {
        "path": os.path.abspath(path),
        "sha256": files.sha256_tree(path),
        "preprocessing": preprocessing,
    }
    return known | (
        {"images": images.n, "image_shape": list(images.shape)}
        if images is not None
        else {"images": 0}
    )


def as_json(result: Result, **more: Any) -> str:
    """Everything needed to make the numbers again."""
    metrics = {
        name: {"value": metric.value, "samples": metric.n, "reference": metric.n_ref}
        | ({"standard_deviation": metric.spread} if metric.spread is not None else {})
        | ({"label": metric.label} if metric.label else {})
        for name, metric in result.metrics.items()
    }
    versions = {
        "guided_diffusion_ip": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    return (
        json.dumps(
            {"metrics": metrics, **more, "warnings": result.warnings, "versions": versions},
            indent=1,
        )
        + "\n"
    )
