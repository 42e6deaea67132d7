"""Reading YAML that anybody may have written: whatever is wrong with it is one line."""

from __future__ import annotations

from typing import IO, Any

import yaml

_BYTES = 16 << 20  # of a file; a config has 4 KB, a schedule of 1,000 steps 20
_DEPTH = 64
_VALUES = 1_000_000  # with aliases written out
_BITS = 64  # of a whole number
# PyYAML's own constructors raise whatever Python does for dates, numbers and keys.
_RAISED = (yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


def parse_yaml(text: str | bytes, what: str) -> Any:
    """The content of a YAML text, made of plain values only; None if it is empty.

    Args:
        what: a name of the text, for the message: its path, or its flag.

    Raises:
        ValueError: not YAML, or not made of plain values, or beyond reason: larger than 16 MB,
            nested deeper than 64 levels, aliases that stand for more than a million values, whole
            numbers of more than 64 bits.
    """
    if len(text) > _BYTES:
        raise ValueError(f"{what} has more than {_BYTES:,} bytes, which no YAML of ours has")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _weight(node, {}, 0)
            content = loader.construct_document(node)
        finally:
            loader.dispose()
        _refuse_huge_numbers(content)
        return content
    except RecursionError:
        reason = "it is nested too deeply"
    except _RAISED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason.replace('in "<byte string>", ', "at ").replace('in "<unicode string>", ', "at ")
    raise ValueError(f"{what} is not valid YAML: {reason[:400]}")


def read_yaml_file(path: str, what: str = "") -> Any:
    """The content of a local file.

    Raises:
        ValueError: see parse_yaml. OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return read_yaml_stream(file, what or path)


def read_yaml_stream(file: IO[bytes], what: str) -> Any:
    """The same of an open file, of which no more is read than may be in one."""
    return parse_yaml(file.read(_BYTES + 1), what)


def _weight(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for, with aliases written out."""
    if depth > _DEPTH:
        raise ValueError(f"it is nested deeper than {_DEPTH} levels")
    if id(node) in known:
        weight = known[id(node)]
        if not weight:
            raise ValueError("it contains itself")
        return weight
    known[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    weight = 1
    for child in children:
        weight += _weight(child, known, depth + 1)
        if weight > _VALUES:
            raise ValueError(f"its aliases stand for more than {_VALUES:,} values")
    known[id(node)] = weight
    return weight


def _refuse_huge_numbers(content: Any) -> None:
    """Raises ValueError; the content is neither deep nor large any more."""
    if isinstance(content, int) and content.bit_length() > _BITS:
        raise ValueError(f"it holds a whole number of {content.bit_length()} bits")
    if isinstance(content, dict):
        for key, value in content.items():
            _refuse_huge_numbers(key)
            _refuse_huge_numbers(value)
    elif isinstance(content, (list, tuple, set)):
        for value in content:
            _refuse_huge_numbers(value)
