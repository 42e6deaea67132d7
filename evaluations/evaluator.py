"""Evaluate samples against a reference: FID, sFID, Inception Score, precision, recall, KID.

    python evaluations/evaluator.py REF SAMPLES --inception_weights weights-inception-2015-12-05-6726825d.pth
    python evaluations/evaluator.py REF SAMPLES --features pixels --json result.json
    torchrun --nproc_per_node 4 evaluations/evaluator.py REF SAMPLES        (or mpiexec -n 4 python ...)

REF and SAMPLES: an npz with arr_0 uint8 [N, H, W, 3], a folder or a zip of images. REF may hold
statistics (mu, sigma, mu_s, sigma_s) besides or instead, as OpenAI's reference files and those of
evaluations/make_reference.py do. With --config, the paper's value for the samples' settings stands
beside ours. What each number means: evaluations/README.md.
"""

from __future__ import annotations

import os

from guided_diffusion_ip import dist_util, files
from guided_diffusion_ip.data.image_io import size_text
from guided_diffusion_ip.data.image_set import Images, ImageSet, open_images
from guided_diffusion_ip.evaluation.evaluate import (
    TITLES,
    Result,
    evaluate,
    parse_metrics,
    unavailable,
)
from guided_diffusion_ip.evaluation.reference import (
    StoredStatistics,
    compare_features,
    has_images,
    has_statistics,
    read_statistics,
)
from guided_diffusion_ip.evaluation.report import (
    as_json,
    describe_set,
    published_lines,
    published_values,
    settings_beside,
    table,
)
from guided_diffusion_ip.script_util import parse_image_size
from guided_diffusion_ip.settings.config import Config, command, parse
from guided_diffusion_ip.settings.evaluation import choose_device, open_space
from guided_diffusion_ip.settings.sampling import say

SCALE = "give --image_size to scale and crop all"


def main() -> None:
    cfg = parse("evaluator", __doc__)
    if not cfg.ref or not cfg.samples:
        raise ValueError("two arguments are needed: evaluator.py REF SAMPLES (see --help)")
    metrics = parse_metrics(cfg.metrics)
    dist_util.setup_dist()
    device = choose_device(cfg.device)
    size = parse_image_size(cfg.image_size) if cfg.image_size else None
    samples = open_images(cfg.samples, "samples", size, remedy=SCALE)
    notes = check_order(cfg)
    with_images = has_images(cfg.ref)
    reference = open_images(cfg.ref, "reference", size, remedy=SCALE) if with_images else None
    if reference is not None:
        check_sizes(reference, samples, has_statistics(cfg.ref))
    if cfg.json and not os.path.isdir(os.path.dirname(os.path.abspath(cfg.json))):
        raise ValueError(f"--json {cfg.json}: its folder does not exist")

    space = open_space(cfg, say)
    stored = read_statistics(cfg.ref, space, samples.shape) if has_statistics(cfg.ref) else None
    if "metrics" not in cfg.given:  # by default, whatever this reference and these features allow
        for name in [name for name in metrics if unavailable(name, space, with_images)]:
            say(f"note: {TITLES[name]} left out: {unavailable(name, space, with_images)}")
            metrics.remove(name)
    made_with = settings_beside(cfg.samples)
    notes += differences(reference, stored, samples, made_with, space)
    for note in notes:
        say(f"note: {note}")
    say(
        f"reference: {cfg.ref}"
        + (f", {reference.n} images" if reference else "")
        + (", statistics" if stored else "")
    )
    say(f"samples: {cfg.samples}, {samples.n} images; features: {space.name}, {cfg.precision}")

    result = evaluate(
        reference,
        stored,
        samples,
        space,
        metrics=metrics,
        num_samples=cfg.num_samples,
        batch_size=cfg.batch_size,
        pr_arithmetic=cfg.pr_arithmetic,
        seed=cfg.seed,
        device=device,
        say=say,
    )
    result.warnings += notes
    if dist_util.is_main():
        show(cfg, result, reference, stored, samples, made_with, space)
    dist_util.cleanup()


def check_order(cfg: Config) -> list[str]:
    """Notes about statistics in the sample file.

    Raises:
        ValueError: the arguments look swapped.
    """
    if not has_statistics(cfg.samples):
        return []
    by_place = cfg.given["samples"] == "SAMPLES"
    if by_place and not has_statistics(cfg.ref):
        raise ValueError(
            f"{cfg.samples}, given as SAMPLES, holds reference statistics (mu), and {cfg.ref}, "
            "given as REF, does not: the order is REF SAMPLES. If it is meant so, name them: "
            "--ref ... --samples ..."
        )
    return [
        f"{cfg.samples} holds statistics (mu) too: ignored, samples are always measured from their "
        "images"
    ]


def check_sizes(reference: ImageSet, samples: ImageSet, fixed: bool = False) -> None:
    """Are the images of both sides of one height and width?

    Inception would take them as they are, and measure how they were scaled.

    Args:
        fixed: the reference cannot be scaled, because it has statistics too.

    Raises:
        ValueError: they are not; names the flag that scales.
    """
    if reference.shape[:2] != samples.shape[:2]:
        # An npz mostly has the size of the model already.
        wanted = (
            reference if fixed or reference.source.kind == "npz" != samples.source.kind else samples
        )
        (h, w, _), (height, width, _) = reference.shape, samples.shape
        raise ValueError(
            f"reference images are {h} x {w}, samples {height} x {width} (height x width), "
            "and would differ by their scaling alone: give --image_size "
            f"{size_text(wanted.size)} to scale and crop as training does"
        )


def differences(
    reference: Images | None,
    stored: StoredStatistics | None,
    samples: Images,
    made_with: dict,
    space,
) -> list[str]:
    """What the two sides do not have in common, in words."""
    notes = compare_features(stored, space)
    if reference is not None and reference.shape != samples.shape:
        notes.append(
            f"reference images have {reference.shape[2]} channels, samples {samples.shape[2]}"
        )
    prepared = reference.preprocessing if reference is not None else stored.preprocessing
    trained_on = made_with.get("trained_on", "") or samples.preprocessing
    if prepared and trained_on and prepared != trained_on:
        notes.append(
            f"the two sides were prepared differently, which FID sees: reference '{prepared}', the "
            f"samples' model was trained on '{trained_on}'"
        )
    return notes


def show(
    cfg: Config,
    result: Result,
    reference: Images | None,
    stored: StoredStatistics | None,
    samples: Images,
    made_with: dict,
    space,
) -> None:
    """Print the table, and write the JSON if asked for."""
    published = published_values(cfg.paper, made_with) if space.name == "inception" else {}
    print("\n" + table(result, published, cfg.pr_arithmetic, space.describe()))
    if space.name == "inception":
        print("\n" + published_lines(result.metrics))
    if cfg.json:
        prepared = reference.preprocessing if reference is not None else stored.preprocessing
        text = as_json(
            result,
            published=published,
            features=space.describe(),
            pr_arithmetic=cfg.pr_arithmetic,
            batch_size=cfg.batch_size,
            processes=dist_util.get_world_size(),
            device=str(choose_device(cfg.device)),
            seed=cfg.seed,
            num_samples=cfg.num_samples,
            image_size=cfg.image_size,
            reference=describe_set(cfg.ref, reference, prepared)
            | {"statistics": stored is not None},
            samples=describe_set(cfg.samples, samples, samples.preprocessing),
            made_with=made_with,
            config=cfg.config_path,
        )
        with files.atomic_file(cfg.json) as file:
            file.write(text.encode())


if __name__ == "__main__":
    command(main)
