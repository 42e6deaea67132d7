"""lambda(t) of epsilon scaling, from the flags that say it."""

from __future__ import annotations

import warnings

from .. import files
from .config import Config
from .lambda_file import check_origin, read_schedule
from .solver import flags_of_solver, goes_along_sigma, number_of_steps, sampler_kind


def settle_lambda(cfg: Config) -> Config:
    """`cfg` with the eps_scaler and eps_scaler_k that `--eps_schedule FILE` and `--eps_scaler
    published` stand for.

    Raises:
        ValueError: both a schedule and another lambda are given, or the file or the table of
            published values does not fit; a schedule that was calibrated for another checkpoint is
            a warning.
    """
    if cfg.eps_schedule:
        if cfg.eps_scaler != 1.0 or cfg.eps_scaler_k != 0.0:
            raise ValueError(
                f"--eps_schedule {cfg.eps_schedule} says what lambda(t) is, but --eps_scaler "
                f"{cfg.eps_scaler} --eps_scaler_k {cfg.eps_scaler_k} says something else: give one "
                "of them"
            )
        b, k = read_schedule(cfg.eps_schedule, number_of_steps(cfg))
        for note in check_origin(
            cfg.eps_schedule,
            sampler_kind(cfg),
            {
                "eta": cfg.eta,
                "diffusion_steps": cfg.diffusion_steps,
                "timestep_respacing": cfg.timestep_respacing,
                "model_sha256": files.sha256(cfg.model_path)
                if files.exists(cfg.model_path)
                else "",
                "clip_denoised": cfg.clip_denoised,
                "guidance_scale": cfg.guidance_scale,
                **flags_of_solver(cfg),
            },
        ):
            warnings.warn(note)
    elif cfg.eps_scaler == "published":
        b, k = published_lambda(cfg)
    else:
        return cfg
    return cfg.with_values(eps_scaler=b, eps_scaler_k=k)


def published_lambda(cfg: Config) -> tuple[float, float]:
    """(b, k) of `--eps_scaler published`: the paper's value for this sampler and number of steps,
    from the config's table.

    Tables in section paper: eps_scaler for DDPM, eps_scaler_heun and eps_scaler_euler by number of
    steps.

    Raises:
        ValueError: no table, or a number of steps that the table does not have.
    """
    kind = cfg.values.get("solver") or ("ddim" if cfg.use_ddim else "ddpm")
    table = cfg.paper.get("eps_scaler" if kind == "ddpm" else f"eps_scaler_{kind}", {})
    known = [
        owner
        for owner, name in (
            ("DDPM", "eps_scaler"),
            ("Heun", "eps_scaler_heun"),
            ("Euler", "eps_scaler_euler"),
        )
        if name in cfg.paper
    ]
    if not table and known:
        raise ValueError(
            f"the published lambdas of this config belong to {' and '.join(known)} sampling: give "
            "a number"
        )
    if not table:
        raise ValueError(
            "--eps_scaler published needs a table of lambdas: give --config with one (section "
            "paper, such as configs/cifar10.yaml), or a number"
        )
    sigma = goes_along_sigma(cfg)
    steps = str(cfg.edm_steps) if sigma else cfg.timestep_respacing or str(cfg.diffusion_steps)
    by_steps = {str(key): value for key, value in table.items()}
    if steps not in by_steps:
        raise ValueError(
            f"no lambda was published for {steps} steps; there is one for {', '.join(by_steps)} "
            f"(--{'edm_steps' if sigma else 'timestep_respacing'}), or give a number"
        )
    return float(by_steps[steps]), 0.0
