"""Strategies that teach by logits reach clients with another tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_federation import ToyFederation, toy_adapter, toy_manifest

from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.core.types import ClientContext, UpdateHeader
from fedml_plugin_fedmosaic.core.work import Pass

HERE, THERE = "words of S", "words of M"


def federation(name: str, kinds: Sequence[str] = ("S", "M", "S"), **options: Any) -> ToyFederation:
    """A federation in which every architecture has a vocabulary of its own."""
    strategy = STRATEGIES[name](STRATEGIES[name].Options(**options))
    toy = ToyFederation(strategy, kinds)
    toy.manifests = [
        replace(manifest, vocabulary=f"words of {manifest.signature}") for manifest in toy.manifests
    ]
    toy.state = strategy.init(toy.manifests, toy.seed)
    return toy


def server_passes(toy: ToyFederation, host: int) -> tuple[Any, tuple[Pass, ...]]:
    """What a host is asked to train from what it received, and its state then."""
    state, works = toy.strategy.client.prepare(
        toy.downlinks[host], toy.clients[host], toy.context(toy.manifests[host], "server")
    )
    assert all(isinstance(work, Pass) for work in works)
    return state, works


@pytest.mark.parametrize("name", ["feddistill", "perada", "takfl", "fedmkt"])
def test_logits_cross_vocabularies_unless_the_user_says_no(name: str) -> None:
    assert STRATEGIES[name](STRATEGIES[name].Options()).translates
    toy = federation(name).play(2)
    assert [
        row
        for slot, rows in toy.plan.rows.items()
        for row in rows
        if slot.partition("@")[2] not in ("", toy.manifests[row.target].vocabulary)
    ]
    for slot, rows in toy.plan.rows.items():
        for row in rows:
            # Sums of logits are of one vocabulary, which the slot names.
            if slot != "conv":
                assert {toy.manifests[source].vocabulary for source in row.sources} == {
                    slot.partition("@")[2]
                }


@pytest.mark.parametrize("name", ["feddistill", "perada", "takfl", "fedmkt"])
def test_one_vocabulary_stays_as_it_is(name: str) -> None:
    strategy = STRATEGIES[name](STRATEGIES[name].Options())
    toy = ToyFederation(strategy, ("S", "M", "S")).play()
    assert {slot.partition("@")[2] for slot in toy.plan.rows} <= {"", "toy words"}
    assert not [slot for slot in toy.plan.rows if slot.startswith("voices-")]


@pytest.mark.parametrize("name", ["feddistill", "perada"])
def test_distillation_weighs_vocabularies_by_their_clients(name: str) -> None:
    toy = federation(name, temperature=3.0, top_tokens=5).play()
    assert toy.plan.slots["voices-1-of-3@words of M"] == "logits-words of M"
    received = dict(toy.downlinks[0])
    sent = [toy.uploads[client]["logits-words of S/public-0/1"] for client in (0, 2)]
    mean = received["voices-2-of-3@words of S/public-0/1"]
    assert torch.allclose(mean, torch.stack(sent).mean(0))
    state, (work,) = server_passes(toy, 0)
    own, other = sorted(work.distil, key=lambda term: len(term.vocabularies))
    assert (own.weight, other.weight) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert own.vocabularies == {}
    assert other.vocabularies == {f"public-0/{index}": THERE for index in range(3)}
    assert (other.top_k, other.temperature) == (5, 3.0)
    for term in (own, other):
        for index in range(3):
            assert f"{term.targets}/public-0/{index}" in state.tensors
    # The other host hears two of three in a foreign language.
    _, (work,) = server_passes(toy, 1)
    weights = {bool(term.vocabularies): term.weight for term in work.distil}
    assert weights == {True: pytest.approx(2 / 3), False: pytest.approx(1 / 3)}


def test_takfl_has_a_teacher_per_architecture_of_any_vocabulary() -> None:
    toy = federation("takfl").play()
    state, passes = server_passes(toy, 0)
    assert len(passes) == 2
    foreign = [work for work in passes if work.distil[0].vocabularies]
    assert len(foreign) == 1
    assert set(foreign[0].distil[0].vocabularies.values()) == {THERE}
    # The average teaches in the student's own words.
    assert foreign[0].distil[1].vocabularies == {}
    for work in passes:
        assert f"{work.distil[0].targets}/public-0/0" in state.tensors


def headers(losses: Mapping[int, Sequence[float]], tokens: Mapping[int, Sequence[int]]) -> Any:
    return [
        UpdateHeader(
            client_id=client,
            round_idx=0,
            num_examples=1,
            notes={"losses": list(values), "tokens": list(tokens[client])},
        )
        for client, values in losses.items()
    ]


def test_fedmkt_compares_whole_answers_across_vocabularies() -> None:
    toy = federation("fedmkt")
    # Client 1 cuts answers into one token, the others into four.
    losses = {0: [0.5, 0.2], 1: [0.9, 0.9], 2: [0.4, 0.3]}
    tokens = {0: [4, 4], 1: [1, 1], 2: [4, 4]}
    after, plan = toy.strategy.plan(toy.state, headers(losses, tokens))
    assert {row.target: row.sources for row in plan.rows[f"sample0@{THERE}"]} == {0: (1,), 1: (1,)}
    assert {row.target: row.sources for row in plan.rows[f"sample1@{HERE}"]} == {0: (0,), 1: (0,)}
    assert plan.internal == set(plan.rows)
    # What was sent earlier still counts.
    _, plan = toy.strategy.plan(after, headers({0: [9.0, 9.0]}, {0: [4, 4]}))
    assert {row.target: row.sources for row in plan.rows[f"sample1@{THERE}"]} == {0: (1,), 1: (1,)}


def test_fedmkt_inside_a_vocabulary_compares_means() -> None:
    strategy = STRATEGIES["fedmkt"](STRATEGIES["fedmkt"].Options())
    toy = ToyFederation(strategy, ("S", "M"))
    _, plan = strategy.plan(toy.state, headers({0: [0.5], 1: [0.9]}, {0: [4], 1: [1]}))
    assert {row.sources for row in plan.rows["sample0@toy words"]} == {(0,)}


def context(stage: str) -> ClientContext:
    return ClientContext(
        manifest=replace(toy_manifest(0, "S", "lora"), vocabulary=HERE),
        round_idx=0,
        num_rounds=3,
        num_steps=4,
        seed=0,
        stage=stage,
        public_steps=2,
    )


def test_fedmkt_learns_where_the_whole_answer_is_better() -> None:
    half = STRATEGIES["fedmkt"](STRATEGIES["fedmkt"].Options(top_tokens=9)).client
    state = half.init_state(toy_adapter("S", "lora"), context("transfer"))
    extra = {
        "public losses": {"t/a": 1.0, "t/b": 1.0, "t/c": 1.0},
        "public tokens": {"t/a": 2, "t/b": 2, "t/c": 2},
    }
    state = replace(state, extra=extra)
    downlink = {
        # 1.5 in one token is better than 1.0 in each of two; 0.9 in three is not.
        f"server@{THERE}/logits/t/a": torch.ones(1, 5),
        f"server@{THERE}/loss/t/a": torch.tensor([1.5]),
        f"server@{THERE}/logits/t/b": torch.ones(3, 5),
        f"server@{THERE}/loss/t/b": torch.tensor([0.9]),
        f"server@{HERE}/logits/t/c": torch.ones(2, 7),
        f"server@{HERE}/loss/t/c": torch.tensor([0.9]),
    }
    state, (work,) = half.prepare(downlink, state, context("transfer"))
    assert sorted(state.tensors) == ["teacher/t/a", "teacher/t/c"]
    (term,) = work.distil
    assert (term.vocabularies, term.top_k) == ({"t/a": THERE}, 9)


@pytest.mark.parametrize("choice", ["all", "own"])
def test_fedmkt_answers_clients_of_a_layout_in_another_vocabulary(choice: str) -> None:
    toy = federation("fedmkt", ("S", "S"), vocabularies=choice)
    toy.manifests[1] = replace(toy.manifests[1], vocabulary=THERE)
    toy.state = toy.strategy.init(toy.manifests, 0)
    _, plan = toy.strategy.plan_stage(toy.state, "server", headers({0: [1.0]}, {0: [2]}))
    assert set(plan.rows) == {f"server@{HERE}"}
    targets = {row.target for row in plan.rows[f"server@{HERE}"]}
    assert targets == ({0, 1} if choice == "all" else {0})
