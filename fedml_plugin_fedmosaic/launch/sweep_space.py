"""What a sweep varies: axes, and how they are spelled, expanded and named. Pure; nothing runs here.

An axis is one key with its values, or a named set of changes that belong together. A space is one
grid or several; a grid is the product of its axes. The random seed is an axis like any other, but
its values repeat a configuration instead of making another one.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedml_plugin_fedmosaic.config.overrides import resolve_key
from fedml_plugin_fedmosaic.config.yamlfile import parse_value
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.rng import python_random

Sampler = Literal["grid", "random", "tpe"]

SEED_KEY = "common_args.random_seed"
ALGO_KEY = "train_args.federated_optimizer"
_FIXED_NAMES = {SEED_KEY: "seed", ALGO_KEY: "algo"}
_EXAMPLE = "write --grid section.key=v1,v2, for example --grid seed=1,2,3"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*:\s*({_NUMBER})\s*(:\s*log\s*)?")
_MAX_NAME = 120
_SAFE = re.compile(r"[^A-Za-z0-9._+=,-]+")


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
            return _rounded(rng.uniform(self.low, self.high))
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else _rounded(value)


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


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: unique and readable, such as ``temperature=0.5,seed=2``; also its folder.
        levels: axis name -> label.
        changes: full key path -> value, in the order in which they apply.
    """

    name: str
    levels: Mapping[str, Any]
    changes: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """The changes as ``--set`` takes them, without the strategy's name."""
        return [override(key, value) for key, value in self.changes.items() if key != ALGO_KEY]

    @property
    def algo(self) -> str | None:
        """The strategy that the point asks for; None if it does not change it."""
        value = self.changes.get(ALGO_KEY)
        return None if value is None else str(value)

    @property
    def configuration(self) -> tuple[tuple[str, Any], ...]:
        """Its levels without the seed: what runs of one configuration have in common."""
        return tuple((name, value) for name, value in self.levels.items() if name != "seed")


def override(key: str, value: Any) -> str:
    """A change as ``--set`` takes it: JSON is YAML on one line."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


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
        raise ConfigError(f"--grid {text}: expected KEY=v1,v2,.. ; {_EXAMPLE}")
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
        raise ConfigError("the sweep varies nothing", hint=_EXAMPLE)
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


def expand(
    space: Sequence[Grid], sampler: Sampler = "grid", samples: int | None = None, seed: int = 0
) -> tuple[Point, ...]:
    """All runs of a sweep whose runs do not depend on each other's results.

    Args:
        space: grids, from :func:`make_space`.
        sampler: ``grid`` takes every combination, ``random`` draws configurations.
        samples: configurations that ``random`` draws; each runs with every seed.
        seed: of the drawing, not of the runs.

    Raises:
        ConfigError: a range in a grid, more samples than there are configurations, or a run that
            two grids have in common.
    """
    if sampler == "grid":
        if samples is not None:
            raise ConfigError("--samples belongs to the samplers random and tpe; grid takes all")
        for axis in (axis for grid in space for axis in grid):
            if axis.range is not None:
                raise ConfigError(
                    f"grid: {axis.name} is a range, which has no list of values",
                    hint="use --sampler random or tpe, or write the values",
                )
        picked = [combination for grid in space for combination in _product(grid)]
    elif sampler == "random":
        picked = _draw(space, _required(samples, sampler), python_random(seed, "sweep"))
    else:
        raise ConfigError("tpe asks for one batch after the other; it cannot be expanded")
    points = [make_point(levels) for levels in picked]
    known: set[str] = set()
    for point in points:
        content = json.dumps(point.changes, sort_keys=True)
        if content in known or point.name in known:
            raise ConfigError(f"grid: the run {point.name} is asked for twice")
        known |= {content, point.name}
    return tuple(points)


def _required(samples: int | None, sampler: str) -> int:
    if samples is None:
        raise ConfigError(f"--sampler {sampler} needs --samples N", hint="for example --samples 20")
    return samples


Choice = tuple[tuple[Axis, Any], ...]
"""One label per axis of a grid."""


def _product(grid: Grid) -> Iterator[Choice]:
    labels = [[level.label for level in axis.levels] for axis in grid]
    for combination in itertools.product(*labels):
        yield tuple(zip(grid, combination, strict=True))


def with_seeds(grid: Grid, chosen: Mapping[str, Any]) -> list[Choice]:
    """A configuration's runs: its labels with every seed, in the order of the grid's axes."""
    options = [
        [level.label for level in axis.levels] if axis.is_seed else [chosen[axis.name]]
        for axis in grid
    ]
    return [
        tuple(zip(grid, combination, strict=True)) for combination in itertools.product(*options)
    ]


def _draw(space: Sequence[Grid], samples: int, rng: random.Random) -> list[Choice]:
    endless = any(axis.range is not None for grid in space for axis in grid)
    if not endless:
        pool = [
            (grid, {axis.name: label for axis, label in combination})
            for grid in space
            for combination in _product(tuple(axis for axis in grid if not axis.is_seed))
        ]
        if samples > len(pool):
            raise ConfigError(f"--samples {samples}, but there are {len(pool)} configurations")
        return [
            run for grid, chosen in rng.sample(pool, samples) for run in with_seeds(grid, chosen)
        ]
    runs: list[Choice] = []
    known: set[str] = set()
    for _ in range(samples):
        for _attempt in range(1000):
            grid = space[rng.randrange(len(space))]
            chosen = {
                axis.name: axis.range.draw(rng) if axis.range else rng.choice(axis.levels).label
                for axis in grid
                if not axis.is_seed
            }
            text = json.dumps(chosen)
            if text not in known:
                break
        else:
            raise ConfigError(f"--samples {samples}: there are only {len(known)} configurations")
        known.add(text)
        runs += with_seeds(grid, chosen)
    return runs


def make_point(choice: Choice) -> Point:
    """Names a run and collects its changes; a strategy comes first, because it owns options."""
    changes: dict[str, Any] = {}
    levels: dict[str, Any] = {}
    for axis, label in choice:
        levels[axis.name] = label
        changes.update(axis.level(label).changes)
    ordered = dict(sorted(changes.items(), key=lambda item: item[0] != ALGO_KEY))
    return Point(run_name(levels), levels, ordered)


def run_name(levels: Mapping[str, Any]) -> str:
    """``{"temperature": 0.5, "seed": 2}`` as ``temperature=0.5,seed=2``, fit for a folder."""
    text = ",".join(f"{name}={_shown(label)}" for name, label in levels.items())
    name = _SAFE.sub("-", text).strip("-.")
    if len(name) <= _MAX_NAME and name == text:
        return name
    # What was replaced or cut could make two names equal.
    digest = f"{hash_text(text):08x}"
    return f"{name[: _MAX_NAME - 9]}-{digest}"


def hash_text(text: str) -> int:
    """32 bits of a text, the same on every machine."""
    return zlib.crc32(text.encode())


def _shown(label: Any) -> str:
    if isinstance(label, bool) or label is None:
        return json.dumps(label)
    return f"{label:g}" if isinstance(label, float) and label == float(f"{label:g}") else str(label)
