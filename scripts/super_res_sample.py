"""Enlarge images with a super-resolution model.

    python scripts/super_res_sample.py --model_path runs/NAME/ema_0.9999_100000.pt --base_samples small.npz \\
        --num_samples 64 --timestep_respacing 100

--base_samples holds images of small_size (of another: --resize_base True): an npz (arr_0 uint8 [N,
h, w, C]; arr_1 labels for a class-conditional model), a folder, or a zip. Image i is made from
low-resolution image i mod N, in the order of rows or sorted names; with --num_samples above N, each
is enlarged several times, from other noise. base_images.csv says which belongs to which, and with
--save_png the pictures of files have the files' names. Architecture and process come from the
config.yaml beside the checkpoint; for a bare published .pt, give them as flags or by --config. The
same command again continues an interrupted run.
"""

import os

import torch

from guided_diffusion_ip import dist_util, script_util
from guided_diffusion_ip.data.image_set import ImageSet, open_image_set
from guided_diffusion_ip.data.super_resolution import check_sizes
from guided_diffusion_ip.interop.adm_checkpoint import load_for_sampling
from guided_diffusion_ip.runs.base_images import TABLE, picture_names, write_table
from guided_diffusion_ip.runs.sample_batch import compiled
from guided_diffusion_ip.runs.samples import SampleRun
from guided_diffusion_ip.settings.config import (
    Config,
    adopt_checkpoint_config,
    command,
    config_beside,
    parse,
)
from guided_diffusion_ip.settings.sample_checks import check_request
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
    cfg = parse("super_res_sample", __doc__)
    if not cfg.model_path:
        raise ValueError("no checkpoint: give --model_path, such as runs/NAME/ema_0.9999_100000.pt")
    if not cfg.base_samples:
        raise ValueError(
            "no low-resolution images: give --base_samples, an npz, a folder or a zip of images"
        )
    if beside := config_beside(cfg.model_path):
        adopt_checkpoint_config(cfg, beside)
    notes = check_request(cfg)
    settle_sampler(cfg)
    script_util.settle_lambda(cfg)
    large, small = (script_util.parse_image_size(size) for size in (cfg.large_size, cfg.small_size))
    check_sizes(large, small)

    dist_util.setup_dist()
    model, diffusion = script_util.sr_create_model_and_diffusion(
        **cfg.section("model"),
        **cfg.section("super_res"),
        **cfg.sampling_process(),
        timestep_respacing=cfg.timestep_respacing,
        eps_scaler=cfg.eps_scaler,
        eps_scaler_k=cfg.eps_scaler_k,
    )
    sampler = make_sampler(cfg, diffusion, large)
    load_for_sampling(
        model,
        cfg.model_path,
        {**cfg.section("model"), **cfg.section("super_res")},
        sampling_precision(cfg),
        cfg.given,
    )
    base = open_image_set(
        cfg.base_samples,
        small,
        cfg.in_channels,
        exact=not cfg.resize_base,
        what="--base_samples",
        remedy="add --resize_base True to have them scaled and cropped as training images are, or "
        "give others",
        num_classes=cfg.num_classes if cfg.class_cond else None,
    )

    settings = what_decides_the_images(
        cfg,
        ("model", "super_res", "diffusion"),
        base_samples=os.path.basename(os.path.normpath(cfg.base_samples)),
        base_count=len(base),
        base_sha256=base.digest(min(len(base), cfg.num_samples)),
    )  # reads, and so checks, them all
    names = () if base.source.kind == "npz" else picture_names(base.source.names, cfg.num_samples)
    run = SampleRun(
        sampler,
        cfg.num_samples,
        choose_out_dir(cfg, settings),
        settings,
        lambda index: conditions(base, index),
        names,
        cfg.classes,
    )
    for note in notes + notes_on_base(cfg, base):
        say(note)
    tell(cfg, base, run.out_dir)
    path = run(
        compiled(model, dist_util.dev()) if cfg.compile else model,
        cfg.batch_size,
        dist_util.dev(),
        png=cfg.save_png,
    )
    if dist_util.is_main():
        write_table(run.out_dir, base.source.names, cfg.num_samples)
    say(
        f"samples: {path}\npicture: {os.path.join(run.out_dir, 'grid.png')}\n"
        f"which image was made from which: {os.path.join(run.out_dir, TABLE)}"
    )
    dist_util.cleanup()


def conditions(base: ImageSet, index: list[int]) -> dict[str, torch.Tensor]:
    """low_res [n, C, h, w] of the images numbered [n], and y [n] with labels."""
    wanted = [i % len(base) for i in index]
    return {"low_res": base.images(wanted), **base.cond(wanted)}


def notes_on_base(cfg: Config, base: ImageSet) -> list[str]:
    """What may not be meant: labels counted off a part of the classes, and many more images than
    there are bases.
    """
    notes = []
    if (
        base.source.kind != "npz"
        and base.classes is not None
        and len(base.classes) < cfg.num_classes
    ):
        last = len(base.classes) - 1
        notes.append(
            f"note: {len(base.classes)} classes were found and numbered in the order of their "
            f"names ({base.classes[0]} is label 0, {base.classes[-1]} label {last}), but the model "
            f"knows {cfg.num_classes}: if its numbers are others, give an npz with the labels in "
            "arr_1"
        )
    if "num_samples" not in cfg.given and cfg.num_samples > len(base):
        notes.append(
            f"note: --num_samples is {cfg.num_samples} by default; --num_samples {len(base)} makes "
            "each image once"
        )
    return notes


def tell(cfg: Config, base: ImageSet, out_dir: str) -> None:
    """What is about to be made of what."""
    say(f"low-resolution images: {base.text}")
    used = min(len(base), cfg.num_samples)
    times = (
        f"each of them {cfg.num_samples / used:g} times"
        if cfg.num_samples > used
        else ("each of them once" if used == len(base) else f"the first {used} of them")
    )
    say(
        f"sampling {cfg.num_samples} images, {times}, from {cfg.model_path} by {sampler_text(cfg)} "
        f"into {out_dir}"
    )


if __name__ == "__main__":
    command(main)
