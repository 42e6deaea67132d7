"""Measure training and sampling speed of a configuration on this machine, against its limits and
the published way.

    python -m tools.benchmark --config configs/cifar10.yaml --num_channels 64 --batch_size 16 \\
        --json result.json
    python -m tools.benchmark --config configs/cifar10.yaml --baseline True \\
        --what train,sample,optimizer,gather,loader,startup
    python -m tools.benchmark --config configs/lsun_tower64.yaml --batch_size 32 \\
        --precision bf16 --timestep_respacing 100

    train      a training step, the training loop's own: noise, forward, backward, AdamW, averaged
               weights; images in memory
    sample     a network call of sampling
    optimizer  the training step without forward and backward
    gather     from batches of samples to one file
    loader     training images/s, of --data_dir or of pictures made for it
    startup    image_sample.py --help

With --baseline True the published way of the first three is measured in turn with ours, repeat by
repeat, from the same weights: contiguous layout, attention by einsum with a float32 softmax, norms,
averages and AdamW parameter by parameter, tables copied to the device at every use; gather and
loader are compared always. Its format is fp32, on a GPU fp16 (half convolutions, float32 masters)
where ours is fp16 or bf16. A ratio says how many times longer it takes.

The limit of a row: GFLOP at the rate of a product of two 4096 x 4096 matrices in the same format,
or a lower bound of bytes moved at the rate of copies of 256 MB, whichever takes longer; best of 5
each, same process and threads, measured before, between and after the repeats. Peak memory is what
the row took beyond what the process had before: GPU, PyTorch's allocator; CPU, resident set
(Linux).
"""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from guided_diffusion_ip import dist_util, script_util
from guided_diffusion_ip.settings.config import Config, command, parse
from guided_diffusion_ip.settings.yaml_file import nearest
from tools.benchmark import loader
from tools.benchmark.baseline import published_network
from tools.benchmark.gathering import measure_gathering
from tools.benchmark.machine import Machine, choose_device
from tools.benchmark.pictures import make_pictures
from tools.benchmark.report import as_json, head, notes, table, write_json
from tools.benchmark.rows import Plan, Row, measure_optimizer, measure_sampling, measure_training
from tools.benchmark.settings import NAME
from tools.benchmark.startup import measure_startup

ROWS = ("train", "sample", "optimizer")
WHAT = (*ROWS, "gather", "loader", "startup")

SAMPLING_SCRIPT = Path(__file__).parents[2] / "scripts" / "image_sample.py"


def main() -> None:
    cfg = parse(NAME, __doc__)
    wanted = [word.strip() for word in cfg.what.split(",") if word.strip()]
    check(cfg, wanted)
    device = choose_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    # On no device: what is wrong with the settings comes out before minutes are spent.
    with torch.device("meta"):
        network = create(cfg, cfg.timestep_respacing)[0]
        parameters = script_util.parameter_count(network)
        if cfg.baseline:
            published_network(network)
    machine = Machine.look(device)
    print(f"{machine}\n{parameters / 1e6:.1f} million parameters\n", flush=True)
    rows = [measure(cfg, word, device) for word in wanted if word in ROWS]
    if rows:
        print("\n\n".join(filter(None, (head(rows), table(rows), notes(rows)))) + "\n", flush=True)
    others = {word: measure_other(cfg, word) for word in wanted if word not in ROWS}
    if cfg.json:
        write_json(
            cfg.json,
            {
                **as_json(machine, {"config": cfg.config_path, **cfg.values}, parameters, rows),
                **others,
            },
        )
        print(f"every number: {cfg.json}")


def check(cfg: Config, wanted: list[str]) -> None:
    """Refuse settings that mean nothing."""
    for word in wanted or [""]:
        if word not in WHAT:
            raise ValueError(
                f"--what {cfg.what!r}: {word!r} is not among {', '.join(WHAT)}."
                + nearest(word, WHAT)
            )
    if cfg.eta and not cfg.use_ddim:
        raise ValueError(
            f"--eta {cfg.eta} is DDIM's noise and means nothing for DDPM: add --use_ddim True, or "
            "leave it out"
        )
    if dist_util.get_world_size() > 1:
        raise ValueError(
            "the benchmark measures a single process: start it without mpiexec, torchrun or srun"
        )
    if "loader" in wanted:
        height, width = script_util.parse_image_size(cfg.image_size)
        if height != width:
            raise ValueError(
                f"the loader is measured on square images, not {height}x{width}: leave loader out "
                "of --what"
            )
        if cfg.data_dir and not os.path.isdir(cfg.data_dir):
            raise ValueError(
                f"--data_dir {cfg.data_dir} is no folder of images: give one, or leave it out and "
                "some are made"
            )


def create(cfg: Config, timestep_respacing: str):
    """The network, in float32, and the process."""
    flags = {
        **cfg.section("model"),
        **cfg.section("diffusion"),
        "timestep_respacing": timestep_respacing,
    }
    return script_util.create_model_and_diffusion(**flags, use_fp16=False)


def measure(cfg: Config, what: str, device: torch.device) -> Row:
    """One row of the table."""
    respacing = cfg.timestep_respacing if what == "sample" else ""
    plan = Plan(
        lambda: create(cfg, respacing),
        (cfg.in_channels, *script_util.parse_image_size(cfg.image_size)),
        cfg.num_classes if cfg.class_cond else 0,
        cfg.batch_size,
        device,
        cfg.precision,
        cfg.repeats,
        cfg.seed,
        cfg.matrix_size,
        cfg.baseline,
        cfg.compile,
    )
    if what == "sample":
        return measure_sampling(plan, use_ddim=cfg.use_ddim, eta=cfg.eta)
    updates = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "ema_rate": cfg.ema_rate}
    if what == "optimizer":
        return measure_optimizer(plan, **updates)
    return measure_training(
        plan, microbatch=cfg.microbatch, schedule_sampler=cfg.schedule_sampler, **updates
    )


def measure_other(cfg: Config, what: str) -> Any:
    """Measure, print, and return for JSON what has no row."""
    height, width = script_util.parse_image_size(cfg.image_size)
    if what == "gather":
        found = measure_gathering(
            (cfg.in_channels, height, width), cfg.batch_size, min(cfg.repeats, 5)
        )
    elif what == "startup":
        found = measure_startup(SAMPLING_SCRIPT, min(cfg.repeats, 5))
    else:
        with tempfile.TemporaryDirectory() as made:
            if not cfg.data_dir:
                make_pictures(made, height)
            ways = loader.measure_loader(
                cfg.data_dir or made,
                cfg.batch_size,
                height,
                repeats=min(cfg.repeats, 5),
                num_workers=None if cfg.num_workers < 0 else cfg.num_workers,
            )
        print(f"{loader.table(ways)}\n", flush=True)
        return [asdict(way) for way in ways]
    print(f"{found}\n", flush=True)
    return asdict(found)


if __name__ == "__main__":
    command(main)
