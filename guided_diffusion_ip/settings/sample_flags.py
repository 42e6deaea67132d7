"""The flags of what is done with a checkpoint: sampling, likelihoods, measures."""

from __future__ import annotations

from dataclasses import replace

from ..diffusion.solvers import SOLVERS
from .flag import Flag, Role, eps_scaler

RESPACING = Flag(
    "timestep_respacing",
    "",
    Role.IMAGES,
    "fewer sampling steps: N, a,b,c or ddimN; empty: all T; N@t: from step t on",
)

# Of solvers that step along noise levels sigma, for EDM's models and for any other.
SIGMA = tuple(
    replace(flag, solvers="sigma")
    for flag in (
        Flag(
            "edm_steps",
            18,
            Role.IMAGES,
            "steps of heun (2 N - 1 network calls) and euler (N calls)",
            least=1,
            most=1_000_000,
        ),
        Flag(
            "sigma_min",
            0.0,
            Role.IMAGES,
            "lowest noise level of heun and euler; 0: 0.002, or what the model was trained for",
            least=0,
        ),
        Flag(
            "sigma_max",
            0.0,
            Role.IMAGES,
            "highest noise level; 0: 80, or what the model was trained for",
            least=0,
        ),
        Flag("rho", 7.0, Role.IMAGES, "spacing of the noise levels", least=0),
        Flag("S_churn", 0.0, Role.IMAGES, "amount of fresh noise; 0: deterministic", least=0),
        Flag("S_min", 0.0, Role.IMAGES, "lowest noise level that gets fresh noise", least=0),
        Flag(
            "S_max",
            float("inf"),
            Role.IMAGES,
            "highest noise level that gets fresh noise",
            least=0,
            finite=False,
        ),
        Flag("S_noise", 1.0, Role.IMAGES, "factor on the fresh noise", least=0),
        Flag(
            "discretization",
            "",
            Role.IMAGES,
            "noise levels as vp, ve, iddpm or edm have them; default edm",
            choices=("", "vp", "ve", "iddpm", "edm"),
        ),
        Flag(
            "noise_level_schedule",
            "",
            Role.IMAGES,
            "sigma(t): linear, vp or ve; default linear",
            choices=("", "vp", "ve", "linear"),
        ),
        Flag(
            "noise_level_scaling",
            "",
            Role.IMAGES,
            "s(t): none or vp; default none",
            choices=("", "vp", "none"),
        ),
    )
)

# A run's identity has these flags in this order.
SAMPLE = (
    Flag(
        "model_path",
        "",
        Role.INPUT,
        "checkpoint, such as ema_0.9999_100000.pt; its config.yaml is read from beside it",
    ),
    Flag("seed", 0, Role.IMAGES, "image i depends on (seed, i) only", least=0, most=2**63 - 1),
    Flag("num_samples", 10000, Role.IMAGES, "images to make", least=1, most=100_000_000),
    Flag("use_ddim", False, Role.IMAGES, "DDIM instead of DDPM"),
    Flag("eta", 0.0, Role.IMAGES, "DDIM's noise: 0 deterministic, 1 that of DDPM", least=0),
    RESPACING,
    Flag(
        "t_start",
        0,
        Role.IMAGES,
        "start chains at this step of the process, rather than at the last one, where a cosine "
        "schedule leaves nothing of the image; 0: at the last one, as published. The same as @t in "
        "--timestep_respacing",
        least=0,
        most=1_000_000,
        quiet=True,
    ),
    Flag("clip_denoised", True, Role.IMAGES, "clamp the predicted x_0 to [-1, 1] at each step"),
    Flag(
        "eps_scaler",
        1.0,
        Role.IMAGES,
        "b of epsilon scaling, lambda(t) = k t + b; 1 = off. Also one value per step, separated by "
        "commas (first = last, clean step), or 'published' (from the config's table)",
        eps_scaler,
    ),
    Flag("eps_scaler_k", 0.0, Role.IMAGES, "k of epsilon scaling, per respaced step"),
    Flag(
        "eps_schedule",
        "",
        Role.INPUT,
        "a YAML with lambda(t), instead of --eps_scaler; scripts/calibrate_eps.py makes one",
    ),
    Flag(
        "class_ids",
        "",
        Role.IMAGES,
        "classes to sample if class_cond, such as 0-9 or 3,5, or by name; default: all that the "
        "training images had",
    ),
    Flag(
        "guidance_scale",
        1.0,
        Role.IMAGES,
        "classifier-free guidance: 1 = off, larger = more typical of the class, 0 = without class; "
        "needs a network trained with --class_dropout",
        least=0,
    ),
    Flag(
        "dynamic_threshold",
        0.0,
        Role.IMAGES,
        "of DDPM and DDIM: share of the pixels of x_0 that are within the range to which it is "
        "scaled, usual 0.995; 0: off",
        least=0,
        quiet=True,
    ),
    Flag(
        "solver",
        "",
        Role.IMAGES,
        "how to step: {choices} (ddim as --use_ddim; EDM's for any model); default: ddpm, for "
        "EDM's "
        "models heun",
        choices=lambda: ("", *SOLVERS),
        aliases=("sampler",),
    ),
    *SIGMA,
    Flag(
        "time_shift_window",
        40,
        Role.IMAGES,
        "original steps that time_shift chooses from, half of them on either side of the one meant",
        least=0,
        most=1_000_000,
        solvers="time_shift",
    ),
    Flag(
        "time_shift_cutoff",
        300,
        Role.IMAGES,
        "original step up to which time_shift shifts nothing",
        least=0,
        solvers="time_shift",
    ),
    Flag("batch_size", 16, Role.SPEED, "images per process at a time", least=1, most=1_000_000),
    Flag(
        "precision",
        "",
        Role.ARITHMETIC,
        "number format of the network's arithmetic: fp32, fp16 (GPU) or bf16; default fp32, or "
        "what --use_fp16 says",
        choices=("", "fp32", "fp16", "bf16"),
        quiet=True,
    ),
    Flag(
        "compile",
        False,
        Role.SPEED,
        "call the network through torch.compile, with CUDA graphs on a GPU: minutes before the "
        "first images",
    ),
    Flag("save_png", False, Role.TELLING, "also write each image as PNG"),
    Flag("out_dir", "", Role.PLACE, "where results go; default: samples/ beside the checkpoint"),
)

# image_nll: how likely given images are.
LIKELIHOOD = (
    Flag(
        "data_dir",
        "",
        Role.INPUT,
        "images: a folder, a zip of images, or an npz with arr_0 (and arr_1)",
    ),
    Flag(
        "model_path",
        "",
        Role.INPUT,
        "checkpoint, such as ema_0.9999_100000.pt; its config.yaml is read from beside it",
    ),
    Flag(
        "num_samples",
        1000,
        Role.INPUT,
        "images to evaluate, over all processes",
        least=1,
        most=100_000_000,
    ),
    Flag("seed", 0, Role.IMAGES, "seed of the noise", least=0, most=2**63 - 1),
    Flag("clip_denoised", True, Role.IMAGES, "clamp the predicted x_0 to [-1, 1] at each step"),
    RESPACING,
    Flag("batch_size", 1, Role.SPEED, "images per process at a time", least=1, most=1_000_000),
    Flag("out_dir", "", Role.PLACE, "where results go; default: nll/ beside the checkpoint"),
)

# Measuring and calibrating exposure bias; the sampler's flags are those of section sample.
MEASURED_IMAGES = (
    Flag(
        "data_dir",
        "",
        Role.INPUT,
        "real images: a folder, a zip of images, or an npz with arr_0 (and arr_1)",
    ),
    Flag(
        "num_images",
        500,
        Role.INPUT,
        "real images, evenly spread over the set, and as many chains, over all processes",
        least=2,
        most=100_000_000,
    ),
)
