"""A sweep before it runs: its file, its checked configurations, and what makes it that sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.messages import unknown
from fedml_plugin_fedmosaic.config.sections import SECTION_OF, Experiment
from fedml_plugin_fedmosaic.config.yamlfile import Document, as_mapping, read_document
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.launch.sweep_axes import Grid, make_space
from fedml_plugin_fedmosaic.launch.sweep_space import (
    Point,
    Sampler,
    expand,
    make_point,
    override,
)

OBJECTIVES = ("self", "others", "worst", "a_auc")
"""What tpe can maximise; the report gives the values."""
_FILE_KEYS = (
    "cf",
    "set",
    "grid",
    "sampler",
    "samples",
    "sampler_seed",
    "objective",
    "max_parallel",
)
_MAX_PROBLEMS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSpec:
    """What a sweep varies, and around which configuration.

    Attributes:
        cf: configuration file; the bundled quickstart when None.
        overrides: ``--set`` texts that hold for every run.
        grids: plain data of the grids, as written.
        sampler: ``grid``, ``random`` or ``tpe``.
        samples: configurations to draw; None for a grid.
        sampler_seed: of the drawing.
        objective: what ``tpe`` maximises, one of :data:`OBJECTIVES`.
        max_parallel: runs at once.
        grows: the folder may hold other runs of the same base: further values add runs to it.
        free: keys whose values may differ from those of a run that is there already.
    """

    cf: Path | None = None
    overrides: tuple[str, ...] = ()
    grids: tuple[Mapping[str, Any], ...] = ()
    sampler: Sampler = "grid"
    samples: int | None = None
    sampler_seed: int = 0
    objective: str = "self"
    max_parallel: int = 8
    grows: bool = False
    free: tuple[str, ...] = ()

    def space(self) -> tuple[Grid, ...]:
        """The grids as axes.

        Raises:
            ConfigError: a key or value of a grid is wrong.
        """
        return make_space(self.grids)


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """A checked sweep.

    Attributes:
        spec: what was asked for.
        space: its axes.
        base: the configuration that the runs change, resolved.
        points: the runs; empty for tpe, which asks for them batch by batch.
        experiments: resolved configuration of each run, by name.
    """

    spec: SweepSpec
    space: tuple[Grid, ...]
    base: Experiment
    points: tuple[Point, ...]
    experiments: Mapping[str, Experiment] = field(repr=False)

    def identity(self) -> dict[str, Any]:
        """What may not differ when the same sweep is started again, as JSON-ready data."""
        spec = self.spec
        record: dict[str, Any] = {
            "sampler": spec.sampler,
            "grid": [{axis.name: axis.as_plain() for axis in grid} for grid in self.space],
            "base": plain_experiment(self.base),
        }
        if spec.grows:
            del record["grid"]
        if spec.sampler != "grid":
            record |= {"samples": spec.samples, "sampler_seed": spec.sampler_seed}
        if spec.sampler == "tpe":
            record["objective"] = spec.objective
        return record


def plain_experiment(experiment: Experiment) -> dict[str, Any]:
    """A configuration as JSON-ready data, without what says where and on what it runs."""
    plain: dict[str, Any] = TypeAdapter(Experiment).dump_python(experiment, mode="json")
    return {name: plain[name] for name in SECTION_OF if name not in ("run", "launcher")}


def make_plan(spec: SweepSpec) -> SweepPlan:
    """Expands a sweep and checks the configuration of every run.

    Args:
        spec: what is asked for.

    Raises:
        ConfigError: a key, a value, a combination or the base is wrong; all are listed.
    """
    if spec.max_parallel < 1:
        raise ConfigError(f"--max-parallel must be >= 1 (got {spec.max_parallel})")
    if spec.samples is not None and spec.samples < 1:
        raise ConfigError(f"--samples must be >= 1 (got {spec.samples})")
    if spec.objective not in OBJECTIVES:
        raise ConfigError(f"objective: {unknown('measure', spec.objective, OBJECTIVES)}")
    space = spec.space()
    base = load_experiment(spec.cf, spec.overrides)
    if spec.sampler == "tpe":
        _check_tpe(spec, space)
        corners = _corners(space)
        check_points(spec, corners)
        return SweepPlan(spec, space, base, (), {})
    points = expand(space, spec.sampler, spec.samples, spec.sampler_seed)
    return SweepPlan(spec, space, base, points, check_points(spec, points))


def _check_tpe(spec: SweepSpec, space: Sequence[Grid]) -> None:
    if spec.samples is None:
        raise ConfigError("--sampler tpe needs --samples N", hint="for example --samples 20")
    if len(space) > 1:
        raise ConfigError("tpe works on one grid; the sweep has several")
    if all(axis.is_seed for axis in space[0]):
        raise ConfigError("tpe needs a key to choose; the sweep varies only the seed")


def _corners(space: Sequence[Grid]) -> tuple[Point, ...]:
    """Runs that together hold every value (and both ends of every range) at least once."""
    points: dict[str, Point] = {}
    for grid in space:
        values = [
            [axis.range.low, axis.range.high] if axis.range else [x.label for x in axis.levels]
            for axis in grid
        ]
        values = [
            [int(value) for value in options] if axis.range and axis.range.whole else options
            for axis, options in zip(grid, values, strict=True)
        ]
        for number in range(max(map(len, values))):
            choice = tuple(
                (axis, options[min(number, len(options) - 1)])
                for axis, options in zip(grid, values, strict=True)
            )
            point = make_point(choice)
            points[point.name] = point
    return tuple(points.values())


def check_points(spec: SweepSpec, points: Sequence[Point]) -> dict[str, Experiment]:
    """Loads the configuration of every run.

    Returns:
        Name -> resolved experiment.

    Raises:
        ConfigError: one or more are wrong; each mistake is named once, with the runs that have it.
    """
    experiments: dict[str, Experiment] = {}
    problems: dict[str, list[str]] = {}
    for point in points:
        try:
            experiments[point.name] = load_experiment(
                spec.cf, [*spec.overrides, *point.overrides], algo=point.algo
            )
        except ConfigError as error:
            for line in error.message.splitlines():
                problems.setdefault(line, []).append(point.name)
    if problems:
        lines = [_problem(line, names) for line, names in problems.items()]
        rest = len(lines) - _MAX_PROBLEMS
        shown = lines[:_MAX_PROBLEMS] + ([f"... and {rest} more"] if rest > 0 else [])
        raise ConfigError("\n".join(shown), hint="nothing was submitted")
    return experiments


def _problem(line: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{line} (run {names[0]}{more})"


def read_sweep_file(path: Path) -> SweepSpec:
    """Reads a sweep file.

    Keys: ``cf`` (relative to the file), ``set`` (a mapping of keys to values for every run),
    ``grid`` (one grid or a list of them), ``sampler``, ``samples``, ``sampler_seed``,
    ``objective`` and ``max_parallel``.

    Raises:
        ConfigError: the file, a key or a value is wrong; every mistake is listed.
    """
    document = read_document(path)
    data = document.data
    for key in data:
        if key not in _FILE_KEYS:
            document.report((key,), unknown("key", key, _FILE_KEYS))
    cf = _typed(document, "cf", str, None)
    fixed = as_mapping(data.get("set", {}))
    if fixed is None:
        document.report(("set",), "must be a mapping of keys to values")
        fixed = {}
    sampler = _typed(document, "sampler", str, "grid")
    if sampler not in get_args(Sampler):
        document.report(("sampler",), unknown("sampler", str(sampler), get_args(Sampler)))
        sampler = "grid"
    spec = SweepSpec(
        cf=None if cf is None else (path.resolve().parent / cf),
        overrides=tuple(override(key, value) for key, value in fixed.items()),
        grids=_grids(document),
        sampler=sampler,
        samples=_typed(document, "samples", int, None),
        sampler_seed=_typed(document, "sampler_seed", int, 0),
        objective=_typed(document, "objective", str, "self"),
        max_parallel=_typed(document, "max_parallel", int, 8),
    )
    document.raise_problems()
    return spec


def _typed(document: Document, key: str, kind: type, default: Any) -> Any:
    value = document.data.get(key, default)
    right = value is None if default is None and value is None else isinstance(value, kind)
    if not right or isinstance(value, bool):
        names = {int: "a whole number", str: "text"}
        document.report((key,), f"must be {names[kind]} (got {value!r})")
        return default
    return value


def _grids(document: Document) -> tuple[Mapping[str, Any], ...]:
    grid = document.data.get("grid")
    grids = grid if isinstance(grid, list) else [grid]
    found = []
    for one in grids:
        mapping = as_mapping(one)
        if not mapping:
            document.report(("grid",), "must be a mapping of keys to lists of values, or a list")
            return ()
        found.append(mapping)
    return tuple(found)
