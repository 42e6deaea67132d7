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
from ..diffusion.denoiser import BoundDenoiser, Denoiser
from ..diffusion.epsilon_scaling import EpsilonScaling
from ..diffusion.process_denoiser import ProcessDenoiser
from ..diffusion.solvers import SOLVERS
from ..diffusion.solvers.paths import AlongProcess
from ..diffusion.solvers.sigma_path import AlongSigma, Churn, SigmaGrid
from ..runs.sample_batch import Sampler

# Flags of sampling that the images depend on.
_SAMPLING = (
    "seed",
    "num_samples",
    "use_ddim",
    "eta",
    "timestep_respacing",
    "clip_denoised",
    "eps_scaler",
    "eps_scaler_k",
    "class_ids",
    "guidance_scale",
    "use_fp16",
)
_ABLATION = ("discretization", "noise_level_schedule", "noise_level_scaling")
_SIGMA = (
    "edm_steps",
    "sigma_min",
    "sigma_max",
    "rho",
    "S_churn",
    "S_min",
    "S_max",
    "S_noise",
    *_ABLATION,
)


def make_sampler(cfg: Any, diffusion: Any, image_size: tuple[int, int]) -> Sampler:
    """The sampler that the flags describe; cond_fn, if any, is the caller's to add.

    Args:
        diffusion: the process; for EDM's models, which have none, their denoiser.

    Raises:
        ValueError: flags of one sampler for another, or classifier-free guidance of a network that
            cannot do without a class.
    """
    solver = SOLVERS[sampler_kind(cfg)]
    if solver.along == "sigma" and "edm_steps" not in cfg.values:
        raise ValueError(
            f"--sampler {solver.name} is for image_sample: {cfg.script} steers each step of DDPM "
            "or DDIM (by a classifier or a low-resolution image), which EDM's samplers do not have"
        )
    _check_flags_of(solver.name, cfg)
    if cfg.guidance_scale != 1:
        _check_guidance(cfg)
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


def _along(cfg: Any, diffusion: Any, null_label: int | None) -> AlongProcess | AlongSigma:
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


def goes_along_sigma(cfg: Any) -> bool:
    """Whether the chain goes along noise levels (--edm_steps), rather than the steps of a process
    (--timestep_respacing).
    """
    along = SOLVERS[sampler_kind(cfg)].along
    return along == "sigma" or along == "either" and cfg.values.get("framework") == "edm"


def settle_sampler(cfg: Any) -> None:
    """Bring --sampler and --use_ddim, two ways to say it, to agree; what is on the command line
    wins over a config file. And settle whether to clip.

    Raises:
        ValueError: they contradict each other.
    """
    said = [name for name in ("sampler", "use_ddim") if cfg.given.get(name, "").startswith("--")]
    if said == ["use_ddim"]:
        cfg.values["sampler"] = "ddim" if cfg.use_ddim else ""
    elif said == ["sampler"]:
        cfg.values["use_ddim"] = cfg.sampler == "ddim"
    if cfg.use_ddim and cfg.sampler not in ("", "ddim"):
        raise ValueError(f"--use_ddim True and --sampler {cfg.sampler} name two samplers: give one")
    cfg.values["sampler"] = sampler_kind(cfg)
    cfg.values["use_ddim"] = cfg.sampler == "ddim"
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
    kind = cfg.values.get("sampler") or ("ddim" if cfg.use_ddim else "heun" if edm else "ddpm")
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
        **{name: getattr(cfg, name) for name in _SAMPLING},
    }
    if (kind := sampler_kind(cfg)) in ("heun", "euler"):
        values |= {"sampler": kind, **{name: getattr(cfg, name) for name in _SIGMA}}
    if cfg.values.get("precision"):
        values["precision"] = cfg.precision
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
            {name: value for name, value in cfg.section(section).items() if name not in _SAMPLING}
        )
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
