"""FedReMa: peers by their answers, on numbers made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_federation import toy_adapter, toy_manifest

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import ClientContext, MixingPlan, UpdateHeader
from fedml_plugin_fedmosaic.core.work import LocalResult, Pass, Probe, ProbeResult, Samples
from fedml_plugin_fedmosaic.strategies.fedrema import FedReMa, FedReMaOptions


def _header(client: int, *answers: list[float], round_idx: int = 0) -> UpdateHeader:
    notes = {"answers": {f"p/{index}": answer for index, answer in enumerate(answers)}}
    return UpdateHeader(client_id=client, round_idx=round_idx, num_examples=4, notes=notes)


def _rows(plan: MixingPlan, slot: str) -> dict[int, dict[int, float]]:
    return {row.target: dict(zip(row.sources, row.weights, strict=True)) for row in plan.rows[slot]}


def _start(**options: Any) -> tuple[FedReMa, Any]:
    strategy = FedReMa(FedReMaOptions(projection=2, **options))
    names = ("S", "S", "S", "S", "M")
    return strategy, strategy.init([toy_manifest(i, n, "lora") for i, n in enumerate(names)], 0)


# Angles of 0, 10, 80 and 90 degrees: two pairs that answer alike.
ANGLES = {0: [1.0, 0.0], 1: [0.985, 0.174], 2: [0.174, 0.985], 3: [0.0, 1.0]}


def test_heads_are_shared_above_the_largest_gap_and_bodies_by_all() -> None:
    strategy, state = _start()
    _, plan = strategy.plan(state, [_header(i, answer) for i, answer in ANGLES.items()])
    heads = _rows(plan, "head")
    assert heads[0] == heads[1] == {0: 0.5, 1: 0.5}
    assert heads[2] == heads[3] == {2: 0.5, 3: 0.5}
    assert _rows(plan, "body") == {i: dict.fromkeys(range(4), 0.25) for i in range(4)}
    assert plan.relevance is not None
    assert float(plan.relevance[0, 1]) == pytest.approx(0.985, abs=1e-3)
    assert torch.isnan(plan.relevance[4]).all()


def test_likeness_is_the_mean_over_the_samples() -> None:
    strategy, state = _start()
    headers = [_header(0, [1.0, 0.0], [1.0, 0.0]), _header(1, [2.0, 0.0], [0.0, 3.0])]
    _, plan = strategy.plan(state, headers)
    assert plan.relevance is not None
    assert float(plan.relevance[0, 1]) == pytest.approx(0.5)


def test_after_the_critical_period_counts_decide() -> None:
    strategy, state = _start(delta=0.9)
    for _ in range(2):
        state, _ = strategy.plan(state, [_header(i, answer) for i, answer in ANGLES.items()])
    # Client 1 now answers like 2 and 3: the period goes on, and 0 has nobody left near.
    moved = {**ANGLES, 1: [0.0, 1.0]}
    state, _ = strategy.plan(state, [_header(i, answer) for i, answer in moved.items()])
    assert state["counts"]["1"] == {"1": 3, "0": 2, "2": 1, "3": 1}
    assert not any(state["over"].values())
    # Everybody answers nearly alike: the gap is small, and nothing is counted any more.
    same = {i: [1.0, 0.01 * i] for i in range(4)}
    after, plan = strategy.plan(state, [_header(i, answer) for i, answer in same.items()])
    assert list(after["over"].values()) == [True]
    assert after["counts"] == state["counts"]
    counts = state["counts"]["0"]
    total = sum(counts.values())
    expected = {int(client): count / total for client, count in sorted(counts.items())}
    assert _rows(plan, "head")[0] == pytest.approx(expected)


def test_whoever_has_not_trained_receives_the_body_only() -> None:
    strategy, state = _start()
    state, plan = strategy.plan(state, [_header(0, [1.0, 0.0]), _header(1, [0.0, 1.0])])
    assert _rows(plan, "body")[3] == {0: 0.5, 1: 0.5}
    assert 3 not in _rows(plan, "head")
    # A round of other clients: 0 and 1 are still known, the body is that of the round.
    _, plan = strategy.plan(state, [_header(2, [1.0, 0.1])])
    assert _rows(plan, "body")[0] == {2: 1.0}
    assert _rows(plan, "head")[2] == {0: 0.5, 2: 0.5}
    assert _rows(plan, "head")[0] == {0: 0.5, 2: 0.5}


def test_everything_can_be_head() -> None:
    strategy, state = _start(head_share=1.0)
    _, plan = strategy.plan(state, [_header(0, [1.0, 0.0])])
    assert sorted(plan.rows) == ["head"]


def test_broken_answers_are_refused() -> None:
    strategy, state = _start()
    bare = UpdateHeader(client_id=0, round_idx=0, num_examples=1)
    for header in (bare, _header(0, [1.0]), _header(0), _header(0, [float("nan"), 1.0])):
        with pytest.raises(PlanError, match="2 finite numbers per public sample"):
            strategy.plan(state, [header])
    with pytest.raises(PlanError, match="different public samples"):
        strategy.plan(state, [_header(0, [1.0, 0.0]), _header(1, [1.0, 0.0], [1.0, 0.0])])


def test_a_client_answers_after_training_and_splits_its_layers() -> None:
    strategy = FedReMa(FedReMaOptions(projection=8, probe_samples=5, head_share=0.3))
    assert strategy.needs_public
    assert strategy.cost.public == 5 / 80
    half, adapter = strategy.client, toy_adapter("S", "lora")
    context = ClientContext(
        manifest=toy_manifest(0, "S", "lora"), round_idx=0, num_rounds=3, num_steps=7, seed=0
    )
    state = half.init_state(adapter, context)
    state, (training,) = half.prepare({}, state, context)
    assert isinstance(training, Pass)
    result = LocalResult(
        adapter=adapter, losses=(1.0,), num_examples=4, num_tokens=9, duration_s=0.1
    )
    state, (probe,) = half.advance({training.name: result}, state, context)
    assert isinstance(probe, Probe)
    assert (probe.samples, probe.limit, probe.what) == (Samples.PUBLIC, 5, "logits")
    # The distribution of the first answer token; four words fit into the projection as they are.
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]).log()
    seen = ProbeResult(
        losses={}, counts={"p": 1}, tensors={"model/p/0": logits}, labels={"p/0": (1, 2)}
    )
    state, more = half.advance({probe.name: seen}, state, context)
    assert more == ()
    header = UpdateHeader(client_id=0, round_idx=0, num_examples=4)
    update, after = half.finish(result, state, context, header)
    answer = update.header.notes["answers"]["p/0"]
    assert answer == pytest.approx([0.1, 0.2, 0.3, 0.4, 0, 0, 0, 0])
    by_channel = {name.rpartition("/")[0] for name in update.tensors}
    assert by_channel == {f"body/{i}/q_proj" for i in (0, 1)} | {f"head/{i}/q_proj" for i in (2, 3)}
    downlink = {n: torch.ones_like(t) for n, t in update.tensors.items() if n.startswith("body")}
    got, _ = half.prepare(downlink, after, context)
    for key, tensor in got.adapter.items():
        assert torch.equal(tensor, torch.ones_like(tensor) if key.layer < 2 else adapter[key])


def test_answers_of_different_vocabularies_are_not_compared() -> None:
    strategy = FedReMa(FedReMaOptions(projection=2))
    manifests = [toy_manifest(i, "S", "lora") for i in range(4)]
    other = [replace(manifest, vocabulary="other words") for manifest in manifests[2:]]
    state = strategy.init([*manifests[:2], *other], 0)
    # 0 and 2 answer with the same numbers, which mean other words.
    answers = {0: [1.0, 0.0], 1: [0.8, 0.6], 2: [1.0, 0.0], 3: [0.0, 1.0]}
    _, plan = strategy.plan(state, [_header(i, answer) for i, answer in answers.items()])
    heads = _rows(plan, "head")
    assert heads[0] == heads[1] == {0: 0.5, 1: 0.5}
    assert heads[2] == heads[3] == {2: 0.5, 3: 0.5}
    assert plan.relevance is not None
    assert torch.isnan(plan.relevance[:2, 2:]).all()
    assert _rows(plan, "body")[0] == dict.fromkeys(range(4), 0.25)
