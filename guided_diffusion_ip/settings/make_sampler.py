"""From settled flags to the sampler that they describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..diffusion.denoiser import BoundDenoiser, Denoiser
from ..diffusion.epsilon_scaling import EpsilonScaling
from ..diffusion.process_denoiser import ProcessDenoiser
from ..diffusion.solvers import SOLVERS
from ..diffusion.solvers.paths import AlongProcess
from ..diffusion.solvers.sigma_path import AlongSigma, Churn, SigmaGrid
from ..runs.sample_batch import Sampler
from .config import Config
from .flags import names
from .solver import goes_along_sigma, sampler_kind

_SIGMA = names("sample", solvers="sigma")


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
        return AlongProcess(diffusion, cfg.clip_denoised)
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
    scaling = EpsilonScaling.of(cfg.eps_scaler, cfg.eps_scaler_k)
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
    _check_flags_of(solver.name, cfg)
    if cfg.guidance_scale != 1:
        _check_guidance(cfg)


def _check_flags_of(kind: str, cfg: Config) -> None:
    """Refuse what was asked of another sampler: it would be ignored in silence."""
    if cfg.eta and kind != "ddim":
        raise ValueError(
            f"--eta {cfg.eta} is DDIM's noise and means nothing for {kind.upper()}: add --use_ddim "
            "True, or leave it out"
            + (" (--S_churn adds noise to EDM's samplers)" if goes_along_sigma(cfg) else "")
        )
    if goes_along_sigma(cfg):
        if cfg.on_command_line("timestep_respacing") and cfg.timestep_respacing:
            raise ValueError(
                f"--timestep_respacing {cfg.timestep_respacing} chooses steps of DDPM and DDIM; "
                f"{kind} takes --edm_steps of them along sigma"
            )
        return
    for name in _SIGMA:
        if cfg.on_command_line(name):
            raise ValueError(
                f"--{name} {cfg.values[name]} belongs to --solver heun and euler, and means "
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
