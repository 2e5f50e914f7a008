"""The run folder: atomic checkpoints as safetensors and JSON, and nothing else.

Layout of ``checkpoints/<strategy>/``::

    round-0003.json                      which file holds what, with a checksum each
    server-round-0003.safetensors/.json  the strategy's state
    client-002-round-0003.safetensors/.json
    ...

A client that sat a round out keeps its older file; files that no kept round refers to are deleted.
Every file is written under a temporary name, flushed to disk and renamed; the round's JSON comes
last, so a killed run always leaves a complete older round.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import CheckpointError
from fedml_plugin_fedmosaic.core.types import AdapterKey, ClientState, SharedTensors

_TENSOR = "__tensor__"
FORMAT_VERSION = 1


def write_atomic(path: Path, payload: bytes) -> None:
    """Writes a file so that it is either complete or absent, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(payload)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _split(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replaces tensors by references and collects them under their path."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().to("cpu").contiguous()
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, str):
                raise CheckpointError(
                    f"state at {path or 'its root'!r} has the key {key!r}; keys must be strings"
                )
        return {key: _split(value, f"{path}.{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_split(value, f"{path}.{index}", tensors) for index, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise CheckpointError(
        f"state at {path or 'its root'!r} is a {type(tree).__name__}; "
        "only tensors, JSON values, lists and string-keyed mappings can be saved"
    )


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: _join(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    return tree


def save_tree(stem: Path, tree: Any) -> dict[str, str]:
    """Writes plain data with tensors as ``<stem>.json`` and ``<stem>.safetensors``.

    Args:
        stem: path without suffix.
        tree: nested string-keyed mappings and lists of tensors and JSON values.

    Returns:
        File name -> BLAKE2b checksum of both files.

    Raises:
        CheckpointError: the tree holds something that is not plain data.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_split(tree, "", tensors), allow_nan=False, separators=(",", ":"))
    unshared = {name: tensor.clone() for name, tensor in tensors.items()}
    checksums: dict[str, str] = {}
    for suffix, payload in ((".safetensors", save(unshared)), (".json", text.encode())):
        path = stem.with_name(stem.name + suffix)
        write_atomic(path, payload)
        checksums[path.name] = hashlib.blake2b(payload, digest_size=16).hexdigest()
    return checksums


def load_tree(stem: Path, checksums: Mapping[str, str] | None = None) -> Any:
    """Reads what :func:`save_tree` wrote.

    Raises:
        CheckpointError: a file is missing, damaged, or differs from its checksum.
    """
    json_path = stem.with_name(stem.name + ".json")
    tensor_path = stem.with_name(stem.name + ".safetensors")
    try:
        for path in (json_path, tensor_path):
            expected = (checksums or {}).get(path.name)
            if expected is None:
                continue
            found = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            if found != expected:
                raise CheckpointError(
                    f"{path} is damaged: checksum {found}, expected {expected}",
                    hint="resume from an older round of the same run folder",
                )
        return _join(json.loads(json_path.read_text()), load_file(tensor_path))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the checkpoint {stem}: {error}") from error


def client_tree(state: ClientState) -> dict[str, Any]:
    """A client's state as plain data."""
    return {
        "client_id": state.client_id,
        "participations": state.participations,
        "adapter": {str(key): tensor for key, tensor in state.adapter.items()},
        "sketch": state.sketch,
        "extra": dict(state.extra),
    }


def client_from_tree(tree: Mapping[str, Any]) -> ClientState:
    """The inverse of :func:`client_tree`."""
    return ClientState(
        client_id=tree["client_id"],
        participations=tree["participations"],
        adapter={AdapterKey.parse(key): value for key, value in tree["adapter"].items()},
        sketch=tree["sketch"],
        extra=tree["extra"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCheckpoint:
    """Everything needed to go on after a round."""

    round_idx: int
    server: Mapping[str, Any]
    clients: Mapping[int, ClientState]
    downlinks: Mapping[int, SharedTensors]


class CheckpointStore:
    """Checkpoints of one strategy of one run.

    Args:
        folder: ``RUN/checkpoints/<strategy>``; created on the first save.
        keep_last: rounds kept.
        rank: only rank 0 writes the server's state and the round file.
    """

    def __init__(self, folder: Path, *, keep_last: int, rank: int = 0) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.rank = rank
        self._client_files: dict[int, tuple[str, dict[str, str]]] = {}

    def save_clients(
        self,
        round_idx: int,
        changed: Mapping[int, ClientState],
        downlinks: Mapping[int, SharedTensors],
    ) -> dict[int, tuple[str, dict[str, str]]]:
        """Writes the clients this rank trained in the round; returns client -> (stem, checksums).

        A client's downlink is part of its file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        written: dict[int, tuple[str, dict[str, str]]] = {}
        for client_id, state in changed.items():
            stem = self.folder / f"client-{client_id:03d}-round-{round_idx + 1:04d}"
            tree = {"state": client_tree(state), "downlink": dict(downlinks.get(client_id, {}))}
            written[client_id] = (stem.name, save_tree(stem, tree))
        return written

    def commit(
        self,
        round_idx: int,
        server: Mapping[str, Any],
        written: Mapping[int, tuple[str, dict[str, str]]],
    ) -> None:
        """Makes the round valid: server state, then the round file, then the clean-up."""
        if self.rank != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._client_files.update(written)
        server_stem = self.folder / f"server-round-{round_idx + 1:04d}"
        manifest = {
            "format": FORMAT_VERSION,
            "round_idx": round_idx,
            "server": {"stem": server_stem.name, "checksums": save_tree(server_stem, server)},
            "clients": {
                str(client_id): {"stem": stem, "checksums": checksums}
                for client_id, (stem, checksums) in sorted(self._client_files.items())
            },
        }
        path = self.folder / f"round-{round_idx + 1:04d}.json"
        write_atomic(path, json.dumps(manifest, indent=1).encode())
        self._clean_up()

    def _clean_up(self) -> None:
        rounds = sorted(self.folder.glob("round-*.json"))
        for old in rounds[: -self.keep_last]:
            old.unlink()
        used: set[str] = set()
        for path in rounds[-self.keep_last :]:
            manifest = json.loads(path.read_text())
            used |= set(manifest["server"]["checksums"])
            for entry in manifest["clients"].values():
                used |= set(entry["checksums"])
        newest = int(rounds[-1].stem.removeprefix("round-"))
        for path in (*self.folder.glob("client-*"), *self.folder.glob("server-*")):
            made_in = int(path.stem.rpartition("-")[2])
            if path.name not in used and made_in <= newest:
                path.unlink()

    def rounds(self) -> Sequence[int]:
        """0-based rounds that can be loaded, ascending."""
        return [
            int(path.stem.removeprefix("round-")) - 1
            for path in sorted(self.folder.glob("round-*.json"))
        ]

    def load(self, round_idx: int | None = None) -> RoundCheckpoint:
        """Reads a round (the newest by default) and checks every checksum.

        Raises:
            CheckpointError: no such round, another format, or a damaged file.
        """
        known = self.rounds()
        if not known or (round_idx is not None and round_idx not in known):
            wanted = "any round" if round_idx is None else f"round {round_idx + 1}"
            found = ", ".join(str(index + 1) for index in known) or "none"
            raise CheckpointError(f"{self.folder}: no checkpoint of {wanted}; found: {found}")
        chosen = known[-1] if round_idx is None else round_idx
        path = self.folder / f"round-{chosen + 1:04d}.json"
        try:
            manifest = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
        if manifest.get("format") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {manifest.get('format')!r}, expected {FORMAT_VERSION}"
            )
        server = load_tree(
            self.folder / manifest["server"]["stem"], manifest["server"]["checksums"]
        )
        clients: dict[int, ClientState] = {}
        downlinks: dict[int, SharedTensors] = {}
        for client_id, entry in manifest["clients"].items():
            tree = load_tree(self.folder / entry["stem"], entry["checksums"])
            clients[int(client_id)] = client_from_tree(tree["state"])
            downlinks[int(client_id)] = tree["downlink"]
        return RoundCheckpoint(
            round_idx=chosen, server=server, clients=clients, downlinks=downlinks
        )


def to_rows(matrix: Tensor | None) -> tuple[tuple[float | None, ...], ...] | None:
    """A matrix as nested tuples for an event; NaN becomes None."""
    if matrix is None:
        return None
    known = ~torch.isnan(matrix)
    return tuple(
        tuple(
            float(value) if ok else None
            for value, ok in zip(row.tolist(), mask.tolist(), strict=True)
        )
        for row, mask in zip(matrix, known, strict=True)
    )
