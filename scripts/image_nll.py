"""Measure the likelihood of images: bits per dimension, and each term of the variational bound.

    python scripts/image_nll.py --model_path runs/NAME/ema_0.9999_100000.pt --data_dir DIR --num_samples 1000 --batch_size 50
    mpiexec -n 4 python scripts/image_nll.py ...              torchrun --nproc_per_node 4 scripts/image_nll.py ...

The first --num_samples images in the order of their names (an npz: of its rows), at most all of
them, unmirrored. The result depends on --seed, but for rounding not on batch size or number of
processes. It goes to --out_dir: bpd.json, total_bpd.npz (each image), and the mean of each term at
each t, from T-1 down to 0: vb_terms.npz, mse_terms.npz, xstart_mse_terms.npz. The same command
again continues an interrupted run.
"""

import os

from guided_diffusion_ip import dist_util, files, script_util
from guided_diffusion_ip.data.image_set import ImageSet, open_image_set
from guided_diffusion_ip.interop.adm_checkpoint import load_for_sampling
from guided_diffusion_ip.runs.likelihood import LikelihoodRun, default_out_dir
from guided_diffusion_ip.settings.config import (
    Config,
    adopt_checkpoint_config,
    command,
    config_beside,
    parse,
)
from guided_diffusion_ip.settings.sampling import sampling_precision, say


def main() -> None:
    cfg = parse("image_nll", __doc__)
    if not cfg.model_path:
        raise ValueError("no checkpoint: give --model_path, such as runs/NAME/ema_0.9999_100000.pt")
    if not cfg.data_dir:
        raise ValueError("no images: give --data_dir, a folder, a zip or an npz of images")
    if beside := config_beside(cfg.model_path):
        adopt_checkpoint_config(cfg, beside)

    dist_util.setup_dist()
    model, diffusion = script_util.create_model_and_diffusion(
        **cfg.section("model"), **cfg.sampling_process(), timestep_respacing=cfg.timestep_respacing
    )
    load_for_sampling(
        model, cfg.model_path, cfg.section("model"), sampling_precision(cfg), cfg.given
    )
    data = open_image_set(
        cfg.data_dir,
        script_util.parse_image_size(cfg.image_size),
        cfg.in_channels,
        num_classes=cfg.num_classes if cfg.class_cond else None,
        what="--data_dir",
    )
    count = min(cfg.num_samples, len(data))
    settings = what_decides_the_result(cfg, data, count)
    out_dir = files.results_folder(cfg.out_dir, default_out_dir(cfg.model_path, count, settings))

    run = LikelihoodRun(diffusion, count, data, out_dir, settings, cfg.seed, cfg.clip_denoised)
    for note in cfg.notes_on_origin():
        say(note)
    say(f"images: {data.text}")
    if count < cfg.num_samples:
        say(
            f"note: {cfg.num_samples} images were asked for, but there are {count}: each is "
            "measured once"
        )
    elif count < len(data):
        say(
            f"note: these are the first {count} of {len(data)}; in a set that is sorted by class, "
            "they may be of few classes"
        )
    say(
        f"measuring {count} images at {diffusion.num_timesteps} steps with {cfg.model_path} into "
        f"{out_dir}"
    )
    result = run(model, cfg.batch_size, dist_util.dev())
    error = (
        ""
        if result["standard_error"] is None
        else f" +- {result['standard_error']:.4f} (standard error)"
    )
    say(
        f"bits per dimension: {result['total_bpd']:.4f}{error} over {count} images; prior "
        f"{result['prior_bpd']:.2g}\nresult: {run.summary_path}"
    )
    dist_util.cleanup()


def what_decides_the_result(cfg: Config, data: ImageSet, count: int) -> dict:
    """All that the result depends on, as plain values. Reads every image, so that a damaged one is
    found now.
    """
    return {
        "model_path": os.path.basename(cfg.model_path),
        "model_sha256": files.sha256(cfg.model_path),
        "data_dir": os.path.basename(os.path.normpath(cfg.data_dir)),
        "data_sha256": data.digest(count),
        "num_images": count,
        "seed": cfg.seed,
        "clip_denoised": cfg.clip_denoised,
        "timestep_respacing": cfg.timestep_respacing,
        **cfg.section("model"),
        **cfg.section("diffusion"),
    }


if __name__ == "__main__":
    command(main)
