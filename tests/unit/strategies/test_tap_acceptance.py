"""What TAP must do, with real tiny models: eight statements that hold bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_rounds import Member, ModelRounds, load_bundles
from torch import Tensor

from fedml_plugin_fedmosaic.core.rng import derive_seed
from fedml_plugin_fedmosaic.core.types import AdapterState, ClientState
from fedml_plugin_fedmosaic.core.work import Pass, Samples
from fedml_plugin_fedmosaic.engine.base import FitStopped
from fedml_plugin_fedmosaic.runtime.arrivals import Arrivals
from fedml_plugin_fedmosaic.runtime.client import ClientRunner
from fedml_plugin_fedmosaic.runtime.records import StepRecord, step_from_tree, step_tree
from fedml_plugin_fedmosaic.runtime.treefile import load_tree, save_tree
from fedml_plugin_fedmosaic.strategies.tap_sets import set_name, upload_name

KEYS = ("text:words-0", "text:words-1")
SETS = (*KEYS, "shared")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    return load_bundles(tmp_path_factory.mktemp("models"))


def equal(first: AdapterState, second: AdapterState) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def edition(state: ClientState, name: str) -> dict[str, AdapterState]:
    return {
        key.partition(".")[2]: tensors
        for key, tensors in state.sets.items()
        if key.startswith(f"{name}.")
    }


def same_sets(first: Mapping[str, AdapterState], second: Mapping[str, AdapterState]) -> bool:
    return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)


def test_1_one_client_that_never_replaces_is_local_training(bundles: Mapping[str, Any]) -> None:
    options = {"margin": math.inf}
    with ModelRounds("tap", options, bundles, [Member()], num_rounds=2) as rounds:
        client = rounds.clients[0]
        start = client.state
        own = _by_hand(rounds, start, client)
        rounds.play().play()
        assert same_sets(edition(client.state, "p"), own)
        assert not same_sets(edition(client.state, "p"), edition(start, "p"))


def _by_hand(
    rounds: ModelRounds, start: ClientState, client: ClientRunner
) -> dict[str, AdapterState]:
    """Two rounds of training by the engine alone."""
    arrivals = Arrivals(client.data, rounds.experiment)
    sets = edition(start, "p")
    for round_idx in range(2):
        one = Pass(
            name="personal",
            view=rounds.strategy.client._view,
            train=rounds.strategy.client._train,
            num_steps=2,
            route={"words-0": KEYS[0], "words-1": KEYS[1]},
        )
        result = client.engine.fit(
            one,
            {**start.adapter, **sets["shared"]},
            arrivals.batches(round_idx, 2),
            seed=derive_seed(1, "fit", 0, round_idx, "personal"),
            sets={key: sets[key] for key in KEYS},
        )
        shared = {key: result.adapter[key] for key in sets["shared"]}
        sets = {**result.sets, "shared": shared}
    return sets


def test_2_a_client_that_always_replaces_starts_from_the_federated_sets(
    bundles: Mapping[str, Any],
) -> None:
    starts: list[bool] = []

    def watch(client: ClientRunner, work: Any) -> None:
        if work.name == "personal":
            assert work.samples is Samples.REPLAY, "the samples of the federated pass are over"
            starts.append(same_sets(edition(client.state, "p"), edition(client.state, "f")))

    with ModelRounds(
        "tap", {"margin": -math.inf}, bundles, [Member(), Member()], watch=watch
    ) as rounds:
        rounds.play().play()
    assert starts == [True] * 4


@pytest.mark.parametrize("sets", ["both", "key"])
def test_3_clients_without_a_common_key_leave_each_others_key_alone(
    bundles: Mapping[str, Any], sets: str
) -> None:
    members = [Member(samples={0: 8}), Member(samples={1: 8})]
    with ModelRounds("tap", {"sets": sets}, bundles, members) as rounds:
        rounds.play()
        for client_id, key in enumerate(KEYS):
            own = {k: v for k, v in rounds.uploads[client_id].items() if key in k}
            received = {k: v for k, v in rounds.downlinks[client_id].items() if ":words-" in k}
            assert own
            assert equal(received, own)  # type: ignore[arg-type]
            assert f"f.{KEYS[1 - client_id]}" not in rounds.clients[client_id].state.sets
        rounds.play()
        together = rounds.clients[0].state
    if sets == "key":  # nothing at all is shared then
        with ModelRounds("tap", {"sets": sets}, bundles, members[:1]) as rounds:
            assert same_sets(rounds.play().play().clients[0].state.sets, together.sets)


def test_4_what_is_downloaded_is_the_aggregate_bit_for_bit(bundles: Mapping[str, Any]) -> None:
    members = [Member(), Member(samples={0: 20, 1: 12}), Member(samples={1: 8})]
    with ModelRounds("tap", {}, bundles, members, optim={"num_steps": 12}) as rounds:
        rounds.play()
        samples = rounds.state["samples"]
        assert [len(header.notes["trained"]) for header in rounds.headers] == [2, 2, 1]
        holders = {key: [c for c in samples if key in samples[c]] for key in SETS}
        assert [len(holders[key]) for key in SETS] == [2, 3, 3]
        for client_id in range(3):
            client = rounds.clients[client_id]
            client.prepare(rounds.downlinks[client_id], 1)
            federated = edition(client.state, "f")
            placed = 0
            for key, tensors in federated.items():
                total = sum(samples[c][key] for c in holders[key])
                for tensor, value in tensors.items():
                    name = upload_name(key, tensor)
                    assert torch.equal(value, rounds.downlinks[client_id][name])
                    mean = sum(
                        rounds.uploads[int(c)][name].double() * samples[c][key] / total
                        for c in holders[key]
                    )
                    torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)
                    placed += 1
            assert placed == len(rounds.downlinks[client_id])
        shared = [edition(rounds.clients[c].state, "f")["shared"] for c in range(3)]
        assert equal(shared[0], shared[1])
        assert equal(shared[1], shared[2])


def test_5_a_client_that_was_never_drawn_goes_through_the_final_stage(
    bundles: Mapping[str, Any],
) -> None:
    with ModelRounds("tap", {}, bundles, [Member(), Member(), Member()]) as rounds:
        rounds.play(0, 1).play(0).finalize()
        absent = rounds.clients[2].state
        assert absent.participations == 0
        sets = {name: edition(absent, name) for name in "fpts"}
        assert all(set(tensors) == set(SETS) for tensors in sets.values())
        # It begins with what the federation knows, and trains from there.
        assert same_sets(sets["f"], edition(_received(rounds, 2), "f"))
        assert same_sets(sets["p"], sets["f"])
        for key in SETS:
            assert not equal(sets["t"][key], sets["f"][key])
            assert not equal(sets["s"][key], sets["p"][key])
        for view in ("regular", "regular_ft", "personal", "personal_post"):
            served = rounds.clients[2].serve(view, "words-0")
            assert set(served.model.overlay) <= absent.sets.keys()


def _received(rounds: ModelRounds, client_id: int) -> ClientState:
    """A fresh state with the last downlink in it."""
    client = rounds.clients[client_id]
    half = rounds.strategy.client
    fresh = half.init_state(client.engine.initial_adapter(), client.context(0))
    state: ClientState = half.prepare(rounds.downlinks[client_id], fresh, client.context(0))[0]
    return state


@pytest.mark.parametrize("test", ["held_out", "train"])
def test_6_a_client_killed_or_stopped_between_its_passes_ends_the_same(
    bundles: Mapping[str, Any], test: str, tmp_path: Any
) -> None:
    options = {"test": test, "margin": 0.001}

    def play(rounds: ModelRounds) -> tuple[ClientState, Any]:
        rounds.play().play()
        return rounds.clients[0].state, rounds.headers[0].notes

    with ModelRounds("tap", options, bundles, [Member(), Member()]) as rounds:
        whole = play(rounds)
        assert len(whole[1]["report"]) == 3
    for end in (_killed, _stopped):
        with ModelRounds("tap", options, bundles, [Member(), Member()]) as rounds:
            rounds.play()
            end(rounds, tmp_path / f"{end.__name__}.safetensors")
            rounds.play()
            state, notes = rounds.clients[0].state, rounds.headers[0].notes
        assert notes == whole[1], end
        assert same_sets(state.sets, whole[0].sets)
        assert state.extra == whole[0].extra


def _killed(rounds: ModelRounds, _: Any) -> None:
    """The process is lost between the passes; the round begins again from the saved state."""
    client = rounds.clients[0]
    saved = client.state
    works = client.prepare(rounds.downlinks[0], 1)
    client.advance({work.name: rounds.work(client, work) for work in works}, 1)
    rounds.restart(0, saved)


def _stopped(rounds: ModelRounds, path: Any) -> None:
    """Asked to stop between the passes: it stops in the second one and goes on from a file."""
    client = rounds.clients[0]
    saved = client.state
    train = rounds.train

    def in_two_lives(client_id: int, stage: str = "train") -> Any:
        if client_id:
            return train(client_id, stage)
        works = client.prepare(rounds.downlinks[0], 1)
        while works[0].name != "personal":
            works = client.advance({w.name: rounds.work(client, w) for w in works}, 1)
        (work,) = works
        with pytest.raises(FitStopped) as stop:
            client.fit(work, 1, lambda *_: None, should_stop=lambda: True)
        record = StepRecord(
            pass_idx=0, state=client.state, progress=stop.value.progress, works=tuple(works)
        )
        save_tree(path, step_tree(record))
        read = step_from_tree(load_tree(path))
        rounds.restart(0, saved)
        fresh = rounds.clients[0]
        fresh.prepare(rounds.downlinks[0], 1)
        fresh.go_on(read.state)
        (again,) = read.works
        assert isinstance(again, Pass)
        result = fresh.fit(again, 1, lambda *_: None, progress=read.progress)
        assert fresh.advance({again.name: result}, 1) == ()
        return fresh.finish(1)

    rounds.train = in_two_lives  # type: ignore[method-assign]


def test_7_a_final_stage_without_distillation_is_plain_fine_tuning(
    bundles: Mapping[str, Any],
) -> None:
    students = {}
    for factor in (0.0, 2.0):
        seen: list[Pass] = []

        def watch(client: ClientRunner, work: Any, seen: list[Pass] = seen) -> None:
            if work.name == "student":
                seen.append(work)
                if not work.distil:  # the same pass, by the engine alone
                    plain = client.engine.fit(
                        replace(work, overlay=(), into=""),
                        {**client.state.adapter, **client.state.sets["s.shared"]},
                        client._drawn(work, 3, work.num_steps),
                        seed=derive_seed(1, "fit", 0, 3, "student"),
                        sets=client.state.sets,
                    )
                    students["by hand"] = {
                        name.partition(".")[2]: tensors for name, tensors in plain.sets.items()
                    }

        options = {"distillation": factor, "final_lr_scale": 1.0}
        with ModelRounds("tap", options, bundles, [Member()], watch=watch) as rounds:
            # The last round's learning rate is that of the final stage.
            state = rounds.play().finalize().clients[0].state
            students[factor] = edition(state, "s")
        assert [bool(work.distil) for work in seen] == [bool(factor)]
    for key, tensors in students["by hand"].items():
        assert equal(students[0.0][key], tensors)
        assert not equal(students[2.0][key], tensors)


@pytest.mark.parametrize("exchange", ["family", "colora", "none"])
def test_8_unequal_clients_exchange_only_what_the_policy_allows(
    bundles: Mapping[str, Any], exchange: str
) -> None:
    members = [Member(), Member(model="large"), Member(), Member(model="large", samples={1: 9})]
    with ModelRounds("tap", {"exchange": exchange}, bundles, members) as rounds:
        rounds.play().play(0, 1).finalize()
        model = {client_id: client.manifest.model for client_id, client in rounds.clients.items()}
        met: dict[str, set[bool]] = {}
        for channel, rows in rounds.plan.rows.items():
            for row in rows:
                crossing = {model[source] != model[row.target] for source in row.sources}
                met.setdefault(channel.partition(":")[0], set()).update(crossing)
                if ":words-0" in channel:
                    assert 3 not in (row.target, *row.sources)
        expected: dict[str, dict[str, set[bool]]] = {
            "family": {"conv": {False}},
            "colora": {"conv": {False}, "pq": {False, True}},
            "none": {},
        }
        assert met == expected[exchange]
        assert any(rounds.uploads.values()) == (exchange != "none")
        for client in rounds.clients.values():
            for tensors in client.state.sets.values():
                assert all(value.isfinite().all() for value in tensors.values())
        if exchange == "colora":
            assert rounds.strategy.adapter == "pq_lora"
            _equal_blocks(rounds)


def _equal_blocks(rounds: ModelRounds) -> None:
    """Everyone who holds the key starts from the same P and Q, whatever the architecture."""

    def blocks(client_id: int) -> dict[str, Tensor]:
        received = rounds.downlinks[client_id]
        return {name: received[name] for name in received if name.startswith(f"pq:{KEYS[1]}/")}

    first = blocks(0)
    assert first
    for client_id in (1, 2, 3):
        assert equal(blocks(client_id), first)  # type: ignore[arg-type]
    assert set_name("f", KEYS[1]) in rounds.clients[3].state.sets
