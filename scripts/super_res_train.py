"""Train a diffusion model that enlarges images.

    python scripts/super_res_train.py --data_dir DIR --large_size 256 --small_size 64 --batch_size 32
    mpiexec -n 4 python scripts/super_res_train.py ...        torchrun --nproc_per_node 4 scripts/super_res_train.py ...

--data_dir holds large images only: the small ones are made from them by area averaging.
Checkpoints, logs and the merged settings (config.yaml) go to --out_dir; so do sample grids, and
what they are to be compared with: low_res.png (what the network sees) and large.png (the truth).
batch_size is per process.
"""

if __name__ == "__main__":
    from guided_diffusion_ip import early_signals

    early_signals.note_signals()  # before PyTorch is imported, which takes seconds

import os

import torch

from guided_diffusion_ip import dist_util, script_util
from guided_diffusion_ip.data.image_io import save_grid, to_uint8
from guided_diffusion_ip.data.super_resolution import SuperResolutionStream, check_sizes
from guided_diffusion_ip.runs.sample_batch import Sampler, process_sampler
from guided_diffusion_ip.settings.config import Config, command, parse
from guided_diffusion_ip.settings.training import (
    add_null_class,
    choose_out_dir,
    make_loop,
    open_data,
    run,
    settle_batch,
    settle_classes,
)
from guided_diffusion_ip.training.evaluation import make_evaluation
from guided_diffusion_ip.training.preview import Preview


def main() -> None:
    cfg = parse("super_res_train", __doc__)
    dist_util.setup_dist()
    settle_batch(cfg)
    # Everything that wrong input can break comes before anything is written.
    add_null_class(cfg)
    large, small = (script_util.parse_image_size(size) for size in (cfg.large_size, cfg.small_size))
    check_sizes(large, small)
    out_dir = choose_out_dir(cfg)
    settle_classes(cfg, out_dir)
    model, diffusion = create(cfg)
    messages: list[str] = []
    data = SuperResolutionStream(
        open_data(
            cfg,
            large,
            class_cond=cfg.class_cond,
            log=messages.append,
            class_dropout=cfg.class_dropout,
        ),
        large,
        small,
    )
    messages.append(f"low-resolution images: {small[0]} x {small[1]}, by area averaging")
    count = max(
        cfg.sample_count if cfg.sample_interval else 0, cfg.eval_samples if cfg.eval_interval else 0
    )
    examples = data.examples(count) if count else None
    shape = (cfg.in_channels, *large)
    model.to(device=dist_util.dev(), memory_format=torch.channels_last)

    def conditions(index: list[int]) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in examples[1].items()}

    def sampler(timestep_respacing: str) -> Sampler:
        """Of pictures and evaluations on the way; its process knows no losses."""
        return process_sampler(
            create(cfg, timestep_respacing=timestep_respacing, loss_weighting="uniform")[1],
            shape,
            cfg.seed,
        )

    preview = cfg.sample_interval and Preview(
        sampler(cfg.sample_respacing),
        cfg.sample_count,
        out_dir,
        cfg.batch_size,
        conditions,
        data.classes or (),
    )
    evaluation = cfg.eval_interval and make_evaluation(cfg, sampler(cfg.eval_respacing), conditions)
    loop = make_loop(cfg, model, diffusion, data, preview, out_dir, messages, evaluation)
    if cfg.sample_interval and dist_util.is_main():
        save_grid(
            to_uint8(examples[1]["low_res"][: cfg.sample_count]),
            os.path.join(out_dir, "low_res.png"),
        )
        save_grid(to_uint8(examples[0][: cfg.sample_count]), os.path.join(out_dir, "large.png"))
    run(loop, cfg, out_dir, shape, messages)


def create(cfg: Config, **process):
    """The network, in float32 (half precision is the loop's business), and the process."""
    torch.manual_seed(cfg.seed)
    flags = {
        **cfg.section("model"),
        **cfg.section("super_res"),
        **cfg.section("diffusion"),
        "timestep_respacing": cfg.timestep_respacing,
    }
    return script_util.sr_create_model_and_diffusion(**{**flags, **process, "use_fp16": False})


if __name__ == "__main__":
    command(main)
