"""A page for several runs: strategies side by side, with confidence intervals over the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.statistics import mean_interval
from fedml_plugin_fedmosaic.report import plots
from fedml_plugin_fedmosaic.report.adaptation import (
    AdaptedTask,
    adaptation_means,
    unseen_section,
)
from fedml_plugin_fedmosaic.report.html import render, write_page
from fedml_plugin_fedmosaic.report.learning import task_boundaries
from fedml_plugin_fedmosaic.report.matrix_plots import heat_map
from fedml_plugin_fedmosaic.report.measures import (
    MEASURES,
    cost_table,
    measured,
    paired_differences,
    score_table,
    strategies_of,
)
from fedml_plugin_fedmosaic.report.metrics import Run, load_run, mean
from fedml_plugin_fedmosaic.report.numbers import percent
from fedml_plugin_fedmosaic.report.parts import Figure, Section
from fedml_plugin_fedmosaic.report.records import BASE
from fedml_plugin_fedmosaic.report.style import COLOURS
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


def _rounds(runs: Sequence[Run]) -> Section | None:
    """Self over the rounds: the reference, the main strategy and those that end highest."""
    lines = {name: mean_curves(runs, name) for name in strategies_of(runs) if name != BASE}
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    last = {name: line[max(line)] for name, line in lines.items()}
    ends = [name for name in (REFERENCE, runs[-1].main) if name in lines]
    ranked = [name for name in sorted(lines, key=lambda n: -last[n]) if name not in ends]
    shown = [str(name) for name in dict.fromkeys([*ends, *ranked])][: len(COLOURS)]
    singles = {
        name: {
            number: run.strategies[name].mean_curve
            for number, run in enumerate(runs)
            if name in run.strategies
        }
        for name in shown
    }
    boundaries = task_boundaries(runs[0].schedule)
    svg = plots.curves(
        singles,
        {name: lines[name] for name in shown},
        ylabel="Self, %",
        label="Self over the rounds",
        scale=100,
        boundaries=boundaries,
    )
    caption = "Mean over the seeds bold, single seeds faint."
    if boundaries:
        caption += " Grey lines: a new task begins."
    if len(shown) < len(lines):
        caption += f" The other {len(lines) - len(shown)} strategies end lower."
    return Section("rounds", "Rounds", figures=(Figure(svg, caption),))


def mean_curves(runs: Sequence[Run], name: str) -> dict[int, float]:
    """Self of a strategy over the rounds, as a mean over the runs that have it."""
    lines = [run.strategies[name].mean_curve for run in runs if name in run.strategies]
    lines = [line for line in lines if line]
    if not lines:
        return {}
    common = sorted(set.intersection(*(set(line) for line in lines)))
    return {r: sum(line[r] for line in lines) / len(lines) for r in common}


def _clients(runs: Sequence[Run]) -> Section | None:
    """Who gains and who loses: mean paired difference of Self per strategy and client."""
    names = [name for name in strategies_of(runs) if name not in (BASE, REFERENCE)]
    ids = [client.client_id for client in runs[0].clients]
    cells: list[list[float | None]] = []
    for name in names:
        pairs = [
            (run.strategies[name].client_scores("self"), run.strategies[REFERENCE])
            for run in runs
            if name in run.strategies and REFERENCE in run.strategies
        ]
        row: list[float | None] = []
        for client_id in ids:
            found = [
                own[client_id] - other.client_scores("self")[client_id]
                for own, other in pairs
                if client_id in own and client_id in other.client_scores("self")
            ]
            row.append(mean(found))
        cells.append(row)
    if not any(value is not None for row in cells for value in row):
        return None
    svg = heat_map(
        cells,
        names,
        [str(client_id) for client_id in ids],
        label=f"Self against {REFERENCE} by strategy and client",
        bar="points",
        scale=100,
        digits=1,
        diverging=True,
        xlabel="client",
    )
    caption = f"Difference of Self to {REFERENCE} in percentage points, mean over the seeds."
    return Section("clients", "Who gains, who loses", figures=(Figure(svg, caption),))


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


def comparison_sections(
    runs: Sequence[Run], notes: Sequence[str] = (), adapted: Sequence[AdaptedTask] = ()
) -> list[Section]:
    """What a page says of several runs.

    Args:
        runs: at least one.
        notes: sentences below the first table, e.g. about runs that are missing.
        adapted: scores on unseen tasks.
    """
    table = score_table(runs)
    table.notes.extend(notes)
    parts = (
        Section("table", "Result", table=table),
        _scores(runs),
        _differences(runs),
        _rounds(runs),
        _clients(runs),
        unseen_section(adapted, adaptation_means(adapted)) if adapted else None,
        Section("cost", "Cost", table=cost_table(runs)),
        Section("runs", "Runs", table=_runs_table(runs)),
    )
    return [part for part in parts if part is not None]


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
    return write_runs_page([load_run(path) for path in run_dirs], out)


def write_runs_page(
    runs: Sequence[Run],
    out: Path,
    *,
    title: str | None = None,
    notes: Sequence[str] = (),
    adapted: Sequence[AdaptedTask] = (),
) -> Path:
    """Like :func:`write_comparison`, for runs that are already read; at least one."""
    names = [name for name in strategies_of(runs) if name != BASE]
    text = render(
        title=title or f"Comparison of {', '.join(names) or 'runs'}",
        subtitle=f"{len(runs)} run{'s' if len(runs) > 1 else ''}",
        numbers=[],
        sections=comparison_sections(runs, notes, adapted),
    )
    return write_page(out, text)
