"""From settled flags to the sampler that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..diffusion.denoiser import BoundDenoiser
from ..diffusion.process_denoiser import ProcessDenoiser
from ..runs.sample_batch import Sampler, SigmaSampler
from .config import Config
from .flags import names
from .solver import along_sigma, sampler_kind

_SIGMA = names("sample", solvers="sigma")
_ABLATION = ("discretization", "noise_level_schedule", "noise_level_scaling")


def make_sampler(
    cfg: Config, diffusion: Any, image_size: tuple[int, int]
) -> Sampler | SigmaSampler:
    """The sampler that the flags describe; cond_fn, if any, is the caller's to add.

    Args:
        diffusion: the process; for EDM's models, which have none, their denoiser.

    Raises:
        ValueError: flags of one sampler for another, or classifier-free guidance of a network that
            cannot do without a class.
    """
    kind = sampler_kind(cfg)
    if along_sigma(kind) and "edm_steps" not in cfg.values:
        raise ValueError(
            f"--sampler {kind} is for image_sample: {cfg.script} steers each step of DDPM or DDIM "
            "(by a classifier or a low-resolution image), which EDM's samplers do not have"
        )
    _check_flags_of(kind, cfg)
    if cfg.guidance_scale != 1:
        _check_guidance(cfg)
    shape = (cfg.in_channels, *image_size)
    guidance = {
        "guidance_scale": cfg.guidance_scale,
        "null_label": cfg.num_classes if cfg.null_class else None,
    }
    if kind in ("ddpm", "ddim"):
        return Sampler(
            diffusion, shape, cfg.seed, kind == "ddim", cfg.eta, cfg.clip_denoised, **guidance
        )
    if edm := cfg.values.get("framework") == "edm":

        def as_denoiser(network: Callable[..., Tensor], kwargs: dict[str, Any]) -> Any:
            return BoundDenoiser(network, diffusion)
    else:

        def as_denoiser(network: Callable[..., Tensor], kwargs: dict[str, Any]) -> Any:
            return ProcessDenoiser(
                diffusion, network, model_kwargs=kwargs, null_label=guidance["null_label"]
            )

    return SigmaSampler(
        as_denoiser,
        shape,
        cfg.seed,
        sigma_options(cfg, kind),
        is_ablation(cfg),
        **guidance,
        rounded=edm,
    )


def is_ablation(cfg: Config) -> bool:
    """Do the flags ask for the generalised sampler of EDM's ablations?"""
    return any(cfg.values.get(name) for name in _ABLATION)


def sigma_options(cfg: Config, kind: str) -> dict[str, Any]:
    """The flags of heun and euler as arguments of edm_sample or ablation_sample."""
    # 0 stands for "not given": the samplers know what is usual, and clamp to what the model was
    # trained for.
    options = {
        name: getattr(cfg, name) for name in ("sigma_min", "sigma_max") if getattr(cfg, name)
    }
    options |= {
        name: getattr(cfg, name)
        for name in ("rho", "S_churn", "S_min", "S_max", "S_noise", "eps_scaler", "eps_scaler_k")
    }
    if is_ablation(cfg):
        options |= {
            "discretization": cfg.discretization or "edm",
            "schedule": cfg.noise_level_schedule or "linear",
            "scaling": cfg.noise_level_scaling or "none",
        }
    return options | {
        "num_steps": cfg.edm_steps,
        "solver": kind,
        "clip_denoised": cfg.clip_denoised,
    }


def _check_flags_of(kind: str, cfg: Config) -> None:
    """Refuse what was asked of another sampler: it would be ignored in silence."""
    if cfg.eta and kind != "ddim":
        raise ValueError(
            f"--eta {cfg.eta} is DDIM's noise and means nothing for {kind.upper()}: add --use_ddim "
            "True, or leave it out"
            + (" (--S_churn adds noise to EDM's samplers)" if along_sigma(kind) else "")
        )
    if along_sigma(kind):
        if cfg.on_command_line("timestep_respacing") and cfg.timestep_respacing:
            raise ValueError(
                f"--timestep_respacing {cfg.timestep_respacing} chooses steps of DDPM and DDIM; "
                f"{kind} takes --edm_steps of them along sigma"
            )
        return
    for name in _SIGMA:
        if cfg.on_command_line(name):
            raise ValueError(
                f"--{name} {cfg.values[name]} belongs to --sampler heun and euler, and means "
                f"nothing for {kind.upper()}"
                + (": use --timestep_respacing" if name == "edm_steps" else ": leave it out")
            )


def _check_guidance(cfg: Config) -> None:
    if cfg.values.get("framework") == "edm":
        raise ValueError(
            f"--guidance_scale {cfg.guidance_scale:g} needs a label for 'no class', which EDM's "
            "networks do not have: leave it out"
        )
    if not cfg.class_cond:
        raise ValueError(
            f"--guidance_scale {cfg.guidance_scale:g} pushes towards the class, but this model is "
            "unconditional and knows none: leave it out, or use a model trained with --class_cond "
            "True --class_dropout 0.1"
        )
    if not cfg.null_class:
        raise ValueError(
            f"--guidance_scale {cfg.guidance_scale:g} compares the network with class and without, "
            "but this checkpoint has no label for 'no class': train with --class_dropout 0.1 (a "
            "bare .pt that was trained so needs --null_class True)"
        )
