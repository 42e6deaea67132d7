"""The benchmark's command line: the flags of a training, some of a sampling, and its own."""

from __future__ import annotations

from guided_diffusion_ip.settings.flags import SCRIPTS, SECTIONS, Flag, Script

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
    *(flag for flag in SECTIONS["sample"] if flag.name == "timestep_respacing"),
    Flag("use_ddim", False, "sample by DDIM instead of DDPM"),
    Flag("eta", 0.0, "DDIM's noise: 0 deterministic, 1 that of DDPM", least=0),
    Flag(
        "what",
        "train,sample",
        "what to measure, separated by commas: train, sample, optimizer, gather, loader, startup",
    ),
    Flag(
        "baseline",
        False,
        "also measure the published way of each, in turn with ours, and say the ratio",
    ),
    Flag("precision", "fp32", "number format", choices=("fp32", "bf16", "fp16")),
    Flag("device", "auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda")),
    Flag("threads", 0, "CPU threads; 0: PyTorch's choice", least=0),
    Flag("repeats", 15, "timed repeats of each thing", least=1),
    Flag(
        "matrix_size",
        4096,
        "side of the matrices that the machine's rate is measured with",
        least=1,
    ),
    Flag("json", "", "also write every number to this file"),
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
