"""What every strategy on the shelf must do."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_federation import (
    ToyFederation,
    plan_with_sketches,
    toy_adapter,
    toy_manifest,
    toy_sketch,
)
from toy_work import do_turns, toy_header

from fedml_plugin_fedmosaic.comm.codec import Layout
from fedml_plugin_fedmosaic.comm.exchange import split_channels
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.registry import ADAPTERS, STRATEGIES
from fedml_plugin_fedmosaic.core.types import (
    Branch,
    ClientContext,
    MixingPlan,
    MixRow,
    Part,
    UpdateHeader,
    View,
)
from fedml_plugin_fedmosaic.core.work import Pass, Samples

MIXED = ("S", "M", "S", "M", "S", "X")


@pytest.fixture(params=sorted(STRATEGIES))
def strategy(request: pytest.FixtureRequest) -> Any:
    cls = STRATEGIES[request.param]
    return cls(cls.Options())


def assert_equal_trees(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, Mapping):
        assert list(first) == list(second)
        for key in first:
            assert_equal_trees(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for left, right in zip(first, second, strict=True):
            assert_equal_trees(left, right)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def plain(tree: Any) -> Any:
    """The tree with tensors as lists; fails on anything that is not plain data."""
    if isinstance(tree, torch.Tensor):
        return tree.tolist()
    if isinstance(tree, Mapping):
        assert all(type(key) is str for key in tree)
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    assert tree is None or type(tree) in (bool, int, float, str)
    return tree


def headers_of(strategy: Any, clients: list[int], round_idx: int = 0) -> list[UpdateHeader]:
    """Headers of clients of ``MIXED`` that train for the first time, with their notes."""
    headers = []
    for client in clients:
        architecture = MIXED[client]
        manifest = toy_manifest(client, architecture, strategy.adapter)
        context = context_of(manifest, round_idx)
        header = UpdateHeader(
            client_id=client,
            round_idx=round_idx,
            num_examples=5 + client,
            sketch=toy_sketch(client, round_idx) if strategy.needs_sketch else None,
        )
        half = strategy.client
        state = half.init_state(toy_adapter(architecture, strategy.adapter), context)
        headers.append(toy_header(half, state, context, header))
    return headers


def context_of(manifest: Any, round_idx: int = 0, num_steps: int = 5) -> ClientContext:
    return ClientContext(
        manifest=manifest,
        round_idx=round_idx,
        num_rounds=4,
        num_steps=num_steps,
        seed=0,
        public_steps=2,
    )


def rows_of(plan: MixingPlan) -> dict[tuple[str, int], dict[int, float]]:
    return {
        (channel, row.target): dict(zip(row.sources, row.weights, strict=True))
        for channel, rows in plan.rows.items()
        for row in rows
    }


def test_declares_what_the_runtime_reads(strategy: Any) -> None:
    assert STRATEGIES[strategy.name] is type(strategy)
    assert strategy.adapter in ADAPTERS
    assert 0 < strategy.cost.share <= 1
    assert strategy.eval_view not in strategy.final_views


def test_unknown_option_is_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        type(strategy).Options(no_such_option=1)


def test_state_is_plain_and_survives_json(strategy: Any) -> None:
    toy = ToyFederation(strategy, MIXED, per_round=3).play(2)
    text = json.dumps(plain(toy.state), allow_nan=False)
    assert json.loads(text) == plain(toy.state)


def test_resumed_state_makes_the_same_plan(strategy: Any) -> None:
    toy = ToyFederation(strategy, MIXED).play(2)
    read_back = copy.deepcopy(dict(toy.state))
    headers = headers_of(strategy, [0, 3], round_idx=2)
    _, first = plan_with_sketches(strategy, toy.state, headers, dict(toy.sketches))
    _, second = plan_with_sketches(strategy, read_back, headers, dict(toy.sketches))
    assert first.rows == second.rows


def test_plan_mutates_neither_state_nor_headers(strategy: Any) -> None:
    toy = ToyFederation(strategy, MIXED).play(1)
    headers = headers_of(strategy, [1, 2, 5], round_idx=1)
    before = copy.deepcopy((dict(toy.state), [header.sketch for header in headers]))
    plan_with_sketches(strategy, toy.state, headers, dict(toy.sketches))
    assert_equal_trees((dict(toy.state), [header.sketch for header in headers]), before)


def test_client_half_mutates_nothing(strategy: Any) -> None:
    toy = ToyFederation(strategy, MIXED).play(1)
    client, downlink = toy.clients[0], toy.downlinks.get(0, {})
    before = copy.deepcopy((dict(client.adapter), dict(downlink)))
    state, _ = strategy.client.prepare(downlink, client, toy.context(toy.manifests[0]))
    for tensor in state.adapter.values():
        if not any(tensor is kept for kept in client.adapter.values()):
            tensor.add_(1.0)
    assert_equal_trees((dict(client.adapter), dict(downlink)), before)


def test_no_two_tensors_of_a_client_share_memory(strategy: Any) -> None:
    toy = ToyFederation(strategy, MIXED)
    for _ in range(2):
        for client, manifest in enumerate(toy.manifests):
            state, _ = strategy.client.prepare(
                toy.downlinks.get(client, {}), toy.clients[client], toy.context(manifest)
            )
            for adapter in (toy.clients[client].adapter, state.adapter):
                starts = [tensor.data_ptr() for tensor in adapter.values()]
                assert len(set(starts)) == len(adapter)
        toy.play()


def test_finish_returns_copies(strategy: Any) -> None:
    toy = ToyFederation(strategy, MIXED).play(1)
    before = {key: tensor.clone() for key, tensor in toy.clients[0].adapter.items()}
    for tensor in toy.uploads[0].values():
        tensor.add_(1.0)
    assert_equal_trees(dict(toy.clients[0].adapter), before)


@pytest.mark.parametrize("per_round", [1, 3, 6])
def test_plans_are_well_formed(strategy: Any, per_round: int) -> None:
    toy = ToyFederation(strategy, MIXED, per_round=per_round)
    for _ in range(4):
        toy.play()
        for slot, rows in toy.plan.rows.items():
            channel = toy.plan.channel(slot)
            assert rows, "a slot without rows is left out"
            assert len({row.target for row in rows}) == len(rows)
            for row in rows:
                assert list(row.sources) == sorted(set(row.sources))
                assert all(
                    channel in {k.split("/")[0] for k in toy.uploads[s]} for s in row.sources
                )
                assert math.isclose(sum(row.weights), 1.0, abs_tol=1e-12)
                assert all(weight > 0 for weight in row.weights)
                layouts = layouts_in(toy.uploads, toy.plan.channel(slot), row)
                assert len(layouts) == 1


def test_by_default_clients_learn_from_others(strategy: Any) -> None:
    """Defaults under which everybody mixes only itself would be local training in disguise."""
    toy = ToyFederation(strategy, ("S",) * 5).play(2)
    taken = {
        source != row.target
        for rows in toy.plan.rows.values()
        for row in rows
        for source in row.sources
    }
    assert (True in taken) == (strategy.name != "local")


def layouts_in(uploads: Mapping[int, Any], channel: str, row: MixRow) -> set[str]:
    """Layouts of what a row's clients have sent in a channel."""
    return {
        Layout.of(part).digest
        for client in (row.target, *row.sources)
        if (part := split_channels(uploads.get(client, {})).get(channel))
    }


def outside(plan: MixingPlan) -> MixingPlan:
    """Without what stays on the server: which client lends it a model goes by the client's id."""
    rows = {slot: rows for slot, rows in plan.rows.items() if slot not in plan.internal}
    return replace(plan, rows=rows)


def test_plan_follows_a_renaming_of_the_clients(strategy: Any) -> None:
    """Permutation equivariance: names of clients carry no meaning."""
    order = [4, 2, 5, 0, 3, 1]  # client i is called order[i] in the renamed federation
    kind = strategy.adapter
    manifests = [toy_manifest(i, name, kind) for i, name in enumerate(MIXED)]
    renamed = [replace(manifest, client_id=order[manifest.client_id]) for manifest in manifests]
    headers = headers_of(strategy, [0, 1, 2, 3, 5])
    renamed_headers = [replace(header, client_id=order[header.client_id]) for header in headers]
    _, plan = plan_with_sketches(strategy, strategy.init(manifests, 0), headers, {})
    _, other = plan_with_sketches(strategy, strategy.init(renamed, 0), renamed_headers, {})
    moved = {
        (channel, order[target]): {order[source]: weight for source, weight in weights.items()}
        for (channel, target), weights in rows_of(outside(plan)).items()
    }
    got = rows_of(outside(other))
    assert got.keys() == moved.keys()
    for where, weights in moved.items():
        assert got[where].keys() == weights.keys()
        for source, weight in weights.items():  # similarities are float32 products
            assert math.isclose(got[where][source], weight, rel_tol=1e-6)


def test_order_of_headers_does_not_matter(strategy: Any) -> None:
    manifests = [toy_manifest(i, name, strategy.adapter) for i, name in enumerate(MIXED)]
    state = strategy.init(manifests, 0)
    headers = headers_of(strategy, [0, 1, 4, 5])
    _, first = plan_with_sketches(strategy, state, headers, {})
    _, second = plan_with_sketches(strategy, state, headers[::-1], {})
    assert first.rows == second.rows


def test_cohorts_are_drawn_without_replacement_and_repeatably(strategy: Any) -> None:
    state = strategy.init([toy_manifest(i, "S", strategy.adapter) for i in range(9)], seed=5)
    cohorts = [strategy.select(state, round_idx, 4) for round_idx in range(40)]
    assert cohorts == [strategy.select(state, round_idx, 4) for round_idx in range(40)]
    assert all(list(cohort) == sorted(set(cohort)) and len(cohort) == 4 for cohort in cohorts)
    assert len(set(cohorts)) > 20
    assert {client for cohort in cohorts for client in cohort} == set(range(9))
    assert strategy.select(state, 0, 9) == tuple(range(9))


def test_cohorts_of_seed_zero_differ_between_rounds(strategy: Any) -> None:
    state = strategy.init([toy_manifest(i, "S", strategy.adapter) for i in range(9)], seed=0)
    assert len({strategy.select(state, round_idx, 4) for round_idx in range(10)}) > 5


@pytest.mark.parametrize("per_round", [0, 7])
def test_impossible_cohort_is_refused(strategy: Any, per_round: int) -> None:
    state = strategy.init([toy_manifest(i, "S", strategy.adapter) for i in range(6)], seed=0)
    with pytest.raises(PlanError, match=f"cannot draw {per_round} "):
        strategy.select(state, 0, per_round)


def test_single_client(strategy: Any) -> None:
    toy = ToyFederation(strategy, ("S",)).play(3)
    assert all(row.sources == (0,) for rows in toy.plan.rows.values() for row in rows)


def test_single_client_of_its_signature_keeps_training(strategy: Any) -> None:
    toy = ToyFederation(strategy, ("S", "S", "X")).play(3)
    conv = {row.target: row for row in toy.plan.rows.get("conv", ())}
    assert 2 not in conv or conv[2].sources == (2,)
    assert all(torch.isfinite(tensor).all() for tensor in toy.clients[2].adapter.values())


def test_round_zero_starts_from_the_own_adapter(strategy: Any) -> None:
    adapter = toy_adapter("M", strategy.adapter)
    context = context_of(toy_manifest(0, "M", strategy.adapter), num_steps=17)
    state = strategy.client.init_state(adapter, context)
    assert state.participations == 0
    prepared, _ = strategy.client.prepare({}, state, context)
    assert set(prepared.adapter) == set(adapter)
    _, _, works = do_turns(strategy.client, {}, state, context)
    passes = [work for work in works if isinstance(work, Pass) and work.samples is Samples.ROUND]
    assert max(pass_.first_step + pass_.num_steps for pass_ in passes) == 17
    for key, tensor in prepared.adapter.items():
        twin = replace(key, branch=Branch.LOCAL) if key.branch is Branch.GLOBAL else key
        assert torch.equal(tensor, adapter[key]) or torch.equal(tensor, adapter[twin])


def test_what_travels_is_what_was_trained(strategy: Any) -> None:
    toy = ToyFederation(strategy, MIXED).play(1)
    for client, upload in toy.uploads.items():
        state = toy.clients[client]
        # By what follows the channel, which a strategy may name as it likes.
        known: dict[str, list[torch.Tensor]] = {}
        for tensors in (state.adapter, *state.sets.values()):
            for key, tensor in tensors.items():
                if key.branch is not Branch.SHARED:
                    known.setdefault(key.share_key.partition("/")[2], []).append(tensor)
        for name, tensor in upload.items():
            assert tensor.dtype == torch.float32
            assert not name.endswith(f"/{Part.GATE}")
            own = known.get(name.partition("/")[2])
            # Logits of public samples are no tensors of the adapter.
            assert own is None or any(torch.equal(tensor, candidate) for candidate in own)


def test_unknown_downlink_key_is_refused(strategy: Any) -> None:
    toy = ToyFederation(strategy, ("S", "S")).play(1)
    downlink = {**toy.downlinks[0], "conv/99/q_proj/A": torch.zeros(3, 5)}
    with pytest.raises(PlanError, match="client 0"):
        strategy.client.prepare(downlink, toy.clients[0], toy.context(toy.manifests[0]))


def test_unknown_and_repeated_headers_are_refused(strategy: Any) -> None:
    state = strategy.init([toy_manifest(0, "S", strategy.adapter)], seed=0)
    with pytest.raises(PlanError, match=r"unknown clients: \[4\]"):
        strategy.plan(state, headers_of(strategy, [0, 4]))
    with pytest.raises(PlanError, match="two headers"):
        strategy.plan(state, headers_of(strategy, [0, 0]))


def test_repeated_or_missing_clients_are_refused(strategy: Any) -> None:
    manifest = toy_manifest(0, "S", strategy.adapter)
    with pytest.raises(PlanError, match="twice"):
        strategy.init([manifest, manifest], seed=0)
    with pytest.raises(PlanError, match="at least one"):
        strategy.init([], seed=0)


def test_final_stages_reach_every_client_and_every_task_is_served(strategy: Any) -> None:
    toy = ToyFederation(strategy, MIXED, per_round=2).play(2)
    toy.finalise()
    for view in (strategy.eval_view, *strategy.final_views):
        for client, state in toy.clients.items():
            for task in (*toy.manifests[client].tasks, "another-1"):
                served = strategy.client.serve(view, task, state)
                assert set(served.model.overlay) <= set(state.sets)
                assert served.model.view in View
