"""Training the clients of one round that this rank owns, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedml_plugin_fedmosaic.core.events import (
    ClientTrained,
    EventSink,
    StepsDone,
    from_record,
    to_record,
)
from fedml_plugin_fedmosaic.core.types import ClientUpdate, SharedTensors
from fedml_plugin_fedmosaic.core.work import Pass
from fedml_plugin_fedmosaic.engine.base import FitStopped, ShouldStop
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.runtime.client import ClientRunner
from fedml_plugin_fedmosaic.runtime.faults import Attempt, FaultGuard
from fedml_plugin_fedmosaic.runtime.hooks import RoundHooks
from fedml_plugin_fedmosaic.runtime.keeper import Keeper
from fedml_plugin_fedmosaic.runtime.records import ClientRecord, EventRecord, StepRecord
from fedml_plugin_fedmosaic.runtime.sinks import Recorder
from fedml_plugin_fedmosaic.runtime.validation import UpdateShape


class CohortTrainer:
    """Turns downlinks into updates.

    Args:
        strategy: name of the strategy, for the events.
        sink: takes the events.
        hooks: the host framework's hooks.
        sketcher: computes sketches; None if the strategy needs none.
        guard: says what happens to a client that fails.
        keeper: saves finished clients and knows those of an interrupted round.
        should_stop: asked between clients and between optimizer steps.

    Attributes:
        stopped: whether the last round was left before all clients were done.
    """

    def __init__(
        self,
        strategy: str,
        sink: EventSink,
        hooks: RoundHooks,
        sketcher: SketchEngine | None,
        guard: FaultGuard,
        keeper: Keeper,
        should_stop: ShouldStop,
    ) -> None:
        self._strategy = strategy
        self._sink = sink
        self._hooks = hooks
        self._sketcher = sketcher
        self._guard = guard
        self._keeper = keeper
        self._should_stop = should_stop
        self.stopped = False

    def train(
        self,
        round_idx: int,
        clients: Mapping[int, ClientRunner],
        downlinks: Mapping[int, SharedTensors],
    ) -> dict[int, ClientUpdate]:
        """Trains each client and returns what it sends; dropped clients are left out.

        A client is saved as soon as it is done. One that was done before the run was interrupted
        is not trained again; its events are.

        Args:
            round_idx: 0-based round.
            clients: members of the cohort that this rank owns, in the order of training.
            downlinks: what each client last received; absent means nothing.

        Raises:
            CheckpointError: a client cannot be saved, or its file is damaged.
            ClientFailure: a client failed; the original error is its cause.
            FedMosaicError: an error of this package, with the client and the stage as a note.
        """
        updates: dict[int, ClientUpdate] = {}
        self.stopped = False
        for client_id, client in clients.items():
            record = self._keeper.finished(round_idx, client_id)
            if record is not None:
                client.adopt(record.state)
                self._report_again(record.events)
                updates[client_id] = record.update
                continue
            if self._should_stop():
                self.stopped = True
                break
            if self._guard.is_late(client_id, round_idx):
                continue
            recorder = Recorder(self._sink)
            try:
                with self._guard.attempt(client, round_idx) as attempt:
                    updates[client_id] = self._train(
                        client, downlinks.get(client_id, {}), attempt, recorder
                    )
            except FitStopped:
                self.stopped = True
                break
            if client_id in updates:
                events = tuple(to_record(event) for event in recorder.events)
                record = ClientRecord(state=client.state, update=updates[client_id], events=events)
                self._keeper.client_done(round_idx, client_id, record)
        return updates

    def _report_again(self, events: Sequence[EventRecord]) -> None:
        for record in events:
            event = from_record(record)
            if event is not None:
                self._sink(event)

    def _train(
        self,
        client: ClientRunner,
        downlink: SharedTensors,
        attempt: Attempt,
        recorder: Recorder,
    ) -> ClientUpdate:
        client_id, round_idx = attempt.client_id, attempt.round_idx

        def on_step(done: int, total: int) -> None:
            self._sink(
                StepsDone(
                    strategy=self._strategy,
                    round_idx=round_idx,
                    client_id=client_id,
                    steps=done,
                    total=total,
                )
            )
            self._guard.check_time(client_id, round_idx, f"it had done {done} of {total} steps")

        step = self._keeper.stopped(round_idx, client_id)
        downlink = self._hooks.before_local_training(client_id, downlink)
        passes = client.prepare(downlink, round_idx)
        attempt.stage = "fit"
        first = 0
        if step is not None:
            first = step.pass_idx
            client.go_on(step.state)
            for event in filter(None, map(from_record, step.events)):
                recorder(event)
        for index, pass_ in enumerate(passes[first:], start=first):
            if not isinstance(pass_, Pass):
                raise TypeError(f"{pass_.name!r} is no pass")
            progress = step.progress if step is not None and index == first else None
            try:
                result = client.fit(
                    pass_, round_idx, on_step, progress=progress, should_stop=self._should_stop
                )
            except FitStopped as stop:
                record = StepRecord(
                    pass_idx=index,
                    state=replace(client.state, adapter=stop.progress.adapter),
                    progress=stop.progress,
                    events=tuple(to_record(event) for event in recorder.events),
                )
                self._keeper.client_stopped(round_idx, client_id, record)
                raise
            recorder(
                ClientTrained(
                    strategy=self._strategy,
                    round_idx=round_idx,
                    client_id=client_id,
                    pass_name=pass_.name,
                    num_steps=len(result.losses),
                    num_examples=result.num_examples,
                    num_tokens=result.num_tokens,
                    mean_loss=sum(result.losses) / max(len(result.losses), 1),
                    duration_s=result.duration_s,
                )
            )
        attempt.stage = "sketch"
        if self._sketcher is not None:
            client.sketch(self._sketcher, round_idx)
        attempt.stage = "finish"
        update = client.finish(round_idx)
        shape = UpdateShape.of(update)
        update = self._hooks.after_local_training(update)
        attempt.stage = "update"
        self._guard.check(shape, update)
        return update
