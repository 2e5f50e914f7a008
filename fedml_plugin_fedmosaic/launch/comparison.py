"""A comparison as a sweep: every strategy with every seed is one run, a *cell*.

The folder of a comparison may grow: the same command with more strategies or seeds starts only the
cells that are missing, have failed or were interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.messages import unknown
from fedml_plugin_fedmosaic.config.overrides import resolve_key
from fedml_plugin_fedmosaic.config.yamlfile import parse_value
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.launch.sweep_axes import ALGO_KEY, SEED_KEY
from fedml_plugin_fedmosaic.launch.sweep_plan import SweepPlan, SweepSpec, make_plan

ALL = "all"
REFERENCE = "local"
AXIS = "strategy"
_BASE_KEY = "eval_args.evaluation.base"
_COMPARE = "eval_args.evaluation.compare=[]"
_OWN = ("optim_args.optim", "sketch_args.sketch", "strategy_args.strategy")
_COMPUTE = tuple(f"{_OWN[0]}.{key}" for key in ("num_steps", "batch_size", "grad_accumulation"))

Settings = Mapping[str, Mapping[str, Any]]
"""Strategy -> full key path -> value: what only its cells get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonSpec:
    """What is compared.

    Attributes:
        cf: configuration file; the bundled quickstart when None.
        overrides: ``--set`` texts that hold for every cell.
        strategies: registry names, each once.
        seeds: number of seeds; they count up from the configuration's own.
        max_parallel: cells at once.
        settings: what only one strategy's cells get, after ``overrides``.
    """

    cf: Path | None = None
    overrides: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    seeds: int = 3
    max_parallel: int = 1
    settings: Settings = field(default_factory=dict)


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


def own_settings(entries: Iterable[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    """Checks what single strategies shall have for themselves, and joins it.

    Args:
        entries: (strategy, key in any spelling that ``--set`` takes, value); later ones count.

    Raises:
        ConfigError: the strategy or the key is not known, or the key is not one that strategies of
            a comparison may differ in: it would change the data, the models or the compute.
    """
    found: dict[str, dict[str, Any]] = {}
    for written, key, value in entries:
        name = written.strip().lower()
        if name not in STRATEGIES:
            raise ConfigError(unknown("strategy", name, list(STRATEGIES)))
        path = ".".join(map(str, resolve_key(key)))
        if path in _COMPUTE or not path.startswith(tuple(f"{place}." for place in _OWN)):
            raise ConfigError(
                f"{path} must be the same for all strategies of a comparison",
                hint="one strategy may have its own learning rates and schedule (optim_args), "
                "sketch_args and strategy_args",
            )
        found.setdefault(name, {})[path] = value
    return found


def parse_own(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """``--for STRATEGY KEY=VALUE`` as :func:`own_settings` makes it.

    Raises:
        ConfigError: it is written otherwise, or is refused.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, text in pairs:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--for {name} {text}: expected KEY=VALUE after the strategy",
                hint="for example --for fedmosaic learning_rate=4e-3",
            )
        try:
            own = own_settings([(name, key.strip(), parse_value(raw))])
        except ConfigError as error:
            raise ConfigError(f"--for {name} {text}: {error.message}", hint=error.hint) from error
        for strategy, changes in own.items():
            found.setdefault(strategy, {}).update(changes)
    return found


def make_comparison(spec: ComparisonSpec) -> SweepPlan:
    """Checks the configuration of every cell.

    The untouched base models are evaluated once per seed, by the first strategy's cells.

    Raises:
        ConfigError: a key, a value or a combination is wrong (all are listed), or a strategy has
            settings but no cells.
    """
    idle = [name for name in spec.settings if name not in spec.strategies]
    if idle:
        raise ConfigError(
            f"--for {idle[0]}: the strategy is not compared; these are: "
            f"{', '.join(spec.strategies)}",
            hint="add it to --strategies",
        )
    overrides = (*spec.overrides, _COMPARE)
    base = load_experiment(spec.cf, overrides)
    first = base.common.random_seed
    levels: dict[str, Mapping[str, Any]] = {}
    for number, name in enumerate(spec.strategies):
        without_base = {_BASE_KEY: False} if number and base.evaluation.base else {}
        levels[name] = {ALGO_KEY: name, **spec.settings.get(name, {}), **without_base}
    return make_plan(
        SweepSpec(
            cf=spec.cf,
            overrides=overrides,
            grids=({AXIS: levels, SEED_KEY: list(range(first, first + spec.seeds))},),
            max_parallel=spec.max_parallel,
            grows=True,
            free=(_BASE_KEY,),
        )
    )


def cell_folders(folder: Path, plan: SweepPlan) -> dict[str, dict[int, Path]]:
    """Strategy -> seed -> run folder, finished or not."""
    found: dict[str, dict[int, Path]] = {}
    for point in plan.points:
        name, seed = str(point.levels[AXIS]), int(point.levels["seed"])
        found.setdefault(name, {})[seed] = folder / "runs" / point.name
    return found


__all__: Sequence[str] = (
    "ComparisonSpec",
    "Settings",
    "cell_folders",
    "chosen_strategies",
    "make_comparison",
    "own_settings",
    "parse_own",
)
