"""Where a strategy stands, and when that is written: after each client and after each round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedml_plugin_fedmosaic.comm.base import Communicator
from fedml_plugin_fedmosaic.core.errors import CheckpointError
from fedml_plugin_fedmosaic.core.types import SharedTensors
from fedml_plugin_fedmosaic.runtime.client import ClientRunner
from fedml_plugin_fedmosaic.runtime.faults import RoundLedger
from fedml_plugin_fedmosaic.runtime.records import ClientRecord, StepRecord
from fedml_plugin_fedmosaic.runtime.setup import together
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore
from fedml_plugin_fedmosaic.strategies.base import ServerState


@dataclass(slots=True, kw_only=True)
class Standing:
    """Where a strategy stands between two rounds, on one rank.

    Attributes:
        server: the strategy's state.
        next_round: 0-based round to run next.
        train_s: wall-clock seconds of all rounds so far.
        duration_s: wall-clock seconds of the strategy so far, evaluations included.
        uploads: last accepted tensors of owned clients.
        downlinks: what owned clients received last.
    """

    server: ServerState
    next_round: int = 0
    train_s: float = 0.0
    duration_s: float = 0.0
    uploads: dict[int, SharedTensors] = field(default_factory=dict)
    downlinks: dict[int, SharedTensors] = field(default_factory=dict)


class Keeper:
    """Writes one strategy's progress and takes it up again.

    Args:
        store: the strategy's checkpoints.
        comm: all ranks of the job.
        ledger: who delivered when; saved with each round.
        save_every: rounds between two checkpoints.
        num_rounds: rounds of the run, and one more if the strategy has stages after the last; the
            last one is always saved.
        sync: makes the events that were emitted so far outlive a power cut.
    """

    def __init__(
        self,
        store: CheckpointStore,
        comm: Communicator,
        ledger: RoundLedger,
        *,
        save_every: int,
        num_rounds: int,
        sync: Callable[[], None],
    ) -> None:
        self._store = store
        self._comm = comm
        self._ledger = ledger
        self._save_every = save_every
        self._num_rounds = num_rounds
        self._sync = sync
        self._saved_round = -1
        self._waiting: dict[int, tuple[int, int, ClientRecord]] = {}
        self._updates: dict[int, SharedTensors] = {}
        self._received: dict[int, SharedTensors] = {}
        self._accepted: dict[int, SharedTensors] = {}

    def take_up(self, clients: Mapping[int, ClientRunner]) -> Standing | None:
        """Goes on from the newest saved round; None if there is none. All ranks call it.

        Args:
            clients: the owned ones; they take their saved states.

        Raises:
            CheckpointError: a file is damaged, or does not belong to this run.
        """
        if not self._store.rounds():
            return None
        saved = together(self._comm, lambda: self._store.load(clients=clients))
        trained = saved.num_rounds
        if saved.round_idx >= trained and self._num_rounds != saved.round_idx + 1:
            raise CheckpointError(
                f"the stages after round {trained}, the last, are done: no more rounds can follow",
                hint=f"--from-round {trained} goes on from before them",
            )
        for client_id, state in saved.clients.items():
            clients[client_id].adopt(state)
        self._ledger.restore(saved.progress["ledger"])
        self._saved_round = saved.round_idx
        return Standing(
            server=saved.server,
            next_round=saved.round_idx + 1,
            train_s=saved.progress["train_s"],
            duration_s=saved.progress["duration_s"],
            uploads=dict(saved.uploads),
            downlinks=dict(saved.downlinks),
        )

    def finished(self, round_idx: int, client_id: int, stage: int = 0) -> ClientRecord | None:
        """A client of this round that was done before the run was interrupted.

        Raises:
            CheckpointError: its file is damaged.
        """
        if round_idx != self._saved_round + 1:
            return None
        with self._hinted():
            record = self._store.finished_client(round_idx, client_id, stage)
        if record is not None:
            self._updates[client_id] = record.update.tensors
        return record

    def stopped(self, round_idx: int, client_id: int, stage: int = 0) -> StepRecord | None:
        """Where a client of this round was stopped before the run was interrupted.

        Raises:
            CheckpointError: its file is damaged.
        """
        if round_idx != self._saved_round + 1:
            return None
        with self._hinted():
            return self._store.stopped_client(round_idx, client_id, stage)

    @contextmanager
    def _hinted(self) -> Iterator[None]:
        """Says how to do without a damaged file of an unfinished round."""
        try:
            yield
        except CheckpointError as error:
            done = self._saved_round + 1
            error.hint = f"--from-round {done} goes on after round {done} without this file"
            raise

    def client_done(
        self, round_idx: int, client_id: int, record: ClientRecord, stage: int = 0
    ) -> None:
        """Saves a client that has finished its part of a stage of the round.

        Between two checkpoints that are more than a round apart it is only kept in memory: a
        resumed run could not use it.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self._waiting[client_id] = (round_idx, stage, record)
        if round_idx == self._saved_round + 1 or self._saves(round_idx):
            self._write_waiting(client_id)

    def client_stopped(
        self, round_idx: int, client_id: int, record: StepRecord, stage: int = 0
    ) -> None:
        """Saves a client that was stopped inside a pass.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if round_idx == self._saved_round + 1:
            self._store.save_step(round_idx, client_id, record, stage)

    def round_done(
        self,
        round_idx: int,
        standing: Standing,
        received: Mapping[int, SharedTensors],
        accepted: Mapping[int, SharedTensors],
    ) -> None:
        """Makes the round valid if it is one to be saved; all ranks call it.

        Args:
            round_idx: 0-based round.
            standing: after the round.
            received: new downlinks of owned clients.
            accepted: owned clients' updates that were mixed.

        Raises:
            CheckpointError: a file cannot be written on some rank; older rounds are intact.
        """
        self._received.update(received)
        self._accepted.update(accepted)
        if not self._saves(round_idx):
            return
        together(self._comm, lambda: self._write(round_idx))
        written = self._comm.share(self._store.written())
        progress = {
            "ledger": self._ledger.state(),
            "train_s": standing.train_s,
            "duration_s": standing.duration_s,
        }
        # Nobody begins the next round before this one is valid.
        together(
            self._comm,
            lambda: self._store.commit(round_idx, standing.server, progress, written),
        )
        self._saved_round = round_idx
        self._received, self._accepted, self._updates = {}, {}, {}

    def _saves(self, round_idx: int) -> bool:
        return round_idx == self._num_rounds - 1 or (round_idx + 1) % self._save_every == 0

    def _write(self, round_idx: int) -> None:
        for client_id in sorted(self._waiting):
            self._write_waiting(client_id)
        self._store.save_exchange(round_idx, self._received, self._accepted, self._updates)
        self._sync()

    def _write_waiting(self, client_id: int) -> None:
        made_in, stage, record = self._waiting.pop(client_id)
        self._store.save_client(made_in, client_id, record, stage)
        self._updates[client_id] = record.update.tensors
