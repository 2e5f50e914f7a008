"""pFedLA, Factorized-FL and Per-FedAvg, on numbers made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_federation import toy_adapter, toy_manifest

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import (
    Branch,
    ClientContext,
    MixingPlan,
    Part,
    UpdateHeader,
    View,
)
from fedml_plugin_fedmosaic.core.work import LocalResult, Samples
from fedml_plugin_fedmosaic.equations.hypernetwork import (
    agreement,
    follow,
    layer_weights,
    new_network,
)
from fedml_plugin_fedmosaic.strategies.factorized import Factorized, FactorizedOptions
from fedml_plugin_fedmosaic.strategies.per_fedavg import PerFedAvg, PerFedAvgOptions
from fedml_plugin_fedmosaic.strategies.pfedla import PFedLA, PFedLAOptions

KNOWN = torch.tensor([True, True, True])


def _context(steps: int = 7, stage: str = "train") -> ClientContext:
    manifest = toy_manifest(0, "S", "lora")
    return ClientContext(
        manifest=manifest, round_idx=0, num_rounds=3, num_steps=steps, seed=0, stage=stage
    )


def _result(adapter: Any) -> LocalResult:
    return LocalResult(adapter=adapter, losses=(1.0,), num_examples=4, num_tokens=9, duration_s=0.1)


def _header(client: int, **notes: Any) -> UpdateHeader:
    return UpdateHeader(client_id=client, round_idx=0, num_examples=10, notes=notes)


def _rows(plan: MixingPlan, channel: str) -> dict[int, dict[int, float]]:
    return {
        row.target: dict(zip(row.sources, row.weights, strict=True)) for row in plan.rows[channel]
    }


def _network(self_weight: float = 0.5, layers: int = 2) -> dict[str, torch.Tensor]:
    return new_network(
        layers=layers, sources=3, own=1, embedding=4, hidden=5, self_weight=self_weight, seed=0
    )


def test_a_new_network_weighs_the_own_layer_and_shares_the_rest() -> None:
    weights = layer_weights(_network(0.6), KNOWN, 1)
    torch.testing.assert_close(weights, torch.tensor([[0.2, 0.6, 0.2]] * 2).double())
    some = layer_weights(_network(0.6), torch.tensor([True, False, True]), 1)
    assert some.tolist() == [[0.5, 0.0, 0.5]] * 2
    alone = layer_weights(_network(0.6), torch.tensor([True, True, False]), 1)
    torch.testing.assert_close(alone, torch.tensor([[0.4, 0.6, 0.0]] * 2).double())
    with pytest.raises(PlanError, match="nobody has uploaded"):
        layer_weights(_network(), torch.zeros(3, dtype=torch.bool), 1)


def test_a_first_step_is_the_softmax_gradient() -> None:
    network = _network(0.5)
    scores = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    alpha = layer_weights(network, KNOWN, 1)[0]
    after = follow(network, KNOWN, 1, scores, 0.1)
    slope = alpha * (scores[0] - (alpha * scores[0]).sum())
    torch.testing.assert_close(after["b2"][0], (network["b2"][0] + 0.1 * slope).float())
    assert torch.equal(after["b2"][1], network["b2"][1])
    hidden = torch.tanh(network["w1"] @ network["v"]) / math.sqrt(5)
    torch.testing.assert_close(after["w2"][0], (0.1 * slope[:, None] * hidden).float())
    # W2 is 0, so nothing below it moves in the first step.
    assert torch.equal(after["w1"], network["w1"])
    assert torch.equal(after["v"], network["v"])


def test_who_agrees_gains_weight_layer_by_layer() -> None:
    network = _network(0.5)
    scores = torch.tensor([[0.8, 0.1, -0.5], [-0.5, 0.1, 0.8]])
    for _ in range(10):
        network = follow(network, KNOWN, 1, scores, 1.0)
    weights = layer_weights(network, KNOWN, 1)
    assert weights[0, 0] > 0.5 > weights[0, 2]
    assert weights[1, 2] > 0.5 > weights[1, 0]


def test_agreement_by_hand() -> None:
    values = torch.tensor([[[3.0, 4.0]], [[0.0, 5.0]]])
    change = torch.tensor([[0.0, 2.0]])
    assert agreement(values, change, normalise=False).tolist() == [[8.0, 10.0]]
    assert agreement(values, change, normalise=True).tolist() == [[0.8, 1.0]]
    assert agreement(values, change * 0, normalise=True).tolist() == [[0.0, 0.0]]


def _pfedla(**options: Any) -> tuple[PFedLA, Any]:
    strategy = PFedLA(PFedLAOptions(projection=2, **options))
    names = ("X", "X", "X", "S")
    return strategy, strategy.init([toy_manifest(i, n, "lora") for i, n in enumerate(names)], 0)


def test_pfedla_mixes_each_layer_by_itself() -> None:
    strategy, state = _pfedla()
    vectors = {0: [[1.0, 0], [1, 0]], 1: [[0.0, 1], [0, 1]], 2: [[-1.0, 0], [-1, 0]]}
    state, plan = strategy.plan(state, [_header(i, layers=v) for i, v in vectors.items()])
    assert sorted(plan.rows) == ["layer0", "layer1"]
    assert _rows(plan, "layer0")[0] == pytest.approx({0: 0.5, 1: 0.25, 2: 0.25})
    # Client 0 started layer 0 and 1 from (0.25, 0.25): layer 0 goes towards client 1, layer 1
    # away from it.
    start = state["starts"]["0"]
    torch.testing.assert_close(start, torch.full((2, 2), 0.25))
    trained = [[0.25, 2.25], [0.25, -1.75]]
    after, plan = strategy.plan(state, [_header(0, layers=trained)])
    first, second = _rows(plan, "layer0")[0], _rows(plan, "layer1")[0]
    assert first[1] > 0.25 > second[1]
    assert sum(first.values()) == pytest.approx(1.0)
    # The others' networks did not see anything.
    assert _rows(plan, "layer0")[1] == pytest.approx({0: 0.25, 1: 0.5, 2: 0.25})
    assert 3 not in _rows(plan, "layer0")
    assert torch.equal(state["vectors"]["0"], torch.tensor(vectors[0]))
    assert torch.equal(after["vectors"]["0"], torch.tensor(trained))


def test_pfedla_serves_a_client_that_has_not_trained() -> None:
    strategy, state = _pfedla()
    _, plan = strategy.plan(state, [_header(1, layers=[[1.0, 0], [1, 0]])])
    assert _rows(plan, "layer1") == {0: {1: 1.0}, 1: {1: 1.0}, 2: {1: 1.0}}


def test_layers_with_the_largest_own_weight_can_stay() -> None:
    strategy, state = _pfedla(keep_local=1)
    state, plan = strategy.plan(state, [_header(i, layers=[[1.0, 0], [0, 1]]) for i in range(3)])
    assert sorted(plan.rows) == ["layer1"]  # equal weights: the first layer stays
    network = state["networks"]["0"]
    shifted = {**network, "b2": network["b2"] + torch.tensor([[-1.0, 0, 0], [2.0, 0, 0]])}
    state = {**state, "networks": {**state["networks"], "0": shifted}}
    after, plan = strategy.plan(state, [])
    assert 0 not in _rows(plan, "layer1")
    assert 0 in _rows(plan, "layer0")
    assert torch.equal(after["starts"]["0"][1], after["vectors"]["0"][1])


def test_pfedla_clients_receive_single_layers() -> None:
    strategy, _ = _pfedla()
    half, context, adapter = strategy.client, _context(), toy_adapter("S", "lora")
    state = half.init_state(adapter, context)
    update, after = half.finish(_result(adapter), state, context, _header(0))
    assert {name.partition("/")[0] for name in update.tensors} == {f"layer{i}" for i in range(4)}
    assert len(update.header.notes["layers"]) == 4
    downlink = {n: torch.ones_like(t) for n, t in update.tensors.items() if n.startswith("layer2/")}
    got, _ = half.prepare(downlink, after, context)
    for key, tensor in got.adapter.items():
        assert torch.equal(tensor, torch.ones_like(tensor) if key.layer == 2 else adapter[key])
    del downlink[next(iter(downlink))]
    with pytest.raises(PlanError, match="missing conv/2/q_proj/A"):
        half.prepare(downlink, after, context)


def _factorized(**options: Any) -> tuple[Factorized, Any]:
    strategy = Factorized(FactorizedOptions(projection=2, **options))
    names = ("S", "S", "S", "M")
    return strategy, strategy.init([toy_manifest(i, n, "lora") for i, n in enumerate(names)], 0)


FACTORS = {0: [1.0, 0.0], 1: [3.0, 4.0], 2: [0.0, 1.0], 3: [1.0, 0.0]}


def test_factorized_mixes_peers_by_their_cosine() -> None:
    strategy, state = _factorized(threshold=0.7, sharpness=2.0)
    _, plan = strategy.plan(state, [_header(i, factor=v) for i, v in FACTORS.items()])
    rows = _rows(plan, "conv")
    # Cosines: 0-1: 0.6, 1-2: 0.8, 0-2: 0.
    assert rows[0] == {0: 1.0}
    total = math.exp(2) + math.exp(1.6)
    assert rows[1] == pytest.approx({1: math.exp(2) / total, 2: math.exp(1.6) / total})
    assert rows[3] == {3: 1.0}
    assert plan.relevance is not None
    assert plan.relevance[0].tolist() == pytest.approx([1.0, 0.6, 0.0, float("nan")], nan_ok=True)


def test_factorized_has_a_least_number_of_peers() -> None:
    strategy, state = _factorized(threshold=1.0, least_peers=2, sharpness=0.0)
    _, plan = strategy.plan(state, [_header(i, factor=v) for i, v in FACTORS.items()])
    rows = _rows(plan, "conv")
    assert (rows[0], rows[1], rows[2]) == ({0: 0.5, 1: 0.5}, {1: 0.5, 2: 0.5}, {1: 0.5, 2: 0.5})


def test_new_adapters_have_no_peers_but_themselves() -> None:
    strategy, state = _factorized(threshold=0.1)
    zero = [_header(i, factor=[0.0, 0.0]) for i in range(3)]
    _, plan = strategy.plan(state, zero)
    assert _rows(plan, "conv") == {i: {i: 1.0} for i in range(3)}


def test_factors_as_alike_as_those_of_lora_have_peers_by_default() -> None:
    """B starts at 0: cosines of related clients are about 0.2, of others about 0."""
    strategy, state = _factorized()
    angles = [0.0, 1.37, -1.6]  # radians; cosines with the first one 0.2 and -0.03
    headers = [_header(i, factor=[math.cos(a), math.sin(a)]) for i, a in enumerate(angles)]
    _, plan = strategy.plan(state, headers)
    own, other = math.exp(1.0), math.exp(math.cos(1.37))
    assert _rows(plan, "conv")[0] == pytest.approx(
        {0: own / (own + other), 1: other / (own + other)}
    )
    assert _rows(plan, "conv")[2] == {2: 1.0}


def test_a_client_that_joins_late_starts_from_the_mean_of_the_shared_factor() -> None:
    strategy, state = _factorized()
    state, plan = strategy.plan(
        state, [_header(0, factor=[1.0, 0.0]), _header(2, factor=[-1.0, 0.0])]
    )
    assert _rows(plan, "conv")[1] == {0: 0.5, 2: 0.5}
    assert _rows(plan, "conv")[0] == {0: 1.0}
    _, plan = strategy.plan(state, [_header(1, factor=[0.9, 0.1])])
    assert 2 not in _rows(plan, "conv")[1]


def test_only_the_shared_factor_travels_and_is_replaced() -> None:
    strategy, _ = _factorized(share="A", compare="B")
    half, context, adapter = strategy.client, _context(), toy_adapter("S", "lora")
    state = half.init_state(adapter, context)
    update, after = half.finish(_result(adapter), state, context, _header(0))
    assert {name.rpartition("/")[2] for name in update.tensors} == {"A"}
    downlink = {name: torch.ones_like(tensor) for name, tensor in update.tensors.items()}
    got, _ = half.prepare(downlink, after, context)
    for key, tensor in got.adapter.items():
        assert torch.equal(tensor, torch.ones_like(tensor) if key.part is Part.A else adapter[key])
    with pytest.raises(PlanError, match="unknown conv/0/q_proj/B"):
        half.prepare({**downlink, "conv/0/q_proj/B": torch.ones(5, 3)}, after, context)


def test_factors_are_compared_in_the_last_layer() -> None:
    strategy, _ = _factorized()
    context, adapter = _context(), toy_adapter("S", "lora")
    state = strategy.client.init_state(adapter, context)

    def note(changed: Any) -> list[float]:
        update, _ = strategy.client.finish(_result(changed), state, context, _header(0))
        return list(update.header.notes["factor"])

    before = note(adapter)
    for key in adapter:
        same = note({**adapter, key: adapter[key] + 1}) == before
        assert same == (key.layer != 3 or key.part is not Part.B)


def _works(half: Any, state: Any, context: ClientContext) -> list[Any]:
    """Plays a round in which every step adds 1 to what is trained; returns the passes."""
    state, works = half.prepare({}, state, context)
    done = []
    while works:
        (work,) = works
        done.append(work)
        base = dict(state.adapter)
        for name in work.overlay:
            base |= state.sets[name]
        trained = {key: value + work.num_steps for key, value in base.items()}
        if work.into:
            state = replace(state, sets={**state.sets, work.into: trained})
        else:
            state = replace(state, adapter=trained)
        state, works = half.advance({work.name: _result(trained)}, state, context)
    return [*done, state]


def test_per_fedavg_applies_the_outer_steps_to_the_start() -> None:
    strategy = PerFedAvg(PerFedAvgOptions(inner_steps=2, outer_steps=3))
    half, context, adapter = strategy.client, _context(11), toy_adapter("S", "lora")
    *passes, state = _works(half, half.init_state(adapter, context), context)
    described = [(p.name, p.first_step, p.num_steps, p.overlay, p.into) for p in passes]
    assert described == [
        ("inner 0", 0, 2, (), "inner"),
        ("outer 0", 2, 3, ("inner",), "outer"),
        ("inner 1", 5, 2, (), "inner"),
        ("outer 1", 7, 4, ("inner",), "outer"),
    ]
    # 11 steps, of which the 7 outer ones count.
    for key, tensor in state.adapter.items():
        torch.testing.assert_close(tensor, adapter[key] + 7)
    update, after = half.finish(_result({}), state, context, _header(0))
    assert set(update.tensors) == {key.share_key for key in adapter}
    assert torch.equal(update.tensors["conv/0/q_proj/A"], state.adapter[min(adapter)])
    assert after.sets == {}


@pytest.mark.parametrize("steps", range(1, 14))
def test_per_fedavg_spends_all_steps_of_a_round(steps: int) -> None:
    half = PerFedAvg(PerFedAvgOptions(inner_steps=3, outer_steps=2)).client
    context = _context(steps)
    *passes, _ = _works(half, half.init_state(toy_adapter("S", "lora"), context), context)
    assert sum(p.num_steps for p in passes) == steps
    assert all(p.num_steps >= 1 for p in passes)
    firsts = [p.first_step for p in passes]
    assert firsts == [sum(p.num_steps for p in passes[:at]) for at in range(len(passes))]


def test_per_fedavg_adapts_after_the_last_round() -> None:
    strategy = PerFedAvg(PerFedAvgOptions(adapt_steps=6))
    half, context, adapter = strategy.client, _context(stage="adapt"), toy_adapter("S", "lora")
    assert strategy.final_stages == ("adapt",)
    assert PerFedAvg(PerFedAvgOptions(adapt_steps=0)).final_stages == ()
    state = half.init_state(adapter, context)
    assert half.serve("local", "any-0", state).model.overlay == ()
    (adapt, state) = _works(half, state, context)
    assert (adapt.num_steps, adapt.samples, adapt.train) == (
        6,
        Samples.REPLAY,
        frozenset({Branch.LOCAL}),
    )
    update, state = half.finish(_result(state.adapter), state, context, _header(0))
    assert update.tensors == {}
    assert torch.equal(state.adapter[min(adapter)], adapter[min(adapter)])
    served = half.serve("local", "any-0", state).model
    assert (served.overlay, served.view) == (("adapted",), View.LOCAL)
