"""What the command lines do, for notebooks and programs: make a request, and have it carried out.

    from guided_diffusion_ip.api import sample, sampling_request

    request = sampling_request(model_path="ema_0.9999_100000.pt", num_samples=64)
    path = sample(request)  # an npz, as scripts/image_sample.py writes it

A request is checked when it is made: see docs/python_api.md.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from . import dist_util
from .data.image_set import ImageSet
from .diffusion.guidance import classifier_gradient
from .diffusion.solvers.paths import AlongProcess
from .dist_util import say
from .interop.adm_checkpoint import load_for_sampling
from .runs.base_images import TABLE, picture_names, write_table
from .runs.likelihood import LikelihoodRun
from .runs.sample_batch import compiled, draw_labels
from .runs.samples import SampleRun
from .settings.factories import create_classifier
from .settings.image_training import train
from .settings.likelihood import LikelihoodRequest, likelihood_request
from .settings.make_sampler import make_sampler
from .settings.models import create_for_sampling, register_network
from .settings.sampling import ClassifierGuidance, SamplingRequest, sampling_request

__all__ = [
    "LikelihoodRequest",
    "SamplingRequest",
    "likelihood_request",
    "measure_likelihood",
    "register_network",
    "sample",
    "sampling_request",
    "train",
]


def sample(request: SamplingRequest) -> str:
    """Make the images, or what is missing of them, and tell about it; a collective. Returns the
    path of the npz.

    Raises:
        ValueError: the checkpoint does not fit, files cannot be read, or the folder holds other
            samples.
    """
    dist_util.setup_dist()
    model, process = create_for_sampling(request.network, request.process)
    sampler = make_sampler(request.settled, process, request.image_size)
    load_for_sampling(model, request.model_path, request.network, request.precision, request.given)
    # The classifier is loaded for scale 0 too: a wrong file should not wait for the next scale to
    # be noticed.
    guide = request.classifier and _load_classifier(request.classifier)
    if guide and request.classifier and request.classifier.scale:
        gradient = classifier_gradient(guide, request.classifier.scale)
        assert isinstance(sampler.along, AlongProcess), "make_sampler refuses other solvers here"
        along = dataclasses.replace(sampler.along, cond_fn=gradient)
        sampler = dataclasses.replace(sampler, along=along)
    base = request.base and request.base.images
    run = SampleRun(
        sampler,
        request.num_samples,
        request.out_dir,
        request.identity,
        _conditions(request),
        _picture_names(base, request.num_samples) if base and request.save_png else (),
        request.class_names,
    )
    for line in _announcement(request):
        say(line)
    network = compiled(model, dist_util.dev()) if request.compile else model
    if guide and not request.network["class_cond"]:
        network = _without_labels(network)
    path = run(network, request.batch_size, dist_util.dev(), png=request.save_png)
    told = f"samples: {path}\npicture: {os.path.join(run.out_dir, 'grid.png')}"
    if base:
        if dist_util.is_main():
            write_table(run.out_dir, base.source.names, request.num_samples)
        told += f"\nwhich image was made from which: {os.path.join(run.out_dir, TABLE)}"
    say(told)
    return path


def measure_likelihood(request: LikelihoodRequest) -> dict[str, Any]:
    """Measure the images, or what is missing of them, and tell about it; a collective. Returns
    what is in bpd.json: total_bpd, standard_error, prior_bpd, ...

    Raises:
        ValueError: as sample.
    """
    dist_util.setup_dist()
    model, process = create_for_sampling(request.network, request.process)
    load_for_sampling(model, request.model_path, request.network, request.precision, request.given)
    run = LikelihoodRun(
        process,
        request.count,
        request.images,
        request.out_dir,
        request.identity,
        request.seed,
        request.clip_denoised,
    )
    for note in request.notes:
        say(note)
    say(f"images: {request.images.text}")
    if note := _note_on_count(request):
        say(note)
    say(
        f"measuring {request.count} images at {process.num_timesteps} steps with "
        f"{request.model_path} into {request.out_dir}"
    )
    result = run(model, request.batch_size, dist_util.dev())
    error = result["standard_error"]
    spread = "" if error is None else f" +- {error:.4f} (standard error)"
    say(
        f"bits per dimension: {result['total_bpd']:.4f}{spread} over {request.count} images; prior "
        f"{result['prior_bpd']:.2g}\nresult: {run.summary_path}"
    )
    return result


def _load_classifier(guidance: ClassifierGuidance) -> nn.Module:
    classifier = create_classifier(**guidance.network)
    load_for_sampling(classifier, guidance.path, guidance.network, guidance.precision)
    return classifier


def _conditions(request: SamplingRequest) -> Callable[[list[int]], dict[str, Any]]:
    """model_kwargs of the images numbered [n]: low_res [n, C, h, w] of those that are enlarged,
    and labels y [n].
    """
    if request.base:
        base = request.base.images

        def enlarged(index: list[int]) -> dict[str, Any]:
            wanted = [i % len(base) for i in index]
            return {"low_res": base.images(wanted), **base.cond(wanted)}

        return enlarged
    if class_ids := request.class_ids:
        return lambda index: {"y": draw_labels(request.seed, index, class_ids)}
    return lambda index: {}


def _picture_names(base: ImageSet, count: int) -> Sequence[str]:
    return () if base.source.kind == "npz" else picture_names(base.source.names, count)


def _without_labels(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An unconditional model that is given labels, meant for the classifier, and drops them."""

    def unconditional(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return model(x, t)

    return unconditional


def _announcement(request: SamplingRequest) -> list[str]:
    """What is about to be made of what, and what may not be meant."""
    count, base = request.num_samples, request.base and request.base.images
    lines = list(request.notes)
    how = ""
    if base:
        lines += _notes_on_base(request, base)
        lines.append(f"low-resolution images: {base.text}")
        used = min(len(base), count)
        if count > used:
            how = f", each of them {count / used:g} times,"
        else:
            how = f", {'each of them once' if used == len(base) else f'the first {used} of them'},"
    guided = ""
    if request.classifier:
        scale = f"with scale {request.classifier.scale:g}"
        guided = f", guided by {request.classifier.path} {scale},"
    lines.append(
        f"sampling {count} images{how} from {request.model_path} by {request.text}{guided} into "
        f"{request.out_dir}"
    )
    return lines


def _notes_on_base(request: SamplingRequest, base: ImageSet) -> list[str]:
    """Labels counted off a part of the classes, and many more images than there are bases."""
    notes = []
    known = request.network["num_classes"]
    classes = None if base.source.kind == "npz" else base.classes
    if classes and len(classes) < known:
        last = len(classes) - 1
        notes.append(
            f"note: {len(classes)} classes were found and numbered in the order of their "
            f"names ({classes[0]} is label 0, {classes[-1]} label {last}), but the model "
            f"knows {known}: if its numbers are others, give an npz with the labels in arr_1"
        )
    if request.default_count and request.num_samples > len(base):
        notes.append(
            f"note: --num_samples is {request.num_samples} by default; --num_samples {len(base)} "
            "makes each image once"
        )
    return notes


def _note_on_count(request: LikelihoodRequest) -> str:
    count, found = request.count, len(request.images)
    if count < request.asked_for:
        return (
            f"note: {request.asked_for} images were asked for, but there are {count}: each is "
            "measured once"
        )
    if count < found:
        return (
            f"note: these are the first {count} of {found}; in a set that is sorted by class, they "
            "may be of few classes"
        )
    return ""
