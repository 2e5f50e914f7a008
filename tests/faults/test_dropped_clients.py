"""Whole runs of the tiny federation in which clients fail; policy "drop" and "abort"."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_fit import REASONS, Plan, faulty_fit
from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import ClientFailure, FedMosaicError, QuorumError
from fedml_plugin_fedmosaic.core.events import (
    ClientDropped,
    Event,
    PlanMade,
    RoundFinished,
    RoundSkipped,
)
from fedml_plugin_fedmosaic.core.types import AdapterState, ClientState, ClientUpdate
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.report.metrics import load_run
from fedml_plugin_fedmosaic.report.tables import summary_rows
from fedml_plugin_fedmosaic.runtime import round as round_module
from fedml_plugin_fedmosaic.runtime.faults import FaultGuard
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.hooks import NoHooks
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore, RoundCheckpoint

DROP = "faults.policy=drop"
FAST = ("evaluation.base=false", "evaluation.others=false")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(plan, *overrides, algo, hooks)`` -> the run's events; the folder is ``run.out``."""

    class Runner:
        def __init__(self) -> None:
            self.out = tmp_path
            self.events: list[Event] = []

        def __call__(
            self,
            plan: Plan,
            *overrides: str,
            algo: str = "fedmosaic",
            hooks: Any = None,
            resume: bool = False,
        ) -> list[Event]:
            if not resume:
                self.out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
            self.events = []
            self.algo = algo
            experiment = load_experiment(world, [*FAST, *overrides], algo=algo)
            with monkeypatch.context() as patch:
                patch.setattr(TorchEngine, "fit", faulty_fit(plan))
                sinks = [self.events.append]
                prepare_run(experiment, self.out, sinks, hooks, resume=resume).execute()
            return self.events

        def checkpoint(self, round_idx: int | None = None) -> RoundCheckpoint:
            store = CheckpointStore(self.out / "checkpoints" / self.algo, keep_last=9)
            return store.load(round_idx)

    return Runner()


def of(events: list[Event], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def same(left: AdapterState, right: AdapterState) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def assert_same(left: ClientState, right: ClientState) -> None:
    assert same(left.adapter, right.adapter)
    assert left.sketch is not None
    assert right.sketch is not None
    assert torch.equal(left.sketch, right.sketch)
    assert left.extra == right.extra
    assert left.participations == right.participations


@pytest.mark.parametrize("kind", sorted(REASONS))
def test_a_failing_client_is_left_out_for_one_round(run: Any, kind: str) -> None:
    events = run({(1, 0): kind}, DROP)
    (dropped,) = of(events, ClientDropped)
    assert (dropped.round_idx, dropped.client_id, dropped.stage) == (0, 1, "fit")
    assert REASONS[kind] in dropped.reason
    first, second = of(events, RoundFinished)
    assert sorted(first.uplink_bytes) == [0, 2]
    assert sorted(second.uplink_bytes) == [0, 1, 2]
    plan, _ = of(events, PlanMade)
    for row in plan.weights:
        assert row[1] in (None, 0.0)
        if row[0] is not None:
            assert math.isclose(sum(row), 1.0, abs_tol=1e-6)
    last = run.checkpoint()
    assert [last.clients[i].participations for i in range(3)] == [2, 1, 2]
    # What arrived in the lost round was there in the next: nothing was thrown away.
    seen = [len(last.clients[i].extra["arrivals"]["memory"]["items"]) for i in range(3)]
    assert seen == [8, 8, 8]


def test_a_dropped_client_is_where_it_was_and_the_others_do_not_notice_why(run: Any) -> None:
    run({(1, 0): "memory"}, DROP)
    reference = run.checkpoint()
    assert 1 not in run.checkpoint(0).clients  # there is nothing to save of it yet
    first = run({(1, 1): "memory"}, DROP)
    assert len(of(first, ClientDropped)) == 1
    assert_same(run.checkpoint(0).clients[1], run.checkpoint(1).clients[1])
    for kind in ("oom", "data", "explode"):
        run({(1, 0): kind}, DROP)
        found = run.checkpoint()
        for client_id, state in reference.clients.items():
            assert same(state.adapter, found.clients[client_id].adapter), (kind, client_id)


@pytest.mark.parametrize("algo", ["fedavg", "local"])
def test_every_strategy_goes_on_without_a_client(run: Any, algo: str) -> None:
    events = run({(0, 0): "oom", (2, 1): "explode"}, DROP, algo=algo)
    assert [(e.round_idx, e.client_id) for e in of(events, ClientDropped)] == [(0, 0), (1, 2)]
    for plan in of(events, PlanMade):
        for row in plan.weights or ():
            assert row[0] is None or math.isclose(sum(row), 1.0, abs_tol=1e-6)


@pytest.mark.parametrize("kind", ["oom", "data"])
def test_with_policy_abort_the_run_ends_and_names_the_client(run: Any, kind: str) -> None:
    with pytest.raises(FedMosaicError) as raised:
        run({(1, 1): kind})
    text = str(raised.value) + " ".join(getattr(raised.value, "__notes__", ()))
    assert "client 1, round 2, fit" in text
    assert REASONS[kind] in text
    assert run.checkpoint().round_idx == 0


def test_failures_are_recorded_and_reported(run: Any) -> None:
    run({(1, 0): "oom", (0, 1): "memory"}, DROP)
    records = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if record["event"] == "ClientDropped"]
    assert [(r["client_id"], r["round_idx"], r["stage"]) for r in found] == [
        (1, 0, "fit"),
        (0, 1, "fit"),
    ]
    assert "Failures of fedmosaic: 2 dropped (fit 2)." in summary_rows(run.out).notes
    run({})
    assert not any("Failures" in note for note in summary_rows(run.out).notes)


def test_a_round_without_a_quorum_changes_nothing_but_the_clients(run: Any) -> None:
    events = run({(0, 1): "oom", (1, 1): "data"}, DROP, "faults.quorum=0.5", "comm_round=2")
    (skipped,) = of(events, RoundSkipped)
    assert (skipped.round_idx, skipped.delivered, skipped.needed) == (1, 1, 2)
    assert [plan.round_idx for plan in of(events, PlanMade)] == [0]
    first, second = run.checkpoint(0), run.checkpoint(1)
    for client_id, downlink in first.downlinks.items():
        assert downlink.keys() == second.downlinks[client_id].keys()
        assert all(torch.equal(t, second.downlinks[client_id][k]) for k, t in downlink.items())
    assert [second.clients[i].participations for i in range(3)] == [1, 1, 2]
    assert load_run(run.out).strategies["fedmosaic"].skipped.keys() == {1}


def test_too_many_failed_rounds_in_a_row_end_the_run(run: Any) -> None:
    everyone = {(client, call): "data" for client in range(3) for call in range(2)}
    with pytest.raises(QuorumError, match=r"round 2: 0 of 3 clients delivered, 1 were needed"):
        run(everyone, DROP, "faults.max_failed_rounds=2")
    assert len(of(run.events, RoundSkipped)) == 2
    assert len(of(run(everyone, DROP), RoundSkipped)) == 2


def test_a_client_that_runs_into_the_deadline_stops_at_its_next_step(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every look at the clock takes a second: 0 begins, client 0 looks at 1, 2 and 3, client 1 at
    # 4 and, after its first step, at 5.
    monkeypatch.setattr(
        round_module,
        "FaultGuard",
        functools.partial(FaultGuard, clock=itertools.count(-1).__next__),
    )
    events = run({}, DROP, "faults.round_deadline_s=4.5", "comm_round=1")
    found = [(e.client_id, e.stage, e.reason) for e in of(events, ClientDropped)]
    assert found == [
        (1, "deadline", "it had done 1 of 2 steps when the round's 4.5 s were over"),
        (2, "deadline", "it had not begun when the round's 4.5 s were over"),
    ]
    states = run.checkpoint().clients
    assert {i: state.participations for i, state in states.items()} == {0: 1}


class Breaking(NoHooks):
    """A host framework whose privacy mechanism breaks client 1's update in the first round."""

    def __init__(self, place: str, kind: str) -> None:
        self.place = place
        self.kind = kind

    def broken(self, update: ClientUpdate) -> ClientUpdate:
        if (update.header.client_id, update.header.round_idx) != (1, 0):
            return update
        key = sorted(update.tensors)[0]
        tensor = update.tensors[key].clone()
        wrong = {
            "nan": tensor.fill_(float("nan")),
            "shape": tensor[:1],
            "dtype": tensor.double(),
            "huge": torch.full_like(tensor, 1e6),
        }
        rest = {name: t for name, t in update.tensors.items() if name != key}
        if self.kind == "missing":
            return replace(update, tensors=rest)
        if self.kind == "unknown":
            return replace(update, tensors={**update.tensors, "pq/99/m/Q": torch.zeros(1)})
        return replace(update, tensors={**rest, key: wrong[self.kind]})

    def after_local_training(self, update: ClientUpdate) -> ClientUpdate:
        return self.broken(update) if self.place == "client" else update

    def before_aggregation(self, updates: Mapping[int, ClientUpdate]) -> Mapping[int, ClientUpdate]:
        if self.place == "client":
            return updates
        return {client_id: self.broken(update) for client_id, update in updates.items()}


@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [
        ("client", "nan", "NaN or infinite"),
        ("client", "huge", "above faults.max_update_norm"),
        ("client", "missing", "missing conv/"),
        ("client", "unknown", "unknown pq/99/m/Q"),
        ("server", "shape", "has shape"),
        ("server", "dtype", "is torch.float64"),
    ],
)
def test_an_update_broken_by_a_hook_is_refused(
    run: Any, place: str, kind: str, message: str
) -> None:
    options = ("comm_round=1", "faults.max_update_norm=1000")
    events = run({}, DROP, *options, hooks=Breaking(place, kind))
    (dropped,) = of(events, ClientDropped)
    assert (dropped.client_id, dropped.round_idx, dropped.stage) == (1, 0, "update")
    assert message in dropped.reason
    (finished,) = of(events, RoundFinished)
    assert sorted(finished.uplink_bytes) == [0, 2]
    # A hook of the server breaks what has been sent; the client's own part was right.
    assert set(run.checkpoint().clients) == ({0, 2} if place == "client" else {0, 1, 2})


def test_with_policy_abort_a_broken_update_ends_the_run(run: Any) -> None:
    with pytest.raises(ClientFailure, match="client 1, round 1, update: refused: conv/"):
        run({}, hooks=Breaking("client", "nan"))


def test_updates_that_are_too_old_are_no_longer_mixed(run: Any) -> None:
    plan = {(0, call): "memory" for call in (1, 2)}
    options = (DROP, "comm_round=3", "optim.num_steps=1")
    mixed = [p.weights for p in of(run(plan, *options), PlanMade)]
    assert all(row[0] != 0.0 for weights in mixed for row in weights[1:])
    limited = [p.weights for p in of(run(plan, *options, "faults.staleness_limit=1"), PlanMade)]
    assert limited[:2] == mixed[:2]
    for row in limited[2][1:]:
        assert row[0] == 0.0
        assert math.isclose(sum(row), 1.0, abs_tol=1e-6)


def test_a_resumed_run_remembers_who_delivered_and_which_rounds_failed(run: Any) -> None:
    options = (
        DROP,
        "comm_round=4",
        "run.keep_last=9",
        "optim.num_steps=1",
        "faults.quorum=0.6",
        "faults.staleness_limit=1",
    )
    lost = {(0, 1): "data", (1, 1): "data"}  # round 2 is skipped
    run({**lost, (1, 3): "data"}, *options)
    expected, reference = run.checkpoint(), recorded(run.out)
    assert expected.progress["ledger"]["last_delivered"] == {"0": 3, "1": 2, "2": 3}
    with pytest.raises(AssertionError, match="no client's fault"):
        run({**lost, (2, 2): "bug"}, *options)
    assert run.checkpoint().progress["ledger"]["failed_in_row"] == 1
    # Clients 0 and 1 had finished round 3; client 1's next training is that of round 4.
    run({(1, 0): "data"}, *options, resume=True)
    found = run.checkpoint()
    assert found.progress["ledger"] == expected.progress["ledger"]
    for client_id, state in expected.clients.items():
        assert_same(state, found.clients[client_id])
    assert recorded(run.out) == reference


def recorded(out: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    kinds = ("ClientDropped", "RoundSkipped", "PlanMade")
    return [record for record in records if record["event"] in kinds]
