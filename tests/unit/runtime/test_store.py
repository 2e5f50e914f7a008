"""Checkpoints: exact round trip, checked, cleaned up, and what a killed run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedml_plugin_fedmosaic.core.errors import CheckpointError
from fedml_plugin_fedmosaic.core.types import (
    AdapterKey,
    Branch,
    ClientState,
    ClientUpdate,
    Moments,
    Part,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import FitProgress
from fedml_plugin_fedmosaic.runtime.records import ClientRecord, StepRecord
from fedml_plugin_fedmosaic.runtime.round import to_rows
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore

KEY = AdapterKey(1, 3, "q_proj", Branch.LOCAL, Part.P)
SHARE = "pq/1/q_proj/P"


def _state(client_id: int, value: float) -> ClientState:
    tensor = torch.full((2, 2), value)
    return ClientState(
        client_id=client_id,
        participations=2,
        adapter={KEY: tensor},
        sketch=torch.arange(6.0).reshape(2, 3),
        sketch_average=torch.arange(8.0).reshape(4, 2) / 3,
        moments={KEY: Moments(step=7, first=tensor / 3, second=tensor / 7)},
        extra={"arrivals": {"seen": [1, 2]}},
    )


def _record(client_id: int, value: float, round_idx: int = 0) -> ClientRecord:
    state = _state(client_id, value)
    header = UpdateHeader(
        client_id=client_id, round_idx=round_idx, num_examples=5, sketch=state.sketch
    )
    update = ClientUpdate(header=header, tensors={SHARE: torch.full((2, 2), value)})
    return ClientRecord(state=state, update=update, events=({"event": "X", "loss": 0.1},))


def _store(folder: Path, keep_last: int = 2, **options: str) -> CheckpointStore:
    return CheckpointStore(folder, keep_last=keep_last, num_rounds=9, **options)  # type: ignore[arg-type]


def _save(
    store: CheckpointStore,
    round_idx: int,
    clients: dict[int, float],
    accepted: dict[int, float] | None = None,
) -> None:
    for client_id, value in clients.items():
        store.save_client(round_idx, client_id, _record(client_id, value, round_idx))
    updates = {i: {SHARE: torch.full((2, 2), value)} for i, value in clients.items()}
    wanted = clients if accepted is None else accepted
    uploads = {i: {SHARE: torch.full((2, 2), value)} for i, value in wanted.items()}
    store.save_exchange(round_idx, {0: {SHARE: torch.ones(2)}}, uploads, updates)
    server = {"known": {"0": torch.zeros(1)}, "round": round_idx}
    store.commit(round_idx, server, {"train_s": 1.5}, [store.written()])


def _value(state: ClientState) -> float:
    return float(state.adapter[KEY][0, 0])


def test_round_trip_of_a_round(tmp_path: Path) -> None:
    store = _store(tmp_path / "s")
    _save(store, 0, {0: 1.0, 1: 2.0})
    _save(store, 1, {1: 3.0})
    loaded = _store(tmp_path / "s").load()
    assert (loaded.round_idx, loaded.num_rounds) == (1, 9)
    assert {i: _value(state) for i, state in loaded.clients.items()} == {0: 1.0, 1: 3.0}
    state = loaded.clients[0]
    assert state.extra == {"arrivals": {"seen": [1, 2]}}
    assert state.sketch is not None
    assert state.sketch_average is not None
    assert torch.equal(state.sketch, torch.arange(6.0).reshape(2, 3))
    assert torch.equal(state.sketch_average, torch.arange(8.0).reshape(4, 2) / 3)
    assert state.moments[KEY].step == 7
    assert torch.equal(state.moments[KEY].first, torch.full((2, 2), 1.0) / 3)
    assert torch.equal(loaded.downlinks[0][SHARE], torch.ones(2))
    assert {i: float(u[SHARE][0, 0]) for i, u in loaded.uploads.items()} == {0: 1.0, 1: 3.0}
    assert loaded.server["round"] == 1
    assert loaded.progress == {"train_s": 1.5}


def test_only_the_wanted_clients_are_read(tmp_path: Path) -> None:
    store = _store(tmp_path)
    _save(store, 0, {0: 1.0, 1: 2.0})
    (tmp_path / "client-000-round-0001.safetensors").write_bytes(b"torn")
    assert set(store.load(clients=[1, 5]).clients) == {1}


def test_an_accepted_update_that_a_hook_changed_has_a_file_of_its_own(tmp_path: Path) -> None:
    store = _store(tmp_path, keep_last=1)
    _save(store, 0, {0: 1.0, 1: 2.0}, accepted={0: 1.0, 1: 0.5})
    assert [path.name for path in tmp_path.glob("upload-*")] == [
        "upload-001-round-0001.safetensors"
    ]
    # Client 0 trains again, but its update is refused: the older upload stays the one to mix.
    _save(store, 1, {0: 4.0}, accepted={})
    loaded = _store(tmp_path).load()
    assert _value(loaded.clients[0]) == 4.0
    assert {i: float(u[SHARE][0, 0]) for i, u in loaded.uploads.items()} == {0: 1.0, 1: 0.5}
    # A resumed run goes on from the entries that it read.
    again = _store(tmp_path, keep_last=1)
    again.load()
    _save(again, 2, {1: 6.0})
    assert float(_store(tmp_path).load().uploads[0][SHARE][0, 0]) == 1.0


def test_old_rounds_go_but_files_in_use_stay(tmp_path: Path) -> None:
    store = _store(tmp_path, keep_last=1)
    _save(store, 0, {0: 1.0, 1: 2.0})
    store.save_step(0, 1, _step())
    _save(store, 1, {1: 3.0})
    names = {path.name for path in tmp_path.iterdir()}
    assert "client-000-round-0001.safetensors" in names
    assert "client-001-round-0001.safetensors" not in names
    assert not [name for name in names if name.startswith("step-")]
    assert list(store.rounds()) == [1]


def _step() -> StepRecord:
    progress = FitProgress(
        adapter={KEY: torch.ones(2, 2)},
        moments={KEY: Moments(step=3, first=torch.ones(2, 2), second=torch.zeros(2, 2))},
        losses=(0.1 + 0.2, 1.5),
        num_tokens=11,
        duration_s=0.25,
    )
    return StepRecord(pass_idx=1, state=_state(1, 1.0), progress=progress, events=({"a": 1},))


def test_a_stopped_client_comes_back_exactly(tmp_path: Path) -> None:
    store = _store(tmp_path)
    assert store.stopped_client(3, 1) is None
    store.save_step(3, 1, _step())
    back = store.stopped_client(3, 1)
    assert back is not None
    assert (back.pass_idx, back.events) == (1, ({"a": 1},))
    assert (back.progress.losses, back.progress.num_tokens) == ((0.1 + 0.2, 1.5), 11)
    assert torch.equal(back.progress.adapter[KEY], torch.ones(2, 2))
    assert back.progress.moments[KEY].step == 3


def test_a_client_of_an_unfinished_round_counts_in_the_next_commit(tmp_path: Path) -> None:
    first = _store(tmp_path)
    _save(first, 0, {0: 1.0, 1: 2.0})
    first.save_client(1, 0, _record(0, 5.0, 1))
    store = _store(tmp_path)
    store.load()
    assert store.finished_client(1, 1) is None
    record = store.finished_client(1, 0)
    assert record is not None
    assert record.update.header.round_idx == 1
    _save(store, 1, {1: 6.0})
    values = {i: _value(state) for i, state in _store(tmp_path).load().clients.items()}
    assert values == {0: 5.0, 1: 6.0}


def test_what_a_kill_during_the_clean_up_left_goes_with_the_end(tmp_path: Path) -> None:
    store = _store(tmp_path, keep_last=1)
    _save(store, 0, {0: 1.0})
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    _save(store, 1, {0: 2.0})
    expected = {path.name for path in tmp_path.iterdir()} | {"finished.json"}
    for name, payload in old.items():
        (tmp_path / name).write_bytes(payload)
    resumed = _store(tmp_path, keep_last=1)
    resumed.load()
    resumed.finish({"train_s": 1.0})
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert list(resumed.rounds()) == [1]


def test_only_the_leader_writes(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "s", keep_last=1, rank=1, writes=False)
    _save(store, 0, {0: 1.0})
    store.save_step(0, 0, _step())
    store.finish({"train_s": 1.0})
    assert not (tmp_path / "s").exists()


def test_damage_is_named_with_the_way_out(tmp_path: Path) -> None:
    store = _store(tmp_path)
    _save(store, 0, {0: 1.0})
    _save(store, 1, {0: 2.0})
    victim = tmp_path / "client-000-round-0002.safetensors"
    payload = bytearray(victim.read_bytes())
    payload[-1] ^= 1
    victim.write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"client-000-round-0002\.safetensors") as caught:
        store.load()
    assert "--from-round 1" in str(caught.value.hint)
    assert _value(store.load(0).clients[0]) == 1.0
    store.rewind(0)
    assert list(store.rounds()) == [0]
    assert not victim.exists()


def test_a_torn_round_file_is_named(tmp_path: Path) -> None:
    store = _store(tmp_path)
    _save(store, 0, {0: 1.0})
    (tmp_path / "round-0001.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"round-0001\.json is damaged") as caught:
        store.load()
    assert caught.value.hint is None


def test_a_checkpoint_of_another_experiment_is_refused(tmp_path: Path) -> None:
    _save(_store(tmp_path, experiment="one"), 0, {0: 1.0})
    with pytest.raises(CheckpointError, match="another configuration"):
        _store(tmp_path, experiment="two").load()


def test_missing_round_lists_what_is_there(tmp_path: Path) -> None:
    store = _store(tmp_path)
    _save(store, 0, {0: 1.0})
    with pytest.raises(CheckpointError, match=r"round 5; found: 1"):
        store.load(4)
    with pytest.raises(CheckpointError, match="found: none"):
        _store(tmp_path / "nothing").load()


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    store = _store(tmp_path)
    _save(store, 0, {0: 1.0})
    path = tmp_path / "round-0001.json"
    manifest = json.loads(path.read_text())
    manifest["format"] = 99
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 99"):
        store.load()


def test_rewinding_to_the_start_forgets_everything(tmp_path: Path) -> None:
    store = _store(tmp_path)
    _save(store, 0, {0: 1.0})
    store.finish({"train_s": 2.0})
    assert store.finished() == {"format": 2, "num_rounds": 9, "train_s": 2.0}
    store.rewind(-1)
    assert list(tmp_path.iterdir()) == []


def test_rows_for_events_turn_nan_into_none() -> None:
    matrix = torch.tensor([[float("nan"), 0.5], [0.25, float("nan")]])
    assert to_rows(matrix) == ((None, 0.5), (0.25, None))
    assert to_rows(None) is None
