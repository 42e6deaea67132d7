"""The flags of training."""

from __future__ import annotations

from ..metrics.registry import METRIC_NAMES
from .flag import Flag, Role

STOPPING = (
    Flag("max_steps", 0, Role.LENGTH, "stop after so many steps; 0: no limit", least=0),
    Flag(
        "max_images",
        0,
        Role.LENGTH,
        "stop after so many images, over all processes; 0: no limit",
        least=0,
    ),
    Flag(
        "max_hours",
        0.0,
        Role.LENGTH,
        "stop, saving first, after so many hours of this process; 0: no limit",
        least=0,
        most=1_000_000,
    ),
    Flag(
        "max_skipped",
        25,
        Role.LENGTH,
        "give up after so many steps in a row without finite gradients",
        least=1,
    ),
)

SAVING = (
    Flag("save_interval", 10000, Role.LENGTH, "steps between checkpoints", least=1),
    Flag(
        "save_minutes",
        0.0,
        Role.LENGTH,
        "also save when the last checkpoint is so many minutes old; 0: no",
        least=0,
    ),
    Flag("keep_last", 0, Role.LENGTH, "keep the newest so many checkpoints; 0: all", least=0),
    Flag(
        "keep_every",
        0,
        Role.LENGTH,
        "keep those at multiples of so many steps in any case; 0: none",
        least=0,
    ),
    Flag(
        "resume",
        "",
        Role.START,
        "a run's folder, or a checkpoint's weights in it: continue with that run's own settings, "
        "but for flags that are given; or auto: from the newest checkpoint in --out_dir, if "
        "there is one",
    ),
    Flag(
        "resume_checkpoint",
        "",
        Role.START,
        "a modelNNNNNN.pt to continue from, with its ema, opt and state files beside it",
    ),
    Flag(
        "init_from",
        "",
        Role.START,
        "start at step 0 from the weights in this file (published checkpoints too)",
    ),
    Flag(
        "overwrite",
        False,
        Role.PLACE,
        "begin a new run in a folder that holds one: its config.yaml and progress files are "
        "replaced, its checkpoints stay, with their own settings, until the new run comes to "
        "their steps",
        saved=False,
    ),
)

# Of image_train and super_res_train; the classifier's script has a validation of its own.
EVALUATING = (
    Flag(
        "eval_interval",
        0,
        Role.TELLING,
        "steps between evaluations of samples from the averaged weights; 0: none",
        least=0,
    ),
    Flag("eval_samples", 1000, Role.TELLING, "images in an evaluation", least=4, most=100_000_000),
    Flag(
        "eval_ref",
        "",
        Role.TELLING,
        "what they are compared with: a reference for evaluations/evaluator.py; default: the "
        "training images",
    ),
    Flag(
        "eval_features",
        "inception",
        Role.TELLING,
        "feature space of evaluations: inception, pixels, or a FILE.onnx",
    ),
    Flag(
        "eval_metrics",
        "fid",
        Role.TELLING,
        f"what evaluations compute, separated by commas: {METRIC_NAMES}",
    ),
    Flag("eval_respacing", "50", Role.TELLING, "timestep_respacing of evaluations"),
    Flag(
        "inception_weights",
        "",
        Role.TELLING,
        "Inception's weights, for --eval_features inception; see evaluations/README.md",
    ),
)

TRAIN = (
    Flag(
        "data_dir",
        "",
        Role.INPUT,
        "training images: a folder, a zip of images, or an npz with arr_0 (and arr_1)",
    ),
    Flag("batch_size", 1, Role.TRAINING, "images per process and step", least=1, most=1_000_000),
    Flag(
        "global_batch_size",
        0,
        Role.TRAINING,
        "images per step over all processes, instead of batch_size; the same for any number of "
        "them",
        least=0,
        most=10_000_000,
    ),
    Flag(
        "microbatch",
        -1,
        Role.TRAINING,
        "images per forward pass; -1: the whole batch. The gradient is that of the batch",
    ),
    Flag("lr", 1e-4, Role.TRAINING, "learning rate of AdamW", least=0, most=1_000),
    Flag("weight_decay", 0.0, Role.TRAINING, "weight decay of AdamW", least=0, most=1_000),
    Flag(
        "lr_warmup_steps",
        0,
        Role.TRAINING,
        "raise lr linearly from 0 over so many steps; 0: no",
        least=0,
    ),
    Flag(
        "lr_anneal_steps",
        0,
        Role.TRAINING,
        "lower lr linearly to 0 over so many steps, then stop; 0: constant",
        least=0,
    ),
    Flag(
        "grad_clip",
        0.0,
        Role.TRAINING,
        "scale gradients down to this norm where theirs is larger; 0: no",
        least=0,
    ),
    Flag(
        "precision",
        "",
        Role.TRAINING,
        "number format of the network's arithmetic: fp32, fp16 (V100) or bf16; weights stay "
        "fp32. Default fp32",
        choices=("", "fp32", "fp16", "bf16"),
    ),
    Flag(
        "compile",
        False,
        Role.SPEED,
        "call the network through torch.compile: minutes before the first step; meant for GPUs",
    ),
    *STOPPING,
    Flag(
        "schedule_sampler",
        "uniform",
        Role.LOSS,
        "how t is drawn",
        choices=("uniform", "loss-second-moment"),
    ),
    Flag(
        "ema_rate",
        "0.9999",
        Role.LOSS,
        "decay of the averaged weights; several separated by commas",
        type=str,
    ),
    Flag(
        "ema_warmup",
        False,
        Role.LOSS,
        "averaged weights forget their random start early: rate min(ema_rate, (1 + n) / (10 + n))",
    ),
    Flag("log_interval", 100, Role.TELLING, "steps between log lines", least=1),
    *SAVING,
    Flag(
        "sample_interval",
        0,
        Role.TELLING,
        "steps between sample grids from the averaged weights; 0: none",
        least=0,
    ),
    Flag("sample_count", 64, Role.TELLING, "images in a sample grid", least=1, most=1_000_000),
    Flag("sample_respacing", "50", Role.TELLING, "timestep_respacing of the sample grids"),
    *EVALUATING,
    Flag(
        "fp16_scale_growth",
        1e-3,
        Role.TRAINING,
        "growth of log2(loss scale) per step when training in fp16",
    ),
    Flag(
        "class_dropout",
        0.0,
        Role.LOSS,
        "share of the labels that are replaced by 'no class', for --guidance_scale; usual 0.1 to "
        "0.2",
        least=0,
        most=1,
    ),
    Flag("random_flip", True, Role.TRAINING, "mirror images at random"),
    Flag("random_crop", False, Role.TRAINING, "crop at random instead of the centre"),
    Flag(
        "num_workers",
        -1,
        Role.SPEED,
        "processes that decode images; -1: chosen by the number of cores",
    ),
    Flag(
        "cache_mb",
        512,
        Role.SPEED,
        "sets that fit in so many MB (as uint8) are decoded once and kept in memory",
        least=0,
    ),
    Flag("seed", 0, Role.LOSS, "seed of everything that is drawn", least=0, most=2**63 - 1),
    Flag("out_dir", "", Role.PLACE, "where results go; default: runs/<time>-<name>"),
)
