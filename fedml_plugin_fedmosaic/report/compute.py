"""What a client spends in a round: floating-point operations, seconds, bytes."""

from __future__ import annotations

from fedml_plugin_fedmosaic.report.metrics import Run
from fedml_plugin_fedmosaic.report.numbers import readable_bytes, seconds
from fedml_plugin_fedmosaic.report.parts import Section
from fedml_plugin_fedmosaic.report.strategy_metrics import StrategyMetrics, on_server
from fedml_plugin_fedmosaic.report.tables import SummaryTable

_REFERENCE = "local"


def flops_text(value: float) -> str:
    """Floating-point operations with a prefix, e.g. ``1.2 TFLOP``."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}FLOP"
    return f"{value:.3g} FLOP"


def client_rounds(metrics: StrategyMetrics) -> int:
    """How often a client took part in a round."""
    rounds = set(metrics.rounds)
    local = (e for e in metrics.trained if e.round_idx in rounds and not on_server(e.pass_name))
    return len({(event.round_idx, event.client_id) for event in local})


def compute(run: Run) -> Section | None:
    """Per client and round; the stages after the last round are left out."""
    spent: dict[str, float] = {}
    rows = []
    for name in run.ordered:
        metrics = run.strategies[name]
        count = client_rounds(metrics)
        inside = [event for event in metrics.trained if event.round_idx in metrics.rounds]
        local = [event for event in inside if not on_server(event.pass_name)]
        flops = sum(event.flops for event in local)
        if not count or not flops:
            continue
        spent[name] = flops / count
        server = sum(event.flops for event in inside if on_server(event.pass_name))
        up = sum(sum(event.uplink_bytes.values()) for event in metrics.rounds.values())
        down = sum(sum(event.downlink_bytes.values()) for event in metrics.rounds.values())
        rows.append(
            [
                name,
                flops_text(flops / count),
                "",
                flops_text(server / len(metrics.rounds)) if server else "-",
                seconds(sum(event.duration_s for event in local) / count),
                readable_bytes(up / count),
                readable_bytes(down / count),
            ]
        )
    if not rows:
        return None
    reference = spent.get(_REFERENCE)
    for row in rows:
        row[2] = "-" if reference is None else f"{spent[row[0]] / reference:.2f}"
    columns = ["strategy", "training", f"relative\nto {_REFERENCE}", "server,\nper round",
               "time", "sent", "received"]  # fmt: skip
    lead = (
        "Means per client and round. Operations are 2 per parameter and token of a forward pass "
        "and 4 of a backward pass; proxy gradients are not among them."
    )
    return Section("compute", "Compute per client and round", lead,
                   table=SummaryTable(columns, rows, []))  # fmt: skip
