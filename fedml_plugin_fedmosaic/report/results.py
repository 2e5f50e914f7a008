"""The results of a comparison as files: JSON for programs, Markdown and figures for documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from fedml_plugin_fedmosaic.data.statistics import mean_interval, paired_p_value
from fedml_plugin_fedmosaic.report.adaptation import (
    AGGREGATED,
    FRESH,
    AdaptedTask,
    adaptation_means,
    mean_lines,
)
from fedml_plugin_fedmosaic.report.cells import Joined
from fedml_plugin_fedmosaic.report.comparison import comparison_sections, write_runs_page
from fedml_plugin_fedmosaic.report.html import write_page
from fedml_plugin_fedmosaic.report.measures import (
    MEASURES,
    cost_table,
    paired_differences,
    score_table,
    strategies_of,
)
from fedml_plugin_fedmosaic.report.metrics import Run, mean
from fedml_plugin_fedmosaic.report.style import standalone
from fedml_plugin_fedmosaic.report.tables import REFERENCE

PAGE_FILE = "comparison.html"
RESULTS_FILE = "results.json"
MARKDOWN_FILE = "results.md"
FIGURES_FOLDER = "figures"
_VERSION = 1
_PACKAGE = "fedml_plugin_fedmosaic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where results come from.

    Attributes:
        title: of the page.
        command: that makes them again.
        commit: of the checkout, None outside of one.
    """

    title: str
    command: str
    commit: str | None = None


def _strategy_record(runs: Sequence[Run], seeds: Sequence[int], name: str) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for measure in MEASURES:
        values = {
            str(seed): value
            for seed, run in zip(seeds, runs, strict=True)
            if name in run.strategies and (value := measure.read(run.strategies[name])) is not None
        }
        if not values:
            continue
        estimate = mean_interval(list(values.values()))
        entry: dict[str, Any] = {
            "mean": estimate.mean,
            "half_width_95": estimate.half_width,
            "by_seed": values,
        }
        pairs = paired_differences(runs, name, measure) if name != REFERENCE else []
        if pairs and measure.is_score:
            difference = mean_interval(pairs)
            entry[f"minus_{REFERENCE}"] = {
                "mean": difference.mean,
                "half_width_95": difference.half_width,
                "p_value": paired_p_value(pairs),
                "pairs": len(pairs),
            }
        record[measure.key] = entry
    return record


def results_record(joined: Joined, origin: Origin) -> dict[str, Any]:
    """Everything that is needed to quote, check and repeat the results, as JSON-ready data.

    Shares are in [0, 1], bytes and seconds plain. ``strategies`` maps a name to its measures: mean,
    half width of the 95 % confidence interval, the value of each seed, and the difference to the
    reference paired over the seeds.

    Args:
        joined: the finished cells; at least one.
        origin: where they come from.
    """
    first = joined.runs[0]
    environment = {k: v for k, v in first.environment.items() if k not in ("seed", "started")}
    return {
        "version": _VERSION,
        "title": origin.title,
        "command": origin.command,
        "package": metadata.version(_PACKAGE),
        "commit": origin.commit,
        "started": min((run.environment.get("started") or "" for run in joined.runs), default=""),
        "environment": environment,
        "seeds": list(joined.seeds),
        "num_clients": len(first.clients),
        "num_tasks": len(first.tasks),
        "missing": [list(cell) for cell in joined.missing],
        "strategies": {
            name: _strategy_record(joined.runs, joined.seeds, name)
            for name in strategies_of(joined.runs)
        },
        "unseen": _unseen_record(joined.adapted),
        "config": yaml.safe_load(first.config) or {},
    }


def _unseen_record(adapted: Sequence[AdaptedTask]) -> dict[str, Any]:
    """Strategy -> start -> zero-shot by likelihood, and the mean score by optimizer steps."""
    record: dict[str, Any] = {}
    for strategy in dict.fromkeys(task.strategy for task in adapted):
        mine = [task for task in adapted if task.strategy == strategy]
        record[strategy] = {
            start: {
                "likelihood": mean(t.likelihood[start] for t in mine if start in t.likelihood),
                "updates": {str(n): value for n, value in mean_lines(mine, start).items()},
            }
            for start in (AGGREGATED, FRESH)
        }
    return record


def missing_notes(joined: Joined) -> list[str]:
    """A sentence about cells that have not finished; none if all have."""
    if not joined.missing:
        return []
    name, seed = joined.missing[0]
    more = f" and {len(joined.missing) - 1} more" if len(joined.missing) > 1 else ""
    return [f"Not finished: {name} with seed {seed}{more}; the same command goes on with them."]


def markdown_of(joined: Joined, origin: Origin, figures: Mapping[str, str] | None = None) -> str:
    """The results as Markdown: scores, cost, figures, and how they were made.

    Args:
        joined: the finished cells; at least one.
        origin: where they come from.
        figures: caption -> path of an image, relative to the document.
    """
    scores = score_table(joined.runs)
    scores.notes.extend(missing_notes(joined))
    environment = joined.runs[0].environment
    packages = environment.get("packages") or {}
    versions = [f"{name} {packages[name]}" for name in ("torch", "fedml") if name in packages]
    made = [
        f"Seeds {', '.join(map(str, joined.seeds))}",
        ", ".join([f"Python {environment.get('python', '?')}", *versions]),
        f"{environment.get('cpu_count', '?')} cores",
        *([f"commit {origin.commit}"] if origin.commit else []),
    ]
    parts = [
        f"### {origin.title}",
        scores.to_markdown(),
        cost_table(joined.runs).to_markdown(),
        *([adaptation_means(joined.adapted).to_markdown()] if joined.adapted else []),
        *(f"![{caption}]({path})" for caption, path in (figures or {}).items()),
        f"```bash\n{origin.command}\n```",
        "; ".join(made) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def write_figures(joined: Joined, folder: Path) -> dict[str, Path]:
    """Writes every figure of the page as an SVG file of its own.

    Returns:
        Caption -> file.
    """
    found: dict[str, Path] = {}
    for section in comparison_sections(joined.runs, adapted=joined.adapted):
        for figure in section.figures:
            path = write_page(folder / f"{section.anchor}.svg", standalone(figure.svg))
            found[f"{section.title}. {figure.caption}"] = path
    return found


def write_results(folder: Path, joined: Joined, origin: Origin) -> tuple[Path, Path, Path]:
    """Writes ``comparison.html``, ``results.json``, ``results.md`` and ``figures/``.

    Args:
        folder: of the comparison.
        joined: the finished cells; at least one.
        origin: where they come from.

    Returns:
        The page, the JSON and the Markdown file.
    """
    page = write_runs_page(
        joined.runs,
        folder / PAGE_FILE,
        title=origin.title,
        notes=missing_notes(joined),
        adapted=joined.adapted,
    )
    figures = {
        caption: path.relative_to(folder).as_posix()
        for caption, path in write_figures(joined, folder / FIGURES_FOLDER).items()
    }
    record = results_record(joined, origin)
    results = write_page(folder / RESULTS_FILE, json.dumps(record, indent=1) + "\n")
    text = write_page(folder / MARKDOWN_FILE, markdown_of(joined, origin, figures))
    return page, results, text
