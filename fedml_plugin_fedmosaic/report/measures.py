"""Several runs as one table: a row per strategy, a column per measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.statistics import mean_interval, paired_p_value, significance_marks
from fedml_plugin_fedmosaic.report.metrics import Run, StrategyMetrics, load_run
from fedml_plugin_fedmosaic.report.numbers import (
    MISSING,
    operations,
    percent,
    points,
    readable_bytes,
    seconds,
)
from fedml_plugin_fedmosaic.report.tables import REFERENCE, SummaryTable


@dataclass(frozen=True, slots=True)
class Measure:
    """One column of a comparison.

    Attributes:
        key: name in files.
        name: header; a newline separates its two lines.
        read: value of one strategy of one run, or None.
        show: formats a value.
        is_score: a share, so that intervals and paired differences to the reference are shown.
        is_main: among the scores, one that plots and differences show.
    """

    key: str
    name: str
    read: Callable[[StrategyMetrics], float | None]
    show: Callable[[float | None], str]
    is_score: bool = False
    is_main: bool = False

    @property
    def title(self) -> str:
        """The header on one line."""
        return self.name.replace("\n", " ")


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


MEASURES: tuple[Measure, ...] = (
    Measure("self", "Self\nA_last", lambda m: m.self_mean, percent, is_score=True, is_main=True),
    Measure("a_auc", "Self\nA_AUC", lambda m: m.a_auc, percent, is_score=True),
    Measure("others", "Others\nA_last", lambda m: m.others_mean, percent, True, is_main=True),
    Measure(
        "worst_client_self", "worst client\nSelf", lambda m: m.worst, percent, True, is_main=True
    ),
    Measure("forgetting", "forgetting", lambda m: m.forgetting, points, is_score=True),
    Measure("forward_transfer", "forward\ntransfer", lambda m: m.forward_transfer, points, True),
    Measure(
        "uplink_bytes_per_client_and_round",
        "up / client\nand round",
        lambda m: m.bytes_per_client_round("uplink"),
        readable_bytes,
    ),
    Measure(
        "downlink_bytes_per_client_and_round",
        "down / client\nand round",
        lambda m: m.bytes_per_client_round("downlink"),
        readable_bytes,
    ),
    Measure("steps", "steps", lambda m: float(m.num_steps) if m.trained else None, _count),
    Measure("flops", "training\ncompute", lambda m: m.flops, operations),
    Measure("train_s", "training\ntime", lambda m: m.train_s, seconds),
)


SIGNIFICANCE = (
    "A difference marked * passes one paired t-test at the 5 % level, one marked ** all tests of "
    "its column together (Holm)."
)
_OPTIONAL = ("forgetting", "forward_transfer", "flops")
"""Keys of measures that many runs cannot have."""


def known_measures(shown: Iterable[StrategyMetrics]) -> tuple[Measure, ...]:
    """The measures of a table: all but the optional ones that no strategy has a value of."""
    strategies = list(shown)
    return tuple(
        measure
        for measure in MEASURES
        if measure.key not in _OPTIONAL
        or any(measure.read(metrics) is not None for metrics in strategies)
    )


def paired_differences(
    runs: Sequence[Run], name: str, measure: Measure, reference: str = REFERENCE
) -> list[float]:
    """Differences of a strategy to the reference inside each run that has both."""
    differences = []
    for run in runs:
        if name in run.strategies and reference in run.strategies:
            ours, theirs = (measure.read(run.strategies[key]) for key in (name, reference))
            if ours is not None and theirs is not None:
                differences.append(ours - theirs)
    return differences


def measured(runs: Sequence[Run], name: str, measure: Measure) -> list[float]:
    """The measure's values in the runs that have the strategy and the value."""
    found = (measure.read(run.strategies[name]) for run in runs if name in run.strategies)
    return [value for value in found if value is not None]


def strategies_of(runs: Sequence[Run]) -> list[str]:
    """All strategies of several runs: base first, main ones last."""
    names = dict.fromkeys(name for run in runs for name in run.ordered)
    mains = dict.fromkeys(run.main for run in runs if run.main is not None)
    return [*(name for name in names if name not in mains), *mains]


def with_ci(values: Sequence[float], measure: Measure) -> str:
    """Mean of several runs' values, for scores with the half width of its 95 % interval."""
    if not values:
        return MISSING
    estimate = mean_interval(values)
    shown = measure.show(estimate.mean)
    if estimate.half_width is None or not measure.is_score:
        return shown
    return f"{shown} ± {percent(estimate.half_width)}"


def difference_cells(
    runs: Sequence[Run], names: Sequence[str], measure: Measure, reference: str = REFERENCE
) -> dict[str, str]:
    """Paired differences to the reference as text, with marks of significance.

    Args:
        runs: with equal seeds for the strategies that they hold.
        names: strategies; all but the reference are tested together.
        measure: of the difference.
        reference: strategy that is subtracted.

    Returns:
        By strategy; ``-`` without a pair.
    """
    pairs = {n: paired_differences(runs, n, measure, reference) for n in names if n != reference}
    marks = significance_marks({name: paired_p_value(values) for name, values in pairs.items()})
    return {name: _difference_cell(pairs.get(name, []), marks.get(name, "")) for name in names}


def _difference_cell(values: Sequence[float], mark: str) -> str:
    if not values:
        return MISSING
    estimate = mean_interval(values)
    half = estimate.half_width
    text = points(estimate.mean) + ("" if half is None else f" ± {percent(half)}")
    return f"{text} {mark}" if mark else text


def comparison_table(runs: Sequence[Run]) -> SummaryTable:
    """Like :func:`compare_rows`, for runs that are already read."""
    names = strategies_of(runs)
    shown = known_measures(metrics for run in runs for metrics in run.strategies.values())
    compared = [measure for measure in shown if measure.is_main]
    with_difference = any(REFERENCE in run.strategies for run in runs)
    columns = ["strategy", "runs", *(measure.name for measure in shown)]
    differences = []
    if with_difference:
        heads = [measure.name.split("\n")[0] for measure in compared]
        columns += [f"{head}\nvs {REFERENCE}" for head in heads]
        differences = [difference_cells(runs, names, measure) for measure in compared]
    rows = [
        [
            name,
            str(sum(name in run.strategies for run in runs)),
            *(with_ci(measured(runs, name, measure), measure) for measure in shown),
            *(cells[name] for cells in differences),
        ]
        for name in names
    ]
    return SummaryTable(columns, rows, _notes(len(runs), shown, with_difference=with_difference))


def score_table(runs: Sequence[Run]) -> SummaryTable:
    """The scores of :func:`comparison_table` and their differences, one row per strategy."""
    return _columns(comparison_table(runs), lambda name: not _is_cost(name))


def cost_table(runs: Sequence[Run]) -> SummaryTable:
    """What each strategy costs: the other columns of :func:`comparison_table`."""
    table = _columns(comparison_table(runs), lambda name: name == "strategy" or _is_cost(name))
    table.rows[:] = [row for row in table.rows if any(cell != MISSING for cell in row[1:])]
    table.notes[:] = ["Means over the runs."]
    return table


def _is_cost(column: str) -> bool:
    return any(measure.name == column and not measure.is_score for measure in MEASURES)


def _columns(table: SummaryTable, keep: Callable[[str], bool]) -> SummaryTable:
    places = [place for place, name in enumerate(table.columns) if keep(name)]
    return SummaryTable(
        [table.columns[place] for place in places],
        [[row[place] for place in places] for row in table.rows],
        list(table.notes),
    )


def _notes(num_runs: int, shown: Sequence[Measure], *, with_difference: bool) -> list[str]:
    keys = {measure.key for measure in shown}
    notes = ["Scores in percent; A_AUC is the mean over all evaluated rounds."]
    if "forgetting" in keys:
        notes.append("Forgetting: fall from a task's best score since its samples stopped.")
    if "forward_transfer" in keys:
        notes.append("Forward transfer: gain over the base model before a task's samples arrive.")
    if num_runs > 1:
        notes.append("± is the half width of the 95 % confidence interval (Student t) over runs.")
    if with_difference:
        notes.append(f"vs {REFERENCE}: difference in percentage points, paired inside each run.")
        if num_runs > 1:
            notes.append(SIGNIFICANCE)
    return notes


def compare_rows(run_dirs: Sequence[Path]) -> SummaryTable:
    """One row per strategy over several runs, usually the same experiment with other seeds.

    Args:
        run_dirs: run folders, at least one.

    Returns:
        Scores with 95 % confidence intervals and, where a run has ``local``, paired differences.

    Raises:
        DataError: no folder, or one is not a run folder.
    """
    if not run_dirs:
        raise DataError("no run folder to compare", hint="give at least one run folder")
    return comparison_table([load_run(path) for path in run_dirs])
