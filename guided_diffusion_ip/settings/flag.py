"""What a flag is: a name, a default, a role, and how a word becomes a value of it."""

from __future__ import annotations

import argparse
import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..files import is_utf8
from ..sizes import parse_size
from ..yaml_text import parse_yaml


class Role(enum.Enum):
    """What a flag decides. Every list of flags is derived from roles and sections."""

    ARCHITECTURE = "the network: names, shapes and meaning of its weights"
    PROCESS = "the diffusion process that the network is trained for and sampled by"
    LOSS = "what is trained for; a run keeps it to its end, a trained checkpoint does without"
    TRAINING = "how training proceeds; a run that is continued may change it, with a note"
    IMAGES = "what a checkpoint yields: images, likelihoods, measures, scores"
    ARITHMETIC = "the number format: rounding and speed"
    SPEED = "only time and memory"
    INPUT = "which files are read; results depend on their content, not on their names"
    START = "where a run starts from; it is not taken over when the run is continued"
    LENGTH = "how long a run goes on, and how often it saves"
    PLACE = "where results go, and whether they may replace what is there"
    TELLING = "only what is printed, drawn or evaluated on the way"


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
    try:
        height, width = parse_size(v)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a size such as 64, or HEIGHTxWIDTH such as 64x96, got {v!r}"
        ) from None
    return height if height == width else f"{height}x{width}"


def size_or_none(v: str | int) -> int | str:
    """a size such as 64, or HEIGHTxWIDTH; empty for none"""
    return "" if v == "" else image_size(v)


def mapping(v: str | Mapping[str, Any]) -> str:
    """a YAML mapping such as {width: 64}; empty for none"""
    try:
        content = parse_yaml(v, "it") if isinstance(v, str) else v
    except ValueError:
        content = v
    if content in (None, "") or content == {}:
        return ""
    if not isinstance(content, Mapping):
        raise argparse.ArgumentTypeError(
            f"expected a YAML mapping such as {{width: 64}}, got {v!r}"
        )
    return yaml.safe_dump(dict(content), default_flow_style=True, width=2**20).strip()


def items(text: str | Iterable[Any]) -> list[str]:
    """["fid", "kid"] from "fid, kid": the one way to read a list separated by commas."""
    parts = text.split(",") if isinstance(text, str) else map(str, text)
    return [part.strip() for part in parts if part.strip()]


def numbers(text: str, flag: str) -> list[int]:
    """[5, 10] from "5,10"; [] from "".

    Raises:
        ValueError: not of this form.
    """
    parts = items(text)
    if not all(part.isdigit() for part in parts):
        raise ValueError(
            f"--{flag} {text}: expected whole numbers separated by commas, such as 5,10,20"
        )
    return [int(part) for part in parts]


def eps_scaler(v: str | float | Sequence[float]) -> float | list[float] | str:
    """A number, a comma-separated list with one number per step (index 0 = last, clean step), or
    "published".
    """
    if v == "published":
        return v
    parts: Sequence[Any] = [v]
    if isinstance(v, str):
        parts = v.split(",")
    elif isinstance(v, (list, tuple)):
        parts = v
    try:
        values = [float(p) for p in parts]
    except (TypeError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"expected a number, numbers separated by commas, or 'published', got {v!r}"
        ) from None
    return values[0] if len(values) == 1 else values


_LARGEST = 2**53  # what JSON and float64 keep exactly

Choices = tuple[Any, ...] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Flag:
    """One flag.

    Args:
        help: "{choices}" in it stands for the choices, separated by commas.
        type: by default that of `default`.
        choices: what is allowed, or a function that returns it: the keys of a registry, which is
            then imported only when the flag is used.
        least, most: the smallest and the largest value allowed; a whole number has 53 bits at most
            in any case.
        finite: refuse NaN and infinity.
        quiet: leave the flag out of a run's identity where it has its default. For flags that are
            newer than the folders that are to be continued.
        solvers: of which solvers it is: "sigma" for those that step along noise levels, or the name
            of one; "" for all.
        in_weights: names and shapes of a checkpoint tell it.
        saved: it is written into config.yaml.
    """

    name: str
    default: Any
    role: Role
    help: str
    type: Callable[[Any], Any] | None = None
    aliases: tuple[str, ...] = ()
    choices: Choices | None = None
    least: float | None = None
    most: float | None = None
    finite: bool = True
    quiet: bool = False
    solvers: str = ""
    in_weights: bool = True
    saved: bool = True

    @property
    def allowed(self) -> tuple[Any, ...]:
        """The choices; () if anything goes."""
        return tuple(self.choices() if callable(self.choices) else self.choices or ())

    @property
    def help_text(self) -> str:
        """The help, with the choices and the default."""
        default = "''" if self.default == "" else self.default
        text = self.help
        if "{choices}" in text:
            text = text.replace("{choices}", ", ".join(str(word) for word in self.allowed if word))
        return f"{text} (default {default})"

    def convert(self, value: Any) -> Any:
        """`value`, from YAML or the command line, as this flag's type; ArgumentTypeError if it
        cannot be.
        """
        kind: Callable[[Any], Any] = type(self.default)
        if self.type or isinstance(self.default, bool):
            kind = self.type or str2bool
        try:
            if value is None:
                raise ValueError
            if kind is int and isinstance(value, float) and value != int(value):
                raise ValueError
            result = kind(value)
        except (TypeError, ValueError, OverflowError):
            words: dict[Any, str] = {int: "a whole number", float: "a number", str: "text"}
            name = words.get(kind) or kind.__doc__ or ""
            raise argparse.ArgumentTypeError(f"expected {name}, got {value!r}") from None
        self._check(result, value)
        return result

    def _check(self, result: Any, value: Any) -> None:
        if isinstance(result, str) and not is_utf8(result):
            raise argparse.ArgumentTypeError(
                f"{value!r} is not UTF-8, so that no file could name it: rename it"
            )
        if (allowed := self.allowed) and result not in allowed:
            raise argparse.ArgumentTypeError(
                f"expected one of {', '.join(map(str, allowed))}, got {value!r}"
            )
        if self.finite and isinstance(result, float) and not math.isfinite(result):
            raise argparse.ArgumentTypeError(f"{value!r} is no finite number")
        if self.least is not None and result < self.least:
            raise argparse.ArgumentTypeError(f"must be at least {self.least:g}, got {value!r}")
        most = _LARGEST if self.most is None and isinstance(result, int) else self.most
        if most is not None and not result <= most:
            raise argparse.ArgumentTypeError(f"must be at most {most:,}, got {value!r}")
        if isinstance(result, int) and result < -_LARGEST:
            raise argparse.ArgumentTypeError(f"must be at least {-_LARGEST:,}, got {value!r}")
