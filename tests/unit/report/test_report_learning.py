"""Forgetting, forward transfer and task boundaries of a run, counted by hand."""

from __future__ import annotations

import json

import pytest

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.report.learning import (
    forgetting_of,
    forward_transfer_of,
    position_curves,
    task_boundaries,
)
from fedml_plugin_fedmosaic.report.metrics import Run, load_run

# client -> task -> score after each of three rounds
SCORES = {
    0: {"a-0": [0.5, 0.8, 0.6], "b-0": [0.3, 0.4, 0.9]},
    1: {"c-0": [0.2, 0.6, 0.4], "d-0": [0.5, 0.5, 0.5]},
}
BASE = {"a-0": 0.25, "b-0": 0.2, "c-0": 0.25, "d-0": 0.6}
SCHEDULE = {"0": [[0, 0], [1, 2]], "1": [[0, 1], [2, 2]]}


def evaluated(strategy: str, round_idx: int, client_id: int, task: str, value: float) -> ev.Event:
    return ev.Evaluated(
        strategy=strategy,
        round_idx=round_idx,
        client_id=client_id,
        view="local",
        scope="self",
        task=task,
        metric="accuracy",
        value=value,
        num_samples=10,
        final=strategy == "base" or round_idx == 2,
    )


@pytest.fixture
def run(tmp_path) -> Run:
    events = [
        evaluated("base", -1, client, task, BASE[task])
        for client, tasks in SCORES.items()
        for task in tasks
    ]
    events += [
        evaluated("s", round_idx, client, task, values[round_idx])
        for round_idx in range(3)
        for client, tasks in SCORES.items()
        for task, values in tasks.items()
    ]
    lines = [json.dumps(ev.to_record(event)) + "\n" for event in events]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    clients = [
        {
            "client_id": client_id,
            "model": "m",
            "family": "llama",
            "size": "1M",
            "signature": "s",
            "tasks": list(tasks),
            "num_examples": 4,
        }
        for client_id, tasks in SCORES.items()
    ]
    (tmp_path / "clients.json").write_text(json.dumps(clients))
    (tmp_path / "schedule.json").write_text(json.dumps(SCHEDULE))
    return load_run(tmp_path)


def test_forgetting_is_over_the_tasks_that_have_ended(run):
    metrics = run.strategies["s"]
    # Client 0: a-0 falls from 0.8 to 0.6, b-0 still arrives. Client 1: c-0 falls from 0.6 to 0.4.
    assert forgetting_of(metrics.scores(), metrics.stream) == pytest.approx({0: 0.2, 1: 0.2})
    assert metrics.forgetting == pytest.approx(0.2)
    assert run.strategies["base"].forgetting is None


def test_forward_transfer_is_over_the_tasks_that_begin_later(run):
    metrics = run.strategies["s"]
    # Client 0: b-0 begins in round 2, after a score of 0.3 (base 0.2). Client 1: d-0 begins in
    # round 3, after 0.5 (base 0.6).
    found = forward_transfer_of(metrics.scores(), metrics.stream)
    assert found == pytest.approx({0: 0.1, 1: -0.1})
    assert metrics.forward_transfer == pytest.approx(0.0)


def test_a_auc_is_the_mean_over_tasks_then_clients_then_rounds(run):
    # Round 1: clients (0.4, 0.35), round 2: (0.6, 0.55), round 3: (0.75, 0.45).
    assert run.strategies["s"].a_auc == pytest.approx((0.375 + 0.575 + 0.6) / 3)
    assert run.strategies["s"].self_mean == pytest.approx(0.6)
    assert run.strategies["s"].worst == pytest.approx(0.45)


def test_boundaries_are_where_most_clients_begin_a_task(run):
    assert task_boundaries(run.schedule) == ()
    assert task_boundaries({0: ((0, 1), (2, 3)), 1: ((0, 1), (2, 3)), 2: ((0, 3),)}) == (2,)
    assert task_boundaries({0: ((0, 3), (0, 3))}) == ()
    assert task_boundaries({0: (None, (1, 1))}) == (1,)


def test_positions_are_means_over_the_clients(run):
    metrics = run.strategies["s"]
    curves = position_curves(metrics.scores(), metrics.stream)
    assert curves[0] == pytest.approx({0: 0.35, 1: 0.7, 2: 0.5})
    assert curves[1] == pytest.approx({0: 0.4, 1: 0.45, 2: 0.7})


def test_a_damaged_schedule_names_the_file(run):
    (run.path / "schedule.json").write_text('{"0": [[1]]}')
    with pytest.raises(DataError, match=r"schedule\.json: expected two rounds"):
        load_run(run.path)
    (run.path / "schedule.json").write_text('{"0": [[0, 1], [1, 1], [2, 2], [3, 3]], "9": []}')
    with pytest.raises(DataError, match=r"schedule\.json: client 0: expected \d tasks .*, got 4"):
        load_run(run.path)
