from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_federation import (
    ToyFederation,
    plan_with_sketches,
    toy_adapter,
    toy_manifest,
    toy_sketch,
)

from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.core.errors import AdapterError, PlanError
from fedml_plugin_fedmosaic.core.types import Branch, MixingPlan, UpdateHeader, View
from fedml_plugin_fedmosaic.strategies.fedmosaic import FedMosaic, FedMosaicOptions


def make(**options: Any) -> FedMosaic:
    return FedMosaic(FedMosaicOptions(**options))


def headers(*clients: int, round_idx: int = 0, sketches: bool = True) -> list[UpdateHeader]:
    return [
        UpdateHeader(
            client_id=client,
            round_idx=round_idx,
            num_examples=1,
            sketch=toy_sketch(client, 0) if sketches else None,
        )
        for client in clients
    ]


def planned(
    strategy: FedMosaic,
    state: Any,
    given: list[UpdateHeader],
    held: dict[int, torch.Tensor] | None = None,
) -> tuple[Any, MixingPlan]:
    return plan_with_sketches(strategy, state, given, {} if held is None else held)


def start(strategy: FedMosaic, architectures: str) -> Any:
    manifests = [toy_manifest(i, name, "pq_lora") for i, name in enumerate(architectures)]
    return strategy.init(manifests, seed=0)


def weights_of(plan: MixingPlan, channel: str, target: int) -> dict[int, float]:
    (row,) = [row for row in plan.rows[channel] if row.target == target]
    return dict(zip(row.sources, row.weights, strict=True))


def test_weights_are_the_softmax_of_column_similarity() -> None:
    strategy = make(temperature=0.25)
    _, plan = planned(strategy, start(strategy, "SMS"), headers(0, 1, 2))
    sketches = [toy_sketch(client, 0).double() for client in range(3)]

    def similarity(i: int, j: int) -> float:
        cosines = torch.nn.functional.cosine_similarity(sketches[i], sketches[j], dim=0)
        return float(cosines.mean())

    for target in range(3):
        peers = [client for client in range(3) if client != target]
        exps = [math.exp(similarity(target, client) / 0.25) for client in peers]
        got = weights_of(plan, "pq", target)
        assert list(got) == peers
        for client, value in zip(peers, exps, strict=True):
            assert math.isclose(got[client], value / sum(exps), rel_tol=1e-6)


def test_conventional_layers_mix_inside_a_layout_only() -> None:
    strategy = make()
    _, plan = planned(strategy, start(strategy, "SMSMX"), headers(*range(5)))
    assert {row.target: row.sources for row in plan.rows["conv"]} == {
        0: (2,),
        1: (3,),
        2: (0,),
        3: (1,),
    }
    assert {row.target for row in plan.rows["pq"]} == set(range(5))
    assert all(row.target not in row.sources for rows in plan.rows.values() for row in rows)


def test_a_client_that_never_took_part_receives_equal_shares_and_gives_nothing() -> None:
    strategy = make()
    _, plan = planned(strategy, start(strategy, "SSSS"), headers(0, 1, 2))
    assert weights_of(plan, "pq", 3) == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    assert all(3 not in row.sources for rows in plan.rows.values() for row in rows)
    assert plan.relevance is not None
    unknown = torch.isnan(plan.relevance)
    assert unknown[3].all()
    assert unknown[:, 3].all()
    assert not unknown[:3, :3].any()


def test_absent_clients_keep_their_last_sketch() -> None:
    strategy = make()
    held: dict[int, torch.Tensor] = {}
    state, everyone = planned(strategy, start(strategy, "SSSS"), headers(0, 1, 2, 3), held)
    _, later = planned(strategy, state, headers(1, round_idx=1), held)
    assert later.rows == everyone.rows
    assert state["known"] == [0, 1, 2, 3]


def test_the_state_holds_similarities_and_no_sketches() -> None:
    toy = ToyFederation(make(), "SMSX", per_round=2).play(4)
    known = toy.state["known"]
    sketches = [toy.sketches[client].double() for client in known]
    expected = [
        [float(torch.nn.functional.cosine_similarity(a, b, dim=0).mean()) for b in sketches]
        for a in sketches
    ]
    torch.testing.assert_close(
        toy.state["similarity"], torch.tensor(expected).double(), rtol=0, atol=1e-6
    )
    tensors = [value for value in toy.state.values() if isinstance(value, torch.Tensor)]
    assert [tuple(tensor.shape) for tensor in tensors] == [(len(known), len(known))]


def test_missing_relevance_is_refused() -> None:
    strategy = make()
    relevance = LocalCommunicator().relevance("columns", {0: toy_sketch(0, 0)}, [0])
    with pytest.raises(PlanError, match="got none"):
        strategy.plan(start(strategy, "SS"), headers(0))
    with pytest.raises(PlanError, match=r"relevance of clients \[0, 1\], got that of"):
        strategy.plan(start(strategy, "SS"), headers(0, 1), relevance)
    state, _ = strategy.plan(start(strategy, "SS"), headers(0), relevance)
    other = LocalCommunicator().relevance("columns", {1: toy_sketch(1, 0)}, [1])
    with pytest.raises(PlanError, match="clients 0 and 1 is missing or not finite"):
        strategy.plan(state, headers(1), other)


def test_stale_clients_are_left_out() -> None:
    strategy = make(max_staleness=1)
    held: dict[int, torch.Tensor] = {}
    state, _ = planned(strategy, start(strategy, "SSSS"), headers(0, 1, 2, 3, round_idx=0), held)
    state, kept = planned(strategy, state, headers(0, 1, round_idx=1), held)
    assert set(weights_of(kept, "pq", 0)) == {1, 2, 3}
    _, dropped = planned(strategy, state, headers(0, 1, round_idx=2), held)
    assert set(weights_of(dropped, "pq", 0)) == {1}
    assert set(weights_of(dropped, "pq", 3)) == {0, 1}
    assert math.isclose(sum(weights_of(dropped, "pq", 3).values()), 1.0)


def test_top_k_keeps_the_most_relevant() -> None:
    _, full = planned(make(), start(make(), "SSSSS"), headers(*range(5)))
    strategy = make(top_k=2)
    _, plan = planned(strategy, start(strategy, "SSSSS"), headers(*range(5)))
    for target in range(5):
        everyone = weights_of(full, "pq", target)
        best = sorted(sorted(everyone, key=lambda client: -everyone[client])[:2])
        kept = weights_of(plan, "pq", target)
        assert list(kept) == best
        total = sum(everyone[client] for client in best)
        for client in best:
            assert math.isclose(kept[client], everyone[client] / total, rel_tol=1e-9)


def test_a_weight_that_vanishes_moves_no_bytes() -> None:
    strategy = make(temperature=1e-4)
    _, plan = planned(strategy, start(strategy, "SSSS"), headers(0, 1, 2, 3))
    for row in plan.rows["pq"]:
        assert len(row.sources) == 1
        assert row.weights == (1.0,)


def test_flat_similarity_differs_from_columns() -> None:
    _, columns = planned(make(), start(make(), "SSS"), headers(0, 1, 2))
    flat_strategy = make(similarity="flat")
    _, flat = planned(flat_strategy, start(flat_strategy, "SSS"), headers(0, 1, 2))
    assert flat.relevance is not None
    first, second = toy_sketch(0, 0).flatten().double(), toy_sketch(1, 0).flatten().double()
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=0)
    assert math.isclose(float(flat.relevance[0, 1]), float(cosine), rel_tol=1e-5)
    assert flat.rows != columns.rows


def test_uniform_relevance_needs_no_sketch() -> None:
    strategy = make(relevance="uniform")
    state, plan = planned(strategy, start(strategy, "SMSS"), headers(0, 1, 2, 3, sketches=False))
    assert weights_of(plan, "pq", 1) == pytest.approx({0: 1 / 3, 2: 1 / 3, 3: 1 / 3})
    assert weights_of(plan, "conv", 0) == pytest.approx({2: 0.5, 3: 0.5})
    assert plan.relevance is None
    assert state["known"] == []


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, {"pq", "conv"}),
        ({"share_pq": False}, {"conv"}),
        ({"share_conventional": False}, {"pq"}),
        ({"global_branch": False}, set()),
    ],
)
def test_shared_channels(options: dict[str, bool], channels: set[str]) -> None:
    toy = ToyFederation(make(**options), ("S", "S", "M", "M")).play(2)
    assert set(toy.plan.rows) == channels
    assert {key.split("/")[0] for key in toy.uploads[0]} == channels
    assert (toy.comm.downlink_bytes != {}) == bool(channels)


def test_without_global_branch_all_views_are_the_local_model() -> None:
    toy = ToyFederation(make(global_branch=False), ("S", "S")).play(1)
    _, passes = toy.strategy.client.prepare({}, toy.clients[0], toy.context(toy.manifests[0]))
    assert [(pass_.view, pass_.train) for pass_ in passes] == [
        (View.LOCAL, frozenset({Branch.LOCAL}))
    ]
    adapter = toy.clients[0].adapter
    pairs = [
        (tensor, other)
        for key, tensor in adapter.items()
        for twin, other in adapter.items()
        if key.branch is Branch.LOCAL
        and twin.branch is Branch.GLOBAL
        and (key.layer, key.part) == (twin.layer, twin.part)
    ]
    assert pairs
    assert all(torch.equal(local, received) for local, received in pairs)


def test_training_pass_and_received_branch() -> None:
    toy = ToyFederation(make(), ("S", "S", "M", "X")).play(1)
    for client in range(4):
        before, downlink = toy.clients[client], toy.downlinks[client]
        state, passes = toy.strategy.client.prepare(
            downlink, before, toy.context(toy.manifests[client])
        )
        assert [(p.view, p.train, p.num_steps) for p in passes] == [
            (View.GATED, frozenset({Branch.LOCAL, Branch.SHARED}), 5)
        ]
        for key, tensor in state.adapter.items():
            if key.branch is not Branch.GLOBAL:
                assert torch.equal(tensor, before.adapter[key])
                continue
            own = [
                t
                for k, t in before.adapter.items()
                if k.branch is Branch.LOCAL and k.share_key == key.share_key
            ]
            assert torch.equal(tensor, downlink.get(key.share_key, own[0]))
    assert not any(key.startswith("conv") for key in toy.downlinks[2])  # alone in its layout
    assert any(key.startswith("pq") for key in toy.downlinks[2])


def test_pq_is_mixed_across_architectures_by_block() -> None:
    toy = ToyFederation(make(), ("S", "M", "X")).play(1)
    for row in toy.plan.rows["pq"]:
        for key, tensor in toy.downlinks[row.target].items():
            expected = sum(
                weight * toy.uploads[source][key].double()
                for source, weight in zip(row.sources, row.weights, strict=True)
            )
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        (None, "needs a sketch"),
        (torch.zeros(5), r"got shape \(5,\)"),
        (torch.zeros(4, 7), "different shapes"),
    ],
)
def test_bad_sketches_are_refused(sketch: torch.Tensor | None, message: str) -> None:
    strategy = make()
    bad = UpdateHeader(client_id=1, round_idx=0, num_examples=1, sketch=sketch)
    with pytest.raises(PlanError, match=message):
        strategy.plan(start(strategy, "SS"), [*headers(0), bad])


def test_an_adapter_without_global_branch_is_refused() -> None:
    toy = ToyFederation(make(), ("S",))
    with pytest.raises(AdapterError, match="two branches"):
        toy.strategy.client.init_state(toy_adapter("S", "lora"), toy.context(toy.manifests[0]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"max_staleness": -1},
        {"similarity": "cosine"},
        {"relevance": "none"},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        FedMosaicOptions(**options)


@settings(deadline=None, max_examples=60)
@given(
    architectures=st.text("SMX", min_size=1, max_size=6),
    cohorts=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=4),
    temperature=st.floats(1e-3, 10),
    top_k=st.none() | st.integers(1, 3),
    max_staleness=st.none() | st.integers(0, 2),
)
def test_rows_are_weighted_means_over_other_clients_that_took_part(
    architectures: str,
    cohorts: list[set[int]],
    temperature: float,
    top_k: int | None,
    max_staleness: int | None,
) -> None:
    strategy = make(temperature=temperature, top_k=top_k, max_staleness=max_staleness)
    state = start(strategy, architectures)
    seen: set[int] = set()
    held: dict[int, torch.Tensor] = {}
    for round_idx, drawn in enumerate(cohorts):
        cohort = sorted(client for client in drawn if client < len(architectures))
        seen.update(cohort)
        state, plan = planned(strategy, state, headers(*cohort, round_idx=round_idx), held)
        for channel, rows in plan.rows.items():
            for row in rows:
                assert math.isclose(sum(row.weights), 1.0, abs_tol=1e-9)
                assert set(row.sources) <= seen - {row.target}
                assert len(row.sources) <= (top_k or len(architectures))
                if channel == "conv":
                    assert {architectures[c] for c in row.sources} == {architectures[row.target]}
        if top_k is None and max_staleness is None:
            targets = {row.target for row in plan.rows.get("pq", ())}
            assert targets == {c for c in range(len(architectures)) if seen - {c}}
