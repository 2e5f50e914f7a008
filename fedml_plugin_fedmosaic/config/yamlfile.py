"""YAML with a memory: plain data, and where each key was written.

Differences to YAML 1.1 as PyYAML reads it: ``2e-5`` is a number, a date or ``12:30`` is text, and
the same key twice in a mapping is a mistake instead of a silent replacement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedml_plugin_fedmosaic.core.errors import ConfigError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it was written, which key, and what is wrong."""

    origin: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin, self.key, self.text) if part)


def dotted(path: KeyPath) -> str:
    """``("a", "b", 0)`` as ``a.b[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(slots=True)
class Document:
    """A configuration as plain data with the origin of every key.

    Attributes:
        name: file name as the user gave it.
        data: the YAML's mappings, lists, text, numbers, booleans and nulls.
        origins: key path -> ``file.yaml:12``, or the command-line option that set it.
        problems: mistakes found so far.
    """

    name: str
    data: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def origin(self, path: KeyPath) -> str:
        """Where the nearest written parent of ``path`` stands."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.name)

    def report(self, path: KeyPath, text: str) -> None:
        """Notes a mistake."""
        self.problems.append(Problem(self.origin(path), dotted(path), text))

    def raise_problems(self) -> None:
        """Raises all mistakes at once, in the order of the file.

        Raises:
            ConfigError: there is at least one.
        """
        if not self.problems:
            return
        unique = dict.fromkeys(sorted(self.problems, key=_file_order))
        raise ConfigError(
            "\n".join(map(str, unique)),
            hint="'fedmosaic config reference' explains every key",
        )


def _file_order(problem: Problem) -> tuple[int, str, int]:
    name, _, line = problem.origin.rpartition(":")
    from_file = line.isdecimal() and not problem.origin.startswith("--")
    return (0, name, int(line)) if from_file else (1, problem.origin, 0)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the number syntax of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rpartition(":")[2] not in {"timestamp", "float", "int"}
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_NUMBERS = (
    # tag, pattern, first characters
    (
        "tag:yaml.org,2002:int",
        re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"),
        list("-+0123456789"),
    ),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+"
            r"|[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either YAML takes for a number, and keeps odd line breaks."""


for _number in _NUMBERS:
    _Loader.add_implicit_resolver(*_number)
    _Dumper.add_implicit_resolver(*_number)


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # Outside double quotes PyYAML folds these line breaks into spaces.
    style = '"' if any(mark in value for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Plain data as YAML that this module, and YAML 1.1 readers like FedML's, read back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


_SCALARS = {
    "tag:yaml.org,2002:null": _Loader.construct_yaml_null,
    "tag:yaml.org,2002:bool": _Loader.construct_yaml_bool,
    "tag:yaml.org,2002:int": _Loader.construct_yaml_int,
    "tag:yaml.org,2002:float": _Loader.construct_yaml_float,
    "tag:yaml.org,2002:str": _Loader.construct_yaml_str,
}


class _Builder:
    """Turns a YAML node tree into a :class:`Document`."""

    def __init__(self, document: Document, loader: _Loader) -> None:
        self.document = document
        self.loader = loader
        self._open: set[int] = set()

    def _at(self, node: yaml.Node) -> str:
        return f"{self.document.name}:{node.start_mark.line + 1}"

    def _report(self, node: yaml.Node, path: KeyPath, text: str) -> None:
        self.document.problems.append(Problem(self._at(node), dotted(path), text))

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.document.origins.setdefault(path, self._at(node))
        if id(node) in self._open:
            self._report(node, path, "an alias refers to its own parent")
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        construct = _SCALARS.get(node.tag)
        if construct is None or not isinstance(node, yaml.ScalarNode):
            self._report(node, path, f"the YAML tag {node.tag} is not supported")
            return None
        try:
            return construct(self.loader, node)
        except (ValueError, KeyError):
            self._report(node, path, f"{node.value!r} is not a valid {node.tag.rpartition(':')[2]}")
            return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        self._find_duplicates(node, path)
        self.loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is None:
                continue
            self.document.origins[(*path, key)] = self._at(key_node)
            result[key] = self.build(value_node, (*path, key))
        return result

    def _key(self, node: yaml.Node, path: KeyPath) -> str | None:
        if not isinstance(node, yaml.ScalarNode) or not node.tag.endswith(":str"):
            shown = getattr(node, "value", node)
            self._report(node, path, f"a key must be text; put {shown!r} in quotes")
            return None
        return str(node.value)

    def _find_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first: dict[str, yaml.Node] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            known = first.setdefault(key_node.value, key_node)
            if known is not key_node:
                line = known.start_mark.line + 1
                self._report(
                    key_node, (*path, key_node.value), f"the key is already set in line {line}"
                )


def _read_text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{name}: there is no such configuration file",
            hint="give an existing YAML file to --cf; 'fedmosaic config show' prints one",
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{name}: is a folder; a YAML file is expected") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from error


def read_document(path: Path) -> Document:
    """Reads a configuration file.

    Raises:
        ConfigError: missing, unreadable, empty or broken YAML. Duplicate keys and unsupported
            tags are noted in the document's ``problems``, with what else will be found.
    """
    name = str(path)
    text = _read_text(path, name)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(
            f"{where}: broken YAML: {error.problem or error.context}"
            + (f" (column {mark.column + 1})" if mark else ""),
            hint="check the indentation, colons and quotes of this line and the one before",
        ) from error
    except yaml.YAMLError as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"{name}: broken YAML: {reason}") from error
    if root is None:
        raise ConfigError(
            f"{name}: the file is empty", hint="'fedmosaic config show' prints a complete one"
        )
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}:1: expected sections like 'train_args:' at the top level")
    document = Document(name=name, data={})
    document.data = _Builder(document, loader).build(root, ())
    document.origins[()] = name
    return document


def parse_value(text: str) -> Any:
    """One value in the same YAML as the file, for ``--set``.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is not a YAML value; put it in quotes") from error
    if node is None:
        return None
    document = Document(name="", data={})
    value = _Builder(document, loader).build(node, ())
    if document.problems:
        raise ConfigError("; ".join(problem.text for problem in document.problems))
    return value


def as_mapping(value: Any) -> Mapping[str, Any] | None:
    """``value`` if it is a mapping."""
    return value if isinstance(value, dict) else None
