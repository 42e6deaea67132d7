"""Which solver, steps and number format the flags ask for, and how to say it."""

from __future__ import annotations

from typing import Any

from ..diffusion.respace import space_timesteps
from ..diffusion.solvers import SOLVERS
from ..runs.sampler_text import sampler_text as describe_sampler
from .config import Config
from .flags import SECTIONS


def goes_along_sigma(cfg: Config) -> bool:
    """Whether the chain goes along noise levels (--edm_steps), rather than the steps of a process
    (--timestep_respacing).
    """
    return SOLVERS[sampler_kind(cfg)].goes_along_sigma(cfg.values.get("framework") == "edm")


def along(*kinds: str) -> list[str]:
    """The solvers that go along paths of these kinds: process, sigma, either."""
    return [name for name, solver in SOLVERS.items() if solver.along in kinds]


def settle_sampler(cfg: Config) -> Config:
    """`cfg` with --solver and --use_ddim, two ways to say it, in agreement, with clip_denoised
    settled, and with --t_start as part of the respacing; what is on the command line wins over a
    config file.

    Raises:
        ValueError: they contradict each other.
    """
    said = [name for name in ("solver", "use_ddim") if cfg.on_command_line(name)]
    solver, use_ddim = cfg.solver, cfg.use_ddim
    if said == ["use_ddim"]:
        solver = "ddim" if use_ddim else ""
    elif said == ["solver"]:
        use_ddim = solver == "ddim"
    if use_ddim and solver not in ("", "ddim"):
        raise ValueError(f"--use_ddim True and --solver {solver} name two samplers: give one")
    solver = sampler_kind(cfg.with_values(solver=solver, use_ddim=use_ddim))
    settled = {"solver": solver, "use_ddim": solver == "ddim"}
    if cfg.values.get("framework") == "edm" and "clip_denoised" not in cfg.given:
        settled["clip_denoised"] = False  # EDM does not clip; settings.yaml tells what was done
    return _settle_start(cfg.with_values(**settled))


def _settle_start(cfg: Config) -> Config:
    """--t_start N as `timestep_respacing: ...@N`.

    Raises:
        ValueError: there are no such steps, or the respacing says where to start already.
    """
    start = cfg.values.get("t_start", 0)
    if not start:
        return cfg
    if goes_along_sigma(cfg):
        raise ValueError(
            f"--t_start {start} is a step of a process, and {SOLVERS[sampler_kind(cfg)].title} "
            "goes along noise levels: --sigma_max says where it starts"
        )
    if "@" in cfg.timestep_respacing:
        raise ValueError(
            f"--timestep_respacing {cfg.timestep_respacing} says already where chains start: leave "
            f"--t_start {start} out"
        )
    respacing = f"{cfg.timestep_respacing}@{start}"
    space_timesteps(cfg.diffusion_steps, respacing)  # complains
    return cfg.with_values(timestep_respacing=respacing, t_start=0)


def sampler_kind(cfg: Config) -> str:
    """A name in SOLVERS; for scripts without --solver, by --use_ddim.

    Raises:
        ValueError: an EDM model is to be sampled along the steps of a process.
    """
    edm = cfg.values.get("framework") == "edm"
    kind = cfg.values.get("solver") or ("ddim" if cfg.use_ddim else "heun" if edm else "ddpm")
    if edm and SOLVERS[kind].along == "process":
        raise ValueError(
            f"{SOLVERS[kind].title} steps along the alpha_bar of a process, and EDM's models have "
            f"none: use --solver {' or '.join(along('sigma', 'either'))}"
        )
    return kind


def flags_of_solver(cfg: Config) -> dict[str, Any]:
    """The flags that only solvers of this kind read, and their values."""
    own = "sigma" if goes_along_sigma(cfg) else sampler_kind(cfg)
    names = (flag.name for flag in SECTIONS["sample"] if flag.solvers == own)
    return {name: cfg.values[name] for name in names if name in cfg.values}


def sampling_precision(cfg: Config) -> str:
    """fp32, fp16 or bf16: --precision, else what the published --use_fp16 says, for which a config
    may speak.

    Raises:
        ValueError: the two contradict each other on the command line.
    """
    asked = cfg.values.get("precision", "")
    if asked in ("fp32", "bf16") and cfg.use_fp16 and cfg.on_command_line("use_fp16"):
        raise ValueError(f"--use_fp16 True and --precision {asked} contradict each other: keep one")
    return asked or ("fp16" if cfg.use_fp16 else "fp32")


def number_of_steps(cfg: Config) -> int:
    """Of the solver."""
    if goes_along_sigma(cfg):
        return cfg.edm_steps
    return len(
        space_timesteps(cfg.diffusion_steps, cfg.timestep_respacing or [cfg.diffusion_steps])
    )


def sampler_text(cfg: Config) -> str:
    """DDPM, steps 100, lambda 1.017."""
    return describe_sampler({**cfg.values, "solver": sampler_kind(cfg)})
