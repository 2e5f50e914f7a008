"""The result of one run: a table with a row per client, and ``summary.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.report.learning import forgetting_of, forward_transfer_of
from fedml_plugin_fedmosaic.report.metrics import Run, StrategyMetrics, load_run, mean
from fedml_plugin_fedmosaic.report.numbers import MISSING, percent, points
from fedml_plugin_fedmosaic.report.records import BASE

SUMMARY_FILE = "summary.json"
MAX_WIDTH = 100
"""Columns of text that a summary may take, with three characters between two columns."""
REFERENCE = "local"
"""Strategy that paired differences are taken to."""


_NOTES = {
    "A_AUC": "A_AUC: mean Self over all evaluated rounds; the mean above is A_last.",
    "forgetting": "Forgetting: fall from a task's best score since its samples stopped arriving.",
    "transfer": "Transfer: gain over the base model on tasks whose samples had not arrived yet.",
}


@dataclass(frozen=True)
class SummaryTable:
    """A table of text cells, ready for a terminal, HTML or Markdown.

    Attributes:
        columns: headers; a newline separates a header's two lines.
        rows: cells, one list per row, as many as columns.
        notes: sentences to print below.
        num_left: leading columns that are text (the others are numbers: align them right).
        num_footer: last rows that sum up the others.
    """

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    num_left: int = 1
    num_footer: int = 0

    @property
    def widths(self) -> list[int]:
        """Width of every column in characters."""
        return [
            max(max(map(len, head.split("\n"))), *(len(row[i]) for row in self.rows), 0)
            for i, head in enumerate(self.columns)
        ]

    @property
    def width(self) -> int:
        """Width of the whole table with a frame: three characters a column and one more."""
        return sum(self.widths) + 3 * len(self.columns) + 1

    def to_text(self) -> str:
        """The table for a plain terminal or log file."""
        widths = self.widths
        heads = [head.split("\n") for head in self.columns]
        depth = max(map(len, heads))
        lines = [[""] * (depth - len(head)) + head for head in heads]
        table = [[line[level] for line in lines] for level in range(depth)]
        rule = "-+-".join("-" * width for width in widths)
        text = [self._line(cells, widths) for cells in table]
        text.append(rule)
        for number, row in enumerate(self.rows):
            if self.num_footer and number == len(self.rows) - self.num_footer:
                text.append(rule)
            text.append(self._line(row, widths))
        return "\n".join([*text, *self.notes])

    def to_markdown(self) -> str:
        """The table in Markdown."""
        heads = [head.replace("\n", " ") for head in self.columns]
        marks = ["---" if i < self.num_left else "---:" for i in range(len(heads))]
        lines = [f"| {' | '.join(cells)} |" for cells in (heads, marks, *self.rows)]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def transposed(self) -> SummaryTable:
        """Rows as columns, for a table with many measures and few strategies."""
        heads = [head.replace("\n", " ") for head in self.columns]
        rows = [[heads[i], *(row[i] for row in self.rows)] for i in range(1, len(heads))]
        return SummaryTable([heads[0], *(row[0] for row in self.rows)], rows, list(self.notes))

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        return " | ".join(
            cell.ljust(width) if i < self.num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()


def _pair(first: float | None, second: float | None) -> str:
    return f"{percent(first)} / {percent(second)}"


def _task_cells(run: Run, budget: int) -> list[str]:
    """Tasks per client within ``budget`` characters: names, or names and a count, or a count."""
    cells = []
    for client in run.clients:
        names = list(client.tasks)
        text = ", ".join(names)
        shown = len(names)
        while len(text) > budget and shown > 1:
            shown -= 1
            text = ", ".join(names[:shown]) + f" +{len(names) - shown}"
        cells.append(text if len(text) <= budget else f"{len(names)} tasks")
    return cells


def _summary(run: Run, names: Sequence[str], max_width: int) -> SummaryTable:
    columns = ["client", "model", "tasks", *(f"{name}\nSelf / Others" for name in names)]
    own = {name: run.strategies[name].client_scores("self") for name in names}
    others = {name: run.strategies[name].client_scores("others") for name in names}
    score_cells = [
        [_pair(own[n].get(c.client_id), others[n].get(c.client_id)) for n in names]
        for c in run.clients
    ]
    models = [client.label for client in run.clients]
    shown = _all(run, names)
    footer = [
        ["mean", "", "", *(_pair(m.self_mean, m.others_mean) for m in shown)],
        ["worst client", "", "", *(_pair(m.worst, m.worst_others) for m in shown)],
        *_over_time(shown),
    ]
    fixed = SummaryTable(
        columns,
        [
            *(
                [str(c.client_id), m, "", *s]
                for c, m, s in zip(run.clients, models, score_cells, strict=True)
            ),
            *footer,
        ],
        [],
    )
    budget = max(max_width - fixed.width + len("tasks"), len("12 tasks"))
    rows = [
        [str(client.client_id), model, tasks, *cells]
        for client, model, tasks, cells in zip(
            run.clients, models, _task_cells(run, budget), score_cells, strict=True
        )
    ]
    return SummaryTable(columns, [*rows, *footer], [], num_left=3, num_footer=len(footer))


def _over_time(shown: Sequence[StrategyMetrics]) -> list[list[str]]:
    """Footer rows of what is measured over the rounds, as far as it can be said."""
    rows = (
        ("A_AUC", [percent(m.a_auc) for m in shown]),
        ("forgetting", [points(m.forgetting) for m in shown]),
        ("transfer", [points(m.forward_transfer) for m in shown]),
    )
    return [[head, "", "", *cells] for head, cells in rows if set(cells) != {MISSING}]


def _all(run: Run, names: Sequence[str]) -> list[StrategyMetrics]:
    return [run.strategies[name] for name in names]


def summary_table(run: Run, max_width: int | None = MAX_WIDTH) -> SummaryTable:
    """Like :func:`summary_rows`, for a run that is already read; any width if None."""
    limit = sys.maxsize if max_width is None else max_width
    names = list(run.ordered)
    notes = [
        "Accuracy in percent: Self = the client's own tasks, Others = all other tasks; "
        "mean over tasks."
    ]
    table = _summary(run, names, limit)
    over_time = {row[0] for row in table.rows[-table.num_footer :]}
    notes += [text for head, text in _NOTES.items() if head in over_time]
    left_out: list[str] = []
    # Base, reference and main strategy stay as long as possible.
    optional = [name for name in names if name not in (BASE, REFERENCE, run.main)]
    for name in [*reversed(optional), BASE, REFERENCE]:
        if table.width <= limit or len(names) == 1:
            break
        if name in names and name != run.main:
            names.remove(name)
            left_out.append(name)
            table = _summary(run, names, limit)
    if left_out:
        notes.append(f"Left out for width (they are in report.html): {', '.join(left_out)}.")
    unfinished = [
        name for name in run.ordered if name != BASE and run.strategies[name].finished is None
    ]
    if unfinished:
        notes.append(f"Not finished: {', '.join(unfinished)}; the last evaluated round is shown.")
    failures = {name: text for name in run.ordered if (text := run.strategies[name].failure_text)}
    found = {name: text for name in run.ordered if (text := run.strategies[name].group_text)}
    notes += [
        f"Groups of {name} after the last round (clients): {text}." for name, text in found.items()
    ]
    notes += [f"Failures of {name}: {text}." for name, text in failures.items()]
    return SummaryTable(table.columns, table.rows, notes, table.num_left, table.num_footer)


def summary_rows(run_dir: Path) -> SummaryTable:
    """One row per client, with Self and Others of base, compared and main strategy.

    Args:
        run_dir: run folder, finished or not.

    Returns:
        A table at most :data:`MAX_WIDTH` characters wide; the last rows are the mean over the
        clients, the worst client (the smallest value of each column) and what is measured over the
        rounds: A_AUC and, where tasks arrive one after the other, forgetting and forward transfer.

    Raises:
        DataError: the folder is not a run folder, or a file in it is damaged.
    """
    return summary_table(load_run(run_dir))


def summary_record(run: Run) -> dict[str, Any]:
    """The numbers of a run as JSON-ready values; shares in [0, 1], bytes, seconds."""
    strategies = {}
    for name in run.ordered:
        metrics = run.strategies[name]
        own, others = metrics.client_scores("self"), metrics.client_scores("others")
        forgotten = forgetting_of(metrics.scores(), metrics.stream)
        transferred = forward_transfer_of(metrics.scores(), metrics.stream)
        groups = metrics.groups
        strategies[name] = {
            "view": metrics.view,
            "self": metrics.self_mean,
            "others": metrics.others_mean,
            "worst_client_self": metrics.worst,
            "worst_client_others": metrics.worst_others,
            "a_last": metrics.self_mean,
            "a_auc": metrics.a_auc,
            "forgetting": metrics.forgetting,
            "forward_transfer": metrics.forward_transfer,
            "rounds": len(metrics.rounds),
            "steps": metrics.num_steps,
            "dropped_clients": len(metrics.dropped),
            "skipped_rounds": len(metrics.skipped),
            "uplink_bytes_per_client_and_round": metrics.bytes_per_client_round("uplink"),
            "downlink_bytes_per_client_and_round": metrics.bytes_per_client_round("downlink"),
            "effective_sources": metrics.effective_sources,
            "groups": {str(c): name for c, name in groups[max(groups)].items()} if groups else None,
            "group_moves": len(metrics.group_moves) if groups else None,
            "flops": metrics.flops,
            "train_s": metrics.train_s,
            "duration_s": metrics.duration_s,
            "finished": name == BASE or metrics.finished is not None,
            "clients": {
                str(client.client_id): {
                    "self": own.get(client.client_id),
                    "others": others.get(client.client_id),
                    "forgetting": forgotten.get(client.client_id),
                    "forward_transfer": transferred.get(client.client_id),
                }
                for client in run.clients
            },
            "views": {
                view: {
                    scope: mean(metrics.client_scores(scope, view).values())
                    for scope in ("self", "others")
                }
                for view in metrics.views
            },
        }
    return {
        "main": run.main,
        "seed": run.environment.get("seed"),
        "num_clients": len(run.clients),
        "num_tasks": len(run.tasks),
        "strategies": strategies,
    }


def write_summary(run_dir: Path) -> Path:
    """Writes ``summary.json`` into a run folder.

    Args:
        run_dir: run folder, finished or not.

    Returns:
        The file's path.

    Raises:
        DataError: the folder is not a run folder, or a file in it is damaged.
    """
    record = summary_record(load_run(run_dir))
    path = run_dir / SUMMARY_FILE
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path
