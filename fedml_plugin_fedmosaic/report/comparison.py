"""A page for several runs: strategies side by side, with confidence intervals over the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.statistics import mean_interval
from fedml_plugin_fedmosaic.report import plots
from fedml_plugin_fedmosaic.report.html import render, write_page
from fedml_plugin_fedmosaic.report.measures import (
    MEASURES,
    comparison_table,
    measured,
    paired_differences,
    strategies_of,
)
from fedml_plugin_fedmosaic.report.metrics import Run, load_run
from fedml_plugin_fedmosaic.report.numbers import percent
from fedml_plugin_fedmosaic.report.parts import Figure, Section
from fedml_plugin_fedmosaic.report.records import BASE
from fedml_plugin_fedmosaic.report.tables import REFERENCE, SummaryTable

Interval = tuple[str, float, float | None, list[float]]


def score_intervals(values: Mapping[str, Sequence[float]]) -> list[Interval]:
    """Shares of several runs as percent with confidence intervals, for the interval plot."""
    found: list[Interval] = []
    for name, numbers in values.items():
        if numbers:
            shares = [100 * number for number in numbers]
            estimate = mean_interval(shares)
            found.append((name, estimate.mean, estimate.half_width, shares))
    return found


def _scores(runs: Sequence[Run]) -> Section | None:
    panels = {}
    for measure in MEASURES:
        title = measure.title
        if measure.is_main:
            values = {name: measured(runs, name, measure) for name in strategies_of(runs)}
            panels[title] = score_intervals(values)
    panels = {title: items for title, items in panels.items() if items}
    if not panels:
        return None
    svg = plots.intervals(panels, xlabel="%", label="Scores of the strategies")
    caption = "Mean and 95 % confidence interval over the runs; strokes are single runs."
    return Section("scores", "Scores", figures=(Figure(svg, caption),))


def _differences(runs: Sequence[Run]) -> Section | None:
    names = [name for name in strategies_of(runs) if name not in (BASE, REFERENCE)]
    panels = {}
    for measure in MEASURES:
        if measure.is_main:
            values = {name: paired_differences(runs, name, measure) for name in names}
            panels[measure.title] = score_intervals(values)
    panels = {title: items for title, items in panels.items() if items}
    if not panels:
        return None
    svg = plots.intervals(panels, xlabel="points", label="Paired differences", zero=True)
    lead = "Paired inside each run: what a seed does to both strategies cancels."
    caption = "An interval that does not touch zero is a difference at the 5 % level of one test."
    title = f"Difference to {REFERENCE}"
    return Section("differences", title, lead, figures=(Figure(svg, caption),))


def _runs_table(runs: Sequence[Run]) -> SummaryTable:
    rows = []
    for run in runs:
        main = run.strategies.get(run.main or "")
        rows.append(
            [
                run.path.resolve().name,
                run.main or "-",
                str(run.environment.get("seed", "-")),
                str(len(run.clients)),
                percent(main.self_mean if main else None),
                percent(main.others_mean if main else None),
            ]
        )
    columns = ["run", "strategy", "seed", "clients", "Self", "Others"]
    return SummaryTable(columns, rows, [], num_left=2)


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes a self-contained page that compares the strategies of several runs.

    Args:
        run_dirs: run folders, usually the same experiment with other seeds.
        out: the page to write; its folder is made if needed.

    Returns:
        ``out``.

    Raises:
        DataError: no folder, or one is not a run folder.
    """
    if not run_dirs:
        raise DataError("no run folder to compare", hint="give at least one run folder")
    runs = [load_run(path) for path in run_dirs]
    parts = (
        Section("table", "Result", table=comparison_table(runs).transposed()),
        _scores(runs),
        _differences(runs),
        Section("runs", "Runs", table=_runs_table(runs)),
    )
    names = [name for name in strategies_of(runs) if name != BASE]
    text = render(
        title=f"Comparison of {', '.join(names) or 'runs'}",
        subtitle=f"{len(runs)} run{'s' if len(runs) > 1 else ''}",
        numbers=[],
        sections=[part for part in parts if part is not None],
    )
    return write_page(out, text)
