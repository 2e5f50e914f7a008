"""What the baselines of the FedMosaic paper do beyond what the conformance suite asks of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_federation import ToyFederation, toy_adapter, toy_manifest

from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.core.types import (
    AdapterKey,
    Branch,
    ClientContext,
    ClientManifest,
    Part,
    UpdateHeader,
    View,
)
from fedml_plugin_fedmosaic.core.work import Pass, ProbeResult
from fedml_plugin_fedmosaic.strategies.fedmkt import sample_channel
from fedml_plugin_fedmosaic.strategies.takfl import task_arithmetic
from fedml_plugin_fedmosaic.strategies.teaching import sample_losses

GOLDEN = np.load(Path(__file__).parents[2] / "golden/baselines.npz", allow_pickle=False)


def make(name: str, **options: Any) -> Any:
    return STRATEGIES[name](STRATEGIES[name].Options(**options))


def context(strategy: Any, stage: str = "train", steps: int = 9) -> ClientContext:
    return ClientContext(
        manifest=toy_manifest(0, "S", strategy.adapter),
        round_idx=0,
        num_rounds=3,
        num_steps=steps,
        seed=0,
        stage=stage,
        public_steps=2,
    )


def works(name: str, steps: int = 9) -> tuple[Any, tuple[Any, ...]]:
    strategy = make(name)
    state = strategy.client.init_state(toy_adapter("S", strategy.adapter), context(strategy))
    return strategy.client.prepare({}, state, context(strategy, steps=steps))


@pytest.mark.parametrize("name", ["fedavg", "ditto", "fedsim", "feddpa", "feddat"])
def test_averages_inside_each_architecture_match_the_reference(name: str) -> None:
    local, arch = torch.from_numpy(GOLDEN["fedavg/local"]).float(), GOLDEN["fedavg/arch"]
    strategy = make(name)
    manifests = [
        ClientManifest(
            client_id=client,
            model=str(kind),
            family="toy",
            signature=str(kind),
            num_layers=1,
            num_blocks=1,
            num_examples=1,
            tasks=("t-0",),
            layouts={"conv": str(kind)},
        )
        for client, kind in enumerate(arch)
    ]
    selected = [int(client) for client in GOLDEN["fedavg/selected"]]
    headers = [UpdateHeader(client_id=c, round_idx=0, num_examples=1 + c) for c in selected]
    _, plan = strategy.plan(strategy.init(manifests, 0), headers)
    uploads = {client: {"conv/0/m/A": local[client].clone()} for client in selected}
    received = LocalCommunicator().execute(plan, uploads)
    for client, expected in enumerate(GOLDEN["fedavg/global"]):
        if "conv/0/m/A" in received.get(client, {}):
            got = received[client]["conv/0/m/A"].double().numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert sum("conv/0/m/A" in value for value in received.values()) == len(arch)


def test_task_vectors_are_not_zero() -> None:
    key = AdapterKey(0, 0, "m", Branch.LOCAL, Part.A)
    average = {key: torch.tensor([1.0, 2.0])}
    students = [{key: torch.tensor([2.0, 2.0])}, {key: torch.tensor([1.0, 6.0])}]
    merged = task_arithmetic(average, students)[key]
    # Mean of the differences (1, 0) and (0, 4).
    assert merged.tolist() == [1.5, 4.0]
    assert task_arithmetic(average, [])[key].tolist() == [1.0, 2.0]
    assert not GOLDEN["takfl/task_vector_official"].any()
    assert GOLDEN["takfl/task_vector_intended"].any()


def test_takfl_teaches_each_architecture_from_the_average() -> None:
    strategy = make("takfl")
    toy = ToyFederation(strategy, ("S", "M", "S", "M"))
    toy.play()
    slots = [slot for slot in toy.plan.rows if slot.startswith("teacher-")]
    assert len(slots) == 2
    for slot in slots:
        assert {row.target for row in toy.plan.rows[slot]} == {0, 1}
        assert {row.sources for row in toy.plan.rows[slot]} in ({(0, 2)}, {(1, 3)})
    assert toy.plan.internal == set(toy.plan.rows)
    # The clients receive the hosts' models, and start from them.
    for client, host in ((0, 0), (1, 1), (2, 0), (3, 1)):
        sent = toy.stage_uploads[host]
        for name, value in sent.items():
            arrived = toy.downlinks[client]["conv/" + name.partition("/")[2]]
            assert torch.equal(arrived, value)


def test_feddpa_shares_the_batches_of_a_round() -> None:
    _, (first, second) = works("feddpa")
    assert (first.num_steps, first.first_step) == (5, 0)
    assert (second.num_steps, second.first_step) == (4, 5)
    assert first.train == {Branch.GLOBAL}
    assert (second.train, second.view) == ({Branch.LOCAL}, View.GATED)
    _, alone = works("feddpa", steps=1)
    assert [work.name for work in alone] == ["global"]


def test_feddat_weighs_distillation_by_the_square_of_the_temperature() -> None:
    state, (one,) = works("feddat")
    assert isinstance(one, Pass)
    own, other = one.objectives
    assert (own.view, own.train) == (View.GLOBAL, {Branch.GLOBAL})
    assert (other.view, other.train, other.overlay) == (
        View.GATED,
        {Branch.LOCAL},
        ("received",),
    )
    for item in (own, other):
        (term,) = item.distil
        # (CE + 4 KL) / 2
        assert (item.task_weight, term.weight, term.temperature) == (0.5, 2.0, 2.0)
    assert own.distil[0].teachers[0].overlay == ("received",)
    assert other.distil[0].teachers[0].overlay == ()
    assert {key.branch for key in state.sets["received"]} == {Branch.GLOBAL}


def test_ditto_pulls_to_what_was_received() -> None:
    strategy = make("ditto", proximal=0.5)
    adapter = toy_adapter("S", "dual_lora")
    state = strategy.client.init_state(adapter, context(strategy))
    sent = {
        key.share_key: torch.full_like(value, 7.0)
        for key, value in adapter.items()
        if key.branch is Branch.GLOBAL
    }
    state, (one,) = strategy.client.prepare(sent, state, context(strategy))
    assert all(bool((value == 7.0).all()) for value in state.sets["received"].values())
    (term,) = one.also[0].proximal
    assert (term.weight, term.anchor, term.branch) == (0.5, "received", Branch.LOCAL)
    for key, value in state.adapter.items():
        assert bool((value == 7.0).all()) == (key.branch is Branch.GLOBAL)


def test_sample_losses_are_mean_cross_entropies() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    seen = ProbeResult(losses={}, counts={}, tensors={"own/t/a": logits}, labels={"t/a": (0, 1)})
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    assert sample_losses(seen) == {"t/a": pytest.approx(float(expected))}


def test_fedmkt_asks_the_best_client_of_the_vocabulary() -> None:
    strategy = make("fedmkt")
    manifests = [toy_manifest(i, kind, "lora") for i, kind in enumerate(("S", "M", "S"))]
    state = strategy.init(manifests, 0)
    losses = {0: [0.5, 0.1], 1: [0.4, 0.9], 2: [0.6, 0.1]}
    headers = [
        UpdateHeader(client_id=c, round_idx=0, num_examples=1, notes={"losses": values})
        for c, values in losses.items()
    ]
    after, plan = strategy.plan(state, headers)
    hosts = {row.target for row in plan.rows[sample_channel(0, "toy words")]}
    assert hosts == {0, 1}
    assert {row.sources for row in plan.rows[sample_channel(0, "toy words")]} == {(1,)}
    # Equally good: the smaller id.
    assert {row.sources for row in plan.rows[sample_channel(1, "toy words")]} == {(0,)}
    # Who stays away can still be the best.
    later = [UpdateHeader(client_id=2, round_idx=1, num_examples=1, notes={"losses": [9.0, 9.0]})]
    _, plan = strategy.plan(after, later)
    assert {row.sources for row in plan.rows[sample_channel(0, "toy words")]} == {(1,)}
    # A model that diverged teaches nobody.
    broken = [
        UpdateHeader(
            client_id=0, round_idx=1, num_examples=1, notes={"losses": [float("nan"), float("inf")]}
        )
    ]
    _, plan = strategy.plan(after, broken)
    assert {row.sources for row in plan.rows[sample_channel(0, "toy words")]} == {(1,)}
    assert {row.sources for row in plan.rows[sample_channel(1, "toy words")]} == {(2,)}
    assert strategy.select_stage(after, "server", 1, (2,)) == (0, 1)
    assert strategy.select_stage(after, "transfer", 1, (2,)) == (2,)


def test_fedmkt_learns_only_where_the_teacher_is_better() -> None:
    strategy = make("fedmkt")
    half, ctx = strategy.client, context(strategy, "transfer")
    state = half.init_state(toy_adapter("S", "lora"), ctx)
    state = type(state)(
        client_id=0,
        adapter=state.adapter,
        sets=state.sets,
        extra={"public losses": {"t/a": 1.0, "t/b": 1.0}},
    )
    downlink = {
        "server@toy words/logits/t/a": torch.ones(2, 3),
        "server@toy words/loss/t/a": torch.tensor([0.5]),
        "server@toy words/logits/t/b": torch.ones(2, 3),
        "server@toy words/loss/t/b": torch.tensor([1.5]),
    }
    state, (one,) = half.prepare(downlink, state, ctx)
    assert sorted(state.tensors) == ["teacher/t/a"]
    assert (one.task_weight, one.distil[0].kind, one.into) == (0.0, "soft_ce", "")
    worse = {**downlink, "server@toy words/loss/t/a": torch.tensor([1.0])}
    _, none = half.prepare(worse, state, ctx)
    assert none == ()


@pytest.mark.parametrize("name", ["feddistill", "perada", "takfl", "fedmkt"])
def test_other_vocabularies_are_not_teachers_where_the_user_says_so(name: str) -> None:
    strategy = make(name, vocabularies="own")
    assert not strategy.translates
    toy = ToyFederation(strategy, ("S", "M", "S", "M"))
    toy.manifests = [
        replace(manifest, vocabulary=f"words of {manifest.signature}") for manifest in toy.manifests
    ]
    toy.state = strategy.init(toy.manifests, toy.seed)
    toy.play()
    for rows in toy.plan.rows.values():
        for row in rows:
            kinds = {toy.architectures[client] for client in (row.target, *row.sources)}
            assert len(kinds) == 1
