"""FeSEM and IFCA: clusters of clients, on numbers made by hand."""

from __future__ import annotations

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
from fedml_plugin_fedmosaic.core.work import LocalResult, Pass, Probe, ProbeResult, Samples
from fedml_plugin_fedmosaic.strategies.clustered import group_names
from fedml_plugin_fedmosaic.strategies.fesem import FeSEM, FeSEMOptions
from fedml_plugin_fedmosaic.strategies.ifca import IFCA, IFCAOptions


def _header(client: int, vector: list[float], count: int = 10, **notes: Any) -> UpdateHeader:
    notes = {"projection": vector, **notes}
    return UpdateHeader(client_id=client, round_idx=0, num_examples=count, notes=notes)


def _rows(plan: MixingPlan, slot: str = "conv") -> dict[int, dict[int, float]]:
    return {row.target: dict(zip(row.sources, row.weights, strict=True)) for row in plan.rows[slot]}


def _context(architecture: str = "S", client: int = 0) -> ClientContext:
    manifest = toy_manifest(client, architecture, "lora")
    return ClientContext(manifest=manifest, round_idx=0, num_rounds=3, num_steps=7, seed=0)


def _result(adapter: Any) -> LocalResult:
    return LocalResult(adapter=adapter, losses=(1.0,), num_examples=4, num_tokens=9, duration_s=0.1)


def _fesem(**options: Any) -> tuple[FeSEM, Any]:
    strategy = FeSEM(FeSEMOptions(projection=1, **options))
    names = ("S", "S", "S", "S", "M", "M")
    return strategy, strategy.init([toy_manifest(i, n, "lora") for i, n in enumerate(names)], 0)


def test_fesem_averages_inside_clusters_of_a_layout() -> None:
    strategy, state = _fesem()
    values = [[0.0], [1.0], [9.0], [11.0], [5.0], [5.5]]
    after, plan = strategy.plan(state, [_header(i, v) for i, v in enumerate(values)])
    rows = _rows(plan)
    assert rows[0] == rows[1] == {0: 0.5, 1: 0.5}
    assert rows[2] == rows[3] == {2: 0.5, 3: 0.5}
    assert (rows[4], rows[5]) == ({4: 1.0}, {5: 1.0})
    small = after["centres"][state["layouts"]["0"]["conv"]]
    assert sorted(small.flatten().tolist()) == [0.5, 10.0]


def test_fesem_follows_clients_that_move_and_keeps_those_that_are_away() -> None:
    strategy, state = _fesem()
    first = [_header(i, [v]) for i, v in enumerate((0.0, 1.0, 9.0, 11.0))]
    state, plan = strategy.plan(state, first)
    assert 4 not in _rows(plan)
    moved, plan = strategy.plan(state, [_header(1, [8.0])])
    rows = _rows(plan)
    assert rows[0] == {0: 1.0}
    assert rows[1] == rows[3] == {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}
    assert moved["clusters"]["1"] == moved["clusters"]["3"] != moved["clusters"]["0"]
    assert state["vectors"]["1"].tolist() == [1.0]


def test_fesem_weights_by_samples_on_request() -> None:
    strategy, state = _fesem(weighting="num_examples")
    headers = [_header(0, [0.0], 30), _header(1, [1.0], 10), _header(2, [9.0], 5)]
    after, plan = strategy.plan(state, headers)
    assert _rows(plan)[0] == {0: 0.75, 1: 0.25}
    digest = state["layouts"]["0"]["conv"]
    assert sorted(after["centres"][digest].flatten().tolist()) == [0.25, 9.0]


def test_fesem_with_one_cluster_is_fedavg() -> None:
    strategy, state = _fesem(clusters=1)
    _, plan = strategy.plan(state, [_header(0, [0.0]), _header(3, [50.0])])
    assert _rows(plan) == {0: {0: 0.5, 3: 0.5}, 3: {0: 0.5, 3: 0.5}}


def test_fesem_refuses_a_header_without_a_projection() -> None:
    strategy, state = _fesem()
    bare = UpdateHeader(client_id=0, round_idx=2, num_examples=1)
    for header in (bare, _header(0, [1.0, 2.0]), _header(0, [float("nan")])):
        with pytest.raises(PlanError, match=r"client 0, round \d.*'projection'.*1 x 1 finite"):
            strategy.plan(state, [header])


def test_fesem_clients_send_where_their_weights_are() -> None:
    strategy, _ = _fesem()
    context, adapter = _context(), toy_adapter("S", "lora")
    state = strategy.client.init_state(adapter, context)
    header = UpdateHeader(client_id=0, round_idx=0, num_examples=4)
    update, _ = strategy.client.finish(_result(adapter), state, context, header)
    assert len(update.header.notes["projection"]) == 1
    assert set(update.tensors) == {key.share_key for key in adapter}


def _ifca(**options: Any) -> tuple[IFCA, Any]:
    strategy = IFCA(IFCAOptions(projection=1, probe_samples=8, **options))
    names = ("S", "S", "S", "S", "M")
    return strategy, strategy.init([toy_manifest(i, n, "lora") for i, n in enumerate(names)], 0)


def test_ifca_starts_with_clusters_of_the_first_updates() -> None:
    strategy, state = _ifca()
    values = [[0.0], [1.0], [9.0]]
    after, plan = strategy.plan(state, [_header(i, v, cluster=None) for i, v in enumerate(values)])
    assert plan.slots == {"model0": "conv", "model1": "conv"}
    near = f"model{after['clusters']['0']}"
    far = f"model{after['clusters']['2']}"
    # Everyone of the layout gets every model, also who has not trained yet; nobody else does.
    assert _rows(plan, near) == {key: {0: 0.5, 1: 0.5} for key in range(4)}
    assert _rows(plan, far) == {key: {2: 1.0} for key in range(4)}


def test_ifca_averages_those_who_chose_a_model_last() -> None:
    strategy, state = _ifca(weighting="num_examples")
    first = [_header(i, [v], cluster=None) for i, v in enumerate((0.0, 1.0, 9.0))]
    state, _ = strategy.plan(state, first)
    away = state["clusters"]["2"]
    after, plan = strategy.plan(state, [_header(1, [1.0], 30, cluster=away)])
    assert after["clusters"] == {"0": 1 - away, "1": away, "2": away}
    assert _rows(plan, f"model{away}")[0] == {1: 0.75, 2: 0.25}
    assert _rows(plan, f"model{1 - away}")[3] == {0: 1.0}
    # Whoever joins later and has no choice yet belongs where it is nearest to.
    after, plan = strategy.plan(after, [_header(3, [8.5], cluster=None)])
    assert after["clusters"]["3"] == away


@pytest.mark.parametrize("choice", [2, -1, "0", True])
def test_ifca_refuses_a_choice_that_is_no_model(choice: Any) -> None:
    strategy, state = _ifca()
    with pytest.raises(PlanError, match=r"expected one of 0\.\.1"):
        strategy.plan(state, [_header(0, [0.0], cluster=choice)])


def test_an_ifca_client_trains_the_model_that_fits_best() -> None:
    strategy, _ = _ifca()
    half, context, adapter = strategy.client, _context(), toy_adapter("S", "lora")
    state = half.init_state(adapter, context)
    state, works = half.prepare({}, state, context)
    assert [type(work) for work in works] == [Pass]
    downlink = {
        f"model{j}/{key.share_key.removeprefix('conv/')}": torch.full(tuple(value.shape), j + 1.0)
        for j in range(2)
        for key, value in adapter.items()
    }
    state, (probe,) = half.prepare(downlink, state, context)
    assert isinstance(probe, Probe)
    assert {name: ref.overlay for name, ref in probe.models.items()} == {
        "model0": ("model0",),
        "model1": ("model1",),
    }
    assert (probe.samples, probe.limit) == (Samples.ROUND, 8)
    # 2 samples of one task and 6 of another: 0.25 * 1 + 0.75 * 3 > 0.25 * 3 + 0.75 * 2.
    seen = ProbeResult(
        losses={"model0": {"a": 1.0, "b": 3.0}, "model1": {"a": 3.0, "b": 2.0}},
        counts={"a": 2, "b": 6},
    )
    state, (training,) = half.advance({probe.name: seen}, state, context)
    assert isinstance(training, Pass)
    assert (training.num_steps, training.view, training.into) == (7, View.LOCAL, "")
    assert all(bool((value == 2.0).all()) for value in state.adapter.values())
    done, more = half.advance({training.name: _result(state.adapter)}, state, context)
    assert more == ()
    header = UpdateHeader(client_id=0, round_idx=1, num_examples=4)
    update, after = half.finish(_result(state.adapter), done, context, header)
    assert update.header.notes["cluster"] == 1
    assert all(key.branch is Branch.LOCAL and key.part is not Part.GATE for key in after.adapter)
    # What is not sent any more stays to be compared.
    _, (probe,) = half.prepare({}, after, context)
    assert sorted(probe.models) == ["model0", "model1"]


def test_an_ifca_client_whose_models_are_all_broken_says_so() -> None:
    strategy, _ = _ifca()
    context, adapter = _context(), toy_adapter("S", "lora")
    state = strategy.client.init_state(adapter, context)
    downlink = {f"model0/{k.share_key.removeprefix('conv/')}": v for k, v in adapter.items()}
    state, (probe,) = strategy.client.prepare(downlink, state, context)
    seen = ProbeResult(losses={"model0": {"a": float("nan")}}, counts={"a": 2})
    with pytest.raises(PlanError, match="no model has a finite loss"):
        strategy.client.advance({probe.name: seen}, state, context)


def test_ifca_pays_for_its_probes() -> None:
    # As many samples as a round of training has: a third of its cost.
    assert IFCA(IFCAOptions(clusters=4, probe_samples=100)).cost.share == 0.67


def test_plans_say_who_is_in_which_cluster() -> None:
    strategy, state = _fesem()
    headers = [_header(i, [v]) for i, v in enumerate((0.0, 1.0, 9.0, 11.0, 5.0))]
    _, plan = strategy.plan(state, headers)
    groups = dict(plan.groups)
    # Two layouts: a letter each; client 5 has not trained.
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert {groups[0], groups[2]} == {"A1", "A2"}
    assert (groups[4], 5 in groups) == ("B1", False)


def test_groups_are_the_clients_own_choices() -> None:
    strategy = IFCA(IFCAOptions(projection=1))
    state = strategy.init([toy_manifest(i, "S", "lora") for i in range(3)], 0)
    state, _ = strategy.plan(state, [_header(0, [0.0]), _header(1, [9.0]), _header(2, [9.5])])
    _, plan = strategy.plan(state, [_header(1, [9.0], cluster=0), _header(2, [0.1], cluster=1)])
    assert plan.groups[1] == "1"
    assert plan.groups[2] == "2"


def test_names_of_groups_are_unique_over_layouts() -> None:
    layouts = {str(i): {"conv": f"layout {i}"} for i in range(28)}
    layouts["28"] = {"pq": "no layer-wise tensors"}
    names = group_names(layouts, {str(i): 0 for i in range(28)})
    assert (names[0], names[25], names[26], names[27]) == ("A1", "Z1", "AA1", "AB1")
    assert len(set(names.values())) == 28


def test_ifca_clients_choose_also_where_there_are_fewer_clients_than_clusters() -> None:
    strategy = IFCA(IFCAOptions(projection=1, clusters=3))
    state = strategy.init([toy_manifest(i, "S", "lora") for i in range(2)], 0)
    state, plan = strategy.plan(state, [_header(0, [0.0]), _header(1, [9.0])])
    assert sorted(plan.rows) == ["model0", "model1"]
    mine = state["clusters"]["1"]
    state, plan = strategy.plan(state, [_header(0, [0.0], cluster=mine)])
    assert sorted(plan.rows) == [f"model{mine}"]
    assert _rows(plan, f"model{mine}")[0] == {0: 0.5, 1: 0.5}
