"""Sample images from a trained model.

    python scripts/image_sample.py --model_path runs/NAME/ema_0.9999_100000.pt --num_samples 64 \\
        --timestep_respacing 100 --eps_scaler 1.017

Architecture and process come from the config.yaml beside the checkpoint; for a bare published .pt, give them as flags or
by --config. Image i depends on --seed and i only. The same command again continues an interrupted run.
"""
import hashlib
import os

import torch

from guided_diffusion_ip import dist_util, files, script_util
from guided_diffusion_ip.config import Config, adopt_checkpoint_config, command, parse, published_lambda
from guided_diffusion_ip.generation.sample_batch import Sampler, draw_labels, parse_class_ids
from guided_diffusion_ip.generation.sample_run import SampleRun
from guided_diffusion_ip.interop.adm_checkpoint import load_network


def main() -> None:
    cfg = parse("image_sample", __doc__)
    if not cfg.model_path:
        raise ValueError("no checkpoint: give --model_path, such as runs/NAME/ema_0.9999_100000.pt")
    beside = os.path.join(os.path.dirname(cfg.model_path), "config.yaml")
    if files.exists(beside):
        adopt_checkpoint_config(cfg, beside)
    if cfg.eta and not cfg.use_ddim:
        raise ValueError(f"--eta {cfg.eta} is DDIM's noise and means nothing for DDPM: add --use_ddim True, or leave it out")
    if cfg.eps_scaler == "published":
        cfg.values["eps_scaler"], cfg.values["eps_scaler_k"] = published_lambda(cfg)
    class_ids = parse_class_ids(cfg.class_ids, cfg.num_classes) if cfg.class_cond else None

    dist_util.setup_dist()
    model, diffusion = script_util.create_model_and_diffusion(
        **cfg.section("model"), **cfg.section("diffusion"), timestep_respacing=cfg.timestep_respacing,
        eps_scaler=cfg.eps_scaler, eps_scaler_k=cfg.eps_scaler_k)
    load_network(model, cfg.model_path, cfg.section("model"))
    model.to(device=dist_util.dev(), memory_format=torch.channels_last)
    if cfg.use_fp16:
        model.convert_to_fp16()
    model.eval()

    settings = what_decides_the_images(cfg)
    run = SampleRun(
        Sampler(diffusion, (cfg.in_channels, *script_util.parse_image_size(cfg.image_size)), cfg.seed, cfg.use_ddim,
                cfg.eta, cfg.clip_denoised),
        cfg.num_samples, choose_out_dir(cfg, settings), settings,
        (lambda index: {"y": draw_labels(cfg.seed, index, class_ids)}) if class_ids else lambda index: {})
    say(f"sampling {cfg.num_samples} images from {cfg.model_path} by {sampler_text(cfg)} into {run.out_dir}")
    path = run(model, cfg.batch_size, dist_util.dev(), png=cfg.save_png)
    say(f"samples: {path}\npicture: {os.path.join(run.out_dir, 'grid.png')}")
    dist_util.cleanup()


def what_decides_the_images(cfg: Config) -> dict:
    """All that the images depend on, as plain values."""
    names = ("seed", "num_samples", "use_ddim", "eta", "timestep_respacing", "clip_denoised", "eps_scaler",
             "eps_scaler_k", "class_ids", "use_fp16")
    return {"model_path": os.path.basename(cfg.model_path), "model_sha256": files.sha256(cfg.model_path),
            **{name: cfg.values[name] for name in names},
            **{k: v for k, v in cfg.section("model").items() if k not in names}, **cfg.section("diffusion")}


def sampler_text(cfg: Config) -> str:
    """DDPM, 100 steps, lambda 1.017."""
    kind = f"DDIM, eta {cfg.eta:g}" if cfg.use_ddim else "DDPM"
    steps = cfg.timestep_respacing or cfg.diffusion_steps
    slope = f" + {cfg.eps_scaler_k:g} t" if cfg.eps_scaler_k else ""
    return f"{kind}, steps {steps}, lambda {cfg.eps_scaler}{slope}"


def choose_out_dir(cfg: Config, settings: dict) -> str:
    """--out_dir, else OPENAI_LOGDIR, else a folder beside the checkpoint named after the settings.

    Named so that the same command finds what it had begun, and another one does not touch it.
    """
    if cfg.out_dir or os.environ.get("OPENAI_LOGDIR"):
        return cfg.out_dir or os.environ["OPENAI_LOGDIR"]
    stem = os.path.splitext(os.path.basename(cfg.model_path))[0]
    kind = "ddim" if cfg.use_ddim else "ddpm"
    key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
    return os.path.join(os.path.dirname(cfg.model_path) or ".", "samples", f"{stem}-{kind}-n{cfg.num_samples}-{key}")


def say(text: str) -> None:
    if dist_util.is_main():
        print(text, flush=True)


if __name__ == "__main__":
    command(main)
