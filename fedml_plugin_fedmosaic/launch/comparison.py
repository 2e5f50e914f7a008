"""A comparison as a sweep: every strategy with every seed is one run, a *cell*.

The folder of a comparison may grow: the same command with more strategies or seeds starts only the
cells that are missing, have failed or were interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.launch.sweep_axes import ALGO_KEY, SEED_KEY
from fedml_plugin_fedmosaic.launch.sweep_plan import SweepPlan, SweepSpec, make_plan

ALL = "all"
REFERENCE = "local"
AXIS = "strategy"
_BASE_KEY = "eval_args.evaluation.base"
_COMPARE = "eval_args.evaluation.compare=[]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonSpec:
    """What is compared.

    Attributes:
        cf: configuration file; the bundled quickstart when None.
        overrides: ``--set`` texts that hold for every cell.
        strategies: registry names, each once.
        seeds: number of seeds; they count up from the configuration's own.
        max_parallel: cells at once.
    """

    cf: Path | None = None
    overrides: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    seeds: int = 3
    max_parallel: int = 1


def chosen_strategies(text: str) -> tuple[str, ...]:
    """``a,b,c`` or ``all`` as registry names, the reference first.

    Raises:
        ConfigError: none is named, or one is not known.
    """
    names = [part.strip().lower() for part in text.split(",") if part.strip()]
    if not names:
        raise ConfigError("--strategies names no strategy", hint="for example local,fedmosaic")
    if ALL in names:
        names = list(STRATEGIES)
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        raise ConfigError(
            f"--strategies: unknown strategy {unknown[0]!r}; known: {', '.join(STRATEGIES)}",
            hint="write names with commas between them, or all",
        )
    return tuple(sorted(dict.fromkeys(names), key=lambda name: name != REFERENCE))


def make_comparison(spec: ComparisonSpec) -> SweepPlan:
    """Checks the configuration of every cell.

    The untouched base models are evaluated once per seed, by the first strategy's cells.

    Raises:
        ConfigError: a key, a value or a combination is wrong; all are listed.
    """
    overrides = (*spec.overrides, _COMPARE)
    base = load_experiment(spec.cf, overrides)
    first = base.common.random_seed
    levels: dict[str, Mapping[str, Any]] = {}
    for number, name in enumerate(spec.strategies):
        without_base = {_BASE_KEY: False} if number and base.evaluation.base else {}
        levels[name] = {ALGO_KEY: name, **without_base}
    return make_plan(
        SweepSpec(
            cf=spec.cf,
            overrides=overrides,
            grids=({AXIS: levels, SEED_KEY: list(range(first, first + spec.seeds))},),
            max_parallel=spec.max_parallel,
            grows=True,
        )
    )


def cell_folders(folder: Path, plan: SweepPlan) -> dict[str, dict[int, Path]]:
    """Strategy -> seed -> run folder, finished or not."""
    found: dict[str, dict[int, Path]] = {}
    for point in plan.points:
        name, seed = str(point.levels[AXIS]), int(point.levels["seed"])
        found.setdefault(name, {})[seed] = folder / "runs" / point.name
    return found


__all__: Sequence[str] = ("ComparisonSpec", "cell_folders", "chosen_strategies", "make_comparison")
