"""YAML as people expect it: the 1.2 core scalars, no duplicate keys, no tags, no aliases, no NUL, within size and depth caps.

PyYAML alone reads `5e-4` as a string, `no` as False, `0123` as 83, `1:30` as 90, and keeps the last of two equal keys.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from selfsight.errors import UsageError

MAX_BYTES, MAX_DEPTH = 200_000, 20  # a list of 100,000 words takes PyYAML 3 s
_SCALARS = {
    "bool": (re.compile(r"^(?:true|false)$", re.I), "tTfF"),
    "null": (re.compile(r"^(?:~|null|)$", re.I), ["~", "n", "N", ""]),
    "int": (re.compile(r"^[-+]?[0-9][0-9_]*$"), "-+0123456789"),
    "float": (
        re.compile(
            r"^[-+]?(?:[0-9][0-9_]*\.[0-9]*(?:e[-+]?[0-9]+)?|\.[0-9]+(?:e[-+]?[0-9]+)?|[0-9][0-9_]*e[-+]?[0-9]+|\.(?:inf|nan))$",
            re.I,
        ),
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above; mappings are built by a method that refuses duplicates."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not read; use base:"
            )
        if getattr(self.peek_event(), "tag", None):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: tags (!name) are not read")
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: a key is a word, not a list or a mapping")
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a character that no file name or text can have")
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that the loader above would read as something else."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}  # none of YAML 1.1's
    for _tag, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(re.sub(r"\.(inf|nan)$", r"\1", node.value.replace("_", ""), flags=re.I)),
)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text; `where` stands in front of errors.

    Raises:
        UsageError: not YAML, too large, too deep, a duplicate key, a tag or an alias.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(f"{where}: larger than {MAX_BYTES:,} bytes")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else str(error)
        raise UsageError(f"{where}: not a readable recipe: {place}") from None


def read(path: Path) -> dict[str, Any]:
    """A file that holds one mapping.

    Raises:
        UsageError: no such file, or not a mapping.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: larger than {MAX_BYTES:,} bytes")
        tree = parse(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values")
    return tree


def dump(tree: Any) -> str:
    """YAML that `parse` reads back as the same value."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=120)
