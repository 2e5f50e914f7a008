"""Clients that were dropped and rounds that were skipped, as tables."""

from __future__ import annotations

from collections import Counter

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.report.metrics import Run, StrategyMetrics
from fedml_plugin_fedmosaic.report.parts import Section
from fedml_plugin_fedmosaic.report.tables import SummaryTable


def _rounds(indices: list[int]) -> str:
    """Rounds as a reader counts them."""
    return ", ".join(str(index + 1) for index in sorted(indices))


def _with_failures(run: Run) -> list[StrategyMetrics]:
    found = (run.strategies[name] for name in run.ordered)
    return [metrics for metrics in found if metrics.dropped or metrics.skipped]


def client_failures(run: Run) -> SummaryTable | None:
    """One row per strategy, client and reason; None if no client was dropped."""
    grouped: dict[tuple[str, int, str, str], list[int]] = {}
    for metrics in _with_failures(run):
        for event in metrics.dropped:
            key = (metrics.name, event.client_id, event.stage, event.reason)
            grouped.setdefault(key, []).append(event.round_idx)
    if not grouped:
        return None
    labels = {client.client_id: client.label for client in run.clients}
    rows = [
        [
            strategy,
            str(client_id),
            labels.get(client_id, ""),
            stage,
            reason,
            str(len(found)),
            _rounds(found),
        ]
        for (strategy, client_id, stage, reason), found in grouped.items()
    ]
    columns = ["strategy", "client", "model", "stage", "reason", "times", "rounds"]
    return SummaryTable(columns, rows, [], num_left=5)


def failed_rounds(run: Run) -> SummaryTable | None:
    """One row per strategy and round in which a client was dropped; None without any."""
    rows = []
    for metrics in _with_failures(run):
        lost = Counter(event.round_idx for event in metrics.dropped)
        for round_idx in sorted({*lost, *metrics.skipped}):
            cohort = metrics.cohorts.get(round_idx)
            skipped = metrics.skipped.get(round_idx)
            names = sorted(e.client_id for e in metrics.dropped if e.round_idx == round_idx)
            rows.append(
                [
                    metrics.name,
                    str(round_idx + 1),
                    _outcome(skipped),
                    ", ".join(map(str, names)),
                    str(lost[round_idx]),
                    "-" if cohort is None else str(len(cohort)),
                ]
            )
    if not rows:
        return None
    columns = ["strategy", "round", "outcome", "dropped clients", "dropped", "asked"]
    return SummaryTable(columns, rows, [], num_left=4)


def _outcome(skipped: ev.RoundSkipped | None) -> str:
    if skipped is None:
        return "mixed without them"
    return f"skipped: {skipped.delivered} delivered, {skipped.needed} needed"


def dropouts(run: Run) -> Section | None:
    """Clients that were dropped, by reason."""
    table = client_failures(run)
    if table is None:
        return None
    lead = "A dropped client goes on from where it was before the round."
    return Section("failures", "Failures", lead, table=table)


def rounds_with_dropouts(run: Run) -> Section | None:
    """Rounds in which clients were missing."""
    table = failed_rounds(run)
    return None if table is None else Section("failed-rounds", "Failures per round", table=table)
