"""Several comparisons as one leaderboard: strategies against experiments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.report import plots
from fedml_plugin_fedmosaic.report.adaptation import adaptation_means
from fedml_plugin_fedmosaic.report.cells import Joined
from fedml_plugin_fedmosaic.report.comparison import score_intervals
from fedml_plugin_fedmosaic.report.html import render, write_page
from fedml_plugin_fedmosaic.report.matrix_plots import heat_map
from fedml_plugin_fedmosaic.report.measures import (
    MEASURES,
    SIGNIFICANCE,
    Measure,
    cost_table,
    difference_cells,
    measured,
    paired_differences,
    score_table,
    strategies_of,
    with_ci,
)
from fedml_plugin_fedmosaic.report.metrics import mean
from fedml_plugin_fedmosaic.report.numbers import MISSING, points
from fedml_plugin_fedmosaic.report.parts import Figure, Headline, Section
from fedml_plugin_fedmosaic.report.records import BASE
from fedml_plugin_fedmosaic.report.results import (
    FIGURES_FOLDER,
    Origin,
    markdown_of,
    missing_notes,
    results_record,
)
from fedml_plugin_fedmosaic.report.style import Cells, standalone
from fedml_plugin_fedmosaic.report.tables import REFERENCE, SummaryTable

PAGE_FILE = "leaderboard.html"
RESULTS_FILE = "results.json"
MARKDOWN_FILE = "results.md"
MAIN = "fedmosaic"
_SELF = next(measure for measure in MEASURES if measure.key == "self")
_VERSION = 1

Comparisons = Mapping[str, Joined]
"""Label of the experiment -> its finished cells; at least one each."""


def _names(comparisons: Comparisons) -> list[str]:
    return list(
        dict.fromkeys(n for joined in comparisons.values() for n in strategies_of(joined.runs))
    )


def leaderboard_table(comparisons: Comparisons, measure: Measure = _SELF) -> SummaryTable:
    """One row per strategy, one column per experiment, and the mean rank.

    Args:
        comparisons: by experiment.
        measure: what is compared.

    Returns:
        Strategies from the best mean rank on; the base models and those without a value come last.
        A cell says the mean, its interval and, in brackets, the mark of the paired difference to
        the reference.
    """
    names = _names(comparisons)
    ranks = mean_ranks(comparisons, measure)
    cells: dict[str, list[str]] = {name: [] for name in names}
    for joined in comparisons.values():
        marks = difference_cells(joined.runs, names, measure)
        for name in names:
            mark = "".join(letter for letter in marks[name] if letter == "*")
            text = with_ci(measured(joined.runs, name, measure), measure)
            cells[name].append(f"{text} {mark}".strip())
    ordered = sorted(names, key=lambda name: (ranks.get(name) is None, ranks.get(name) or 0.0))
    rows = [[n, *cells[n], MISSING if n not in ranks else f"{ranks[n]:.1f}"] for n in ordered]
    notes = [
        f"{measure.title} in percent, ± half the 95 % confidence interval over the seeds.",
        f"{SIGNIFICANCE} Differences are those to {REFERENCE}.",
    ]
    notes += [
        f"{label}: {note}"
        for label, joined in comparisons.items()
        for note in missing_notes(joined)
    ]
    return SummaryTable(["strategy", *comparisons, "mean\nrank"], rows, notes)


def mean_ranks(comparisons: Comparisons, measure: Measure = _SELF) -> dict[str, float]:
    """Mean over the experiments of a strategy's place, 1 for the best; ties share their mean place.

    Only strategies with a value in every experiment have one; the base models are not ranked.
    """
    places: dict[str, list[float]] = {}
    for joined in comparisons.values():
        values = {
            name: value
            for name in strategies_of(joined.runs)
            if name != BASE and (value := mean(measured(joined.runs, name, measure))) is not None
        }
        for name, value in values.items():
            better = sum(other > value for other in values.values())
            equal = sum(other == value for other in values.values())
            places.setdefault(name, []).append(better + (equal + 1) / 2)
    return {
        name: sum(found) / len(found)
        for name, found in places.items()
        if len(found) == len(comparisons)
    }


def _gains(comparisons: Comparisons) -> Section | None:
    """Paired differences to the reference per experiment."""
    panels = {}
    for label, joined in comparisons.items():
        names = [n for n in strategies_of(joined.runs) if n not in (BASE, REFERENCE)]
        values = {name: paired_differences(joined.runs, name, _SELF) for name in names}
        items = score_intervals(values)
        if items:
            panels[label] = items
    most = max((len(items) for items in panels.values()), default=0)
    panels = {label: items for label, items in panels.items() if len(items) == most}
    if not panels:
        return None
    svg = plots.intervals(
        panels, xlabel="points", label="Gain over local", zero=True, one_scale=True
    )
    caption = "Mean and 95 % confidence interval over the seeds; strokes are single seeds."
    return Section("gains", f"Self against {REFERENCE}", figures=(Figure(svg, caption),))


def _overview(comparisons: Comparisons) -> Figure:
    table = leaderboard_table(comparisons)
    names = [row[0] for row in table.rows]
    cells: Cells = [
        [mean(measured(joined.runs, name, _SELF)) for joined in comparisons.values()]
        for name in names
    ]
    svg = heat_map(
        cells,
        names,
        list(comparisons),
        label="Self by strategy and experiment",
        bar="Self, %",
        scale=100,
        digits=1,
    )
    return Figure(svg, "Self after the last round, mean over clients and seeds.")


def leaderboard_sections(comparisons: Comparisons) -> list[Section]:
    """What the page shows."""
    sections = [
        Section(
            "leaderboard",
            "Leaderboard",
            figures=(_overview(comparisons),),
            table=leaderboard_table(comparisons),
        ),
        _gains(comparisons),
    ]
    for measure in MEASURES:
        if measure.is_main and measure is not _SELF:
            table = leaderboard_table(comparisons, measure)
            sections.append(Section(measure.key, measure.title, table=table))
    for label, joined in comparisons.items():
        sections.append(Section(f"scores-{label}", label, table=score_table(joined.runs)))
        sections.append(Section(f"cost-{label}", f"{label}: cost", table=cost_table(joined.runs)))
        if joined.adapted:
            table = adaptation_means(joined.adapted)
            sections.append(Section(f"unseen-{label}", f"{label}: unseen tasks", table=table))
    return [section for section in sections if section is not None]


def _headlines(comparisons: Comparisons) -> list[Headline]:
    found = []
    for label, joined in comparisons.items():
        gain = mean(paired_differences(joined.runs, MAIN, _SELF))
        if gain is not None:
            text = difference_cells(joined.runs, strategies_of(joined.runs), _SELF)[MAIN]
            found.append(Headline(label, points(gain), f"{MAIN} to {REFERENCE}: {text}"))
    return found


def write_leaderboard(
    folder: Path,
    comparisons: Comparisons,
    origins: Mapping[str, Origin],
    *,
    title: str,
    command: str,
) -> tuple[Path, Path, Path]:
    """Writes ``leaderboard.html``, ``results.json``, ``results.md`` and ``figures/``.

    Args:
        folder: of the benchmark.
        comparisons: by experiment; at least one.
        origins: where each comes from.
        title: of the benchmark.
        command: that makes all of it again.

    Returns:
        The page, the JSON and the Markdown file.
    """
    sections = leaderboard_sections(comparisons)
    experiments = ", ".join(comparisons)
    page = write_page(
        folder / PAGE_FILE,
        render(
            title=f"{title}: leaderboard",
            subtitle=f"{len(comparisons)} experiments: {experiments}",
            numbers=_headlines(comparisons),
            sections=sections,
        ),
    )
    record: dict[str, Any] = {
        "version": _VERSION,
        "title": title,
        "command": command,
        "mean_rank": mean_ranks(comparisons),
        "experiments": {
            label: results_record(joined, origins[label]) for label, joined in comparisons.items()
        },
    }
    results = write_page(folder / RESULTS_FILE, json.dumps(record, indent=1) + "\n")
    figures = []
    for section in sections:
        for figure in section.figures:
            path = write_page(
                folder / FIGURES_FOLDER / f"{section.anchor}.svg", standalone(figure.svg)
            )
            figures.append(f"![{figure.caption}]({path.relative_to(folder).as_posix()})")
    parts = [
        f"## {title}",
        leaderboard_table(comparisons).to_markdown(),
        *figures,
        f"```bash\n{command}\n```",
        *(markdown_of(joined, origins[label]) for label, joined in comparisons.items()),
    ]
    text = write_page(folder / MARKDOWN_FILE, "\n\n".join(parts).rstrip() + "\n")
    return page, results, text
