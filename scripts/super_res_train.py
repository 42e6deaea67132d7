"""Train a diffusion model that enlarges images.

    python scripts/super_res_train.py --data_dir DIR --large_size 256 --small_size 64 \\
        --batch_size 32
    mpiexec -n 4 python scripts/super_res_train.py ...
    torchrun --nproc_per_node 4 scripts/super_res_train.py ...

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
from guided_diffusion_ip.data.sources import Source
from guided_diffusion_ip.data.super_resolution import SuperResolutionStream, check_sizes
from guided_diffusion_ip.runs.sample_batch import Sampler, process_sampler
from guided_diffusion_ip.settings.config import Config, command, parse
from guided_diffusion_ip.settings.train_prologue import begin
from guided_diffusion_ip.settings.training import (
    diffusion_train_settings,
    make_loop,
    open_data,
    run,
    sampling_hooks,
    to_device,
    where_to_start,
)


def main() -> None:
    with begin(parse("super_res_train", __doc__)) as (cfg, out_dir, source):
        train(cfg, out_dir, source)


def train(cfg: Config, out_dir: str, source: Source | None) -> None:
    """The run, with its settings settled and its folder owned."""
    messages: list[str] = []
    large, small = (script_util.parse_image_size(size) for size in (cfg.large_size, cfg.small_size))
    check_sizes(large, small)
    model, process = create(cfg)
    shape = (cfg.in_channels, *large)
    data = SuperResolutionStream(open_data(cfg, source, large, messages.append), large, small)
    messages.append(f"low-resolution images: {small[0]} x {small[1]}, by area averaging")
    to_device(model)
    images, cond = examples(cfg, data)
    hooks = sampling_hooks(
        cfg,
        out_dir,
        lambda respacing: sampler_on_the_way(cfg, shape, respacing),
        lambda index: {name: value[index] for name, value in cond.items()},
        data.classes or (),
    )
    start = where_to_start(cfg, out_dir, model, messages.append)
    settings = diffusion_train_settings(cfg, start)
    loop = make_loop(cfg, model, process, data, settings, hooks=hooks)
    if cfg.sample_interval and dist_util.is_main():
        for name, pictures in (("low_res", cond["low_res"]), ("large", images)):
            path = os.path.join(out_dir, f"{name}.png")
            save_grid(to_uint8(pictures[: cfg.sample_count]), path)
    run(loop, cfg, out_dir, shape, messages)


def examples(
    cfg: Config, data: SuperResolutionStream
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The large images, and the conditions, of pictures and evaluations on the way; nothing if
    there are none.
    """
    count = max(
        cfg.sample_count if cfg.sample_interval else 0, cfg.eval_samples if cfg.eval_interval else 0
    )
    return data.examples(count) if count else (torch.empty(0), {})


def sampler_on_the_way(cfg: Config, shape: tuple[int, int, int], respacing: str) -> Sampler:
    """How pictures and evaluations are made: in the steps that the flag says, by a process that
    knows no losses.
    """
    respaced = create(cfg, timestep_respacing=cfg.values[respacing], loss_weighting="uniform")[1]
    return process_sampler(respaced, shape, cfg.seed)


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
