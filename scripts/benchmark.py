"""Measure training and sampling speed of a configuration on this machine.

    python scripts/benchmark.py --config configs/cifar10.yaml --num_channels 64 --batch_size 16 --json result.json
    python scripts/benchmark.py --config configs/lsun_tower64.yaml --batch_size 32 --precision bf16 --timestep_respacing 100

One row for a training step (the training loop's own: noise, forward, backward, AdamW, averaged weights; images in memory),
one for a network call of sampling. GFLOP/s are compared with the rate of a product of two 4096 x 4096 matrices in the same
format: best of 5, same process and threads, measured before, between and after the repeats. Peak memory is what the row
took beyond what the process had before: GPU, PyTorch's allocator; CPU, resident set (Linux).
"""
import torch

from guided_diffusion_ip import dist_util, script_util
from guided_diffusion_ip.benchmark.machine import Machine, choose_device
from guided_diffusion_ip.benchmark.report import as_json, notes, table, write_json
from guided_diffusion_ip.benchmark.rows import Plan, Row, measure_sampling, measure_training
from guided_diffusion_ip.config import Config, command, nearest, parse

WHAT = ("train", "sample")


def main() -> None:
    cfg = parse("benchmark", __doc__)
    wanted = [word.strip() for word in cfg.what.split(",") if word.strip()]
    for word in wanted or [""]:
        if word not in WHAT:
            raise ValueError(f"--what {cfg.what!r}: {word!r} is not among {', '.join(WHAT)}." + nearest(word, WHAT))
    if cfg.eta and not cfg.use_ddim:
        raise ValueError(f"--eta {cfg.eta} is DDIM's noise and means nothing for DDPM: add --use_ddim True, or leave it out")
    if dist_util.get_world_size() > 1:
        raise ValueError("the benchmark measures a single process: start it without mpiexec, torchrun or srun")
    device = choose_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    # On no device: what is wrong with the settings comes out before minutes are spent.
    with torch.device("meta"):
        parameters = script_util.parameter_count(create(cfg, cfg.timestep_respacing)[0])
    machine = Machine.look(device)
    print(f"{machine}\n{parameters / 1e6:.1f} million parameters", flush=True)
    rows = [measure(cfg, word, device) for word in wanted]
    print("\n".join(filter(None, ["", table(rows), notes(rows)])))
    if cfg.json:
        write_json(cfg.json, as_json(machine, {"config": cfg.config_path, **cfg.values}, parameters, rows))
        print(f"every number: {cfg.json}")


def create(cfg: Config, timestep_respacing: str):
    """The network, in float32, and the process."""
    flags = {**cfg.section("model"), **cfg.section("diffusion"), "timestep_respacing": timestep_respacing}
    return script_util.create_model_and_diffusion(**flags, use_fp16=False)


def measure(cfg: Config, what: str, device: torch.device) -> Row:
    """One row of the table."""
    respacing = cfg.timestep_respacing if what == "sample" else ""
    plan = Plan(
        lambda: create(cfg, respacing), (cfg.in_channels, *script_util.parse_image_size(cfg.image_size)),
        cfg.num_classes if cfg.class_cond else 0, cfg.batch_size, device, cfg.precision, cfg.repeats, cfg.seed,
        cfg.matrix_size)
    if what == "sample":
        return measure_sampling(plan, use_ddim=cfg.use_ddim, eta=cfg.eta)
    return measure_training(plan, microbatch=cfg.microbatch, lr=cfg.lr, weight_decay=cfg.weight_decay, ema_rate=cfg.ema_rate,
                            schedule_sampler=cfg.schedule_sampler)


if __name__ == "__main__":
    command(main)
