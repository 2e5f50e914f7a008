"""Whole runs of a tiny federation, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import ClientFailure, ConfigError, FedMosaicError
from fedml_plugin_fedmosaic.core.events import Event, RoundFinished, StepsDone
from fedml_plugin_fedmosaic.core.types import AdapterState
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.equations.gradient import column_projection, compress
from fedml_plugin_fedmosaic.equations.relevance import unit_columns
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore, RoundCheckpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def _run(
    config: Path, out: Path, *overrides: str, algo: str = "fedmosaic", events: list[Event]
) -> RoundCheckpoint:
    experiment = load_experiment(config, overrides, algo=algo)
    prepare_run(experiment, out, [events.append]).execute()
    return CheckpointStore(out / "checkpoints" / algo, keep_last=9).load()


def _same(left: AdapterState, right: AdapterState) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("algo", ["fedmosaic", "fedavg", "local"])
def test_same_seed_same_bits_other_seed_other_bits(world: Path, tmp_path: Path, algo: str) -> None:
    first = _run(world, tmp_path / "a", algo=algo, events=[])
    again = _run(world, tmp_path / "b", algo=algo, events=[])
    other = _run(world, tmp_path / "c", "common.random_seed=7", algo=algo, events=[])
    for client_id, state in first.clients.items():
        assert _same(state.adapter, again.clients[client_id].adapter)
        assert not _same(state.adapter, other.clients[client_id].adapter)


def test_comparing_with_another_strategy_does_not_change_the_main_one(
    world: Path, tmp_path: Path
) -> None:
    alone = _run(world, tmp_path / "a", events=[])
    beside = _run(world, tmp_path / "b", "evaluation.compare=[local, fedavg]", events=[])
    for client_id, state in alone.clients.items():
        assert _same(state.adapter, beside.clients[client_id].adapter)


def test_run_folder_is_complete(world: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    _run(world, tmp_path / "run", "evaluation.compare=[local]", events=events)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "environment.json",
        "clients.json",
        "topology.json",
        "schedule.json",
        "status.json",
        "run.lock",
        "metrics.jsonl",
        "checkpoints",
    }
    stored = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lasting = [event for event in events if not isinstance(event, StepsDone)]
    assert {record["strategy"] for record in stored} == {"base", "local", "fedmosaic"}
    assert len([r for r in stored if r["event"] == "RoundFinished"]) == 4
    assert len(stored) <= len(lasting)
    assert load_experiment(run / "config.yaml").common.random_seed == 1


def test_only_what_was_sent_is_counted(world: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    _run(world, tmp_path / "run", "evaluation.compare=[local]", events=events)
    rounds = [event for event in events if isinstance(event, RoundFinished)]
    local = [sum(r.downlink_bytes.values()) for r in rounds if r.strategy == "local"]
    ours = [min(r.downlink_bytes.values()) for r in rounds if r.strategy == "fedmosaic"]
    assert local == [0, 0]
    assert all(count > 0 for count in ours)


def test_compressed_sketches_come_from_the_running_average_of_whole_ones(
    world: Path, tmp_path: Path
) -> None:
    whole, compressed = list[Event](), list[Event]()
    raw = _run(world, tmp_path / "raw", events=whole)
    small = _run(world, tmp_path / "small", "sketch.floats=16", events=compressed)
    for client_id, state in small.clients.items():
        average = raw.clients[client_id].sketch
        assert average is not None
        assert state.sketch is not None
        assert state.sketch_average is not None
        # Sketches depend on the samples only, so both runs average the same ones.
        assert torch.equal(state.sketch_average, average)
        projection = column_projection(average.numel(), 16, seed=1)
        assert torch.equal(state.sketch.T, compress(unit_columns(average), projection))
        assert raw.clients[client_id].sketch_average is None
        saved = 4 * (average.numel() - 16)
        for sent, all_sent in zip(_uplinks(compressed), _uplinks(whole), strict=True):
            # The header around it, which says the shape, differs in digits.
            assert abs(all_sent[client_id] - sent[client_id] - saved) <= 4


def _uplinks(events: list[Event]) -> list[dict[int, int]]:
    return [event.uplink_bytes for event in events if isinstance(event, RoundFinished)]


def test_clients_that_sit_out_keep_their_state_and_their_samples(
    world: Path, tmp_path: Path
) -> None:
    last = _run(world, tmp_path / "run", "client_num_per_round=2", events=[])
    assert sorted(s.participations for s in last.clients.values()) in ([1, 1, 2], [2, 2])
    for state in last.clients.values():
        assert state.extra["arrivals"]["memory"]["items"]


def test_one_round_and_a_time_slot_without_data(tmp_path: Path) -> None:
    config = write_world(tmp_path)
    scenario = tmp_path / "data/scenarios/tiny.json"
    clients = json.loads(scenario.read_text())
    dummy = {"dataset": "dummy", "subset_id": 0, "type": "multi-choice"}
    clients[0]["datasets"].append(dummy)
    scenario.write_text(json.dumps(clients))
    last = _run(config, tmp_path / "run", "comm_round=1", "data.split=static", events=[])
    assert set(last.clients) == {0, 1, 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=999", "rank"),
        ("adapter.num_blocks=3", "block"),
        ("models.small.path=models/nowhere", "nowhere"),
        ("client_num_in_total=5", "client_num_in_total"),
        ("client_num_per_round=4", "client_num_per_round"),
        ("sketch.proxy=huge", "huge"),
        ("data.rounds_per_task=7", "rounds_per_task"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    world: Path, tmp_path: Path, override: str, message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(FedMosaicError, match=message):
        prepare_run(load_experiment(world, [override]), out)
    assert not out.exists()


def test_a_run_folder_in_use_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        prepare_run(load_experiment(world), tmp_path)
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_a_failing_client_is_named_and_earlier_rounds_stay(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = TorchEngine.fit
    calls = 0

    def failing(self: TorchEngine, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("no memory left")
        return fit(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchEngine, "fit", failing)
    with pytest.raises(ClientFailure, match=r"client 1, round 2, fit: RuntimeError: no memory"):
        _run(world, tmp_path / "run", events=[])
    kept = CheckpointStore(tmp_path / "run/checkpoints/fedmosaic", keep_last=9).load()
    assert kept.round_idx == 0
    assert set(kept.clients) == {0, 1, 2}
