"""Who is like whom, and who learns from whom: relevance and mixing weights over the rounds."""

from __future__ import annotations

from collections.abc import Sequence

from fedml_plugin_fedmosaic.report import matrix_plots
from fedml_plugin_fedmosaic.report.clients import by_group, client_name, group_of, separators
from fedml_plugin_fedmosaic.report.matrix_plots import thinned
from fedml_plugin_fedmosaic.report.metrics import Run, mean
from fedml_plugin_fedmosaic.report.network_plots import main_sources, network
from fedml_plugin_fedmosaic.report.numbers import percent
from fedml_plugin_fedmosaic.report.parts import Figure, Section
from fedml_plugin_fedmosaic.report.records import ClientInfo
from fedml_plugin_fedmosaic.report.strategy_metrics import others_number
from fedml_plugin_fedmosaic.report.style import Cells
from fedml_plugin_fedmosaic.report.tables import SummaryTable

_MULTIPLES = 12
"""Most matrices that the small multiples show."""
_MAX_NODES = 30
"""Most clients that a network shows."""


def _reordered(matrix: Cells, order: Sequence[int]) -> list[list[float | None]]:
    return [[matrix[i][j] for j in order] for i in order]


def _without_diagonal(matrix: Cells) -> list[list[float | None]]:
    return [[None if i == j else v for j, v in enumerate(row)] for i, row in enumerate(matrix)]


def _plans(run: Run, field: str) -> dict[int, Cells]:
    """Matrices of the main strategy by round, clients in the order of :func:`by_group`."""
    if run.main is None:
        return {}
    place = {client.client_id: index for index, client in enumerate(run.clients)}
    order = [place[client.client_id] for client in by_group(run)]
    found: dict[int, Cells] = {}
    for round_idx, plan in run.strategies[run.main].plans.items():
        matrix = getattr(plan, field)
        known = matrix is not None and any(
            value is not None
            for i, row in enumerate(matrix)
            for j, value in enumerate(row)
            if i != j
        )
        if known and len(matrix) == len(order):
            found[round_idx] = _reordered(matrix, order)
    return found


def relevance(run: Run) -> Section | None:
    """Similarity of the clients' sketches."""
    matrices = {r: _without_diagonal(m) for r, m in _plans(run, "relevance").items()}
    if not matrices:
        return None
    clients = by_group(run)
    names, numbers = [client_name(c) for c in clients], [str(c.client_id) for c in clients]
    groups = separators(clients)
    last = max(matrices)
    figures = [
        Figure(
            matrix_plots.heat_map(
                matrices[last], names, numbers, label="Relevance in the last round",
                bar="similarity", groups=groups,
            ),
            f"Round {last + 1}. Clients of one group stand together.",
        )
    ]  # fmt: skip
    if len(matrices) > 1:
        shown = thinned(list(matrices), _MULTIPLES)
        panels = {f"round {r + 1}": matrices[r] for r in shown}
        svg = matrix_plots.small_multiples(panels, label="Relevance over the rounds", groups=groups)
        figures.append(Figure(svg, "The same matrix over the rounds, on one colour scale."))
    lead = "How alike the clients' data look to the server, which sees only sanitised gradients."
    return Section("relevance", "Relevance", lead, tuple(figures))


def mixing(run: Run) -> Section | None:
    """Mixing weights and each client's main sources."""
    matrices = _plans(run, "weights")
    if not matrices:
        return None
    clients = by_group(run)
    names, numbers = [client_name(c) for c in clients], [str(c.client_id) for c in clients]
    groups = separators(clients)
    last = max(matrices)
    svg = matrix_plots.heat_map(
        matrices[last], names, numbers, label="Mixing weights in the last round", bar="weight, %",
        groups=groups, scale=100, digits=0, xlabel="source", ylabel="receiver",
    )  # fmt: skip
    figures = [Figure(svg, f"Round {last + 1}.")]
    average = _mean_matrix(list(matrices.values()))
    if len(clients) <= _MAX_NODES and main_sources(average):
        graph = network(
            average, numbers, label="Who learns from whom",
            groups=[group_of(client) for client in clients],
        )  # fmt: skip
        caption = (
            "Each client's main sources, mean over the rounds: an arrow goes from source to "
            "receiver, its width is the weight. A colour is a group."
        )
        figures.append(Figure(graph, caption))
    if len(matrices) > 1:
        shown = thinned(list(matrices), _MULTIPLES)
        panels = {f"round {r + 1}": matrices[r] for r in shown}
        svg = matrix_plots.small_multiples(
            panels, label="Mixing weights over the rounds", groups=groups
        )
        figures.append(Figure(svg, "The weights over the rounds, on one colour scale."))
    lead = "Share of each source (column) in what a client (row) receives."
    table = _sources_table(clients, matrices[last])
    return Section("mixing", "Who learns from whom", lead, tuple(figures), table)


def _mean_matrix(matrices: Sequence[Cells]) -> list[list[float | None]]:
    """Mean of every cell over the matrices that know it."""
    size = len(matrices[0])
    return [
        [mean(v for m in matrices if (v := m[i][j]) is not None) for j in range(size)]
        for i in range(size)
    ]


def _sources_table(clients: Sequence[ClientInfo], matrix: Cells) -> SummaryTable:
    groups = [group_of(client) for client in clients]
    rows = []
    for i, client in enumerate(clients):
        weights = [(value or 0.0, j) for j, value in enumerate(matrix[i])]
        top = [(w, j) for w, j in sorted(weights, key=lambda item: (-item[0], item[1])) if w > 0]
        shown = ", ".join(f"{clients[j].client_id} ({percent(w)} %)" for w, j in top[:3])
        inside = sum(w for w, j in weights if groups[j] == groups[i])
        number = others_number(matrix[i], i)
        rows.append(
            [
                str(client.client_id), client.label, groups[i], shown or "-",
                f"{percent(inside)} %", "-" if number is None else f"{number:.1f}",
            ]
        )  # fmt: skip
    columns = [
        "client", "model", "group", "main sources", "weight inside\nits group",
        "others that\ncount",
    ]  # fmt: skip
    note = (
        "Others that count: so many sources of equal weight would be as diverse (exp of the "
        "entropy of the weights for other clients). 1 is a single source; "
        f"{len(clients) - 1} is a plain average of all others, and relevance has no say then."
    )
    return SummaryTable(columns, rows, [note], num_left=4)
