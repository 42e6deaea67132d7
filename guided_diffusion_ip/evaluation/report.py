"""The numbers of an evaluation: a table for people, the lines of ADM's evaluator for their parsers,
JSON for programs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .. import __version__, dist_util, files
from ..data.image_set import Images
from ..metrics import METRICS
from ..sizes import size_text
from .compare import Score
from .evaluate import Evaluation
from .opening import GivenImages, choose_device, path_of
from .published import published_values


def table(evaluation: Evaluation, paper: Mapping[str, Any] | None = None) -> str:
    """Aligned columns: metric, value, samples, reference images, published value where there is
    one; features and warnings below.

    Args:
        paper: the section of that name of a config.
    """
    features, result = evaluation.features, evaluation.result
    published = published_for(evaluation, paper or {})
    rows = [["metric", "value", "samples", "reference"] + ["published"] * bool(published)]
    for name, score in result.metrics.items():
        value = f"{score.value:.6g}"
        if score.spread is not None:
            value += f" +- {score.spread:.2g}"
        n_ref = {0: "-", None: "?"}.get(score.n_ref, str(score.n_ref))
        row = [_title(name, score, features["name"]), value, str(score.n), n_ref]
        if published:
            row.append(f"{published[name]:g}" if name in published else "")
        rows.append(row)
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


def _title(name: str, score: Score, features: str) -> str:
    title = METRICS[name].title_for(features, label=score.label)
    return f"{title} ({score.detail})" if score.detail else title


def published_lines(values: Mapping[str, float]) -> str:
    """The lines that ADM's evaluator prints, in its order, for programs that read them."""
    order = ("is", "fid", "sfid", "prec", "recall")
    return "\n".join(f"{METRICS[name].title}: {values[name]}" for name in order if name in values)


def published_for(evaluation: Evaluation, paper: Mapping[str, Any]) -> dict[str, float]:
    """What the paper states for the settings of these samples; only Inception's numbers compare."""
    if evaluation.features["name"] != "inception":
        return {}
    return published_values(paper, evaluation.made_with)


def describe_set(side: GivenImages, images: Images | None, preprocessing: str) -> dict[str, Any]:
    """A set of images as it goes into the JSON: name, hash of the file (folders: of names and
    bytes; memory: of the pixels), number and size.

    Raises:
        ValueError: neither a file nor images.
    """
    path = path_of(side)
    if path:
        where, digest = os.path.abspath(path), files.sha256_tree(path)
    elif images is not None:
        pixels = np.ascontiguousarray(images.rows(0, images.n))
        where, digest = "(memory)", hashlib.sha256(pixels.data).hexdigest()
    else:
        raise ValueError("a set of images in memory has images")
    known = {"path": where, "sha256": digest, "preprocessing": preprocessing}
    return known | (
        {"images": images.n, "image_shape": list(images.shape)}
        if images is not None
        else {"images": 0}
    )


def as_json(
    evaluation: Evaluation, paper: Mapping[str, Any] | None = None, config: str = ""
) -> str:
    """Everything needed to make the numbers again.

    Args:
        paper, config: section of published values, and path, of the config that they were asked
            for with.
    """
    request, reference = evaluation.request, evaluation.reference
    samples = evaluation.samples
    size = size_text(request.image_size) if request.image_size else ""
    content = {
        "metrics": {name: _score_json(score) for name, score in evaluation.result.metrics.items()},
        "published": published_for(evaluation, paper or {}),
        "features": evaluation.features,
        "pr_arithmetic": request.pr_arithmetic,
        "batch_size": request.batch_size,
        "processes": dist_util.get_world_size(),
        "device": str(choose_device(request.device)),
        "seed": request.seed,
        "num_samples": request.num_samples,
        "image_size": int(size) if size.isdigit() else size,
        "reference": describe_set(request.reference, reference.images, reference.preprocessing)
        | {"statistics": reference.stored is not None},
        "samples": describe_set(request.samples, samples, samples.preprocessing),
        "made_with": evaluation.made_with,
        "config": config,
        "warnings": list(evaluation.warnings),
        "versions": _versions(),
    }
    return json.dumps(content, indent=1) + "\n"


def _score_json(score: Score) -> dict[str, Any]:
    content: dict[str, Any] = {"value": score.value, "samples": score.n, "reference": score.n_ref}
    if score.spread is not None:
        content["standard_deviation"] = score.spread
    if score.label:
        content["label"] = score.label
    return content


def _versions() -> dict[str, str]:
    return {
        "guided_diffusion_ip": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
