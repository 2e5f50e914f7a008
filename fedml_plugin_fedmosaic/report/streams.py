"""What happens to a task's score after its samples have stopped, and before they arrive."""

from __future__ import annotations

from fedml_plugin_fedmosaic.report import plots
from fedml_plugin_fedmosaic.report.learning import (
    forgetting_of,
    forward_transfer_of,
    position_curves,
    task_boundaries,
)
from fedml_plugin_fedmosaic.report.metrics import Run
from fedml_plugin_fedmosaic.report.numbers import percent, points
from fedml_plugin_fedmosaic.report.parts import Figure, Section
from fedml_plugin_fedmosaic.report.records import BASE
from fedml_plugin_fedmosaic.report.style import COLOURS
from fedml_plugin_fedmosaic.report.tables import SummaryTable


def _positions(run: Run, boundaries: tuple[int, ...]) -> Figure | None:
    """The main strategy's score on the clients' first task, their second, and so on."""
    if run.main is None:
        return None
    metrics = run.strategies[run.main]
    lines = position_curves(metrics.scores(), metrics.stream)
    lines = {place: line for place, line in lines.items() if len(line) > 1}
    if not 1 < len(lines) <= len(COLOURS):
        return None
    svg = plots.curves(
        {},
        {f"task {place + 1}": line for place, line in lines.items()},
        ylabel="accuracy, %",
        label="Accuracy of each task over the rounds",
        scale=100,
        boundaries=boundaries,
    )
    caption = (
        f"{run.main}: mean over the clients of the score on their first task, their second, and so "
        "on. A line that falls after the next task has begun is forgetting; one that rises before "
        "its own task has begun is forward transfer."
    )
    return Figure(svg, caption)


def over_the_stream(run: Run) -> Section | None:
    """Scores by the tasks' order in time; None unless tasks arrive one after the other."""
    boundaries = task_boundaries(run.schedule)
    named = [run.strategies[name] for name in run.ordered if name != BASE]
    rows = [
        [
            metrics.name,
            percent(metrics.self_mean),
            percent(metrics.a_auc),
            points(metrics.forgetting),
            points(metrics.forward_transfer),
            _worst(forgetting_of(metrics.scores(), metrics.stream), most=True),
            _worst(forward_transfer_of(metrics.scores(), metrics.stream), most=False),
        ]
        for metrics in named
        if metrics.forgetting is not None or metrics.forward_transfer is not None
    ]
    figure = _positions(run, boundaries) if boundaries else None
    if not rows and figure is None:
        return None
    columns = ["strategy", "Self\nA_last", "Self\nA_AUC", "forgetting", "forward\ntransfer",
               "most forgetting\nof a client", "least transfer\nof a client"]  # fmt: skip
    notes = ["In percent and percentage points; forgetting above zero is a loss."]
    table = SummaryTable(columns, rows, notes) if rows else None
    lead = "Tasks arrive one after the other: what stays of earlier ones, what helps later ones."
    return Section("stream", "Over the stream", lead, (figure,) if figure else (), table)


def _worst(by_client: dict[int, float], *, most: bool) -> str:
    if not by_client:
        return points(None)
    client_id = (max if most else min)(by_client, key=lambda key: by_client[key])
    return f"{points(by_client[client_id])} (client {client_id})"
