"""How YAML files and the command line fill in the flags (flags.py), and how scripts end.

Default < config file < command line. A YAML file has the sections of SECTIONS, one named after a
script for the flags that only it has, `paper` (published numbers: for people and tables, and for
`--eps_scaler published`) and, in the config.yaml of a training run, `data` (how its images were
prepared, and their classes). A script reads only its own sections; a key that is not a flag of the
section is an error that names the nearest one. What a run used is saved beside its results as
config.yaml in the same form, and in the state file of each checkpoint, which is what counts if
config.yaml is of another run.

argparse and PyYAML do the parsing. (jsonargparse was tried on paper: flat published flags with two
spellings over nested sections, of which a script sees only some, would have needed as much code
around it.)
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import yaml

from .. import dist_util, files
from ..training import checkpoint
from .flags import (
    DESCRIBING,
    NOT_ARCHITECTURE,
    NOT_IN_WEIGHTS,
    OF_A_START,
    SCRIPTS,
    SECTIONS,
    SPEED_ONLY,
    TRAINING_ONLY,
)

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass
class Config:
    """The merged settings of one run; `cfg.batch_size` reads a flag."""

    script: str
    values: dict[str, Any]
    given: dict[str, str] = field(default_factory=dict)  # flag -> where it was set, for messages
    paper: dict[str, Any] = field(default_factory=dict)
    config_path: str = ""
    trained_on: str = (
        ""  # how the training images were prepared, from the config.yaml beside a checkpoint
    )
    classes: list[str] = field(
        default_factory=list
    )  # of the training images, likewise; label k is classes[k]
    adopted: str = ""  # where the settings of model_path come from
    notes: list[str] = field(default_factory=list)  # what the user should know about them

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def with_values(self, **values: Any) -> Config:
        """A copy in which these flags have other values; the original stays as it is."""
        return replace(self, values={**self.values, **values})

    def section(self, name: str) -> dict[str, Any]:
        """The flags of one section and their values."""
        return {flag.name: self.values[flag.name] for flag in SCRIPTS[self.script].of_section(name)}

    def sampling_process(self) -> dict[str, Any]:
        """Section diffusion without what the training losses alone read, and could refuse or warn
        about.
        """
        return {
            name: value
            for name, value in self.section("diffusion").items()
            if name not in TRAINING_ONLY
        }

    def sections(self) -> dict[str, dict[str, Any]]:
        """The merged settings by section; the script's own flags under its name."""
        script = SCRIPTS[self.script]
        edm = self.values.get("framework") == "edm"  # of no interest to the others
        sections = {name: self.section(name) for name in script.sections if name != "edm" or edm}
        if script.extra:
            sections[self.script] = {flag.name: self.values[flag.name] for flag in script.extra}
        saved = {flag.name for flag in script.flags() if flag.saved}
        return {
            section: {name: value for name, value in values.items() if name in saved}
            for section, values in sections.items()
        }

    def as_yaml(self) -> str:
        """The merged settings, in the form that --config reads."""
        sections = self.sections()
        if sections.get("model", {}).get("class_cond") is False:
            del sections["model"][
                "num_classes"
            ]  # says nothing, and would count as given where the file is a --config
        if data := {
            name: value
            for name, value in (("preprocessing", self.trained_on), ("classes", self.classes))
            if value
        }:
            sections["data"] = data
        if self.paper:
            sections["paper"] = self.paper
        return yaml.safe_dump(sections, sort_keys=False)

    def notes_on_origin(self) -> list[str]:
        """What the user should know about where the settings of model_path come from: from another
        place than usual, or, where neither a file beside it nor a flag tells, from the defaults.
        """
        notes = list(self.notes)
        if self.adopted or not self.values.get("model_path"):
            return notes
        known = [
            *self.given,
            *(["num_heads"] if self.values.get("num_head_channels", -1) > 0 else []),
        ]
        assumed = [
            f"{name} {self.values[name]}"
            for name in NOT_IN_WEIGHTS[self.values.get("framework", "adm")]
            if name in self.values
            and name not in known
            and (name != "null_class" or self.class_cond)
        ]
        if assumed:
            notes.append(
                f"note: {self.model_path} does not tell how it was trained, and nothing beside it "
                f"does; assumed: {', '.join(assumed)} (the defaults; give flags or --config where "
                "it was otherwise)"
            )
        return notes


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?', or '' if nothing is like it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def _where_configs_are(path: str) -> str:
    """What to say of the folder configs/ beside this package, '' where there is none (not in a
    clone).
    """
    folder = os.path.join(os.path.dirname(_PACKAGE), "configs")
    same_name = os.path.join(folder, os.path.basename(path))
    if os.path.isfile(same_name):
        return f"; did you mean {same_name}?"
    return f"; {folder} holds the papers' settings" if os.path.isdir(folder) else ""


def read_yaml(path: str) -> dict[str, dict[str, Any]]:
    """A config file, or the config in the header of a .safetensors or in a stateNNNNNN.pt, as
    {section: {key: value}}.

    Raises:
        ValueError: missing, not YAML, or with sections that are unknown.
    """
    if not files.exists(path) or os.path.isdir(path):
        raise ValueError(
            f"config file {path} does not exist (seen from {os.getcwd()}){_where_configs_are(path)}"
        )
    if _is_state(path):
        return checkpoint.saved_settings(checkpoint.read_state(path))
    with files.open_binary(path) as file:
        try:
            content = (
                yaml.safe_load(files.safetensors_config(path) if _is_safetensors(path) else file)
                or {}
            )
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected the sections {', '.join(SECTIONS)}, found {type(content).__name__}"
        )
    known = [
        *SECTIONS,
        *(name for name, script in SCRIPTS.items() if script.extra),
        "data",
        "paper",
    ]
    for section, keys in content.items():
        if section not in known:
            raise ValueError(
                f"{path}: unknown section {section!r}; allowed: {', '.join(known)}."
                + nearest(str(section), known)
            )
        if keys is not None and not isinstance(keys, dict):
            raise ValueError(f"{path}: section {section} must hold 'key: value' lines")
    return {section: keys or {} for section, keys in content.items()}


def values_from_yaml(
    content: dict[str, dict[str, Any]],
    sections: Iterable[str],
    path: str,
    ignore: Iterable[str] = (),
) -> dict[str, Any]:
    """The values of some sections, converted and checked: {flag name: value}; those to `ignore` are
    left out.
    """
    values: dict[str, Any] = {}
    for section in sections:
        declared = SECTIONS[section] if section in SECTIONS else SCRIPTS[section].extra
        flags = {name: flag for flag in declared for name in (flag.name, *flag.aliases)}
        for key, raw in content.get(section, {}).items():
            if key not in flags:
                raise ValueError(
                    f"{path}: unknown key {key!r} in section {section}." + nearest(str(key), flags)
                )
            flag = flags[key]
            try:
                value = flag.convert(raw)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{path}: {section}.{key}: {error}") from None
            if flag.name in values and values[flag.name] != value:
                raise ValueError(
                    f"{path}: {key} and another spelling of it have different values: keep one"
                )
            values[flag.name] = value
    return {name: value for name, value in values.items() if name not in ignore}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


class _Store(argparse.Action):
    """Keeps what was given on the command line, and refuses two spellings of one flag with
    different values.
    """

    def __call__(self, parser, namespace, value, option_string=None):
        earlier = namespace.given.get(self.dest)
        if earlier and earlier[0] != option_string and earlier[1] != value:
            raise ValueError(
                f"{earlier[0]} {earlier[1]} and {option_string} {value} are two spellings of the "
                "same flag with different values: give one"
            )
        namespace.given[self.dest] = (option_string, value)


def _take_positional(
    names: Sequence[str], words: list[str], given: dict[str, tuple[str, Any]]
) -> list[str]:
    """Store words that are no flags under `names`, in their order; returns those for which there is
    no name, or all.

    (argparse's own positional arguments cannot be optional and stand between flags.)
    """
    if len(words) > len(names) or any(word.startswith("-") for word in words):
        return [word for word in words if word.startswith("-")] or words[len(names) :]
    free = [name for name in names if name not in given] if len(words) < len(names) else names
    for name, word in zip(free, words):
        if name in given:
            raise ValueError(
                f"{word} stands where {name} is expected, but {given[name][0]} {given[name][1]} "
                "was given too: leave one of them out"
            )
        given[name] = (name.upper(), word)
    return []


def make_parser(script: str, description: str) -> argparse.ArgumentParser:
    """The command line of a script: all its flags, none of them required."""
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", default="", metavar="FILE", help="YAML file with settings; flags override it"
    )
    for flag in SCRIPTS[script].flags():
        names = [f"--{name}" for name in (flag.name, *flag.aliases)]
        is_bool = isinstance(flag.default, bool)
        parser.add_argument(
            *names,
            dest=flag.name,
            action=_Store,
            type=flag.convert,
            metavar="BOOL" if is_bool else "X",
            nargs="?" if is_bool else None,
            const=True if is_bool else None,
            default=argparse.SUPPRESS,
            help=flag.help_text.replace("%", "%%"),
        )
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
    spec = SCRIPTS[script]
    unknown = _take_positional(spec.positional, unknown, namespace.given)
    if unknown:
        word = unknown[0].split("=")[0]
        raise ValueError(f"unknown argument {word}." + nearest(word, known) + " (--help lists all)")
    cfg = Config(script, {flag.name: flag.default for flag in spec.flags()})
    path, ignore = namespace.config, spec.without
    if not path and "train" in spec.sections and "resume" in namespace.given:
        path, ignore = (
            _config_of_run(script, namespace.given["resume"][1]),
            (*spec.without, *OF_A_START),
        )
    if path:
        content = read_yaml(path)
        from_file = values_from_yaml(content, (*spec.sections, script), path, ignore)
        cfg.values.update(from_file)
        cfg.given.update({name: path for name in from_file})
        cfg.paper, cfg.config_path = content.get("paper", {}), path
    for name, (option, value) in namespace.given.items():
        cfg.values[name] = value
        cfg.given[name] = option
    return cfg


def _config_of_run(script: str, resume: str) -> str:
    """Where read_yaml finds the settings of the run that --resume names; '' for auto, and for
    weights that nothing tells about.

    Raises:
        ValueError: there is nothing to be continued, or it is the work of another script.
    """
    if resume in ("", "auto"):
        return ""
    weights = checkpoint.newest(resume) if os.path.isdir(resume) else resume
    if not weights:
        raise ValueError(checkpoint.none_in(resume))
    if not files.exists(weights):
        raise ValueError(
            f"--resume {resume}: there is no such file or folder; give a run's folder, a "
            "modelNNNNNN.pt, or auto"
        )
    path = config_beside(weights)
    content = read_yaml(path) if path else {}
    other = [
        name
        for name in content
        if name != script and name in SCRIPTS and "train" in SCRIPTS[name].sections
    ]
    if other and script not in content:
        raise ValueError(
            f"--resume {resume}: this run was begun by {other[0]}.py, and {script}.py is another "
            f"program: continue it by {other[0]}.py"
        )
    return path


def adopt_checkpoint_config(cfg: Config, path: str) -> None:
    """Take model and diffusion from what belongs to a checkpoint: a `path` of config_beside.

    Raises:
        ValueError: a flag that was given contradicts the architecture or the process that the
            checkpoint was trained with.
    """
    content = read_yaml(path)
    spec = SCRIPTS[cfg.script]
    shared = [name for name in ("model", "super_res", "edm", "diffusion") if name in spec.sections]
    trained = values_from_yaml(content, shared, path, spec.without)
    if not trained.get("class_cond", cfg.values.get("class_cond")):
        trained.pop("num_classes", None)  # says nothing about a network without classes
    _adopt(cfg, trained, path, "checkpoint")
    cfg.adopted = path
    cfg.notes += _note_on_state(path, content)
    cfg.paper = cfg.paper or content.get("paper", {})
    cfg.trained_on = str(content.get("data", {}).get("preprocessing", ""))
    if cfg.values.get("class_cond"):
        cfg.classes = _classes_in(content)


def adopt_classifier_config(cfg: Config, path: str) -> None:
    """Take the classifier from what belongs to its checkpoint; after adopt_checkpoint_config for
    the diffusion model.

    Settings without a section `classifier` belong to something else: nothing is taken from them.

    Raises:
        ValueError: it contradicts a flag that was given, or the diffusion model: other images,
            classes or noise levels.
    """
    content = read_yaml(path)
    if "classifier" not in content:
        return
    _adopt(cfg, values_from_yaml(content, ("classifier",), path), path, "classifier")
    cfg.notes += _note_on_state(path, content)
    both = values_from_yaml(content, ("model", "diffusion"), path)
    if "num_classes" in both and not cfg.class_cond:
        _adopt(cfg, {"num_classes": both["num_classes"]}, path, "classifier")
    for name in (
        "image_size",
        "in_channels",
        "num_classes",
        "diffusion_steps",
        "noise_schedule",
        "rescale_timesteps",
    ):
        if name in both and both[name] != cfg.values[name]:
            raise ValueError(
                f"the classifier was trained with {name} {both[name]!r} ({path}), the diffusion "
                f"model has {name} {cfg.values[name]!r}: guidance needs two that agree in it"
            )
    classes = _classes_in(content)
    if cfg.classes and classes:
        odd = [k for k, (ours, theirs) in enumerate(zip(cfg.classes, classes)) if ours != theirs]
        if odd:
            warnings.warn(
                f"label {odd[0]} is {cfg.classes[odd[0]]!r} for the diffusion model and "
                f"{classes[odd[0]]!r} for the classifier: guidance needs two that mean the same"
            )
    cfg.classes = cfg.classes or classes
    if content.get("classifier_train", {}).get("noised") is False:
        warnings.warn(
            "the classifier was trained on clean images (--noised False), but guidance shows it "
            "noised ones"
        )


def _classes_in(content: dict[str, dict[str, Any]]) -> list[str]:
    """The names of the training images' classes; [] if they are not known."""
    classes = content.get("data", {}).get("classes")
    return [str(name) for name in classes] if isinstance(classes, list) else []


def _adopt(cfg: Config, trained: dict[str, Any], path: str, what: str) -> None:
    """Take over what was not given; what was given must agree, where it belongs to the architecture
    or the process.
    """
    for name, value in trained.items():
        architecture = name.removeprefix("classifier_") not in NOT_ARCHITECTURE
        if name in cfg.given and cfg.values[name] != value and architecture:
            raise ValueError(
                f"{cfg.given[name]} sets {name} to {cfg.values[name]!r}, but the {what} was "
                f"trained with {name} {value!r} ({path}): leave it out"
            )
        if name not in cfg.given:
            cfg.values[name] = value


def config_beside(weights: str) -> str:
    """What read_yaml finds the settings of a checkpoint in: its own header (.safetensors), the
    config.yaml beside it, or the stateNNNNNN.pt that was saved with it if there is no config.yaml
    or it is of another run; '' if none of them is there.

    The file itself is read, for its hash, only if config.yaml does not agree with the state of its
    step.
    """
    if _is_safetensors(weights) and files.safetensors_config(weights):
        return weights
    path = _config_yaml(weights)
    usual = path if files.exists(path) else ""
    states = (checkpoint.saved_settings(state) for _, state in checkpoint.states_near(weights))
    if usual and not any(_differing(read_yaml(usual), saved, usual) for saved in states):
        return usual
    found = checkpoint.state_that_knows(weights) if files.exists(weights) else None
    if (
        found
        and (saved := checkpoint.saved_settings(found[2]))
        and (not usual or _differing(read_yaml(usual), saved, usual))
    ):
        return found[0]
    return usual


def _config_yaml(weights: str) -> str:
    return os.path.join(os.path.dirname(weights), "config.yaml")


def _differing(
    content: dict[str, dict[str, Any]], saved: dict[str, dict[str, Any]], path: str
) -> dict[str, tuple[Any, Any]]:
    """{name: (value in `content`, value in `saved`)} where two settings describe another network,
    process or set of images; {} also if nothing is saved. The sections are given as read_yaml
    returns them.
    """
    if not saved:
        return {}
    here, there = (_description(sections, path) for sections in (content, saved))
    for name in ("preprocessing", "classes"):  # older states do not have them
        if known := saved.get("data", {}).get(name):
            here[name], there[name] = content.get("data", {}).get(name), known
    return {name: (here.get(name), there[name]) for name in there if here.get(name) != there[name]}


def _description(content: dict[str, dict[str, Any]], path: str) -> dict[str, Any]:
    """What a network and its process are: every flag of their sections, and which sections there
    are.
    """
    values = {flag.name: flag.default for section in DESCRIBING for flag in SECTIONS[section]}
    values |= values_from_yaml(content, DESCRIBING, path)
    if "classifier" not in content and not values["class_cond"]:
        del values["num_classes"]  # says nothing about a network without classes
    kinds = {f"section {name}": name in content for name in ("super_res", "classifier")}
    return {name: value for name, value in (values | kinds).items() if name not in SPEED_ONLY}


def _note_on_state(path: str, content: dict[str, dict[str, Any]]) -> list[str]:
    """One line if `content` is not from the config.yaml that lies beside it."""
    usual = _config_yaml(path)
    if not _is_state(path) or not files.exists(usual):
        return []
    odd = [
        f"{name} {saved!r} instead of {here!r}"
        for name, (here, saved) in _differing(read_yaml(usual), content, usual).items()
    ]
    return [
        f"note: {usual} is not of the run that this checkpoint is from; its settings are those "
        f"saved with it in {path}: {', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''}"
    ]


def _is_state(path: str) -> bool:
    return path.endswith(".pt")


def _is_safetensors(path: str) -> bool:
    return path.lower().endswith(".safetensors")


def published_lambda(cfg: Config) -> tuple[float, float]:
    """(b, k) of `--eps_scaler published`: the paper's value for this sampler and number of steps,
    from the config's table.

    Tables in section paper: eps_scaler for DDPM, eps_scaler_heun and eps_scaler_euler by number of
    steps.

    Raises:
        ValueError: no table, or a number of steps that the table does not have.
    """
    kind = cfg.values.get("solver") or ("ddim" if cfg.use_ddim else "ddpm")
    table = cfg.paper.get("eps_scaler" if kind == "ddpm" else f"eps_scaler_{kind}", {})
    known = [
        owner
        for owner, name in (
            ("DDPM", "eps_scaler"),
            ("Heun", "eps_scaler_heun"),
            ("Euler", "eps_scaler_euler"),
        )
        if name in cfg.paper
    ]
    if not table and known:
        raise ValueError(
            f"the published lambdas of this config belong to {' and '.join(known)} sampling: give "
            "a number"
        )
    if not table:
        raise ValueError(
            "--eps_scaler published needs a table of lambdas: give --config with one (section "
            "paper, such as configs/cifar10.yaml), or a number"
        )
    sigma = kind in ("heun", "euler")
    steps = str(cfg.edm_steps) if sigma else cfg.timestep_respacing or str(cfg.diffusion_steps)
    by_steps = {str(key): value for key, value in table.items()}
    if steps not in by_steps:
        raise ValueError(
            f"no lambda was published for {steps} steps; there is one for {', '.join(by_steps)} "
            f"(--{'edm_steps' if sigma else 'timestep_respacing'}), or give a number"
        )
    return float(by_steps[steps]), 0.0


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    homes = (_PACKAGE, os.path.dirname(os.path.abspath(sys.argv[0])))
    return os.path.dirname(os.path.abspath(frames[-1].filename)).startswith(homes)


def _verdict(error: BaseException) -> tuple[str, int]:
    """The line that a user gets to see ("": the traceback), and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted: {error}" if str(error) else "interrupted", 130
    ours = isinstance(error, OSError) or isinstance(error, ValueError) and _raised_by_us(error)
    if not ours or os.environ.get("GUIDED_DIFFUSION_IP_TRACEBACK"):
        return "", 1
    return f"error: {' '.join(str(error).split())}", 2


def command(main: Callable[[], Any]) -> NoReturn:
    """Run a script's main: what a user did wrong becomes one line on stderr and exit code 2; bugs
    keep their traceback.

    A ValueError raised by our own code is addressed to the user; one from a library is a bug of
    ours. GUIDED_DIFFUSION_IP_TRACEBACK=1 shows the traceback in any case. One of several processes
    tells the others of its end, or names the rank whose end is the cause of its own (exit code 1),
    and does not wait for any.
    """
    # A warning is for the user too: one line, without the place in the code that raised it.
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    try:
        main()
    except SystemExit as end:
        if end.code:
            dist_util.report_failure(f"exit code {end.code}")
        raise
    except (Exception, KeyboardInterrupt) as error:
        line, code = _verdict(error)
        dist_util.end_process(error, line, code)  # comes back in a single process
        if not line:
            raise
        print(line, file=sys.stderr)
        sys.exit(code)
    sys.exit(0)
