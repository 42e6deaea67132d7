"""Train a diffusion model on images.

    python scripts/image_train.py --data_dir DIR --config configs/cifar10_ip.yaml
    mpiexec -n 4 python scripts/image_train.py ...        torchrun --nproc_per_node 4 scripts/image_train.py ...

Checkpoints, logs, sample grids and the merged settings (config.yaml) go to --out_dir. batch_size is
per process.
"""

if __name__ == "__main__":
    from guided_diffusion_ip import early_signals

    early_signals.note_signals()  # before PyTorch is imported, which takes seconds

import torch

from guided_diffusion_ip import dist_util, script_util
from guided_diffusion_ip.diffusion.denoiser import BoundDenoiser
from guided_diffusion_ip.diffusion.solvers.sigma_path import AlongSigma, SigmaGrid
from guided_diffusion_ip.runs.sample_batch import Sampler, process_sampler
from guided_diffusion_ip.settings.config import Config, command, parse
from guided_diffusion_ip.settings.edm import edm_process
from guided_diffusion_ip.settings.models import create_network, network_flags
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
from guided_diffusion_ip.training.preview import Preview, drawn_classes


def main() -> None:
    cfg = parse("image_train", __doc__)
    dist_util.setup_dist()
    settle_batch(cfg)
    # Everything that wrong input can break comes before anything is written.
    add_null_class(cfg)
    out_dir = choose_out_dir(cfg)
    settle_classes(cfg, out_dir)
    model, diffusion = create(cfg)
    messages: list[str] = []
    size = script_util.parse_image_size(cfg.image_size)
    data = open_data(
        cfg, size, class_cond=cfg.class_cond, log=messages.append, class_dropout=cfg.class_dropout
    )
    shape = (cfg.in_channels, *size)
    model.to(device=dist_util.dev(), memory_format=torch.channels_last)
    drawn = drawn_classes(cfg.seed, len(data.classes) if cfg.class_cond else 0)
    preview = cfg.sample_interval and Preview(
        sampler_on_the_way(cfg, model, shape, "sample_respacing"),
        cfg.sample_count,
        out_dir,
        cfg.batch_size,
        drawn,
        data.classes or (),
    )
    evaluation = cfg.eval_interval and make_evaluation(
        cfg, sampler_on_the_way(cfg, model, shape, "eval_respacing"), drawn
    )
    loop = make_loop(cfg, model, diffusion, data, preview, out_dir, messages, evaluation)
    run(loop, cfg, out_dir, shape, messages)


def create(cfg: Config, **process):
    """The network, in float32 (half precision is the loop's business), and the process."""
    torch.manual_seed(cfg.seed)
    if cfg.framework == "edm":
        process = edm_process(cfg)
        return create_network({**network_flags(cfg), "use_fp16": False}), process
    flags = {
        **cfg.section("model"),
        **cfg.section("diffusion"),
        "timestep_respacing": cfg.timestep_respacing,
    }
    return script_util.create_model_and_diffusion(**{**flags, **process, "use_fp16": False})


def sampler_on_the_way(cfg: Config, model, shape: tuple[int, int, int], respacing: str) -> Sampler:
    """How pictures and evaluations are made: DDPM in the steps that the flag says, by a process
    that knows no losses; EDM's models by Heun, in 18 steps unless the flag is given.
    """
    if cfg.framework == "edm":
        steps = getattr(cfg, respacing) if respacing in cfg.given else "18"
        if not steps.isdigit():
            raise ValueError(
                f"--{respacing} {steps}: --framework edm takes a number of Heun steps, such as 18"
            )
        along = AlongSigma(lambda network, _: BoundDenoiser(network, model), SigmaGrid(int(steps)))
        return Sampler(along, shape, cfg.seed, "heun", rounded=True)
    process = create(cfg, timestep_respacing=getattr(cfg, respacing), loss_weighting="uniform")[1]
    return process_sampler(process, shape, cfg.seed)


if __name__ == "__main__":
    command(main)
