"""FedMosaic's top_k in large federations: without the matrix, and the same as with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_federation import toy_manifest, toy_sketch

from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import MixingPlan, Relevance, UpdateHeader
from fedml_plugin_fedmosaic.strategies.fedmosaic import FedMosaic, FedMosaicOptions

NAMES = ("S", "M", "S", "S", "M", "X", "S")


def _headers(clients: list[int], round_idx: int) -> list[UpdateHeader]:
    return [
        UpdateHeader(
            client_id=client,
            round_idx=round_idx,
            num_examples=9,
            sketch=toy_sketch(client, round_idx),
        )
        for client in clients
    ]


class Server:
    """One strategy over rounds, with the relevance that it asks for."""

    def __init__(self, **options: Any) -> None:
        self.strategy = FedMosaic(FedMosaicOptions(**options))
        manifests = [toy_manifest(i, name, "pq_lora") for i, name in enumerate(NAMES)]
        self.state = self.strategy.init(manifests, 0)
        self.held: dict[int, torch.Tensor] = {}

    def play(self, clients: list[int], round_idx: int) -> MixingPlan:
        headers = _headers(clients, round_idx)
        self.held |= {header.client_id: header.sketch for header in headers}
        comm, kind = LocalCommunicator(), self.strategy.similarity
        queries = self.strategy.queries(self.state, headers)
        if queries is None:
            relevance = comm.relevance(kind, self.held, clients)
        else:
            found = comm.nearest(kind, self.held, queries)
            relevance = Relevance(clients=(), values=torch.zeros(0, 0), neighbours=found)
        self.state, plan = self.strategy.plan(self.state, headers, relevance)
        return plan


def _table(plan: MixingPlan) -> dict[tuple[str, int], dict[int, float]]:
    return {
        (channel, row.target): dict(zip(row.sources, row.weights, strict=True))
        for channel, rows in plan.rows.items()
        for row in rows
    }


@pytest.mark.parametrize("kind", ["columns", "flat"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_searching_gives_the_rows_of_the_matrix(kind: str, k: int) -> None:
    options = {"top_k": k, "similarity": kind, "temperature": 0.1, "max_staleness": 1}
    whole, search = Server(**options), Server(**options, matrix_clients=3)
    for round_idx, clients in enumerate(([0, 1, 2, 4], [0, 3, 5], [1, 6], [0, 2, 6])):
        expected, got = (_table(server.play(clients, round_idx)) for server in (whole, search))
        assert got.keys() == expected.keys()
        for where, weights in expected.items():
            assert got[where].keys() == weights.keys(), where
            assert list(got[where].values()) == pytest.approx(list(weights.values()), abs=1e-6)
    assert search.state["similarity"].numel() == 0
    assert search.state["known"] == list(range(7))


def test_a_search_leaves_the_matrices_out() -> None:
    search = Server(top_k=2, matrix_clients=3)
    plan = search.play([0, 1, 2], 0)
    assert (plan.relevance, plan.weights) == (None, None)
    assert all(len(row.sources) <= 2 for rows in plan.rows.values() for row in rows)
    # Client 6 has no sketch: the first two of its kind, equally.
    assert _table(plan)["conv", 6] == {0: 0.5, 2: 0.5}
    assert _table(plan)["pq", 6] == {0: 0.5, 1: 0.5}


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2},
        {"matrix_clients": 3},
        {"top_k": 2, "matrix_clients": 3, "relevance": "uniform"},
        {"top_k": 2, "matrix_clients": 7},
    ],
)
def test_small_or_dense_federations_have_a_matrix(options: dict[str, Any]) -> None:
    server = Server(**options)
    assert server.strategy.queries(server.state, _headers([0, 1], 0)) is None


def test_answers_to_other_questions_are_refused() -> None:
    server = Server(top_k=2, matrix_clients=3)
    with pytest.raises(PlanError, match="nearest clients that it asked for"):
        server.strategy.plan(server.state, _headers([0, 1], 0), None)
    # A round in which nobody delivered changes nothing.
    assert server.strategy.plan(server.state, [], None)[1].rows == {}
