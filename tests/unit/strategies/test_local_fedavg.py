from __future__ import annotations

import math

import pytest
import torch
from toy_federation import ToyFederation, toy_adapter, toy_manifest

from fedml_plugin_fedmosaic.core.errors import AdapterError, PlanError
from fedml_plugin_fedmosaic.core.types import AdapterKey, Branch, Part, UpdateHeader
from fedml_plugin_fedmosaic.strategies.common import local_keys, receive
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvg, FedAvgOptions
from fedml_plugin_fedmosaic.strategies.local import Local, LocalOptions


def headers(*clients: int, examples: tuple[int, ...] | None = None) -> list[UpdateHeader]:
    counts = examples or (1,) * len(clients)
    return [
        UpdateHeader(client_id=client, round_idx=0, num_examples=count)
        for client, count in zip(clients, counts, strict=True)
    ]


def test_local_sends_and_receives_nothing() -> None:
    toy = ToyFederation(Local(LocalOptions()), ("S", "S", "M")).play(2)
    assert toy.plan.rows == {}
    assert all(upload == {} for upload in toy.uploads.values())
    assert toy.comm.downlink_bytes == {}


def test_local_client_is_independent_of_the_others() -> None:
    alone = ToyFederation(Local(LocalOptions()), ("S",)).play(3)
    together = ToyFederation(Local(LocalOptions()), ("S", "S", "M")).play(3)
    for key, tensor in alone.clients[0].adapter.items():
        assert torch.equal(tensor, together.clients[0].adapter[key])


def test_fedavg_receivers_get_the_mean_of_their_layouts_cohort() -> None:
    toy = ToyFederation(FedAvg(FedAvgOptions()), ("S", "M", "S", "S", "X"), per_round=2)
    toy.state, toy.plan = toy.strategy.plan(toy.state, [toy.train(0), toy.train(2)])
    downlinks = toy.comm.execute(toy.plan, toy.uploads)
    assert sorted(client for client, received in downlinks.items() if received) == [0, 2, 3]
    for key in toy.uploads[0]:
        mean = (toy.uploads[0][key].double() + toy.uploads[2][key].double()) / 2
        for client in (0, 2, 3):
            torch.testing.assert_close(downlinks[client][key].double(), mean, rtol=0, atol=1e-6)


def test_fedavg_downlink_replaces_the_local_branch() -> None:
    toy = ToyFederation(FedAvg(FedAvgOptions()), ("S", "S")).play(1)
    state, _ = toy.strategy.client.prepare(
        toy.downlinks[1], toy.clients[1], toy.context(toy.manifests[1])
    )
    names = local_keys(state.adapter)
    assert names
    for name, key in names.items():
        assert torch.equal(state.adapter[key], toy.downlinks[1][name])


def test_fedavg_num_examples_weighting() -> None:
    strategy = FedAvg(FedAvgOptions(weighting="num_examples"))
    state = strategy.init([toy_manifest(i, "S", "lora") for i in range(4)], seed=0)
    _, plan = strategy.plan(state, headers(0, 1, 3, examples=(6, 0, 2)))
    assert [row.target for row in plan.rows["conv"]] == [0, 1, 2, 3]
    assert all(row.sources == (0, 3) for row in plan.rows["conv"])
    assert all(row.weights == (0.75, 0.25) for row in plan.rows["conv"])


def test_fedavg_serves_the_last_average_to_clients_that_skipped_rounds() -> None:
    strategy = FedAvg(FedAvgOptions())
    manifests = [toy_manifest(i, name, "lora") for i, name in enumerate("SSMM")]
    state = strategy.init(manifests, seed=0)
    state, first = strategy.plan(state, headers(0))
    assert [(row.target, row.sources) for row in first.rows["conv"]] == [(0, (0,)), (1, (0,))]
    state, second = strategy.plan(state, headers(2, 3))
    assert {row.target: row.sources for row in second.rows["conv"]} == {
        0: (0,),
        1: (0,),
        2: (2, 3),
        3: (2, 3),
    }
    _, third = strategy.plan(state, headers(1))
    assert {row.target: row.sources for row in third.rows["conv"]}[0] == (1,)


def test_fedavg_report_matrix_is_nan_where_nothing_is_received() -> None:
    strategy = FedAvg(FedAvgOptions())
    state = strategy.init([toy_manifest(i, n, "lora") for i, n in enumerate("SMS")], seed=0)
    _, plan = strategy.plan(state, headers(0, 2))
    assert plan.weights is not None
    rows = plan.weights.tolist()
    assert rows[0] == rows[2] == [0.5, 0.0, 0.5]
    assert all(math.isnan(value) for value in rows[1])


def test_wrong_shape_and_incomplete_channel_are_refused() -> None:
    adapter = toy_adapter("S", "lora")
    good = {name: adapter[key] for name, key in local_keys(adapter).items()}
    name = next(iter(good))
    with pytest.raises(PlanError, match=r"has shape \(2, 2\), expected"):
        receive(adapter, {**good, name: torch.zeros(2, 2)}, Branch.LOCAL, 0)
    with pytest.raises(PlanError, match=f"missing {name}"):
        receive(adapter, {k: v for k, v in good.items() if k != name}, Branch.LOCAL, 0)


def test_two_tensors_of_one_share_key_are_refused() -> None:
    adapter = {
        AdapterKey(0, layer, "q_proj", Branch.LOCAL, Part.P): torch.zeros(2, 2) for layer in (0, 1)
    }
    with pytest.raises(AdapterError, match="same share key"):
        local_keys(adapter)
