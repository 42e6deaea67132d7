"""How YAML files and the command line fill in the flags (flags.py).

Default < config file < command line. What a run used is saved beside its results as config.yaml in
the form that --config reads, and in the state file of each checkpoint, which is what counts if
config.yaml is of another run (beside.py).

argparse and PyYAML do the parsing. (jsonargparse was tried on paper: flat published flags with two
spellings over nested sections, of which a script sees only some, would have needed as much code
around it.)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NoReturn

import yaml

from .. import files
from ..training import checkpoint
from .beside import config_beside
from .command import command  # noqa: F401 (scripts import both from here)
from .flags import NOT_IN_WEIGHTS, OF_A_START, SCRIPTS, TRAINING_ONLY
from .own_network import require_named_by_user
from .yaml_file import nearest, read_yaml, values_from_yaml

Given = Mapping[str, tuple[str, Any]]  # flag -> where it was set, and its value


@dataclass(frozen=True)
class Config:
    """The merged settings of one run; `cfg.batch_size` reads a flag.

    Args:
        given: where a flag was set, for messages: "--lr", or the path of a file.
        paper: section paper of the config file.
        trained_on: how the training images were prepared, from beside a checkpoint.
        class_names: of the training images, likewise; label k is class_names[k].
        adopted: where the settings of model_path come from.
        notes: what the user should know about them.
    """

    script: str
    values: Mapping[str, Any]
    given: Mapping[str, str] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    config_path: str = ""
    trained_on: str = ""
    class_names: tuple[str, ...] = ()
    adopted: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def with_values(self, **values: Any) -> Config:
        """A copy in which these flags have other values; the original stays as it is."""
        return replace(self, values={**self.values, **values})

    def on_command_line(self, name: str) -> bool:
        """Was the flag given there, and not in a file?"""
        return self.given.get(name, "").startswith("--")

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
            # It says nothing, and would count as given where the file is a --config.
            del sections["model"]["num_classes"]
        if data := {
            name: value
            for name, value in (
                ("preprocessing", self.trained_on),
                ("classes", list(self.class_names)),
            )
            if value
        }:
            sections["data"] = data
        if self.paper:
            sections["paper"] = dict(self.paper)
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
        framework = self.values.get("framework", "adm")
        assumed = [
            f"{name} {self.values[name]}"
            for name in NOT_IN_WEIGHTS.get(framework, NOT_IN_WEIGHTS[""])
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
    unknown = _take_positional(SCRIPTS[script].positional, unknown, namespace.given)
    if unknown:
        word = unknown[0].split("=")[0]
        raise ValueError(f"unknown argument {word}." + nearest(word, known) + " (--help lists all)")
    return _merged(script, namespace.given, namespace.config)


def from_values(script: str, values: Mapping[str, Any], config: str = "") -> Config:
    """As parse, from flags and their values instead of words: what a notebook gives counts as
    given on the command line.

    Raises:
        ValueError: as parse.
    """
    flags = {name: flag for flag in SCRIPTS[script].flags() for name in (flag.name, *flag.aliases)}
    given: dict[str, tuple[str, Any]] = {}
    for name, raw in values.items():
        if name not in flags:
            known = [f"--{other}" for other in flags]
            raise ValueError(f"unknown argument --{name}." + nearest(f"--{name}", known))
        try:
            value = flags[name].convert(raw)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"argument --{name}: {error}") from None
        other = given.setdefault(flags[name].name, (f"--{name}", value))
        if other[1] != value:
            raise ValueError(f"{other[0]} and --{name} are one flag, with two values: give one")
    return _merged(script, given, config)


def _merged(script: str, given: Given, path: str) -> Config:
    spec = SCRIPTS[script]
    ignore = spec.without
    if not path and "train" in spec.sections and "resume" in given:
        path, ignore = _config_of_run(script, given["resume"][1]), (*spec.without, *OF_A_START)
    values = {flag.name: flag.default for flag in spec.flags()}
    origin: dict[str, str] = {}
    paper: Mapping[str, Any] = {}
    if path:
        content = read_yaml(path)
        from_file = values_from_yaml(content, (*spec.sections, script), path, ignore)
        values |= from_file
        origin = dict.fromkeys(from_file, path)
        paper = content.get("paper", {})
    values |= {name: value for name, (_, value) in given.items()}
    origin |= {name: option for name, (option, _) in given.items()}
    if "framework" in values:
        require_named_by_user(values["framework"], "framework" in given, path)
    return Config(script, values, origin, paper, path)


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
