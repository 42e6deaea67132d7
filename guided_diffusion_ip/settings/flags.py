"""Every flag, once: name, default, meaning, and which script takes it. config.py fills them in."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


def str2bool(v: str | bool) -> bool:
    """yes/no, true/false, y/n, t/f, 1/0, in any case."""
    if isinstance(v, bool):
        return v
    word = str(v).strip().lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {v!r}")


def image_size(v: str | int) -> int | str:
    """64 for square images, or "HEIGHTxWIDTH"."""
    parts = str(v).lower().split("x")
    if len(parts) > 2 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(
            f"expected a size such as 64, or HEIGHTxWIDTH such as 64x96, got {v!r}"
        )
    sizes = [int(p) for p in parts]
    return sizes[0] if len(set(sizes)) == 1 else "x".join(map(str, sizes))


def size_or_none(v: str | int) -> int | str:
    """a size such as 64, or HEIGHTxWIDTH; empty for none"""
    return "" if v == "" else image_size(v)


def eps_scaler(v: str | float | Sequence[float]) -> float | list[float] | str:
    """A number, a comma-separated list with one number per step (index 0 = last, clean step), or
    "published".
    """
    if v == "published":
        return v
    parts = v.split(",") if isinstance(v, str) else v if isinstance(v, (list, tuple)) else [v]
    try:
        values = [float(p) for p in parts]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"expected a number, numbers separated by commas, or 'published', got {v!r}"
        ) from None
    return values[0] if len(values) == 1 else values


@dataclass(frozen=True)
class Flag:
    """One flag. `type` defaults to that of `default`; `least` is the smallest value allowed."""

    name: str
    default: Any
    help: str
    type: Callable[[Any], Any] | None = None
    aliases: tuple[str, ...] = ()
    choices: tuple[Any, ...] | None = None
    least: float | None = None

    def convert(self, value: Any) -> Any:
        """`value`, from YAML or the command line, as this flag's type; ArgumentTypeError if it
        cannot be.
        """
        kind = self.type or (str2bool if isinstance(self.default, bool) else type(self.default))
        try:
            if value is None:
                raise ValueError
            if kind is int and isinstance(value, float) and value != int(value):
                raise ValueError
            result = kind(value)
        except (TypeError, ValueError):
            name = {int: "a whole number", float: "a number", str: "text"}.get(
                kind, getattr(kind, "__doc__", "")
            )
            raise argparse.ArgumentTypeError(f"expected {name}, got {value!r}") from None
        if self.choices and result not in self.choices:
            raise argparse.ArgumentTypeError(
                f"expected one of {', '.join(map(str, self.choices))}, got {value!r}"
            )
        if self.least is not None and result < self.least:
            raise argparse.ArgumentTypeError(f"must be at least {self.least:g}, got {value!r}")
        return result


_MODEL = (
    Flag(
        "framework",
        "adm",
        "whose network and process: adm; edm (networks behind a preconditioning, see section edm "
        "of --help); ddpm (DDPM's U-Net, from diffusers)",
        choices=("adm", "edm", "ddpm"),
    ),
    Flag("image_size", 64, "size of the images: 64, or HEIGHTxWIDTH", image_size),
    Flag(
        "in_channels", 3, "channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA)", choices=(1, 3, 4)
    ),
    Flag("num_channels", 128, "channels of the first level", least=1),
    Flag("num_res_blocks", 2, "residual blocks per level", least=1),
    Flag(
        "channel_mult",
        "",
        "channels of each level as multiples of num_channels, such as 1,2,2,2; derived if empty",
    ),
    Flag("num_heads", 4, "attention heads (unless num_head_channels is given)"),
    Flag("num_head_channels", -1, "channels per attention head; -1: use num_heads"),
    Flag("num_heads_upsample", -1, "heads in the upsampling half; -1: num_heads"),
    Flag(
        "attention_resolutions",
        "16,8",
        "sizes of the feature maps that get attention (shorter side)",
    ),
    Flag("dropout", 0.0, "dropout in the residual blocks", least=0),
    Flag("class_cond", False, "condition on class labels"),
    Flag(
        "num_classes",
        1000,
        "number of classes if class_cond; a training that is not told takes as many as its "
        "images have",
        least=1,
    ),
    Flag(
        "null_class",
        False,
        "one more label, number num_classes, for 'no class'; --class_dropout brings it along",
    ),
    Flag("learn_sigma", False, "predict the variance too"),
    Flag(
        "use_scale_shift_norm",
        True,
        "timestep embedding as scale and shift after the norm, instead of a sum",
    ),
    Flag(
        "resblock_updown",
        False,
        "residual blocks change the resolution, instead of plain convolutions",
    ),
    Flag("use_new_attention_order", False, "channel order of q, k, v in the attention weights"),
    Flag("use_checkpoint", False, "gradient checkpointing: less memory, more time"),
    Flag("use_fp16", False, "half precision"),
)

_DIFFUSION = (
    Flag("diffusion_steps", 1000, "T, the steps of the process", least=1),
    Flag("noise_schedule", "linear", "linear or cosine", choices=("linear", "cosine")),
    Flag("use_kl", False, "train on the variational bound alone"),
    Flag("predict_xstart", False, "predict x_0 instead of the noise"),
    Flag("rescale_timesteps", False, "hand the network t * 1000 / T"),
    Flag(
        "rescale_learned_sigmas",
        False,
        "weigh the variational bound by T / 1000 when the variance is learned",
    ),
    Flag(
        "input_perturbation",
        0.0,
        "gamma of input perturbation: training only, 0 = off, published 0.1 to 0.15",
        aliases=("input_pertub",),
    ),
    Flag(
        "loss_weighting",
        "uniform",
        "weight of each timestep's MSE: uniform, or by its signal-to-noise ratio; training only",
        choices=("uniform", "debias", "p2", "min_snr"),
        aliases=("loss_weight",),
    ),
    Flag("p2_k", 1.0, "k of --loss_weighting p2, 1 / (k + SNR)^gamma", least=0),
    Flag("p2_gamma", 1.0, "gamma of --loss_weighting p2, published 0.5 and 1", least=0),
    Flag("min_snr_gamma", 5.0, "gamma of --loss_weighting min_snr, min(SNR, gamma) / SNR"),
    Flag(
        "weight_clamp", 0.0, "largest weight that --loss_weighting may give; 0: no limit", least=0
    ),
)

# EDM's networks and their losses; they take sizes, widths, classes, dropout and gamma from sections
# model and diffusion.
_EDM = (
    Flag(
        "precond",
        "edm",
        "preconditioning of the network (Table 1 of the EDM paper)",
        choices=("edm", "vp", "ve", "iddpm"),
    ),
    Flag(
        "edm_network",
        "ddpmpp",
        "ddpmpp, ncsnpp, or adm (as EDM builds it)",
        choices=("ddpmpp", "ncsnpp", "adm"),
    ),
    Flag(
        "augment_dim",
        0,
        "augmentation labels that the network takes; 9 for --augment and EDM's CIFAR-10 "
        "checkpoints",
        least=0,
    ),
    Flag(
        "label_dropout",
        0.0,
        "share of the class labels that EDM's networks drop in training",
        least=0,
    ),
    Flag("sigma_data", 0.5, "standard deviation of the images, for --precond edm"),
    Flag(
        "edm_loss",
        "",
        "noise levels and weights in training: edm, vp or ve; default: what belongs to --precond",
        choices=("", "edm", "vp", "ve"),
    ),
    Flag("P_mean", -1.2, "mean of ln(sigma) in training, for the edm loss"),
    Flag("P_std", 1.2, "standard deviation of ln(sigma) in training, for the edm loss"),
    Flag(
        "augment",
        0.0,
        "probability of each of EDM's augmentations, published 0.12 to 0.15; needs --augment_dim 9",
        least=0,
    ),
)

_RESPACING = Flag("timestep_respacing", "", "fewer sampling steps: N, a,b,c or ddimN; empty: all T")

_CLASSIFIER = (
    Flag("classifier_width", 128, "channels of the classifier's first level", least=1),
    Flag("classifier_depth", 2, "residual blocks per level of the classifier", least=1),
    Flag(
        "classifier_attention_resolutions",
        "32,16,8",
        "sizes of the classifier's feature maps that get attention",
    ),
    Flag(
        "classifier_pool",
        "attention",
        "how the classifier sums up an image",
        choices=("adaptive", "attention", "spatial", "spatial_v2"),
    ),
    Flag("classifier_use_scale_shift_norm", True, "as use_scale_shift_norm, for the classifier"),
    Flag("classifier_resblock_updown", True, "as resblock_updown, for the classifier"),
    Flag("classifier_use_fp16", False, "as use_fp16, for the classifier"),
)

_SUPER_RES = (
    Flag("large_size", 256, "size of the images to make", image_size),
    Flag("small_size", 64, "size of the low-resolution images", image_size),
)

_STOPPING = (
    Flag("max_steps", 0, "stop after so many steps; 0: no limit", least=0),
    Flag("max_images", 0, "stop after so many images, over all processes; 0: no limit", least=0),
    Flag(
        "max_hours",
        0.0,
        "stop, saving first, after so many hours of this process; 0: no limit",
        least=0,
    ),
    Flag(
        "max_skipped", 25, "give up after so many steps in a row without finite gradients", least=1
    ),
)

_SAVING = (
    Flag("save_interval", 10000, "steps between checkpoints", least=1),
    Flag(
        "save_minutes",
        0.0,
        "also save when the last checkpoint is so many minutes old; 0: no",
        least=0,
    ),
    Flag("keep_last", 0, "keep the newest so many checkpoints; 0: all", least=0),
    Flag("keep_every", 0, "keep those at multiples of so many steps in any case; 0: none", least=0),
    Flag(
        "resume",
        "",
        "a run's folder, or a checkpoint's weights in it: continue with that run's own settings, "
        "but for flags that are given; or auto: from the newest checkpoint in --out_dir, if "
        "there is one",
    ),
    Flag(
        "resume_checkpoint",
        "",
        "a modelNNNNNN.pt to continue from, with its ema, opt and state files beside it",
    ),
    Flag(
        "init_from", "", "start at step 0 from the weights in this file (published checkpoints too)"
    ),
    Flag(
        "overwrite",
        False,
        "begin a new run in a folder that holds one: its config.yaml and progress files are "
        "replaced, its checkpoints stay, with their own settings, until the new run comes to "
        "their steps",
    ),
)

# Of image_train and super_res_train; the classifier's script has a validation of its own.
_EVALUATING = (
    Flag(
        "eval_interval",
        0,
        "steps between evaluations of samples from the averaged weights; 0: none",
        least=0,
    ),
    Flag("eval_samples", 1000, "images in an evaluation", least=4),
    Flag(
        "eval_ref",
        "",
        "what they are compared with: a reference for evaluations/evaluator.py; default: the "
        "training images",
    ),
    Flag(
        "eval_features",
        "inception",
        "feature space of evaluations: inception, pixels, or a FILE.onnx",
    ),
    Flag(
        "eval_metrics",
        "fid",
        "what evaluations compute, separated by commas: fid, sfid, is, prec, recall, kid",
    ),
    Flag("eval_respacing", "50", "timestep_respacing of evaluations"),
    Flag(
        "inception_weights",
        "",
        "Inception's weights, for --eval_features inception; see evaluations/README.md",
    ),
)

_TRAIN = (
    Flag(
        "data_dir",
        "",
        "training images: a folder, a zip of images, or an npz with arr_0 (and arr_1)",
    ),
    Flag("batch_size", 1, "images per process and step", least=1),
    Flag(
        "global_batch_size",
        0,
        "images per step over all processes, instead of batch_size; the same for any number of "
        "them",
        least=0,
    ),
    Flag(
        "microbatch",
        -1,
        "images per forward pass; -1: the whole batch. The gradient is that of the batch",
    ),
    Flag("lr", 1e-4, "learning rate of AdamW", least=0),
    Flag("weight_decay", 0.0, "weight decay of AdamW", least=0),
    Flag("lr_warmup_steps", 0, "raise lr linearly from 0 over so many steps; 0: no", least=0),
    Flag(
        "lr_anneal_steps",
        0,
        "lower lr linearly to 0 over so many steps, then stop; 0: constant",
        least=0,
    ),
    Flag(
        "grad_clip", 0.0, "scale gradients down to this norm where theirs is larger; 0: no", least=0
    ),
    Flag(
        "precision",
        "",
        "number format of the network's arithmetic: fp32, fp16 (V100) or bf16; weights stay "
        "fp32. Default fp32",
        choices=("", "fp32", "fp16", "bf16"),
    ),
    Flag(
        "compile",
        False,
        "call the network through torch.compile: minutes before the first step; meant for GPUs",
    ),
    *_STOPPING,
    Flag(
        "schedule_sampler", "uniform", "how t is drawn", choices=("uniform", "loss-second-moment")
    ),
    Flag(
        "ema_rate", "0.9999", "decay of the averaged weights; several separated by commas", type=str
    ),
    Flag(
        "ema_warmup",
        False,
        "averaged weights forget their random start early: rate min(ema_rate, (1 + n) / (10 + n))",
    ),
    Flag("log_interval", 100, "steps between log lines", least=1),
    *_SAVING,
    Flag(
        "sample_interval",
        0,
        "steps between sample grids from the averaged weights; 0: none",
        least=0,
    ),
    Flag("sample_count", 64, "images in a sample grid", least=1),
    Flag("sample_respacing", "50", "timestep_respacing of the sample grids"),
    *_EVALUATING,
    Flag("fp16_scale_growth", 1e-3, "growth of log2(loss scale) per step when training in fp16"),
    Flag(
        "class_dropout",
        0.0,
        "share of the labels that are replaced by 'no class', for --guidance_scale; usual 0.1 to "
        "0.2",
        least=0,
    ),
    Flag("random_flip", True, "mirror images at random"),
    Flag("random_crop", False, "crop at random instead of the centre"),
    Flag("num_workers", -1, "processes that decode images; -1: chosen by the number of cores"),
    Flag(
        "cache_mb",
        512,
        "sets that fit in so many MB (as uint8) are decoded once and kept in memory",
        least=0,
    ),
    Flag("seed", 0, "seed of everything that is drawn", least=0),
    Flag("out_dir", "", "where results go; default: runs/<time>-<name>"),
)

# Sampling along noise levels sigma, for EDM's models and for any other.
_SIGMA_SAMPLING = (
    Flag(
        "sampler",
        "",
        "ddpm, ddim (as --use_ddim), heun or euler (EDM's, for any model); default: ddpm, for "
        "EDM's models heun",
        choices=("", "ddpm", "ddim", "heun", "euler"),
    ),
    Flag("edm_steps", 18, "steps of heun (2 N - 1 network calls) and euler (N calls)", least=1),
    Flag(
        "sigma_min",
        0.0,
        "lowest noise level of heun and euler; 0: 0.002, or what the model was trained for",
        least=0,
    ),
    Flag(
        "sigma_max", 0.0, "highest noise level; 0: 80, or what the model was trained for", least=0
    ),
    Flag("rho", 7.0, "spacing of the noise levels", least=0),
    Flag("S_churn", 0.0, "amount of fresh noise; 0: deterministic", least=0),
    Flag("S_min", 0.0, "lowest noise level that gets fresh noise", least=0),
    Flag("S_max", float("inf"), "highest noise level that gets fresh noise", least=0),
    Flag("S_noise", 1.0, "factor on the fresh noise", least=0),
    Flag(
        "discretization",
        "",
        "noise levels as vp, ve, iddpm or edm have them; default edm",
        choices=("", "vp", "ve", "iddpm", "edm"),
    ),
    Flag(
        "noise_level_schedule",
        "",
        "sigma(t): linear, vp or ve; default linear",
        choices=("", "vp", "ve", "linear"),
    ),
    Flag("noise_level_scaling", "", "s(t): none or vp; default none", choices=("", "vp", "none")),
)

_SAMPLE = (
    *_SIGMA_SAMPLING,
    Flag(
        "model_path",
        "",
        "checkpoint, such as ema_0.9999_100000.pt; its config.yaml is read from beside it",
    ),
    Flag("num_samples", 10000, "images to make", least=1),
    Flag("batch_size", 16, "images per process at a time", least=1),
    Flag("clip_denoised", True, "clamp the predicted x_0 to [-1, 1] at each step"),
    Flag("use_ddim", False, "DDIM instead of DDPM"),
    Flag("eta", 0.0, "DDIM's noise: 0 deterministic, 1 that of DDPM", least=0),
    _RESPACING,
    Flag(
        "eps_scaler",
        1.0,
        "b of epsilon scaling, lambda(t) = k t + b; 1 = off. Also one value per step, separated by "
        "commas (first = last, clean step), or 'published' (from the config's table)",
        eps_scaler,
    ),
    Flag("eps_scaler_k", 0.0, "k of epsilon scaling, per respaced step"),
    Flag(
        "eps_schedule",
        "",
        "a YAML with lambda(t), instead of --eps_scaler; scripts/calibrate_eps.py makes one",
    ),
    Flag(
        "guidance_scale",
        1.0,
        "classifier-free guidance: 1 = off, larger = more typical of the class, 0 = without class; "
        "needs a network trained with --class_dropout",
        least=0,
    ),
    Flag(
        "class_ids",
        "",
        "classes to sample if class_cond, such as 0-9 or 3,5, or by name; default: all that the "
        "training images had",
    ),
    Flag("seed", 0, "image i depends on (seed, i) only", least=0),
    Flag(
        "precision",
        "",
        "number format of the network's arithmetic: fp32, fp16 (GPU) or bf16; default fp32, or "
        "what --use_fp16 says",
        choices=("", "fp32", "fp16", "bf16"),
    ),
    Flag(
        "compile",
        False,
        "call the network through torch.compile, with CUDA graphs on a GPU: minutes before the "
        "first images",
    ),
    Flag("save_png", False, "also write each image as PNG"),
    Flag("out_dir", "", "where results go; default: samples/ beside the checkpoint"),
)

# evaluations/evaluator.py: samples against a reference.
_FEATURES = (
    Flag("features", "inception", "feature space: inception, pixels (tiny images), or a FILE.onnx"),
    Flag(
        "inception_weights",
        "",
        "Inception's weights: torch-fidelity's .pth or ADM's classify_image_graph_def.pb; default: "
        "$GUIDED_DIFFUSION_IP_INCEPTION, or the user's cache",
    ),
    Flag(
        "download",
        False,
        "download Inception's weights (95 MB) into the user's cache if they are nowhere",
    ),
    Flag("batch_size", 64, "images per process at a time", least=1),
    Flag("device", "auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda")),
    Flag(
        "precision",
        "fp32",
        "number format of the feature network; bf16 is faster and changes FID slightly",
        choices=("fp32", "bf16"),
    ),
    Flag(
        "image_size",
        "",
        "scale and crop all images as training does, to this size; default: as they are",
        size_or_none,
    ),
)
_EVALUATE = (
    Flag(
        "ref",
        "",
        "reference: an npz with arr_0 (images), with mu, sigma, mu_s, sigma_s (statistics) or "
        "both; a folder; a zip",
    ),
    Flag("samples", "", "samples: an npz with arr_0 uint8 [N, H, W, 3], a folder, or a zip"),
    Flag(
        "metrics",
        "fid,sfid,is,prec,recall",
        "what to compute, separated by commas: fid, sfid, is, prec, recall, kid",
    ),
    Flag("num_samples", 0, "use the first so many samples; 0: all", least=0),
    *_FEATURES,
    Flag(
        "pr_arithmetic",
        "float32",
        "distances of precision and recall; half imitates the published evaluator's float16, which "
        "makes both a little larger",
        choices=("float32", "float64", "half"),
    ),
    Flag("seed", 0, "of KID's random subsets", least=0),
    Flag("json", "", "also write everything to this file"),
)

# image_nll: how likely given images are.
_LIKELIHOOD = (
    Flag("data_dir", "", "images: a folder, a zip of images, or an npz with arr_0 (and arr_1)"),
    Flag(
        "model_path",
        "",
        "checkpoint, such as ema_0.9999_100000.pt; its config.yaml is read from beside it",
    ),
    Flag("num_samples", 1000, "images to evaluate, over all processes", least=1),
    Flag("batch_size", 1, "images per process at a time", least=1),
    Flag("clip_denoised", True, "clamp the predicted x_0 to [-1, 1] at each step"),
    _RESPACING,
    Flag("seed", 0, "seed of the noise", least=0),
    Flag("out_dir", "", "where results go; default: nll/ beside the checkpoint"),
)

# Measuring and calibrating exposure bias; the sampler's flags are those of section sample.
_MEASURED_IMAGES = (
    Flag(
        "data_dir", "", "real images: a folder, a zip of images, or an npz with arr_0 (and arr_1)"
    ),
    Flag(
        "num_images",
        500,
        "real images, evenly spread over the set, and as many chains, over all processes",
        least=2,
    ),
)
_NOT_MEASURED = (
    "compile",
    "num_samples",
    "class_ids",
    "save_png",
    *(flag.name for flag in _SIGMA_SAMPLING),
)

SECTIONS: dict[str, tuple[Flag, ...]] = {
    "model": _MODEL,
    "classifier": _CLASSIFIER,
    "super_res": _SUPER_RES,
    "edm": _EDM,
    "diffusion": _DIFFUSION,
    "train": _TRAIN,
    "sample": _SAMPLE,
    "evaluate": _EVALUATE,
}

# Flags of the process that its losses alone read.
LOSS_WEIGHT_FLAGS = ("loss_weighting", "p2_k", "p2_gamma", "min_snr_gamma", "weight_clamp")
TRAINING_ONLY = ("use_kl", "rescale_learned_sigmas", "input_perturbation", *LOSS_WEIGHT_FLAGS)
EDM_TRAINING_ONLY = ("edm_loss", "P_mean", "P_std", "augment", "label_dropout")
SIGMA_FLAGS = tuple(
    flag.name for flag in _SIGMA_SAMPLING if flag.name != "sampler"
)  # of heun and euler

# Flags of one start: they are not taken over when a run is continued by --resume FOLDER; NOT_SAVED
# not even into config.yaml.
NOT_SAVED = ("overwrite",)
OF_A_START = ("resume", "resume_checkpoint", "init_from", "out_dir", *NOT_SAVED)
SPEED_ONLY = ("use_checkpoint", "use_fp16", "classifier_use_fp16")

# What names and shapes of weights do not tell, by framework: without a config beside a checkpoint,
# flags or defaults say it.
_PROCESS_NOT_IN_WEIGHTS = (
    "diffusion_steps",
    "noise_schedule",
    "predict_xstart",
    "rescale_timesteps",
)
NOT_IN_WEIGHTS = {
    "adm": (
        "image_size",
        "large_size",
        "small_size",
        "null_class",
        "num_heads",
        "use_new_attention_order",
        *_PROCESS_NOT_IN_WEIGHTS,
    ),
    "edm": ("image_size", "precond", "sigma_data"),
    "ddpm": ("image_size", *_PROCESS_NOT_IN_WEIGHTS),
}

# Flags that change training or speed but not what a trained checkpoint is: sampling may be told
# anything.
NOT_ARCHITECTURE = {"dropout", "use_checkpoint", "use_fp16", *TRAINING_ONLY, *EDM_TRAINING_ONLY}


@dataclass(frozen=True)
class Script:
    """What a script reads.

    Args:
        sections: whole sections.
        extra: flags of its own, or of another section that it takes only if asked for explicitly.
        without: flags of its sections that have no meaning for it.
        defaults: where they differ from the flag's own.
        positional: flags that may also be given without their name, in this order.
    """

    sections: tuple[str, ...]
    extra: tuple[Flag, ...] = ()
    without: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    positional: tuple[str, ...] = ()

    def flags(self) -> list[Flag]:
        return [flag for section in self.sections for flag in self.of_section(section)] + list(
            self.extra
        )

    def of_section(self, section: str) -> list[Flag]:
        """The flags of one section, with this script's defaults."""
        return [
            replace(flag, default=self.defaults.get(flag.name, flag.default))
            for flag in SECTIONS[section]
            if flag.name not in self.without
        ]


_NOT_FOR_CLASSIFIERS = (
    "framework",
    "lr_warmup_steps",
    "grad_clip",
    "compile",
    "num_channels",
    "num_res_blocks",
    "channel_mult",
    "num_heads",
    "num_head_channels",
    "num_heads_upsample",
    "attention_resolutions",
    "dropout",
    "class_cond",
    "null_class",
    "use_scale_shift_norm",
    "resblock_updown",
    "use_new_attention_order",
    "use_checkpoint",
    "use_fp16",
    "class_dropout",
    *LOSS_WEIGHT_FLAGS,
)

SCRIPTS = {
    # Training on respaced steps only happens by an explicit flag, never through a config's sampling
    # section.
    "image_train": Script(("model", "edm", "diffusion", "train"), (_RESPACING,)),
    "image_sample": Script(("model", "edm", "diffusion", "sample")),
    "image_nll": Script(("model", "diffusion"), _LIKELIHOOD),
    "evaluator": Script(("evaluate",), positional=("ref", "samples")),
    "make_reference": Script(
        (),
        (
            Flag("data", "", "images: a folder, a zip, or an npz with arr_0"),
            Flag("out", "", "the npz to write"),
            *_FEATURES,
            Flag(
                "keep_images",
                0,
                "also store the first so many images as arr_0, for precision and recall; -1: all",
                least=-1,
            ),
        ),
        positional=("data",),
    ),
    "npz_to_png": Script(
        (),
        (
            Flag("data", "", "an npz with arr_0, or a folder or zip of images"),
            Flag(
                "out",
                "",
                "what to write: a folder of pictures, one NAME.png with a grid, or NAME.npz",
            ),
            Flag("count", 0, "only the first so many images; 0: all", least=0),
            Flag(
                "image_size",
                "",
                "scale and crop all images as training does, to this size; default: as they are",
                size_or_none,
            ),
            Flag(
                "channels",
                0,
                "of NAME.npz: 1 (grey), 3 or 4; 0: 1 if the first pictures are grey, else 3",
                choices=(0, 1, 3, 4),
            ),
            Flag(
                "classes",
                True,
                "pictures of labelled images go to a folder per class, and NAME.npz gets their "
                "labels",
            ),
            Flag("overwrite", False, "replace a file that is there"),
        ),
        positional=("data",),
    ),
    "convert_checkpoint": Script(
        (),
        (
            Flag(
                "source",
                "",
                "what to convert: EDM's .pkl, a .pt of this library, a .safetensors, or a "
                "checkpoint of DDIM's code",
            ),
            Flag(
                "out",
                "",
                "what to write: NAME.safetensors for a .pt, else a folder for a .pt and its "
                "config.yaml",
            ),
            Flag(
                "image_size",
                "",
                "of a DDIM checkpoint, if it does not attend at 16 pixels",
                size_or_none,
            ),
            Flag("overwrite", False, "replace files that are there"),
        ),
        positional=("source", "out"),
    ),
    "classifier_train": Script(
        ("model", "classifier", "diffusion", "train"),
        (
            _RESPACING,
            Flag("val_data_dir", "", "images for validation; none if empty"),
            Flag("noised", True, "train on noised images, as guidance needs it"),
            Flag("iterations", 150000, "updates", least=1),
            Flag("anneal_lr", False, "lower lr linearly to 0 over the iterations"),
            Flag("eval_interval", 5, "steps between validations", least=1),
        ),
        _NOT_FOR_CLASSIFIERS
        + (
            "lr_anneal_steps",
            "max_steps",
            "sample_interval",
            "sample_count",
            "sample_respacing",
            "fp16_scale_growth",
            *(flag.name for flag in _EVALUATING),
        ),
        {"lr": 3e-4, "batch_size": 4, "log_interval": 10, "ema_rate": ""},
    ),
    "classifier_sample": Script(
        ("model", "classifier", "diffusion", "sample"),
        (
            Flag(
                "classifier_path",
                "",
                "checkpoint of the classifier; its config.yaml is read from beside it",
            ),
            Flag("classifier_scale", 1.0, "guidance scale", least=0),
        ),
        ("framework", *SIGMA_FLAGS),
    ),
    "super_res_train": Script(
        ("model", "super_res", "diffusion", "train"),
        (_RESPACING,),
        ("framework", "image_size"),
        {"log_interval": 10},
    ),
    "super_res_sample": Script(
        ("model", "super_res", "diffusion", "sample"),
        (
            Flag(
                "base_samples",
                "",
                "low-resolution images: an npz with arr_0 (and arr_1), a folder, or a zip",
            ),
            Flag(
                "resize_base",
                False,
                "scale and crop low-resolution images of another size, instead of refusing them",
            ),
        ),
        ("framework", "image_size", *SIGMA_FLAGS),
    ),
    "sweep": Script(
        (),
        (
            Flag("sweep", "", "YAML file that describes the grid; see docs/sweep.md"),
            Flag("out_dir", "", "where results go; default: runs/sweep-NAME"),
            Flag("processes", 1, "cells that are computed at the same time", least=1),
            Flag(
                "launcher",
                "",
                "words before the programs of a cell, such as 'torchrun --standalone "
                "--nproc_per_node 2'",
            ),
        ),
        positional=("sweep",),
    ),
    "exposure_bias": Script(
        ("model", "diffusion", "sample"),
        (
            *_MEASURED_IMAGES,
            Flag(
                "measures",
                "norm,delta,variance,prediction,accumulation",
                "what to measure, separated by commas: norm, delta, "
                "variance, prediction, accumulation",
            ),
            Flag(
                "accumulation_steps",
                "",
                "the K of error accumulation, separated by commas; default: four up to all steps",
            ),
            Flag(
                "features",
                "pixels",
                "feature space of error accumulation: pixels (small images), inception, or a "
                "FILE.onnx",
            ),
            Flag(
                "inception_weights",
                "",
                "Inception's weights, for --features inception; see evaluations/README.md",
            ),
            Flag(
                "plots",
                True,
                "also draw a picture of each measure (needs matplotlib: pip install -e '.[plots]')",
            ),
        ),
        _NOT_MEASURED,
    ),
    "calibrate_eps": Script(
        ("model", "diffusion", "sample"),
        (
            *_MEASURED_IMAGES,
            Flag(
                "by",
                "norm",
                "what lambda(t) has to bring back to its value on training inputs: the norm of "
                "epsilon, or the variance of x_t",
                choices=("norm", "variance"),
            ),
            Flag("out", "", "the YAML to write; default: eps_schedule-... beside the checkpoint"),
        ),
        (*_NOT_MEASURED, "eps_scaler", "eps_scaler_k", "eps_schedule", "out_dir"),
    ),
}
