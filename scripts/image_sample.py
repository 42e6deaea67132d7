"""Sample images from a trained model.

    python scripts/image_sample.py --model_path runs/NAME/ema_0.9999_100000.pt --num_samples 64 \\
        --timestep_respacing 100 --eps_scaler 1.017

Architecture and process come from the config.yaml beside the checkpoint; for a bare published .pt,
give them as flags or by --config. Image i depends on --seed and i only. The same command again
continues an interrupted run.
"""

import os

from guided_diffusion_ip import dist_util, script_util
from guided_diffusion_ip.interop.adm_checkpoint import load_for_sampling
from guided_diffusion_ip.runs.sample_batch import compiled, draw_labels
from guided_diffusion_ip.runs.samples import SampleRun
from guided_diffusion_ip.settings.config import (
    adopt_checkpoint_config,
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
    cfg = parse("image_sample", __doc__)
    if not cfg.model_path:
        raise ValueError("no checkpoint: give --model_path, such as runs/NAME/ema_0.9999_100000.pt")
    if beside := config_beside(cfg.model_path):
        adopt_checkpoint_config(cfg, beside)
    settle_sampler(cfg)
    notes = check_request(cfg)
    script_util.settle_lambda(cfg)
    class_ids = classes_to_sample(cfg)

    dist_util.setup_dist()
    model, diffusion = script_util.create_for_sampling(cfg)
    sampler = make_sampler(cfg, diffusion, script_util.parse_image_size(cfg.image_size))
    load_for_sampling(
        model, cfg.model_path, cfg.section("model"), sampling_precision(cfg), cfg.given
    )

    settings = what_decides_the_images(
        cfg, ("model", "edm") if cfg.framework == "edm" else ("model", "diffusion")
    )
    run = SampleRun(
        sampler,
        cfg.num_samples,
        choose_out_dir(cfg, settings),
        settings,
        (lambda index: {"y": draw_labels(cfg.seed, index, class_ids)})
        if class_ids
        else lambda index: {},
        class_names=cfg.classes,
    )
    for note in notes:
        say(note)
    say(
        f"sampling {cfg.num_samples} images from {cfg.model_path} by {sampler_text(cfg)} into "
        f"{run.out_dir}"
    )
    path = run(
        compiled(model, dist_util.dev()) if cfg.compile else model,
        cfg.batch_size,
        dist_util.dev(),
        png=cfg.save_png,
    )
    say(f"samples: {path}\npicture: {os.path.join(run.out_dir, 'grid.png')}")
    dist_util.cleanup()


if __name__ == "__main__":
    command(main)
