"""Training the clients of one round that this rank owns, one after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedml_plugin_fedmosaic.core.events import (
    ClientProbed,
    ClientReported,
    ClientTrained,
    EventSink,
    StepsDone,
    from_record,
    to_record,
)
from fedml_plugin_fedmosaic.core.types import ClientUpdate, SharedTensors, UpdateHeader
from fedml_plugin_fedmosaic.core.work import (
    LocalResult,
    Pass,
    Probe,
    ProbeResult,
    Result,
    Work,
)
from fedml_plugin_fedmosaic.engine.base import FitStopped, ShouldStop
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.runtime.client import ClientRunner
from fedml_plugin_fedmosaic.runtime.faults import Attempt, FaultGuard
from fedml_plugin_fedmosaic.runtime.hooks import RoundHooks
from fedml_plugin_fedmosaic.runtime.keeper import Keeper
from fedml_plugin_fedmosaic.runtime.records import ClientRecord, EventRecord, StepRecord
from fedml_plugin_fedmosaic.runtime.sinks import Recorder
from fedml_plugin_fedmosaic.runtime.validation import UpdateShape
from fedml_plugin_fedmosaic.runtime.worktree import slim
from fedml_plugin_fedmosaic.strategies.base import TRAIN


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a round: its place in the round and its name."""

    index: int
    name: str


FIRST = Stage(0, TRAIN)


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
        stage: Stage = FIRST,
    ) -> dict[int, ClientUpdate]:
        """Trains each client and returns what it sends; dropped clients are left out.

        A client is saved as soon as it is done. One that was done before the run was interrupted
        is not trained again; its events are.

        Args:
            round_idx: 0-based round.
            clients: members of the cohort that this rank owns, in the order of training.
            downlinks: what each client last received; absent means nothing.
            stage: of the round.

        Raises:
            CheckpointError: a client cannot be saved, or its file is damaged.
            ClientFailure: a client failed; the original error is its cause.
            FedMosaicError: an error of this package, with the client and the stage as a note.
        """
        updates: dict[int, ClientUpdate] = {}
        self.stopped = False
        for client_id, client in clients.items():
            record = self._keeper.finished(round_idx, client_id, stage.index)
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
                        client, downlinks.get(client_id, {}), attempt, recorder, stage
                    )
            except FitStopped:
                self.stopped = True
                break
            if client_id in updates:
                events = tuple(to_record(event) for event in recorder.events)
                record = ClientRecord(state=client.state, update=updates[client_id], events=events)
                self._keeper.client_done(round_idx, client_id, record, stage.index)
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
        stage: Stage,
    ) -> ClientUpdate:
        client_id, round_idx = attempt.client_id, attempt.round_idx
        step = self._keeper.stopped(round_idx, client_id, stage.index)
        downlink = self._hooks.before_local_training(client_id, downlink)
        works = client.prepare(downlink, round_idx, stage.name)
        attempt.stage = "fit"
        if step is not None:
            works = step.works
            client.go_on(step.state)
            for event in filter(None, map(from_record, step.events)):
                recorder(event)
        while works:
            results = self._turn(client, works, attempt, recorder, stage, step)
            step = None
            works = client.advance(results, round_idx, stage.name)
        attempt.stage = "sketch"
        if self._sketcher is not None and stage.index == 0 and stage.name == TRAIN:
            client.sketch(self._sketcher, round_idx)
        attempt.stage = "finish"
        update = client.finish(round_idx, stage.name)
        self._report(update.header, recorder)
        shape = UpdateShape.of(update)
        update = self._hooks.after_local_training(update)
        attempt.stage = "update"
        self._guard.check(shape, update)
        return update

    def _report(self, header: UpdateHeader, recorder: Recorder) -> None:
        """What the strategy wants to have in the run's metrics."""
        if header.notes.get("report"):
            recorder(
                ClientReported(
                    strategy=self._strategy,
                    round_idx=header.round_idx,
                    client_id=header.client_id,
                    values=header.notes["report"],
                )
            )

    def _turn(
        self,
        client: ClientRunner,
        works: Sequence[Work],
        attempt: Attempt,
        recorder: Recorder,
        stage: Stage,
        step: StepRecord | None,
    ) -> dict[str, Result]:
        """Does the work of one turn, or goes on where it was stopped."""
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

        first = 0 if step is None else step.pass_idx
        results: dict[str, Result] = {} if step is None else dict(step.results)
        for index, work in enumerate(works[first:], start=first):
            if isinstance(work, Probe):
                began = time.perf_counter()
                results[work.name] = seen = client.look(work, round_idx)
                recorder(self._probed(work, seen, attempt, time.perf_counter() - began))
                continue
            progress = step.progress if step is not None and index == first else None
            try:
                result = client.fit(
                    work, round_idx, on_step, progress=progress, should_stop=self._should_stop
                )
            except FitStopped as stop:
                # The adapter is saved once, with the progress.
                state = client.state
                if not (work.into or work.overlay):
                    state = replace(state, adapter=stop.progress.adapter)
                record = StepRecord(
                    pass_idx=index,
                    state=state,
                    progress=stop.progress,
                    events=tuple(to_record(event) for event in recorder.events),
                    works=tuple(works),
                    results=results,
                )
                self._keeper.client_stopped(round_idx, client_id, record, stage.index)
                raise
            results[work.name] = slim(result)
            recorder(self._trained(work, result, attempt))
        return results

    def _trained(self, work: Pass, result: LocalResult, attempt: Attempt) -> ClientTrained:
        return ClientTrained(
            strategy=self._strategy,
            round_idx=attempt.round_idx,
            client_id=attempt.client_id,
            pass_name=work.name,
            num_steps=len(result.losses),
            num_examples=result.num_examples,
            num_tokens=result.num_tokens,
            mean_loss=sum(result.losses) / max(len(result.losses), 1),
            duration_s=result.duration_s,
            flops=result.flops,
        )

    def _probed(
        self, work: Probe, seen: ProbeResult, attempt: Attempt, duration_s: float
    ) -> ClientProbed:
        return ClientProbed(
            strategy=self._strategy,
            round_idx=attempt.round_idx,
            client_id=attempt.client_id,
            probe_name=work.name,
            num_models=len(work.models),
            num_examples=sum(seen.counts.values()),
            duration_s=duration_s,
            flops=seen.flops,
        )
