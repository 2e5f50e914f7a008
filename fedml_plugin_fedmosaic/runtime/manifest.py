"""One saved round, read from the files that its JSON names."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.core.errors import CheckpointError
from fedml_plugin_fedmosaic.core.types import ClientState, SharedTensors
from fedml_plugin_fedmosaic.runtime.records import RoundCheckpoint, client_from_tree
from fedml_plugin_fedmosaic.runtime.treefile import load_tree

Entry = Mapping[str, str]
"""``{"file": name, "checksum": hex}``."""


def read_round(
    folder: Path, manifest: Mapping[str, Any], clients: Collection[int] | None
) -> RoundCheckpoint:
    """Reads a round and checks every checksum.

    Args:
        folder: of the files.
        manifest: the round's JSON.
        clients: whose states to read; all by default.

    Raises:
        CheckpointError: a file is damaged or missing.
        KeyError, TypeError, ValueError, AttributeError: the JSON is not a round's.
    """
    entries = {int(key): value for key, value in manifest["clients"].items()}
    wanted = sorted(entries if clients is None else set(clients) & set(entries))
    tree = _read(folder, manifest["server"])
    states: dict[int, ClientState] = {}
    uploads: dict[int, SharedTensors] = {}
    downlinks: dict[int, SharedTensors] = {}
    for client_id in wanted:
        files = entries[client_id]
        record = client_from_tree(_read(folder, files["client"])) if "client" in files else None
        if record is not None:
            states[client_id] = record.state
        if "upload" in files:
            if record is not None and files["upload"] == files["client"]:
                uploads[client_id] = record.update.tensors
            else:
                uploads[client_id] = _upload(folder, files["upload"])
        if "downlink" in files:
            downlinks[client_id] = _read(folder, files["downlink"])
    return RoundCheckpoint(
        round_idx=int(manifest["round_idx"]),
        num_rounds=int(manifest["num_rounds"]),
        server=tree["server"],
        progress=tree["progress"],
        clients=states,
        uploads=uploads,
        downlinks=downlinks,
    )


def _read(folder: Path, entry: Entry) -> Any:
    return load_tree(folder / entry["file"], entry["checksum"])


def _upload(folder: Path, entry: Entry) -> SharedTensors:
    """An upload: a file of its own, or the update inside an older client file."""
    tree = _read(folder, entry)
    if entry["file"].startswith("client-"):
        return client_from_tree(tree).update.tensors
    tensors: SharedTensors = tree
    return tensors


def entries_of(manifest: Mapping[str, Any]) -> list[Entry]:
    """Every file that a round's JSON names."""
    return [
        manifest["server"],
        *(entry for files in manifest["clients"].values() for entry in files.values()),
    ]


def round_of(path: Path) -> int:
    """0-based round that a file's name says."""
    return int(path.stem.rpartition("-")[2]) - 1


def noted_checksum(path: Path) -> str:
    """The checksum that a file says it has."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        return str(stream.metadata()["checksum"])


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: expected an object, got {type(found).__name__}")
    return found
