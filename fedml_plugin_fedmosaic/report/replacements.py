"""Which personal adapters were replaced by federated ones, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.report.metrics import Run, StrategyMetrics
from fedml_plugin_fedmosaic.report.numbers import percent
from fedml_plugin_fedmosaic.report.parts import Section
from fedml_plugin_fedmosaic.report.tables import SummaryTable


@dataclass
class _Tally:
    """Of one adapter over clients and rounds."""

    clients: set[int] = field(default_factory=set)
    compared: int = 0
    rounds: list[int] = field(default_factory=list)


def _tallies(metrics: StrategyMetrics) -> dict[str, _Tally]:
    """Adapter -> its tally, by name."""
    found: dict[str, _Tally] = {}
    for event in metrics.events:
        if not isinstance(event, ev.ClientReported):
            continue
        for name, entry in event.values.items():
            if isinstance(entry, dict) and "replaced" in entry:
                tally = found.setdefault(name, _Tally())
                tally.clients.add(event.client_id)
                tally.compared += 1
                if entry["replaced"]:
                    tally.rounds.append(event.round_idx)
    return dict(sorted(found.items()))


def replacements(run: Run) -> Section | None:
    """One row per strategy and adapter; None if no strategy replaces adapters."""
    rows = [
        [
            name,
            adapter,
            str(len(tally.clients)),
            str(tally.compared),
            str(len(tally.rounds)),
            f"{percent(len(tally.rounds) / tally.compared)} %",
            str(max(tally.rounds) + 1) if tally.rounds else "-",
        ]
        for name in run.ordered
        for adapter, tally in _tallies(run.strategies[name]).items()
    ]
    if not rows:
        return None
    columns = ["strategy", "adapter", "clients", "compared", "replaced", "share", "last\nround"]
    lead = (
        "Personal adapters that gave way to the federated one, over all clients and rounds. The "
        "first training of an adapter counts as a replacement."
    )
    table = SummaryTable(columns, rows, [], num_left=2)
    return Section("replacements", "Replacements", lead, table=table)
