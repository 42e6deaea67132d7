"""The benchmark's command line: the flags of a training, some of a sampling, and its own."""

from __future__ import annotations

from guided_diffusion_ip.settings.flag import Flag, Role
from guided_diffusion_ip.settings.flags import SCRIPTS, SECTIONS, TRAIN_RESPACING, Script

NAME = "benchmark"
# Of the flags of a training, those that change how long a step takes, or on what.
_OF_TRAINING = (
    "data_dir",
    "batch_size",
    "microbatch",
    "lr",
    "weight_decay",
    "compile",
    "schedule_sampler",
    "ema_rate",
    "num_workers",
    "seed",
)
_OWN = (
    TRAIN_RESPACING,
    Flag("use_ddim", False, Role.TELLING, "sample by DDIM instead of DDPM"),
    Flag("eta", 0.0, Role.TELLING, "DDIM's noise: 0 deterministic, 1 that of DDPM", least=0),
    Flag(
        "what",
        "train,sample",
        Role.TELLING,
        "what to measure, separated by commas: train, sample, optimizer, gather, loader, startup",
    ),
    Flag(
        "baseline",
        False,
        Role.TELLING,
        "also measure the published way of each, in turn with ours, and say the ratio",
    ),
    Flag("precision", "fp32", Role.TELLING, "number format", choices=("fp32", "bf16", "fp16")),
    Flag(
        "device",
        "auto",
        Role.TELLING,
        "auto: a GPU if there is one",
        choices=("auto", "cpu", "cuda"),
    ),
    Flag("threads", 0, Role.TELLING, "CPU threads; 0: PyTorch's choice", least=0),
    Flag("repeats", 15, Role.TELLING, "timed repeats of each thing", least=1),
    Flag(
        "matrix_size",
        4096,
        Role.TELLING,
        "side of the matrices that the machine's rate is measured with",
        least=1,
    ),
    Flag("json", "", Role.PLACE, "also write every number to this file"),
)
BENCHMARK = Script(
    ("model", "diffusion", "train"),
    _OWN,
    without=(
        "use_fp16",  # --precision
        *(flag.name for flag in SECTIONS["train"] if flag.name not in _OF_TRAINING),
    ),
    defaults={"batch_size": 16},
)
SCRIPTS[NAME] = BENCHMARK  # where `parse` looks for it
