"""A sweep as one self-contained page: table, intervals, heat maps, curves and the runs' states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedml_plugin_fedmosaic.report import matrix_plots, plots
from fedml_plugin_fedmosaic.report.comparison import score_intervals
from fedml_plugin_fedmosaic.report.html import render, write_page
from fedml_plugin_fedmosaic.report.measures import MEASURES
from fedml_plugin_fedmosaic.report.metrics import mean
from fedml_plugin_fedmosaic.report.numbers import MISSING, percent
from fedml_plugin_fedmosaic.report.parts import Figure, Headline, Section
from fedml_plugin_fedmosaic.report.style import COLOURS, Curve
from fedml_plugin_fedmosaic.report.sweep import (
    Group,
    SweepResults,
    groups_csv,
    runs_csv,
    sweep_table,
)
from fedml_plugin_fedmosaic.report.tables import SummaryTable

PAGE_FILE = "sweep.html"
RUNS_CSV = "runs.csv"
GROUPS_CSV = "groups.csv"
_MAX_INTERVALS = 40
_MAX_CURVES = len(COLOURS)


def _status_table(results: SweepResults) -> SummaryTable:
    by_name = {outcome.entry.name: outcome for outcome in reversed(results.outcomes)}
    rows = []
    for entry in results.manifest.runs:
        metrics = by_name[entry.name].metrics
        rows.append(
            [
                entry.name,
                entry.status,
                str(entry.attempts),
                str(len(metrics.rounds)) if metrics else MISSING,
                percent(metrics.self_mean if metrics else None),
                percent(metrics.others_mean if metrics else None),
            ]
        )
    columns = ["run", "status", "attempts", "rounds", "Self", "Others"]
    return SummaryTable(columns, rows, [], num_left=2)


def _intervals(groups: Sequence[Group]) -> Figure | None:
    panels = {}
    for measure in MEASURES:
        title = measure.title
        if measure.is_main:
            items = score_intervals({g.name: g.values(measure.read) for g in groups})
            if items:
                panels[title] = items
    if not panels:
        return None
    # The panels share one axis of names, so each has all of them.
    full = min(len(items) for items in panels.values()) == max(map(len, panels.values()))
    if not full:
        most = max(map(len, panels.values()))
        panels = {title: items for title, items in panels.items() if len(items) == most}
    svg = plots.intervals(panels, xlabel="%", label="Scores of the configurations")
    return Figure(svg, "Mean and 95 % confidence interval over the seeds; strokes are single runs.")


def _heat_maps(groups: Sequence[Group]) -> list[Figure]:
    """One matrix per score when two axes are varied."""
    axes = list(dict.fromkeys(name for group in groups for name in group.levels))
    if len(axes) != 2 or len(groups) < 4:
        return []
    labels = [list(dict.fromkeys(group.levels[axis] for group in groups)) for axis in axes]
    place = {tuple(group.levels[axis] for axis in axes): group for group in groups}
    figures = []
    for measure in MEASURES:
        title = measure.title
        if not measure.is_main:
            continue
        cells = [
            [mean(place[a, b].values(measure.read)) if (a, b) in place else None for b in labels[1]]
            for a in labels[0]
        ]
        if all(value is None for row in cells for value in row):
            continue
        svg = matrix_plots.heat_map(
            cells,
            [str(label) for label in labels[0]],
            [str(label) for label in labels[1]],
            label=f"{title} by {axes[0]} and {axes[1]}",
            bar="%",
            scale=100.0,
            digits=1,
            xlabel=axes[1],
            ylabel=axes[0],
        )
        figures.append(Figure(svg, f"{title} in percent, mean over the seeds."))
    return figures


def _curves(groups: Sequence[Group]) -> Figure | None:
    shown = [group for group in groups if any(m.mean_curve for m in group.shown)]
    if not shown or len(shown) > _MAX_CURVES:
        return None
    singles: dict[str, dict[int, Curve]] = {}
    means: dict[str, Curve] = {}
    for group in shown:
        lines = [metrics.mean_curve for metrics in group.shown if metrics.mean_curve]
        common = sorted(set.intersection(*(set(line) for line in lines)))
        singles[group.name] = dict(enumerate(lines))
        means[group.name] = {r: sum(line[r] for line in lines) / len(lines) for r in common}
    if not any(len(line) > 1 for line in means.values()):
        return None
    svg = plots.curves(singles, means, ylabel="Self in %", label="Self over the rounds", scale=100)
    return Figure(svg, "Self over the rounds: bold the mean over the seeds, faint the single runs.")


def _sections(results: SweepResults) -> list[Section]:
    groups = [group for group in results.groups if group.shown]
    figures = _heat_maps(groups)
    if len(groups) <= _MAX_INTERVALS:
        scores = _intervals(groups)
        figures = [scores, *figures] if scores else figures
    curves = _curves(groups)
    sections = [Section("table", "Result", table=sweep_table(results))]
    if figures:
        sections.append(Section("scores", "Scores", figures=tuple(figures)))
    if curves:
        sections.append(Section("curves", "Rounds", figures=(curves,)))
    sections.append(Section("runs", "Runs", table=_status_table(results)))
    return sections


def _headlines(results: SweepResults) -> list[Headline]:
    counts = results.manifest.counts()
    done = counts.get("COMPLETED", 0)
    rest = ", ".join(
        f"{n} {status.lower()}" for status, n in counts.items() if status != "COMPLETED"
    )
    numbers = [Headline("runs completed", f"{done} of {len(results.manifest.runs)}", rest)]
    scored = [(group, mean(group.values(lambda m: m.self_mean))) for group in results.groups]
    known = [(value, group) for group, value in scored if value is not None]
    if len(known) > 1:
        value, group = max(known, key=lambda pair: pair[0])
        numbers.append(Headline("highest Self", f"{percent(value)} %", group.name))
    return numbers


def write_sweep_page(results: SweepResults, out: Path) -> Path:
    """Writes a self-contained page about a sweep, finished or not."""
    runs = results.manifest.runs
    axes = ", ".join(results.axes) or "the seed only"
    text = render(
        title=f"Sweep {results.folder.resolve().name}",
        subtitle=f"{len(runs)} run{'s' if len(runs) != 1 else ''}, varied: {axes}",
        numbers=_headlines(results),
        sections=_sections(results),
    )
    return write_page(out, text)


def write_collection(results: SweepResults) -> tuple[Path, Path, Path]:
    """Writes ``sweep.html``, ``runs.csv`` and ``groups.csv`` into the sweep's folder."""
    page = write_sweep_page(results, results.folder / PAGE_FILE)
    runs = write_page(results.folder / RUNS_CSV, runs_csv(results))
    groups = write_page(results.folder / GROUPS_CSV, groups_csv(results))
    return page, runs, groups
