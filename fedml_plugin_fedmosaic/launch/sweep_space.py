"""What a sweep runs: its axes expanded to named runs. Pure; nothing runs here.

A space is one grid or several; a grid is the product of its axes. The random seed is an axis like
any other, but its values repeat a configuration instead of making another one.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.launch.sweep_axes import ALGO_KEY, Axis, Grid

Sampler = Literal["grid", "random", "tpe"]

_MAX_NAME = 120
_SAFE = re.compile(r"[^A-Za-z0-9._+=,-]+")


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
