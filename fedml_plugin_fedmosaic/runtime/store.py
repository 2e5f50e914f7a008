"""The run folder: atomic checkpoints as safetensors and JSON, and nothing else.

Layout of ``checkpoints/<strategy>/``::

    round-0003.json                      which file holds what, with a checksum each
    server-round-0003.safetensors        the strategy's state and the loop's own
    client-002-round-0003.safetensors    a client's state, its update and its events
    downlink-002-round-0003.safetensors  what it received
    upload-002-round-0003.safetensors    its update, where a hook changed it before the mixing
    step-002-round-0004.safetensors      a client that was stopped inside a pass
    client-002.1-round-0003.safetensors  the same of a later stage of the round
    finished.json                        the strategy is done, with its last evaluation

Rounds are counted from 1 in file names. A client's file is written as soon as the client is done,
everything else at the end of the round; the round's JSON comes last, so a killed run always leaves
a complete older round and the clients that were done since. Nothing is written twice: a client
that sat a round out keeps its older files. Files that no kept round refers to are deleted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedml_plugin_fedmosaic.core.errors import CheckpointError
from fedml_plugin_fedmosaic.core.types import SharedTensors
from fedml_plugin_fedmosaic.runtime.manifest import (
    Entry,
    entries_of,
    noted_checksum,
    read_json,
    read_round,
    round_of,
)
from fedml_plugin_fedmosaic.runtime.records import (
    ClientRecord,
    RoundCheckpoint,
    StepRecord,
    client_from_tree,
    client_tree,
    step_from_tree,
    step_tree,
)
from fedml_plugin_fedmosaic.runtime.treefile import (
    FORMAT_VERSION,
    SUFFIX,
    check_format,
    load_tree,
    remove_leftovers,
    save_tree,
    write_atomic,
    write_error,
)

LOG = logging.getLogger(__name__)

_KINDS = ("client", "downlink", "upload", "step", "server")
_FINISHED = "finished.json"


def _same(left: SharedTensors, right: SharedTensors) -> bool:
    return left.keys() == right.keys() and all(
        left[key] is right[key] or torch.equal(left[key], right[key]) for key in left
    )


class CheckpointStore:
    """Checkpoints of one strategy of one run.

    Args:
        folder: ``RUN/checkpoints/<strategy>``; created on the first save.
        keep_last: rounds kept.
        rank: only rank 0 writes the server's state and the round file.
        writes: whether this rank writes its clients' files (the leader of a rank group does).
        experiment: digest of the settings that a checkpoint depends on; checked when one is read.
        num_rounds: rounds that the run is to have.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        rank: int = 0,
        writes: bool = True,
        experiment: str = "",
        num_rounds: int = 0,
    ) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.rank = rank
        self.writes = writes
        self._experiment = experiment
        self._num_rounds = num_rounds
        self._entries: dict[int, dict[str, Entry]] = {}
        self._fresh: dict[int, dict[str, Entry]] = {}

    def _path(
        self, kind: str, round_idx: int, client_id: int | None = None, stage: int = 0
    ) -> Path:
        who = "" if client_id is None else f"-{client_id:03d}"
        who += f".{stage}" if stage else ""
        return self.folder / f"{kind}{who}-round-{round_idx + 1:04d}{SUFFIX}"

    def _save(self, path: Path, tree: Any) -> Entry:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        return {"file": path.name, "checksum": save_tree(path, tree)}

    def save_client(
        self, round_idx: int, client_id: int, record: ClientRecord, stage: int = 0
    ) -> None:
        """Writes a client that has finished its part of a stage of a round.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if self.writes:
            path = self._path("client", round_idx, client_id, stage)
            entry = self._save(path, client_tree(record))
            self._fresh.setdefault(client_id, {})["client"] = entry

    def finished_client(
        self, round_idx: int, client_id: int, stage: int = 0
    ) -> ClientRecord | None:
        """A client that an earlier process finished in a round that it did not complete.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._path("client", round_idx, client_id, stage)
        if not path.exists():
            return None
        record = client_from_tree(load_tree(path))
        if self.writes:
            entry = {"file": path.name, "checksum": noted_checksum(path)}
            self._fresh.setdefault(client_id, {})["client"] = entry
        return record

    def save_step(self, round_idx: int, client_id: int, record: StepRecord, stage: int = 0) -> None:
        """Writes a client that was stopped inside a pass.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if self.writes:
            self._save(self._path("step", round_idx, client_id, stage), step_tree(record))

    def stopped_client(self, round_idx: int, client_id: int, stage: int = 0) -> StepRecord | None:
        """Where an earlier process stopped a client.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._path("step", round_idx, client_id, stage)
        return step_from_tree(load_tree(path)) if path.exists() else None

    def save_exchange(
        self,
        round_idx: int,
        downlinks: Mapping[int, SharedTensors],
        uploads: Mapping[int, SharedTensors],
        updates: Mapping[int, SharedTensors],
    ) -> None:
        """Writes what owned clients received, and accepted uploads that no client file holds.

        Args:
            round_idx: 0-based round.
            downlinks: of the clients that received something new.
            uploads: of the clients whose update was accepted since the last call.
            updates: what these clients' files hold as their update.

        Raises:
            CheckpointError: a file cannot be written.
        """
        if not self.writes:
            return
        for client_id, tensors in downlinks.items():
            entry = self._save(self._path("downlink", round_idx, client_id), dict(tensors))
            self._fresh.setdefault(client_id, {})["downlink"] = entry
        for client_id, tensors in uploads.items():
            fresh = self._fresh.setdefault(client_id, {})
            if "client" in fresh and _same(tensors, updates.get(client_id, {})):
                fresh["upload"] = fresh["client"]
            else:
                fresh["upload"] = self._save(
                    self._path("upload", round_idx, client_id), dict(tensors)
                )

    def written(self) -> str:
        """What this rank has written since the last call, for :meth:`commit`, as JSON."""
        fresh, self._fresh = self._fresh, {}
        return json.dumps(fresh)

    def commit(
        self,
        round_idx: int,
        server: Mapping[str, Any],
        progress: Mapping[str, Any],
        written: Sequence[str],
    ) -> None:
        """Makes the round valid: server state, then the round file, then the clean-up.

        Args:
            round_idx: 0-based round.
            server: the strategy's state.
            progress: JSON values of the loop itself.
            written: :meth:`written` of every rank.

        Raises:
            CheckpointError: a file cannot be written; older rounds are intact.
        """
        if self.rank != 0:
            return
        for text in written:
            for client_id, entries in json.loads(text).items():
                self._entries.setdefault(int(client_id), {}).update(entries)
        tree = {"server": server, "progress": progress}
        manifest = {
            "format": FORMAT_VERSION,
            "round_idx": round_idx,
            "num_rounds": self._num_rounds,
            "experiment": self._experiment,
            "server": self._save(self._path("server", round_idx), tree),
            "clients": {str(i): entries for i, entries in sorted(self._entries.items())},
        }
        write_atomic(self._round_file(round_idx), json.dumps(manifest, indent=1).encode())
        self._clean_up()

    def _round_file(self, round_idx: int) -> Path:
        return self.folder / f"round-{round_idx + 1:04d}.json"

    def _clean_up(self) -> None:
        kept = self.rounds()
        if not kept:
            return
        used: set[str] = set()
        try:
            for round_idx in kept[-self.keep_last :]:
                used |= {entry["file"] for entry in entries_of(self._manifest(round_idx))}
            for old in kept[: -self.keep_last]:
                self._round_file(old).unlink()
            for path in self._files():
                if path.name not in used and round_of(path) <= kept[-1]:
                    path.unlink()
        except (CheckpointError, OSError) as error:
            # The round itself is saved; what is not cleaned up is only disk space.
            LOG.warning("old checkpoints in %s stay: %s", self.folder, error)

    def _files(self) -> list[Path]:
        return [path for kind in _KINDS for path in self.folder.glob(f"{kind}-*{SUFFIX}")]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Notes that the strategy is done.

        Args:
            summary: JSON values for :meth:`finished`.
        """
        if self.rank == 0:
            # A process killed while it cleaned up after the last round has left old files.
            self._clean_up()
            payload = {"format": FORMAT_VERSION, "num_rounds": self._num_rounds, **summary}
            write_atomic(self.folder / _FINISHED, json.dumps(payload, indent=1).encode())

    def finished(self) -> Mapping[str, Any] | None:
        """The summary of a strategy that is done; None if it is not.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.folder / _FINISHED
        return read_json(path) if path.exists() else None

    def rounds(self) -> Sequence[int]:
        """0-based rounds that have a round file, ascending."""
        return sorted(
            int(path.stem.removeprefix("round-")) - 1 for path in self.folder.glob("round-*.json")
        )

    def rewind(self, after: int) -> None:
        """Forgets everything later than a round, also clients that are done since; rank 0 calls it.

        Args:
            after: 0-based round that stays the newest; -1 forgets everything.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            (self.folder / _FINISHED).unlink(missing_ok=True)
            for round_idx in self.rounds():
                if round_idx > after:
                    self._round_file(round_idx).unlink()
            for path in self._files():
                if round_of(path) > after:
                    path.unlink()
        except OSError as error:
            raise write_error(self.folder, error) from error

    def tidy(self) -> None:
        """Deletes half-written files of a killed process; rank 0 calls it before others write."""
        remove_leftovers(self.folder)

    def load(
        self, round_idx: int | None = None, clients: Collection[int] | None = None
    ) -> RoundCheckpoint:
        """Reads a round (the newest by default) and checks every checksum; writes go on from it.

        Args:
            round_idx: 0-based round.
            clients: whose states to read; all by default.

        Raises:
            CheckpointError: no such round, another format or experiment, or a damaged file; the
                hint names the newest older round that is whole.
        """
        known = self.rounds()
        if not known or (round_idx is not None and round_idx not in known):
            wanted = "any round" if round_idx is None else f"round {round_idx + 1}"
            found = ", ".join(str(index + 1) for index in known) or "none"
            raise CheckpointError(f"{self.folder}: no checkpoint of {wanted}; found: {found}")
        chosen = known[-1] if round_idx is None else round_idx
        try:
            return self._load(chosen, clients)
        except CheckpointError as error:
            older = next((i for i in reversed(known) if i < chosen and self.is_whole(i)), None)
            if older is not None:
                error.hint = (
                    f"round {older + 1} is whole: --from-round {older + 1} goes on from there and "
                    "forgets what came later"
                )
            raise

    def is_whole(self, round_idx: int) -> bool:
        """Whether a round can be read with all its clients."""
        try:
            self._load(round_idx, None, remember=False)
        except CheckpointError:
            return False
        return True

    def _manifest(self, round_idx: int) -> dict[str, Any]:
        path = self._round_file(round_idx)
        manifest = read_json(path)
        check_format(path, manifest.get("format"))
        return manifest

    def _load(
        self, round_idx: int, clients: Collection[int] | None, *, remember: bool = True
    ) -> RoundCheckpoint:
        manifest = self._manifest(round_idx)
        path = self._round_file(round_idx)
        if self._experiment and manifest.get("experiment") != self._experiment:
            raise CheckpointError(
                f"{path} was made with another configuration than this run's",
                hint="resume the run folder that it comes from, or start a new run",
            )
        try:
            saved = read_round(self.folder, manifest, clients)
            entries = {int(key): dict(value) for key, value in manifest["clients"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if remember:
            self._entries = entries
        return saved


__all__ = ["CheckpointStore", "RoundCheckpoint"]
