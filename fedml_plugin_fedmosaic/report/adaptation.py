"""Unseen tasks in the report: scores of a new client over its first optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.report import plots
from fedml_plugin_fedmosaic.report.metrics import Run, mean
from fedml_plugin_fedmosaic.report.numbers import MISSING, percent
from fedml_plugin_fedmosaic.report.parts import Figure, Section
from fedml_plugin_fedmosaic.report.records import read_json
from fedml_plugin_fedmosaic.report.tables import SummaryTable

ADAPTATION_FILE = "adaptation.json"
AGGREGATED, FRESH = "aggregated", "fresh"
_MAX_FAINT = 3
"""Lines up to which a plot also shows single tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedTask:
    """One task of a new client.

    Attributes:
        strategy: whose adapters it started from.
        scenario: of the task.
        task: its name.
        model: of the new client.
        scores: start -> optimizer steps -> score in [0, 1].
        likelihood: start -> zero-shot score by the likelihood of the choices.
    """

    strategy: str
    scenario: str
    task: str
    model: str
    scores: dict[str, dict[int, float]]
    likelihood: dict[str, float]


def read_adaptations(run_dir: Path) -> tuple[AdaptedTask, ...]:
    """Reads ``adaptation.json`` of a run folder; empty without it.

    Raises:
        DataError: the file is damaged.
    """
    path = run_dir / ADAPTATION_FILE
    record = read_json(path, required=False)
    try:
        return tuple(
            AdaptedTask(
                strategy=run["strategy"],
                scenario=run["scenario"],
                task=task["task"],
                model=task["model"],
                scores={
                    start: {int(steps): float(value) for steps, value in line.items()}
                    for start, line in task["scores"].items()
                },
                likelihood=dict(task["likelihood"]),
            )
            for run in (record or {"runs": []})["runs"]
            for task in run["tasks"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged: {type(error).__name__}: {error}",
            hint="make it again with 'fedmosaic adapt'",
        ) from error


def mean_lines(tasks: Sequence[AdaptedTask], start: str) -> dict[int, float]:
    """Mean over the tasks of the scores from a start, at the steps that all tasks have."""
    lines = [task.scores[start] for task in tasks if start in task.scores]
    if not lines:
        return {}
    common = sorted(set.intersection(*(set(line) for line in lines)))
    return {steps: sum(line[steps] for line in lines) / len(lines) for steps in common}


_NOTES = (
    "Scores in percent of a new client after so many optimizer steps on a task that no client had,",
    "from the mean of the clients' adapters and from fresh ones. Likelihood: choices ranked.",
)


def adaptation_table(tasks: Sequence[AdaptedTask]) -> SummaryTable:
    """Two rows per task, from the aggregated and from fresh adapters, and their means."""
    steps = _steps(tasks)
    rows = [
        [
            task.strategy,
            task.task,
            task.model,
            start,
            percent(task.likelihood.get(start)),
            *(percent(line.get(number)) for number in steps),
        ]
        for task in tasks
        for start, line in task.scores.items()
    ]
    footer = [[row[0], "mean", "", *row[1:]] for row in adaptation_means(tasks).rows]
    columns = ["strategy", "task", "model", "start", _LIKELIHOOD, *map(_head, steps)]
    return SummaryTable(columns, [*rows, *footer], list(_NOTES), num_left=4, num_footer=len(footer))


def adaptation_means(tasks: Sequence[AdaptedTask]) -> SummaryTable:
    """Two rows per strategy: means over tasks and seeds from aggregated and fresh adapters."""
    steps = _steps(tasks)
    rows = []
    for strategy in dict.fromkeys(task.strategy for task in tasks):
        mine = [task for task in tasks if task.strategy == strategy]
        for start in (AGGREGATED, FRESH):
            line = mean_lines(mine, start)
            likely = mean(t.likelihood[start] for t in mine if start in t.likelihood)
            cells = [percent(likely), *(percent(line.get(number)) for number in steps)]
            if set(cells) != {MISSING}:
                rows.append([strategy, start, *cells])
    columns = ["strategy", "start", _LIKELIHOOD, *map(_head, steps)]
    return SummaryTable(columns, rows, list(_NOTES), num_left=2)


_LIKELIHOOD = "0 updates\nlikelihood"


def _steps(tasks: Sequence[AdaptedTask]) -> list[int]:
    return sorted({number for task in tasks for line in task.scores.values() for number in line})


def _head(steps: int) -> str:
    return f"{steps}\nupdates"


def unseen_tasks(run: Run) -> Section | None:
    """Zero-shot scores and adaptation speed of one run; None if nobody has looked."""
    tasks = read_adaptations(run.path)
    return unseen_section(tasks, adaptation_table(tasks)) if tasks else None


def unseen_section(tasks: Sequence[AdaptedTask], table: SummaryTable) -> Section:
    """A plot of the means over the tasks, and a table.

    Args:
        tasks: at least one; of one run or of several.
        table: below the plot.
    """
    means: dict[str, dict[int, float]] = {}
    singles: dict[str, dict[int, dict[int, float]]] = {}
    for strategy in dict.fromkeys(task.strategy for task in tasks):
        mine = [task for task in tasks if task.strategy == strategy and AGGREGATED in task.scores]
        means[strategy] = mean_lines(mine, AGGREGATED)
        singles[strategy] = {n: task.scores[AGGREGATED] for n, task in enumerate(mine)}
    fresh = [task for task in tasks if FRESH in task.scores]
    means[FRESH] = mean_lines(fresh, FRESH)
    if len(means) > _MAX_FAINT:
        singles = {}
    svg = plots.update_curves(
        singles, means, label="Scores on unseen tasks", ylabel="score, %", scale=100
    )
    caption = "Mean over the tasks bold, single tasks faint; 'fresh' starts from new adapters."
    lead = "A new client learns tasks that no client has had, from the aggregated adapters."
    return Section("unseen", "Unseen tasks", lead, (Figure(svg, caption),), table)
