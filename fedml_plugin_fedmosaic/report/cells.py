"""Puts the runs of a comparison together: one run per strategy and seed becomes one per seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedml_plugin_fedmosaic.report.adaptation import AdaptedTask, read_adaptations
from fedml_plugin_fedmosaic.report.metrics import Run, StrategyMetrics, load_run, with_stream
from fedml_plugin_fedmosaic.report.records import BASE, CLIENTS_FILE, METRICS_FILE

Cells = Mapping[str, Mapping[int, Path]]
"""Strategy -> seed -> run folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The finished cells of a comparison.

    Attributes:
        runs: one per seed with at least one finished cell, ascending; the strategies of a run saw
            the same data and base models.
        seeds: of the runs.
        strategies: that were asked for, in order.
        missing: (strategy, seed) of the cells that have not finished.
        adapted: what the cells' adapters are worth on unseen tasks, where someone has looked.
    """

    runs: tuple[Run, ...]
    seeds: tuple[int, ...]
    strategies: tuple[str, ...]
    missing: tuple[tuple[str, int], ...]
    adapted: tuple[AdaptedTask, ...] = ()


def finished_run(folder: Path, strategy: str) -> Run | None:
    """The run of a cell; None before its strategy has finished.

    Raises:
        DataError: a file of the run is damaged.
    """
    if not all((folder / name).is_file() for name in (METRICS_FILE, CLIENTS_FILE)):
        return None
    run = load_run(folder)
    metrics = run.strategies.get(strategy)
    return run if metrics is not None and metrics.finished is not None else None


def join_cells(cells: Cells) -> Joined:
    """Reads the finished cells.

    Raises:
        DataError: a file of a run is damaged.
    """
    by_seed: dict[int, dict[str, Run]] = {}
    missing = []
    adapted: list[AdaptedTask] = []
    for strategy, seeds in cells.items():
        for seed, folder in seeds.items():
            run = finished_run(folder, strategy)
            if run is None:
                missing.append((strategy, seed))
            else:
                by_seed.setdefault(seed, {})[strategy] = run
                adapted += read_adaptations(folder)
    seeds_found = tuple(sorted(by_seed))
    return Joined(
        runs=tuple(_one_run(by_seed[seed]) for seed in seeds_found),
        seeds=seeds_found,
        strategies=tuple(cells),
        missing=tuple(missing),
        adapted=tuple(adapted),
    )


def _one_run(by_strategy: Mapping[str, Run]) -> Run:
    """One run that holds the strategies of all; the base models' scores are those of the first."""
    strategies: dict[str, StrategyMetrics] = {}
    for run in by_strategy.values():
        if BASE in run.strategies and BASE not in strategies:
            strategies[BASE] = run.strategies[BASE]
    strategies |= {name: run.strategies[name] for name, run in by_strategy.items()}
    first = next(iter(by_strategy.values()))
    return replace(
        first,
        strategies=with_stream(strategies, first.clients, first.schedule),
        main=list(by_strategy)[-1],
    )
