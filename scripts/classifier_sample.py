"""Sample images of given classes from a diffusion model that a classifier guides.

    python scripts/classifier_sample.py --model_path runs/NAME/ema_0.9999_100000.pt --classifier_path runs/CLS/model150000.pt \\
        --classifier_scale 2 --timestep_respacing 100 --class_ids 3,5

Each checkpoint brings its settings in the config.yaml beside it; for bare published .pt files, give
them as flags or by --config. An unconditional model leaves the class to the classifier; a
class-conditional one is told it too. Guidance works for DDPM and, with --use_ddim, for DDIM; scale
0 equals image_sample. Image i depends on --seed and i only. The same command again continues an
interrupted run.
"""

import dataclasses
import os
from collections.abc import Callable

from torch import Tensor

from guided_diffusion_ip import dist_util, files, script_util
from guided_diffusion_ip.diffusion.guidance import classifier_gradient
from guided_diffusion_ip.interop.adm_checkpoint import load_for_sampling
from guided_diffusion_ip.runs.sample_batch import compiled, draw_labels
from guided_diffusion_ip.runs.samples import SampleRun
from guided_diffusion_ip.settings.config import (
    Config,
    adopt_checkpoint_config,
    adopt_classifier_config,
    command,
    config_beside,
    parse,
)
from guided_diffusion_ip.settings.sample_checks import check_request, classes_to_sample
from guided_diffusion_ip.settings.sampling import (
    choose_out_dir,
    make_sampler,
    sampler_text,
    sampling_precision,
    say,
    settle_sampler,
    what_decides_the_images,
)


def main() -> None:
    cfg = parse("classifier_sample", __doc__)
    notes = adopt_configs(cfg)
    class_ids = classes_to_sample(cfg)

    dist_util.setup_dist()
    model, diffusion = script_util.create_model_and_diffusion(
        **cfg.section("model"),
        **cfg.sampling_process(),
        timestep_respacing=cfg.timestep_respacing,
        eps_scaler=cfg.eps_scaler,
        eps_scaler_k=cfg.eps_scaler_k,
    )
    sampler = make_sampler(cfg, diffusion, script_util.parse_image_size(cfg.image_size))
    load_for_sampling(
        model, cfg.model_path, cfg.section("model"), sampling_precision(cfg), cfg.given
    )
    # The classifier is loaded for scale 0 too: a wrong file should not wait for the next scale to
    # be noticed.
    classifier = create_classifier(cfg)
    if cfg.classifier_scale:
        sampler = dataclasses.replace(
            sampler, cond_fn=classifier_gradient(classifier, cfg.classifier_scale)
        )

    settings = what_decides_the_images(
        cfg,
        ("model", "classifier", "diffusion"),
        classifier_path=os.path.basename(cfg.classifier_path),
        classifier_sha256=files.sha256(cfg.classifier_path),
        classifier_scale=cfg.classifier_scale,
    )
    run = SampleRun(
        sampler,
        cfg.num_samples,
        choose_out_dir(cfg, settings),
        settings,
        lambda index: {"y": draw_labels(cfg.seed, index, class_ids)},
        class_names=cfg.classes,
    )
    for note in notes:
        say(note)
    say(
        f"sampling {cfg.num_samples} images from {cfg.model_path} by {sampler_text(cfg)}, guided "
        f"by {cfg.classifier_path} with scale {cfg.classifier_scale:g}, into {run.out_dir}"
    )
    network = compiled(model, dist_util.dev()) if cfg.compile else model
    path = run(
        network if cfg.class_cond else without_labels(network),
        cfg.batch_size,
        dist_util.dev(),
        png=cfg.save_png,
    )
    say(f"samples: {path}\npicture: {os.path.join(run.out_dir, 'grid.png')}")
    dist_util.cleanup()


def adopt_configs(cfg: Config) -> list[str]:
    """Complete the settings from beside the two checkpoints; returns notes for the user.

    Raises:
        ValueError: a checkpoint is not given, or the two do not fit each other or the flags.
    """
    if not cfg.model_path:
        raise ValueError(
            "no diffusion model: give --model_path, such as runs/NAME/ema_0.9999_100000.pt"
        )
    if not cfg.classifier_path:
        raise ValueError(
            "no classifier: give --classifier_path, such as runs/NAME/model150000.pt "
            "(scripts/classifier_train.py makes one), or sample without guidance by "
            "scripts/image_sample.py"
        )
    if beside := config_beside(cfg.model_path):
        adopt_checkpoint_config(cfg, beside)
    if beside := config_beside(cfg.classifier_path):
        adopt_classifier_config(cfg, beside)
    notes = check_request(cfg)
    settle_sampler(cfg)
    script_util.settle_lambda(cfg)
    return notes


def create_classifier(cfg: Config) -> Callable[..., Tensor]:
    """The classifier in classifier_path, for images of the diffusion model's size."""
    flags = {
        **{name: getattr(cfg, name) for name in ("image_size", "in_channels", "num_classes")},
        **cfg.section("classifier"),
    }
    classifier = script_util.create_classifier(**flags)
    load_for_sampling(
        classifier, cfg.classifier_path, flags, "fp16" if cfg.classifier_use_fp16 else "fp32"
    )
    return classifier


def without_labels(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An unconditional model that is handed labels, meant for the classifier, and drops them."""

    def unconditional(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return model(x, t)

    return unconditional


if __name__ == "__main__":
    command(main)
