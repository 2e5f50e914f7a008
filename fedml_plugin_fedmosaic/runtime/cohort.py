"""Training the clients of one round that this rank owns, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from fedml_plugin_fedmosaic.core.events import ClientTrained, EventSink, StepsDone
from fedml_plugin_fedmosaic.core.types import ClientUpdate, SharedTensors
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.runtime.client import ClientRunner
from fedml_plugin_fedmosaic.runtime.faults import Attempt, FaultGuard
from fedml_plugin_fedmosaic.runtime.hooks import RoundHooks
from fedml_plugin_fedmosaic.runtime.validation import UpdateShape


class CohortTrainer:
    """Turns downlinks into updates.

    Args:
        strategy: name of the strategy, for the events.
        sink: takes the events.
        hooks: the host framework's hooks.
        sketcher: computes sketches; None if the strategy needs none.
        guard: says what happens to a client that fails.
    """

    def __init__(
        self,
        strategy: str,
        sink: EventSink,
        hooks: RoundHooks,
        sketcher: SketchEngine | None,
        guard: FaultGuard,
    ) -> None:
        self._strategy = strategy
        self._sink = sink
        self._hooks = hooks
        self._sketcher = sketcher
        self._guard = guard

    def train(
        self,
        round_idx: int,
        clients: Mapping[int, ClientRunner],
        downlinks: Mapping[int, SharedTensors],
    ) -> dict[int, ClientUpdate]:
        """Trains each client and returns what it sends; dropped clients are left out.

        Args:
            round_idx: 0-based round.
            clients: members of the cohort that this rank owns, in the order of training.
            downlinks: what each client last received; absent means nothing.

        Raises:
            ClientFailure: a client failed; the original error is its cause.
            FedMosaicError: an error of this package, with the client and the stage as a note.
        """
        updates: dict[int, ClientUpdate] = {}
        for client_id, client in clients.items():
            if self._guard.is_late(client_id, round_idx):
                continue
            with self._guard.attempt(client, round_idx) as attempt:
                updates[client_id] = self._train(client, downlinks.get(client_id, {}), attempt)
        return updates

    def _train(
        self, client: ClientRunner, downlink: SharedTensors, attempt: Attempt
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

        downlink = self._hooks.before_local_training(client_id, downlink)
        passes = client.prepare(downlink, round_idx)
        attempt.stage = "fit"
        for pass_ in passes:
            result = client.fit(pass_, round_idx, on_step)
            self._sink(
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
