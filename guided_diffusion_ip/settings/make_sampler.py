"""From settled flags to the sampler that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..diffusion.denoiser import BoundDenoiser, Denoiser
from ..diffusion.dynamic_threshold import dynamic_threshold
from ..diffusion.epsilon_scaling import EpsilonScaling
from ..diffusion.process_denoiser import ProcessDenoiser
from ..diffusion.solvers import SOLVERS, Solver
from ..diffusion.solvers.paths import AlongProcess
from ..diffusion.solvers.sigma_path import AlongSigma, Churn, SigmaGrid
from ..runs.sample_batch import Sampler
from .config import Config
from .flags import SECTIONS
from .solver import along, goes_along_sigma, sampler_kind


def make_sampler(cfg: Config, diffusion: Any, image_size: tuple[int, int]) -> Sampler:
    """The sampler that the flags describe; cond_fn, if any, is the caller's to add.

    Args:
        diffusion: the process; for EDM's models, which have none, their denoiser.

    Raises:
        ValueError: flags of one sampler for another, or classifier-free guidance of a network that
            cannot do without a class.
    """
    check_solver(cfg)
    solver = SOLVERS[sampler_kind(cfg)]
    edm = cfg.values.get("framework") == "edm"
    null_label = cfg.num_classes if cfg.null_class else None
    return Sampler(
        _along(cfg, diffusion, null_label),
        (cfg.in_channels, *image_size),
        cfg.seed,
        solver.name,
        {name: getattr(cfg, name) for name in solver.options},
        cfg.guidance_scale,
        null_label,
        rounded=edm,
    )


def _along(cfg: Config, diffusion: Any, null_label: int | None) -> AlongProcess | AlongSigma:
    """The path that the flags describe: the steps of a process, or noise levels."""
    if not goes_along_sigma(cfg):
        threshold = dynamic_threshold(cfg.dynamic_threshold) if cfg.dynamic_threshold else None
        return AlongProcess(diffusion, cfg.clip_denoised, threshold)
    if cfg.values.get("framework") == "edm":

        def as_denoiser(network: Callable[..., Tensor], kwargs: dict[str, Any]) -> Denoiser:
            return BoundDenoiser(network, diffusion)
    else:

        def as_denoiser(network: Callable[..., Tensor], kwargs: dict[str, Any]) -> Denoiser:
            return ProcessDenoiser(diffusion, network, model_kwargs=kwargs, null_label=null_label)

    # 0 and "" stand for "not given": the grid knows what is usual, and keeps to what the model was
    # trained for.
    grid = SigmaGrid(
        cfg.edm_steps,
        cfg.sigma_min or None,
        cfg.sigma_max or None,
        cfg.rho,
        cfg.discretization or "edm",
        cfg.noise_level_schedule or "linear",
        cfg.noise_level_scaling or "none",
    )
    scaling = EpsilonScaling.of(
        cfg.values.get("eps_scaler", 1.0), cfg.values.get("eps_scaler_k", 0.0)
    )
    churn = Churn(cfg.S_churn, cfg.S_min, cfg.S_max, cfg.S_noise)
    return AlongSigma(as_denoiser, grid, scaling, churn, cfg.clip_denoised)


def check_solver(cfg: Config) -> None:
    """Refuse flags of one solver for another, and guidance of a network that cannot do without a
    class.

    Raises:
        ValueError: there are some.
    """
    solver = SOLVERS[sampler_kind(cfg)]
    if solver.along == "sigma" and "edm_steps" not in cfg.values:
        raise ValueError(
            f"--solver {solver.name} is for image_sample: {cfg.script} steers each step of DDPM "
            "or DDIM (by a classifier or a low-resolution image), which EDM's samplers do not have"
        )
    _check_flags_of(solver, cfg)
    if cfg.guidance_scale != 1:
        _check_guidance(cfg)


def _check_flags_of(solver: Solver, cfg: Config) -> None:
    """Refuse what was asked of another solver: it would be ignored in silence."""
    sigma = goes_along_sigma(cfg)
    if cfg.eta and "eta" not in solver.options:
        raise ValueError(
            f"--eta {cfg.eta} is DDIM's noise and means nothing for {solver.title}: add "
            "--use_ddim True, or leave it out"
            + (" (--S_churn adds noise to EDM's samplers)" if sigma else "")
        )
    if cfg.dynamic_threshold and sigma:
        raise ValueError(
            f"--dynamic_threshold {cfg.dynamic_threshold:g} acts on the steps of a process, and "
            f"{solver.title} goes along sigma: leave it out"
        )
    if sigma and cfg.on_command_line("timestep_respacing") and cfg.timestep_respacing:
        raise ValueError(
            f"--timestep_respacing {cfg.timestep_respacing} chooses steps of a process; "
            f"{solver.title} takes --edm_steps of them along sigma"
        )
    for flag in SECTIONS["sample"]:
        if not flag.solvers or not cfg.on_command_line(flag.name):
            continue
        if flag.solvers == "sigma":
            fits = sigma and (solver.churn or not flag.name.startswith("S_"))
            owners = " and ".join(along("sigma"))
        else:
            fits, owners = flag.name in solver.options, flag.solvers
        if not fits:
            instead = "use --timestep_respacing" if flag.name == "edm_steps" else "leave it out"
            raise ValueError(
                f"--{flag.name} {cfg.values[flag.name]} belongs to --solver {owners}, and means "
                f"nothing for {solver.title}: {instead}"
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
