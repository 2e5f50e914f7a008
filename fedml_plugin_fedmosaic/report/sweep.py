"""A sweep's runs, finished or not, as one table and CSV files.

Runs that differ only in their seed are one group. Means and intervals are over a group's finished
runs; a group without one shows its running runs' last evaluated round, marked with ``*``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.data.statistics import mean_interval
from fedml_plugin_fedmosaic.launch.sweep_manifest import Entry, Manifest
from fedml_plugin_fedmosaic.report.measures import MEASURES, Measure, known_measures, with_ci
from fedml_plugin_fedmosaic.report.metrics import Run, StrategyMetrics, load_run
from fedml_plugin_fedmosaic.report.numbers import MISSING
from fedml_plugin_fedmosaic.report.records import BASE, CLIENTS_FILE, METRICS_FILE
from fedml_plugin_fedmosaic.report.tables import SummaryTable

MARK = "*"
"""Marks values of runs that have not finished."""

_COLUMNS: Mapping[str, Callable[[StrategyMetrics], float | None]] = {
    # column of the CSV files: value of one run; shares in [0, 1], bytes, seconds
    measure.key: measure.read
    for measure in MEASURES
}
_OBJECTIVES: Mapping[str, Callable[[StrategyMetrics], float | None]] = {
    "self": lambda m: m.self_mean,
    "others": lambda m: m.others_mean,
    "worst": lambda m: m.worst,
    "a_auc": lambda m: m.a_auc,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One strategy of one run.

    Attributes:
        entry: the run in the manifest.
        strategy: its main strategy, or one that the run compares it with.
        metrics: what has been measured so far; None if nothing has.
    """

    entry: Entry
    strategy: str
    metrics: StrategyMetrics | None

    @property
    def is_finished(self) -> bool:
        """Whether the values are final."""
        return self.metrics is not None and self.metrics.finished is not None

    @property
    def is_going(self) -> bool:
        """Whether there are values, though not the last ones."""
        return self.metrics is not None and not self.is_finished


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        levels: axis name -> label, without the seed; for a compared strategy also ``strategy``.
        outcomes: its runs in the order of the manifest.
    """

    levels: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        """The levels in short, for plots."""
        return ", ".join(f"{key} {value}" for key, value in self.levels.items()) or "all runs"

    @property
    def shown(self) -> list[StrategyMetrics]:
        """Metrics behind the group's values: of finished runs, else of those that are going."""
        finished = [o.metrics for o in self.outcomes if o.is_finished and o.metrics is not None]
        return finished or [o.metrics for o in self.outcomes if o.metrics is not None]

    @property
    def is_partial(self) -> bool:
        """Whether no run of the group has finished."""
        return not any(outcome.is_finished for outcome in self.outcomes)

    def values(self, read: Callable[[StrategyMetrics], float | None]) -> list[float]:
        """A measure's values of the shown runs."""
        return [value for metrics in self.shown if (value := read(metrics)) is not None]

    @property
    def count(self) -> str:
        """Finished runs of all, as ``2/3``."""
        return f"{sum(o.is_finished for o in self.outcomes)}/{len(self.outcomes)}"


@dataclass(frozen=True, slots=True)
class SweepResults:
    """A sweep with what its runs have measured so far.

    Attributes:
        folder: of the sweep.
        manifest: its record, with the statuses to show.
        outcomes: one per run and strategy, in the order of the manifest.
    """

    folder: Path
    manifest: Manifest
    outcomes: tuple[Outcome, ...]

    @property
    def axes(self) -> list[str]:
        """Names of the axes without the seed."""
        names = dict.fromkeys(name for e in self.manifest.runs for name in e.levels)
        return [name for name in names if name != "seed"]

    @property
    def groups(self) -> list[Group]:
        """Runs by configuration and strategy."""
        several = len({(o.entry.name, o.strategy) for o in self.outcomes}) > len(self.manifest.runs)
        found: dict[tuple[Any, ...], list[Outcome]] = {}
        for outcome in self.outcomes:
            key = (outcome.entry.point.configuration, outcome.strategy if several else None)
            found.setdefault(key, []).append(outcome)
        return [
            Group({**dict(levels), **({"strategy": name} if name else {})}, tuple(outcomes))
            for (levels, name), outcomes in found.items()
        ]


def _run(run_dir: Path) -> Run | None:
    """A run folder as far as it has come; None before its first event."""
    if not all((run_dir / name).is_file() for name in (METRICS_FILE, CLIENTS_FILE)):
        return None
    run = load_run(run_dir)
    return run if run.strategies else None


def load_results(folder: Path, manifest: Manifest, *, compared: bool = False) -> SweepResults:
    """Reads all run folders of a sweep.

    Args:
        folder: of the sweep.
        manifest: its record.
        compared: also the strategies that a run compares its own with.

    Raises:
        DataError: a file of a run is damaged.
    """
    outcomes: list[Outcome] = []
    for entry in manifest.runs:
        run = _run(folder / entry.folder)
        if run is None or run.main is None:
            outcomes.append(Outcome(entry, "", None))
            continue
        names = [name for name in run.ordered if name != BASE] if compared else [run.main]
        outcomes += [Outcome(entry, name, run.strategies[name]) for name in names]
    return SweepResults(folder, manifest, tuple(outcomes))


def objective_value(run_dir: Path, objective: str) -> float | None:
    """What a sweep maximises, of a run's main strategy: a share in [0, 1], or None."""
    run = _run(run_dir)
    if run is None or run.main is None:
        return None
    return _OBJECTIVES[objective](run.strategies[run.main])


def _cell(group: Group, measure: Measure) -> str:
    values = group.values(measure.read)
    text = with_ci(values, measure)
    return text + MARK if group.is_partial and values else text


def sweep_table(results: SweepResults) -> SummaryTable:
    """One row per group: axes, finished runs, scores with intervals, bytes, steps, seconds."""
    groups = results.groups
    axes = list(dict.fromkeys(name for group in groups for name in group.levels))
    measures = known_measures(metrics for group in groups for metrics in group.shown)
    rows = [
        [
            *(str(group.levels.get(axis, MISSING)) for axis in axes),
            group.count,
            *(_cell(group, measure) for measure in measures),
        ]
        for group in groups
    ]
    notes = ["Scores in percent; A_AUC is the mean over all evaluated rounds."]
    if any(len(group.shown) > 1 for group in groups):
        notes.append("± is the half width of the 95 % confidence interval (Student t) over seeds.")
    if any(group.is_partial and group.shown for group in groups):
        notes.append(f"{MARK} no run has finished: the last evaluated round so far.")
    missing = [e.name for e in results.manifest.runs if e.needs_start]
    if missing:
        text = f"{missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        notes.append(f"Missing or failed: {text}; the same 'fedmosaic sweep' starts them again.")
    columns = [*axes, "runs", *(measure.name for measure in measures)]
    return SummaryTable(columns, rows, notes, num_left=len(axes))


def runs_csv(results: SweepResults) -> str:
    """One line per run and strategy; shares in [0, 1], bytes, seconds; empty where unknown."""
    axes = list(dict.fromkeys(name for e in results.manifest.runs for name in e.levels))
    rows: list[list[Any]] = [["run", "status", *axes, "strategy", "finished", "rounds", *_COLUMNS]]
    for outcome in results.outcomes:
        entry, metrics = outcome.entry, outcome.metrics
        rows.append(
            [
                entry.name,
                entry.status,
                *(entry.levels.get(axis, "") for axis in axes),
                outcome.strategy,
                str(outcome.is_finished).lower(),
                "" if metrics is None else len(metrics.rounds),
                *("" if metrics is None else read(metrics) for read in _COLUMNS.values()),
            ]
        )
    return _csv(rows)


def groups_csv(results: SweepResults) -> str:
    """One line per group: mean and half width of the 95 % interval of every measure."""
    groups = results.groups
    axes = list(dict.fromkeys(name for group in groups for name in group.levels))
    heads = [head for name in _COLUMNS for head in (name, f"{name}_ci95")]
    rows: list[list[Any]] = [[*axes, "runs", "finished", "partial", *heads]]
    for group in groups:
        cells: list[Any] = []
        for read in _COLUMNS.values():
            values = group.values(read)
            estimate = mean_interval(values) if values else None
            cells += [estimate.mean, estimate.half_width] if estimate else ["", ""]
        finished = sum(outcome.is_finished for outcome in group.outcomes)
        partial = str(group.is_partial and bool(group.shown)).lower()
        labels = [group.levels.get(axis, "") for axis in axes]
        rows.append([*labels, len(group.outcomes), finished, partial, *cells])
    return _csv(rows)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return stream.getvalue()
