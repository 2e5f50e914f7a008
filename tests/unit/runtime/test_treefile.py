"""One file of tensors and JSON: exact round trip, atomic, checked."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fedml_plugin_fedmosaic.core.errors import CheckpointError
from fedml_plugin_fedmosaic.runtime import treefile
from fedml_plugin_fedmosaic.runtime.treefile import (
    load_tree,
    remove_leftovers,
    save_tree,
    write_atomic,
)


def test_round_trip_keeps_tensors_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    shared[0, 0] = float("nan")
    tree = {
        "a": [shared, {"b": shared.bfloat16(), "h": shared.half()}],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "odd": torch.arange(3, dtype=torch.uint8),
        "c": None,
        "d": "text \u2603",
        "e": 0.1 + 0.2,
        "f": True,
    }
    checksum = save_tree(tmp_path / "x.safetensors", tree)
    back = load_tree(tmp_path / "x.safetensors", checksum)
    assert back["a"][0].view(torch.int32).equal(shared.view(torch.int32))
    assert back["a"][1]["b"].dtype == torch.bfloat16
    assert back["a"][1]["h"].dtype == torch.float16
    assert torch.equal(back["scalar"], torch.tensor(2.5))
    assert back["empty"].shape == (0, 3)
    assert torch.equal(back["flags"], torch.tensor([True, False]))
    assert torch.equal(back["odd"], torch.arange(3, dtype=torch.uint8))
    assert [back[key] for key in "cdef"] == [None, "text \u2603", 0.1 + 0.2, True]


def test_a_tree_without_tensors_is_a_file_too(tmp_path: Path) -> None:
    save_tree(tmp_path / "x.safetensors", {"a": [1, 2]})
    assert load_tree(tmp_path / "x.safetensors") == {"a": [1, 2]}


def test_equal_tensors_are_stored_once_and_come_back_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    big = torch.randn(64, 64)
    save_tree(path, {"a": big, "b": big.clone(), "c": big.T, "d": big.view(-1)})
    with safe_open(path, framework="pt") as stream:
        assert sorted(stream.keys()) == [".a", ".c", ".d"]
    back = load_tree(path)
    back["a"].zero_()
    assert torch.equal(back["b"], big)
    assert torch.equal(back["c"], big.T)


@pytest.mark.parametrize(
    "bad", [{"a": object()}, {"a": {1: 2}}, {"a": {2.5}}, {"a": float("nan")}, {"a": 1j}]
)
def test_anything_but_plain_data_is_refused(tmp_path: Path, bad: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        save_tree(tmp_path / "x.safetensors", bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("position", [3, 60, -1])
def test_one_flipped_bit_is_found(tmp_path: Path, position: int) -> None:
    path = tmp_path / "x.safetensors"
    save_tree(path, {"a": torch.ones(4), "b": "text"})
    payload = bytearray(path.read_bytes())
    payload[position] ^= 4
    path.write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        load_tree(path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_torn_file_is_found(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    save_tree(path, {"a": torch.ones(4), "b": "text"})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        load_tree(path)


def test_another_file_of_the_same_name_is_found(tmp_path: Path) -> None:
    first = save_tree(tmp_path / "x.safetensors", {"a": 1})
    save_tree(tmp_path / "x.safetensors", {"a": 2})
    with pytest.raises(CheckpointError, match="expected"):
        load_tree(tmp_path / "x.safetensors", first)


def test_a_newer_format_asks_for_a_newer_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(treefile, "FORMAT_VERSION", 99)
    save_tree(tmp_path / "x.safetensors", {"a": 1})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99") as caught:
        load_tree(tmp_path / "x.safetensors")
    assert "newer version" in str(caught.value.hint)


def test_a_read_only_folder_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*x\.json: Read-only"):
        write_atomic(path, b"new")
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]
    assert path.read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tree(path, {"a": 1})
    program = (
        "import sys, torch, pathlib\n"
        "from fedml_plugin_fedmosaic.runtime.treefile import save_tree\n"
        "save_tree(pathlib.Path(sys.argv[1]), {'a': torch.ones(100_000)})\n"
    )

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        preexec_fn=little_room,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert f"CheckpointError: cannot write {path}: File too large" in done.stderr
    assert "make room" in done.stderr
    assert load_tree(path) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["x.safetensors"]


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    (tmp_path / ".x.json.123.tmp").write_bytes(b"half")
    (tmp_path / "x.json").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]
