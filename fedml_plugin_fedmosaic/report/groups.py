"""Groups of clients that a strategy finds: who is with whom, how steadily, and by what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb

from fedml_plugin_fedmosaic.report.clients import by_group, client_name, group_of, separators
from fedml_plugin_fedmosaic.report.matrix_plots import membership, thinned
from fedml_plugin_fedmosaic.report.metrics import Run, StrategyMetrics
from fedml_plugin_fedmosaic.report.numbers import MISSING
from fedml_plugin_fedmosaic.report.parts import Figure, Section
from fedml_plugin_fedmosaic.report.records import ClientInfo
from fedml_plugin_fedmosaic.report.tables import SummaryTable

_MAX_CLIENTS = 60
"""Most clients that a figure shows."""
_MAX_ROUNDS = 40
"""Most rounds that a figure shows."""


def groups(run: Run) -> Section | None:
    """A figure and a row for each strategy that puts clients into groups; None without any."""
    named = [run.strategies[name] for name in run.ordered if run.strategies[name].groups]
    if not named:
        return None
    figures = [figure for metrics in named if (figure := _figure(run, metrics)) is not None]
    rows = [_row(metrics, run.clients) for metrics in named]
    columns = ["strategy", "groups", "clients\nin them", "moves", "last move\nin round",
               "agreement with\nthe data sets"]  # fmt: skip
    notes = [
        "Groups in the last round, largest first. A move: a client is in another group than in the "
        "round before. Agreement: adjusted Rand index between clients with one kind of model; 1 is "
        "perfect, 0 what chance would give."
    ]
    table = SummaryTable(columns, rows, notes, num_left=1)
    lead = "Clients that a strategy trains together, round by round."
    return Section("groups", "Groups of clients", lead, tuple(figures), table)


def _figure(run: Run, metrics: StrategyMetrics) -> Figure | None:
    """Client by round, coloured by group."""
    clients = by_group(run)
    if len(clients) > _MAX_CLIENTS:
        return None
    rounds = thinned(list(metrics.groups), _MAX_ROUNDS)
    cells = [[metrics.groups[r].get(client.client_id) for r in rounds] for client in clients]
    svg = membership(
        cells,
        [client_name(client) for client in clients],
        [str(r + 1) for r in rounds],
        label=f"Groups of {metrics.name} by client and round",
        separators=separators(clients),
    )
    caption = (
        f"{metrics.name}: a colour is a group; clients with the same data sets stand together. "
        "Clients that are in no group yet stay empty."
    )
    return Figure(svg, caption)


def _row(metrics: StrategyMetrics, clients: Sequence[ClientInfo]) -> list[str]:
    last = metrics.groups[max(metrics.groups)]
    sizes = sorted(Counter(last.values()).values(), reverse=True)
    moves = metrics.group_moves
    agreement = agreement_with_data(last, clients)
    return [
        metrics.name,
        str(len(sizes)),
        " + ".join(map(str, sizes)),
        str(len(moves)),
        str(max(round_idx for round_idx, _ in moves) + 1) if moves else MISSING,
        MISSING if agreement is None else f"{agreement:.2f}",
    ]


def agreement_with_data(groups: Mapping[int, str], clients: Sequence[ClientInfo]) -> float | None:
    """Adjusted Rand index between groups and the clients' data sets (Hubert and Arabie 1985).

    Pairs are counted between clients with one signature only, because tensors of different shapes
    cannot be averaged anyway; the chance level is that of each signature.

    Args:
        groups: client id -> name of its group.
        clients: with their tasks.

    Returns:
        At most 1; None if the index is not defined: no pairs, or both sides put all of them
        together or all of them apart.
    """
    found = expected = possible = 0.0
    kinds: dict[str, list[ClientInfo]] = {}
    for client in clients:
        if client.client_id in groups:
            kinds.setdefault(client.signature, []).append(client)
    for members in kinds.values():
        if len(members) < 2:
            continue
        cells = [(groups[client.client_id], group_of(client)) for client in members]
        ours, theirs = (_pairs(side) for side in zip(*cells, strict=True))
        found += _pairs(cells)
        expected += ours * theirs / comb(len(members), 2)
        possible += (ours + theirs) / 2
    return None if possible == expected else (found - expected) / (possible - expected)


def _pairs(labels: Sequence[object]) -> int:
    """Pairs with the same label."""
    return sum(comb(count, 2) for count in Counter(labels).values())
