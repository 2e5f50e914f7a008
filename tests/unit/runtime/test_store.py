"""Checkpoints: exact round trip, atomic, checked, cleaned up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedml_plugin_fedmosaic.core.errors import CheckpointError
from fedml_plugin_fedmosaic.core.types import AdapterKey, Branch, ClientState, Part
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore, load_tree, save_tree, to_rows


def _state(client_id: int, value: float) -> ClientState:
    key = AdapterKey(1, 3, "q_proj", Branch.LOCAL, Part.P)
    return ClientState(
        client_id=client_id,
        participations=2,
        adapter={key: torch.full((2, 2), value)},
        sketch=torch.arange(6.0).reshape(2, 3),
        extra={"arrivals": {"seen": [1, 2]}},
    )


def _save(store: CheckpointStore, round_idx: int, clients: dict[int, ClientState]) -> None:
    written = store.save_clients(round_idx, clients, {0: {"pq/0/q_proj/P": torch.ones(2)}})
    store.commit(round_idx, {"known": {"0": torch.zeros(1)}, "round": round_idx}, written)


def test_tree_round_trip_keeps_tensors_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tree = {"a": [shared, {"b": shared.half()}], "c": None, "d": "text", "e": 1.5, "f": True}
    sums = save_tree(tmp_path / "x", tree)
    back = load_tree(tmp_path / "x", sums)
    assert torch.equal(back["a"][0], shared)
    assert back["a"][1]["b"].dtype == torch.float16
    assert (back["c"], back["d"], back["e"], back["f"]) == (None, "text", 1.5, True)


@pytest.mark.parametrize("bad", [{"a": object()}, {"a": {1: 2}}, {"a": {2.5}}])
def test_anything_but_plain_data_is_refused(tmp_path: Path, bad: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        save_tree(tmp_path / "x", bad)


def test_round_trip_of_a_round(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "s", keep_last=2)
    _save(store, 0, {0: _state(0, 1.0), 1: _state(1, 2.0)})
    _save(store, 1, {1: _state(1, 3.0)})
    loaded = CheckpointStore(tmp_path / "s", keep_last=2).load()
    assert loaded.round_idx == 1
    values = {i: next(iter(state.adapter.values()))[0, 0] for i, state in loaded.clients.items()}
    assert values == {0: 1.0, 1: 3.0}
    assert loaded.clients[0].extra == {"arrivals": {"seen": [1, 2]}}
    assert torch.equal(loaded.downlinks[0]["pq/0/q_proj/P"], torch.ones(2))
    assert loaded.server["round"] == 1


def test_old_rounds_go_but_files_in_use_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    _save(store, 0, {0: _state(0, 1.0), 1: _state(1, 2.0)})
    _save(store, 1, {1: _state(1, 3.0)})
    names = {path.name for path in tmp_path.iterdir()}
    assert "client-000-round-0001.safetensors" in names
    assert "client-001-round-0001.safetensors" not in names
    assert list(store.rounds()) == [1]
    assert not [name for name in names if name.endswith(".tmp")]


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    _save(store, 0, {0: _state(0, 1.0)})
    victim = tmp_path / "client-000-round-0001.safetensors"
    payload = bytearray(victim.read_bytes())
    payload[-1] ^= 1
    victim.write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"client-000-round-0001\.safetensors is damaged"):
        store.load()


def test_missing_round_lists_what_is_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    _save(store, 0, {0: _state(0, 1.0)})
    with pytest.raises(CheckpointError, match=r"round 5; found: 1"):
        store.load(4)
    with pytest.raises(CheckpointError, match="found: none"):
        CheckpointStore(tmp_path / "nothing", keep_last=1).load()


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    _save(store, 0, {0: _state(0, 1.0)})
    path = tmp_path / "round-0001.json"
    manifest = json.loads(path.read_text())
    manifest["format"] = 99
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 99"):
        store.load()


def test_rows_for_events_turn_nan_into_none() -> None:
    matrix = torch.tensor([[float("nan"), 0.5], [0.25, float("nan")]])
    assert to_rows(matrix) == ((None, 0.5), (0.25, None))
    assert to_rows(None) is None
