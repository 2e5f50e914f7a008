"""Where a run was resumed: marks for the plots, and the lives as a table."""

from __future__ import annotations

from fedml_plugin_fedmosaic.report.metrics import Run
from fedml_plugin_fedmosaic.report.parts import Section
from fedml_plugin_fedmosaic.report.tables import SummaryTable


def resumed_rounds(run: Run) -> dict[str, tuple[int, ...]]:
    """Strategy -> 0-based rounds at which a new life began, ascending.

    A life that had no round left to do, only an evaluation, is not among them.
    """
    found: dict[str, set[int]] = {}
    for resumption in run.resumptions:
        metrics = run.strategies.get(resumption.strategy)
        if metrics is not None and resumption.rounds_done in metrics.cohorts:
            found.setdefault(resumption.strategy, set()).add(resumption.rounds_done)
    return {name: tuple(sorted(rounds)) for name, rounds in found.items()}


def lives(run: Run) -> Section | None:
    """When and where the run was resumed; None if it never was."""
    rows = [
        [str(number), item.time, item.strategy, str(item.rounds_done), str(item.ranks)]
        for number, item in enumerate(run.resumptions, start=2)
    ]
    if not rows:
        return None
    columns = ["life", "began", "strategy", "rounds done", "ranks"]
    lead = "The run was interrupted and went on; its results are those of an uninterrupted one."
    return Section("lives", "Lives", lead, table=SummaryTable(columns, rows, [], num_left=3))
