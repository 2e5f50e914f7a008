"""The axes of a sweep: keys with their values, as they are written and as plain data. Pure.

An axis is one key with its values or a range, or a named set of changes that belong together.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedml_plugin_fedmosaic.config.overrides import resolve_key
from fedml_plugin_fedmosaic.config.yamlfile import parse_value
from fedml_plugin_fedmosaic.core.errors import ConfigError

SEED_KEY = "common_args.random_seed"
ALGO_KEY = "train_args.federated_optimizer"
EXAMPLE = "write --grid section.key=v1,v2, for example --grid seed=1,2,3"
_FIXED_NAMES = {SEED_KEY: "seed", ALGO_KEY: "algo"}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*:\s*({_NUMBER})\s*(:\s*log\s*)?")


@dataclass(frozen=True, slots=True)
class Level:
    """One value of an axis: its label in names and tables, and the keys that it changes."""

    label: Any
    changes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Range:
    """All numbers between two bounds, both included.

    Attributes:
        low: smallest value.
        high: largest value.
        log: drawn evenly on a logarithmic scale.
        whole: integers only.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, rng: random.Random) -> float | int:
        """One value."""
        if self.whole and not self.log:
            return rng.randint(int(self.low), int(self.high))
        if not self.log:
            return self.rounded(rng.uniform(self.low, self.high))
        return self.rounded(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))

    def rounded(self, value: float) -> float | int:
        """A number as runs get it: inside the bounds, whole or with six significant digits."""
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.whole else min(max(_rounded(inside), self.low), self.high)


@dataclass(frozen=True, slots=True)
class Axis:
    """What is varied.

    Attributes:
        name: short, unique in its space.
        key: full path of the key; None for a named set of changes.
        levels: the values; empty for a range.
        range: bounds, for samplers that draw.
    """

    name: str
    key: str | None
    levels: tuple[Level, ...]
    range: Range | None = None

    @property
    def is_seed(self) -> bool:
        """Whether its values repeat a configuration."""
        return self.key == SEED_KEY

    def level(self, value: Any) -> Level:
        """The level of a label, or of a number in the range."""
        if self.range is not None:
            return Level(value, ((str(self.key), value),))
        return next(level for level in self.levels if level.label == value)

    def as_plain(self) -> Any:
        """The axis as JSON-ready data, for the manifest."""
        if self.range is not None:
            kind = ":log" if self.range.log else ""
            return f"{_plain(self.range.low)}:{_plain(self.range.high)}{kind}"
        if self.key is None:
            return {str(level.label): dict(level.changes) for level in self.levels}
        return [level.changes[0][1] for level in self.levels]


Grid = tuple[Axis, ...]


def _rounded(value: float) -> float:
    """Six significant digits: enough for a hyper-parameter, and readable."""
    return float(f"{value:.6g}")


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else value


def parse_grid_option(text: str) -> tuple[str, Any]:
    """``KEY=v1,v2`` or, for a range, ``KEY=LOW:HIGH[:log]``, as written after ``--grid``.

    Returns:
        The key as it was written, and the list of values or the range's text.

    Raises:
        ConfigError: there is no ``=`` or no value, or a value is not YAML.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip() or not raw.strip():
        raise ConfigError(f"--grid {text}: expected KEY=v1,v2,.. ; {EXAMPLE}")
    if _RANGE.fullmatch(raw):
        return key.strip(), raw.strip()
    try:
        values = parse_value(f"[{raw}]")
    except ConfigError as error:
        raise ConfigError(f"--grid {text}: {error.message}") from error
    return key.strip(), values


def parse_range(text: str) -> Range | None:
    """``LOW:HIGH`` or ``LOW:HIGH:log``; None for any other text.

    Raises:
        ConfigError: the bounds are in the wrong order, or a logarithm is asked for of 0 or less.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    low, high, log = float(match[1]), float(match[2]), match[3] is not None
    if not low < high:
        raise ConfigError(f"range {text}: expected LOW < HIGH, got {low:g} and {high:g}")
    if log and low <= 0:
        raise ConfigError(f"range {text}: a logarithmic range must be above 0, got {low:g}")
    whole = all(re.fullmatch(r"[-+]?\d+", bound) for bound in (match[1], match[2]))
    return Range(low, high, log, whole)


def make_space(grids: Iterable[Mapping[str, Any]]) -> tuple[Grid, ...]:
    """Axes from plain data: of ``--grid`` options or of a sweep file.

    Args:
        grids: each maps a key (any spelling that ``--set`` takes) to a list of values or the text
            of a range, or a name of one's own to ``{label: {key: value, ..}, ..}``.

    Raises:
        ConfigError: an unknown key, no value, a value twice, or a key set by two axes of one grid.
    """
    raw = [_raw_axes(grid) for grid in grids]
    if not raw or not all(raw):
        raise ConfigError("the sweep varies nothing", hint=EXAMPLE)
    names = _short_names({key for axes in raw for key, _ in axes if key is not None})
    return tuple(tuple(_axis(key, value, names) for key, value in axes) for axes in raw)


def _raw_axes(grid: Mapping[str, Any]) -> list[tuple[str | None, Any]]:
    found: list[tuple[str | None, Any]] = []
    taken: dict[str, str] = {}
    for written, value in grid.items():
        if isinstance(value, Mapping):
            bundle = {label: _resolved(changes, written) for label, changes in value.items()}
            if not bundle:
                raise ConfigError(f"grid: {written}: expected at least one named set of changes")
            keys = {key for changes in bundle.values() for key in changes}
            found.append((None, (written, bundle)))
        else:
            keys = {_full_key(written)}
            found.append((_full_key(written), value))
        for key in sorted(keys):
            if key in taken:
                raise ConfigError(f"grid: {key} is set by both {taken[key]} and {written}")
            taken[key] = written
    return found


def _resolved(changes: Any, axis: str) -> dict[str, Any]:
    if not isinstance(changes, Mapping) or not changes:
        raise ConfigError(f"grid: {axis}: expected {{label: {{key: value}}}}, got {changes!r}")
    return {_full_key(key): value for key, value in changes.items()}


def _full_key(written: str) -> str:
    try:
        path = resolve_key(written)
    except ConfigError as error:
        raise ConfigError(f"grid: {error.message}", hint=error.hint) from error
    return ".".join(map(str, path))


def _short_names(keys: set[str]) -> dict[str, str]:
    """The shortest ending of each key's path that no other key has."""
    names = {key: name for key, name in _FIXED_NAMES.items() if key in keys}
    parts = {key: key.split(".") for key in keys - names.keys()}
    for key, own in parts.items():
        for length in range(1, len(own) + 1):
            name = ".".join(own[-length:])
            rivals = [other for other in parts if other != key]
            if name not in names.values() and not any(
                parts[other][-length:] == own[-length:] for other in rivals
            ):
                names[key] = name
                break
    return names


def _axis(key: str | None, value: Any, names: Mapping[str, str]) -> Axis:
    if key is None:
        name, bundle = value
        levels = tuple(Level(label, tuple(changes.items())) for label, changes in bundle.items())
        if name in names.values():
            raise ConfigError(f"grid: {name} is the name of a set of changes and of a key")
        return Axis(name, None, levels)
    if isinstance(value, str):
        found = parse_range(value)
        if found is None:
            raise ConfigError(
                f"grid: {names[key]}: expected a list of values or a range LOW:HIGH, got {value!r}"
            )
        if key == SEED_KEY:
            raise ConfigError("grid: seed: expected a list of seeds, got a range")
        return Axis(names[key], key, (), found)
    if not isinstance(value, Sequence) or not value:
        raise ConfigError(f"grid: {names[key]}: expected a list of values, got {value!r}")
    levels = tuple(Level(_label(item), ((key, item),)) for item in value)
    twice = [a.label for a, b in itertools.combinations(levels, 2) if a.label == b.label]
    if twice:
        raise ConfigError(f"grid: {names[key]}: the value {twice[0]} is given twice")
    return Axis(names[key], key, levels)


def _label(value: Any) -> Any:
    """A value as names and tables show it: scalars as they are, others as short text."""
    if isinstance(value, list):
        return "+".join(str(_label(item)) for item in value) or "none"
    if isinstance(value, Mapping):
        return "+".join(f"{key}-{_label(item)}" for key, item in value.items())
    return value
