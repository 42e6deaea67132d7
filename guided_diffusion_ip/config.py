"""Every flag, once: name, default, meaning; which script takes it; how YAML files and the command line fill it in.

Default < config file < command line. A YAML file has the sections of SECTIONS, plus `paper` (published numbers: for people
and tables, and for `--eps_scaler published`). A script reads only its own sections; a key that is not a flag of the section
is an error that names the nearest one. What a run used is saved beside its results as config.yaml in the same form.

argparse and PyYAML do the parsing. (jsonargparse was tried on paper: flat published flags with two spellings over nested
sections, of which a script sees only some, would have needed as much code around it.)
"""
from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml


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
        raise argparse.ArgumentTypeError(f"expected a size such as 64, or HEIGHTxWIDTH such as 64x96, got {v!r}")
    sizes = [int(p) for p in parts]
    return sizes[0] if len(set(sizes)) == 1 else "x".join(map(str, sizes))


def eps_scaler(v: str | float | Sequence[float]) -> float | list[float] | str:
    """A number, a comma-separated list with one number per step (index 0 = last, clean step), or "published"."""
    if v == "published":
        return v
    parts = v.split(",") if isinstance(v, str) else v if isinstance(v, (list, tuple)) else [v]
    try:
        values = [float(p) for p in parts]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"expected a number, numbers separated by commas, or 'published', got {v!r}") from None
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
        """`value`, from YAML or the command line, as this flag's type; ArgumentTypeError if it cannot be."""
        kind = self.type or (str2bool if isinstance(self.default, bool) else type(self.default))
        try:
            if value is None:
                raise ValueError
            if kind is int and isinstance(value, float) and value != int(value):
                raise ValueError
            result = kind(value)
        except (TypeError, ValueError):
            name = {int: "a whole number", float: "a number", str: "text"}.get(kind, getattr(kind, "__doc__", ""))
            raise argparse.ArgumentTypeError(f"expected {name}, got {value!r}") from None
        if self.choices and result not in self.choices:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(map(str, self.choices))}, got {value!r}")
        if self.least is not None and result < self.least:
            raise argparse.ArgumentTypeError(f"must be at least {self.least:g}, got {value!r}")
        return result


_MODEL = (
    Flag("image_size", 64, "size of the images: 64, or HEIGHTxWIDTH", image_size),
    Flag("in_channels", 3, "channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA)", choices=(1, 3, 4)),
    Flag("num_channels", 128, "channels of the first level", least=1),
    Flag("num_res_blocks", 2, "residual blocks per level", least=1),
    Flag("channel_mult", "", "channels of each level as multiples of num_channels, such as 1,2,2,2; derived if empty"),
    Flag("num_heads", 4, "attention heads (unless num_head_channels is given)"),
    Flag("num_head_channels", -1, "channels per attention head; -1: use num_heads"),
    Flag("num_heads_upsample", -1, "heads in the upsampling half; -1: num_heads"),
    Flag("attention_resolutions", "16,8", "sizes of the feature maps that get attention (shorter side)"),
    Flag("dropout", 0.0, "dropout in the residual blocks", least=0),
    Flag("class_cond", False, "condition on class labels"),
    Flag("num_classes", 1000, "number of classes if class_cond", least=1),
    Flag("learn_sigma", False, "predict the variance too"),
    Flag("use_scale_shift_norm", True, "timestep embedding as scale and shift after the norm, instead of a sum"),
    Flag("resblock_updown", False, "residual blocks change the resolution, instead of plain convolutions"),
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
    Flag("rescale_learned_sigmas", False, "weigh the variational bound by T / 1000 when the variance is learned"),
    Flag("input_perturbation", 0.0, "gamma of input perturbation: training only, 0 = off, published 0.1 to 0.15",
         aliases=("input_pertub",)),
    Flag("loss_weight", "uniform", "weight of each timestep in the loss", choices=("uniform",)),
)

_RESPACING = Flag("timestep_respacing", "", "fewer sampling steps: N, a,b,c or ddimN; empty: all T")

_TRAIN = (
    Flag("data_dir", "", "training images: a folder, a zip of images, or an npz with arr_0 (and arr_1)"),
    Flag("batch_size", 1, "images per process and step", least=1),
    Flag("microbatch", -1, "images per forward pass; -1: the whole batch. The gradient is that of the batch"),
    Flag("lr", 1e-4, "learning rate of AdamW", least=0),
    Flag("weight_decay", 0.0, "weight decay of AdamW", least=0),
    Flag("lr_anneal_steps", 0, "lower lr linearly to 0 over so many steps, then stop; 0: constant", least=0),
    Flag("max_steps", 0, "stop after so many steps; 0: no limit", least=0),
    Flag("schedule_sampler", "uniform", "how t is drawn", choices=("uniform", "loss-second-moment")),
    Flag("ema_rate", "0.9999", "decay of the averaged weights; several separated by commas", type=str),
    Flag("log_interval", 100, "steps between log lines", least=1),
    Flag("save_interval", 10000, "steps between checkpoints", least=1),
    Flag("sample_interval", 0, "steps between sample grids from the averaged weights; 0: none", least=0),
    Flag("sample_count", 64, "images in a sample grid", least=1),
    Flag("sample_respacing", "50", "timestep_respacing of the sample grids"),
    Flag("resume_checkpoint", "", "a modelNNNNNN.pt to continue from, with its ema and opt files beside it"),
    Flag("fp16_scale_growth", 1e-3, "growth of log2(loss scale) per step when training in fp16"),
    Flag("random_flip", True, "mirror images at random"),
    Flag("random_crop", False, "crop at random instead of the centre"),
    Flag("num_workers", -1, "processes that decode images; -1: chosen by the number of cores"),
    Flag("cache_mb", 512, "sets that fit in so many MB (as uint8) are decoded once and kept in memory", least=0),
    Flag("seed", 0, "seed of everything that is drawn", least=0),
    Flag("out_dir", "", "where results go; default: runs/<time>-<name>"),
)

_SAMPLE = (
    Flag("model_path", "", "checkpoint, such as ema_0.9999_100000.pt; its config.yaml is read from beside it"),
    Flag("num_samples", 10000, "images to make", least=1),
    Flag("batch_size", 16, "images per process at a time", least=1),
    Flag("clip_denoised", True, "clamp the predicted x_0 to [-1, 1] at each step"),
    Flag("use_ddim", False, "DDIM instead of DDPM"),
    Flag("eta", 0.0, "DDIM's noise: 0 deterministic, 1 that of DDPM", least=0),
    _RESPACING,
    Flag("eps_scaler", 1.0, "b of epsilon scaling, lambda(t) = k t + b; 1 = off. Also one value per step, separated by "
         "commas (first = last, clean step), or 'published' (from the config's table)", eps_scaler),
    Flag("eps_scaler_k", 0.0, "k of epsilon scaling, per respaced step"),
    Flag("class_ids", "", "classes to sample if class_cond, such as 0-9 or 3,5; default: all"),
    Flag("seed", 0, "image i depends on (seed, i) only", least=0),
    Flag("save_png", False, "also write each image as PNG"),
    Flag("out_dir", "", "where results go; default: samples/ beside the checkpoint"),
)

SECTIONS: dict[str, tuple[Flag, ...]] = {
    "model": _MODEL, "diffusion": _DIFFUSION, "train": _TRAIN, "sample": _SAMPLE, "evaluate": ()}

# Flags that change training or speed but not what a trained checkpoint is: sampling may be told anything.
NOT_ARCHITECTURE = {"dropout", "use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "input_perturbation",
                    "loss_weight"}


@dataclass(frozen=True)
class Script:
    """What a script reads: whole sections, and single flags that belong to another one but are asked for explicitly."""

    sections: tuple[str, ...]
    extra: tuple[Flag, ...] = ()

    def flags(self) -> list[Flag]:
        return [flag for section in self.sections for flag in SECTIONS[section]] + list(self.extra)


SCRIPTS = {
    # Training on respaced steps only happens by an explicit flag, never through a config's sampling section.
    "image_train": Script(("model", "diffusion", "train"), (_RESPACING,)),
    "image_sample": Script(("model", "diffusion", "sample")),
}


@dataclass
class Config:
    """The merged settings of one run; `cfg.batch_size` reads a flag."""

    script: str
    values: dict[str, Any]
    given: dict[str, str] = field(default_factory=dict)  # flag -> where it was set, for messages
    paper: dict[str, Any] = field(default_factory=dict)
    config_path: str = ""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def section(self, name: str) -> dict[str, Any]:
        """The flags of one section and their values."""
        return {flag.name: self.values[flag.name] for flag in SECTIONS[name] if flag.name in self.values}

    def as_yaml(self) -> str:
        """The merged settings, in the form that --config reads."""
        script = SCRIPTS[self.script]
        sections = {name: self.section(name) for name in script.sections}
        if self.paper:
            sections["paper"] = self.paper
        return yaml.safe_dump(sections, sort_keys=False)


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?', or '' if nothing is like it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def read_yaml(path: str) -> dict[str, dict[str, Any]]:
    """A config file as {section: {key: value}}.

    Raises:
        ValueError: missing, not YAML, or with sections that are unknown.
    """
    if not os.path.isfile(path):
        raise ValueError(f"config file {path} does not exist; configs/ holds the published settings")
    with open(path, encoding="utf-8") as file:
        try:
            content = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected the sections {', '.join(SECTIONS)}, found {type(content).__name__}")
    for section, keys in content.items():
        if section not in (*SECTIONS, "paper"):
            raise ValueError(f"{path}: unknown section {section!r}; allowed: {', '.join([*SECTIONS, 'paper'])}."
                             + nearest(str(section), SECTIONS))
        if keys is not None and not isinstance(keys, dict):
            raise ValueError(f"{path}: section {section} must hold 'key: value' lines")
    return {section: keys or {} for section, keys in content.items()}


def values_from_yaml(content: dict[str, dict[str, Any]], sections: Iterable[str], path: str) -> dict[str, Any]:
    """The values of some sections, converted and checked: {flag name: value}."""
    values: dict[str, Any] = {}
    for section in sections:
        flags = {name: flag for flag in SECTIONS[section] for name in (flag.name, *flag.aliases)}
        for key, raw in content.get(section, {}).items():
            if key not in flags:
                raise ValueError(f"{path}: unknown key {key!r} in section {section}." + nearest(str(key), flags))
            flag = flags[key]
            try:
                value = flag.convert(raw)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{path}: {section}.{key}: {error}") from None
            if flag.name in values and values[flag.name] != value:
                raise ValueError(f"{path}: {key} and another spelling of it have different values: keep one")
            values[flag.name] = value
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


class _Store(argparse.Action):
    """Keeps what was given on the command line, and refuses two spellings of one flag with different values."""

    def __call__(self, parser, namespace, value, option_string=None):
        earlier = namespace.given.get(self.dest)
        if earlier and earlier[0] != option_string and earlier[1] != value:
            raise ValueError(f"{earlier[0]} {earlier[1]} and {option_string} {value} are two spellings of the same flag "
                             "with different values: give one")
        namespace.given[self.dest] = (option_string, value)


def make_parser(script: str, description: str) -> argparse.ArgumentParser:
    """The command line of a script: all its flags, none of them required."""
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="", metavar="FILE", help="YAML file with settings; flags override it")
    for flag in SCRIPTS[script].flags():
        names = [f"--{name}" for name in (flag.name, *flag.aliases)]
        is_bool = isinstance(flag.default, bool)
        default = "''" if flag.default == "" else flag.default
        parser.add_argument(
            *names, dest=flag.name, action=_Store, type=flag.convert, metavar="BOOL" if is_bool else "X",
            nargs="?" if is_bool else None, const=True if is_bool else None, default=argparse.SUPPRESS,
            help=f"{flag.help} (default {default})".replace("%", "%%"))
    return parser


def parse(script: str, description: str, argv: Sequence[str] | None = None) -> Config:
    """The merged settings of a script: defaults < --config FILE < command line.

    Raises:
        ValueError: an unknown flag, section or key, or a value that its flag does not take.
    """
    parser = make_parser(script, description)
    namespace = argparse.Namespace(given={})
    namespace, unknown = parser.parse_known_args(argv, namespace)
    known = [name for action in parser._actions for name in action.option_strings]
    if unknown:
        word = unknown[0].split("=")[0]
        raise ValueError(f"unknown argument {word}." + nearest(word, known) + " (--help lists all)")
    spec = SCRIPTS[script]
    cfg = Config(script, {flag.name: flag.default for flag in spec.flags()})
    if namespace.config:
        content = read_yaml(namespace.config)
        from_file = values_from_yaml(content, spec.sections, namespace.config)
        cfg.values.update(from_file)
        cfg.given.update({name: namespace.config for name in from_file})
        cfg.paper, cfg.config_path = content.get("paper", {}), namespace.config
    for name, (option, value) in namespace.given.items():
        cfg.values[name] = value
        cfg.given[name] = option
    return cfg


def adopt_checkpoint_config(cfg: Config, path: str) -> None:
    """Take model and diffusion from the config.yaml beside a checkpoint.

    Raises:
        ValueError: a flag that was given contradicts the architecture or the process that the checkpoint was trained with.
    """
    content = read_yaml(path)
    trained = values_from_yaml(content, ("model", "diffusion"), path)
    for name, value in trained.items():
        if name in cfg.given and cfg.values[name] != value and name not in NOT_ARCHITECTURE:
            raise ValueError(f"{cfg.given[name]} sets {name} to {cfg.values[name]!r}, but the checkpoint was trained with "
                             f"{name} {value!r} ({path}): leave it out")
        if name not in cfg.given:
            cfg.values[name] = value
    cfg.paper = cfg.paper or content.get("paper", {})


def write_config(cfg: Config, path: str) -> None:
    """Write the merged settings."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(cfg.as_yaml())


def published_lambda(cfg: Config) -> tuple[float, float]:
    """(b, k) of `--eps_scaler published`: the paper's value for this number of DDPM steps, from the config's table.

    Raises:
        ValueError: no table, DDIM, or a number of steps that the table does not have.
    """
    table = cfg.paper.get("eps_scaler", {})
    if not table:
        raise ValueError("--eps_scaler published needs a table of lambdas: give --config with one (section paper, such as "
                         "configs/cifar10.yaml), or a number")
    if cfg.use_ddim:
        raise ValueError("the published lambdas belong to DDPM sampling: give a number with --use_ddim")
    steps = cfg.timestep_respacing or str(cfg.diffusion_steps)
    by_steps = {str(key): value for key, value in table.items()}
    if steps not in by_steps:
        raise ValueError(f"no lambda was published for {steps} steps; there is one for {', '.join(by_steps)} "
                         "(--timestep_respacing), or give a number")
    return float(by_steps[steps]), 0.0


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    homes = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.abspath(sys.argv[0])))
    return os.path.dirname(os.path.abspath(frames[-1].filename)).startswith(homes)


def command(main: Callable[[], Any]) -> NoReturn:
    """Run a script's main: what a user did wrong becomes one line on stderr and exit code 2; bugs keep their traceback.

    A ValueError raised by our own code is addressed to the user; one from a library is a bug of ours.
    GUIDED_DIFFUSION_IP_TRACEBACK=1 shows the traceback in any case.
    """
    # A warning is for the user too: one line, without the place in the code that raised it.
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    try:
        main()
    except (ValueError, OSError) as error:
        ours = isinstance(error, OSError) or _raised_by_us(error)
        if not ours or os.environ.get("GUIDED_DIFFUSION_IP_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
