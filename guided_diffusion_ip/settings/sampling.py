"""What the sampling scripts have in common: what was asked for, in words and in settings.yaml, and
where the images go.

`cfg` is the merged settings of a script (config.Config): an object that has the flags as
attributes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from .. import dist_util, files
from ..diffusion.denoiser import BoundDenoiser
from ..diffusion.process_denoiser import ProcessDenoiser
from ..runs.sample_batch import Sampler, SigmaSampler
from .flags import SCRIPTS, names

_SIGMA = names("sample", solvers="sigma")
_ABLATION = ("discretization", "noise_level_schedule", "noise_level_scaling")


def make_sampler(cfg: Any, diffusion: Any, image_size: tuple[int, int]) -> Sampler | SigmaSampler:
    """The sampler that the flags describe; cond_fn, if any, is the caller's to add.

    Args:
        diffusion: the process; for EDM's models, which have none, their denoiser.

    Raises:
        ValueError: flags of one sampler for another, or classifier-free guidance of a network that
            cannot do without a class.
    """
    kind = sampler_kind(cfg)
    if kind in ("heun", "euler") and "edm_steps" not in cfg.values:
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


def settle_sampler(cfg: Any) -> None:
    """Bring --sampler and --use_ddim, two ways to say it, to agree; what is on the command line
    wins over a config file. And settle whether to clip.

    Raises:
        ValueError: they contradict each other.
    """
    said = [name for name in ("solver", "use_ddim") if cfg.given.get(name, "").startswith("--")]
    if said == ["use_ddim"]:
        cfg.values["solver"] = "ddim" if cfg.use_ddim else ""
    elif said == ["solver"]:
        cfg.values["use_ddim"] = cfg.solver == "ddim"
    if cfg.use_ddim and cfg.solver not in ("", "ddim"):
        raise ValueError(f"--use_ddim True and --sampler {cfg.solver} name two samplers: give one")
    cfg.values["solver"] = sampler_kind(cfg)
    cfg.values["use_ddim"] = cfg.solver == "ddim"
    if cfg.values.get("framework") == "edm" and "clip_denoised" not in cfg.given:
        cfg.values["clip_denoised"] = (
            False  # EDM does not clip; settled here, so that settings.yaml tells what was done
        )


def sampler_kind(cfg: Any) -> str:
    """ddpm, ddim, heun or euler; for scripts without --sampler, by --use_ddim.

    Raises:
        ValueError: an EDM model is to be sampled by DDPM or DDIM.
    """
    edm = cfg.values.get("framework") == "edm"
    kind = cfg.values.get("solver") or ("ddim" if cfg.use_ddim else "heun" if edm else "ddpm")
    if edm and kind in ("ddpm", "ddim"):
        raise ValueError(
            f"{kind.upper()} steps along the alpha_bar of a process, and EDM's models have none: "
            "use --sampler heun or euler"
        )
    return kind


def sampling_precision(cfg: Any) -> str:
    """fp32, fp16 or bf16: --precision, else what the published --use_fp16 says, for which a config
    may speak.

    Raises:
        ValueError: the two contradict each other on the command line.
    """
    asked = cfg.values.get("precision", "")
    if (
        asked in ("fp32", "bf16")
        and cfg.use_fp16
        and cfg.given.get("use_fp16", "").startswith("--")
    ):
        raise ValueError(f"--use_fp16 True and --precision {asked} contradict each other: keep one")
    return asked or ("fp16" if cfg.use_fp16 else "fp32")


def is_ablation(cfg: Any) -> bool:
    """Do the flags ask for the generalised sampler of EDM's ablations?"""
    return any(cfg.values.get(name) for name in _ABLATION)


def sigma_options(cfg: Any, kind: str) -> dict[str, Any]:
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


def _check_flags_of(kind: str, cfg: Any) -> None:
    """Refuse what was asked of another sampler: it would be ignored in silence."""
    if cfg.eta and kind != "ddim":
        raise ValueError(
            f"--eta {cfg.eta} is DDIM's noise and means nothing for {kind.upper()}: add --use_ddim "
            "True, or leave it out"
            + (" (--S_churn adds noise to EDM's samplers)" if kind in ("heun", "euler") else "")
        )
    if kind in ("heun", "euler"):
        if cfg.given.get("timestep_respacing", "").startswith("--") and cfg.timestep_respacing:
            raise ValueError(
                f"--timestep_respacing {cfg.timestep_respacing} chooses steps of DDPM and DDIM; "
                f"{kind} takes --edm_steps of them along sigma"
            )
        return
    for name in _SIGMA:
        if cfg.given.get(name, "").startswith("--"):
            raise ValueError(
                f"--{name} {cfg.values[name]} belongs to --sampler heun and euler, and means "
                f"nothing for {kind.upper()}"
                + (": use --timestep_respacing" if name == "edm_steps" else ": leave it out")
            )


def _check_guidance(cfg: Any) -> None:
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


def what_decides_the_images(
    cfg: Any, sections: Iterable[str] = ("model", "diffusion"), **more: Any
) -> dict[str, Any]:
    """All that the images depend on, as plain values: the checkpoint, flags of sampling, sections,
    and what else is given.
    """
    values = {
        "model_path": os.path.basename(cfg.model_path),
        "model_sha256": files.sha256(cfg.model_path),
        **more,
        **deciding_values(cfg),
    }
    if cfg.values.get("framework") == "edm":
        # use_fp16 comes with the checkpoint's config, and --precision wins over it: the settings
        # say what was done.
        precision = sampling_precision(cfg)
        values |= {
            "precision": precision,
            "use_fp16": precision == "fp16",
            "quantisation": "rounded",
        }
    if cfg.classes:
        values["classes"] = cfg.classes  # label k is classes[k]
    if cfg.trained_on:
        values["trained_on"] = (
            cfg.trained_on
        )  # decides through the weights; evaluator.py compares it with the reference's
    for section in sections:
        values.update(
            {name: value for name, value in cfg.section(section).items() if name not in values}
        )
    return values


def deciding_values(cfg: Any) -> dict[str, Any]:
    """All flags that decide what comes out of a checkpoint, and their values: those of role images,
    and number formats.

    The solver's name and flags appear only where use_ddim does not say it all, and a quiet flag
    only where it has not its default: so folders that are older than these flags are continued.
    """
    values = {}
    kind = sampler_kind(cfg) if "solver" in cfg.values else ""
    deciding = SCRIPTS[cfg.script].deciding()
    for flag in deciding:
        if flag.name != "solver" and not flag.solvers and not flag.quiet:
            values[flag.name] = cfg.values[flag.name]
    if "use_fp16" in cfg.values:
        values["use_fp16"] = cfg.use_fp16
    if kind not in ("", "ddpm", "ddim"):
        values["sampler"] = kind
        values |= {flag.name: cfg.values[flag.name] for flag in deciding if flag.solvers}
    for flag in deciding:
        if flag.quiet and cfg.values[flag.name] != flag.default:
            values[flag.name] = cfg.values[flag.name]
    return values


def sampler_text(cfg: Any) -> str:
    """DDPM, steps 100, lambda 1.017."""
    kind = sampler_kind(cfg)
    if kind in ("heun", "euler"):
        text = f"{kind.capitalize()}, steps {cfg.edm_steps}" + (
            f", S_churn {cfg.S_churn:g}" if cfg.S_churn else ""
        )
    else:
        text = (
            f"DDIM, eta {cfg.eta:g}" if kind == "ddim" else "DDPM"
        ) + f", steps {cfg.timestep_respacing or cfg.diffusion_steps}"
    slope = f" + {cfg.eps_scaler_k:g} t" if cfg.eps_scaler_k else ""
    guidance = f", guidance scale {cfg.guidance_scale:g}" if cfg.guidance_scale != 1 else ""
    b = cfg.eps_scaler
    if isinstance(b, list):
        b = f"{min(b):g} to {max(b):g}, one per step"
    return f"{text}, lambda {b}{slope}{guidance}"


def choose_out_dir(cfg: Any, settings: dict[str, Any]) -> str:
    """--out_dir, else OPENAI_LOGDIR, else a folder beside the checkpoint named after the settings.

    Named so that the same command finds what it had begun, and another one does not touch it.
    """
    stem = os.path.splitext(os.path.basename(cfg.model_path))[0]
    kind = sampler_kind(cfg)
    key = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
    named = os.path.join(
        files.folder_beside(cfg.model_path), "samples", f"{stem}-{kind}-n{cfg.num_samples}-{key}"
    )
    return files.results_folder(cfg.out_dir, named)


def say(text: str) -> None:
    """Print on one rank."""
    if dist_util.is_main():
        print(text, flush=True)
