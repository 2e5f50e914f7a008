"""One strategy over all rounds: the loop that the strategy, engines and communicator plug into."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.base import Communicator
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.events import (
    EventSink,
    PlanMade,
    RoundFinished,
    RoundStarted,
    RunStarted,
)
from fedml_plugin_fedmosaic.core.types import (
    ClientUpdate,
    Relevance,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.data.base import FederatedData
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.runtime.attendance import Attendance
from fedml_plugin_fedmosaic.runtime.client import ClientRunner, EnginePool, build_clients
from fedml_plugin_fedmosaic.runtime.cohort import CohortTrainer
from fedml_plugin_fedmosaic.runtime.evaluation import evaluate_clients
from fedml_plugin_fedmosaic.runtime.faults import FaultGuard
from fedml_plugin_fedmosaic.runtime.hooks import RoundHooks
from fedml_plugin_fedmosaic.runtime.keeper import Keeper, Standing
from fedml_plugin_fedmosaic.runtime.lives import Life, open_store
from fedml_plugin_fedmosaic.runtime.setup import (
    build_strategy,
    proxy_key,
    share_manifests,
    together,
)
from fedml_plugin_fedmosaic.runtime.validation import UpdateShape, check_headers
from fedml_plugin_fedmosaic.strategies.base import ServerState


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


class StrategyRun:
    """Trains one strategy from round 1 to the last and evaluates it."""

    def __init__(
        self,
        *,
        name: str,
        experiment: Experiment,
        data: FederatedData,
        bundles: Mapping[str, ModelBundle],
        proxy: str,
        comm: Communicator,
        sink: EventSink,
        hooks: RoundHooks,
        run_dir: Path,
        life: Life,
    ) -> None:
        self.name = name
        self.experiment = experiment
        self.data = data
        self.comm = comm
        self.sink = sink
        self.hooks = hooks
        self.run_dir = run_dir
        self.seed = experiment.common.random_seed
        self.num_rounds = experiment.train.comm_round
        self.clients_per_round = experiment.train.client_num_per_round or len(data.clients)
        self.strategy = build_strategy(name, experiment)
        self.attendance = Attendance(experiment, data)
        self.pool = EnginePool(experiment, bundles, self.strategy.adapter)
        # Only ranks that compute sketches have loaded it.
        self.proxy = bundles.get(proxy_key(proxy), bundles.get(proxy))
        self.life = life
        self.guard = FaultGuard(experiment.faults, name, sink, group_size=comm.group_size)
        self.keeper = Keeper(
            open_store(run_dir, name, experiment, comm),
            comm,
            self.guard.ledger,
            save_every=experiment.run.save_every,
            num_rounds=self.num_rounds,
            sync=life.sync,
        )
        self.train_s = 0.0
        self.earlier_s = 0.0
        self._began = time.perf_counter()

    @property
    def duration_s(self) -> float:
        """Wall-clock seconds of this strategy in all lives, up to now; work done again once."""
        return self.earlier_s + time.perf_counter() - self._began

    @classmethod
    def check(
        cls,
        name: str,
        experiment: Experiment,
        data: FederatedData,
        bundles: Mapping[str, ModelBundle],
        comm: Communicator,
    ) -> None:
        """Builds engines, clients and server state, and lets them go again; all ranks call it.

        Each rank builds its own clients; their manifests are exchanged, so that the server's state
        is checked with all of them.

        Raises:
            FedMosaicError: models, adapters, data and strategy do not fit together, on any rank.
        """
        strategy = build_strategy(name, experiment)
        Attendance(experiment, data)
        pool = EnginePool(experiment, bundles, strategy.adapter)
        owned = comm.owned([client.client_id for client in data.clients])
        try:
            clients = together(comm, lambda: build_clients(experiment, data, pool, strategy, owned))
            manifests = share_manifests(comm, [client.manifest for client in clients.values()])
            together(comm, lambda: strategy.init(manifests, experiment.common.random_seed))
        finally:
            pool.close()

    def execute(self) -> None:
        """Runs the rounds that are not saved yet, then the last evaluation.

        Raises:
            RunInterrupted: a rank was asked to stop; all is saved.
        """
        try:
            self._execute()
        finally:
            self.pool.close()

    def _execute(self) -> None:
        owned = self.comm.owned([client.client_id for client in self.data.clients])
        mine = build_clients(self.experiment, self.data, self.pool, self.strategy, owned)
        manifests = share_manifests(self.comm, [client.manifest for client in mine.values()])
        standing = self.keeper.take_up(mine) or Standing(
            server=self.strategy.init(manifests, self.seed)
        )
        self.train_s = standing.train_s
        self.earlier_s = standing.duration_s
        self.sink(
            RunStarted(
                strategy=self.name,
                num_rounds=self.num_rounds,
                num_clients=len(manifests),
                clients_per_round=self.clients_per_round,
                run_dir=str(self.run_dir),
            )
        )
        trainer = CohortTrainer(
            self.name,
            self.sink,
            self.hooks,
            self._sketcher(mine),
            self.guard,
            self.keeper,
            self.life.should_stop,
        )
        if standing.next_round > 0:
            self._evaluate(standing.next_round - 1, mine)
        for round_idx in range(standing.next_round, self.num_rounds):
            self._round(round_idx, standing, mine, trainer)
            self._evaluate(round_idx, mine)

    def _round(
        self,
        round_idx: int,
        standing: Standing,
        mine: Mapping[int, ClientRunner],
        trainer: CohortTrainer,
    ) -> None:
        began = time.perf_counter()
        self.hooks.begin_round(round_idx)
        chosen = self.strategy.select(standing.server, round_idx, self.clients_per_round)
        cohort = self.attendance.cohort(chosen, round_idx)
        self.sink(RoundStarted(strategy=self.name, round_idx=round_idx, cohort=cohort))
        self.guard.begin_round(standing.uploads)
        trained = {client_id: mine[client_id] for client_id in cohort if client_id in mine}
        updates = trainer.train(round_idx, trained, standing.downlinks)
        self.life.go_on(self.comm, stopped=trainer.stopped)
        before = dict(standing.uploads)
        standing.server, received = self._aggregate(
            round_idx, cohort, updates, standing.server, standing.uploads, mine
        )
        standing.downlinks.update(received)
        accepted = {
            client_id: tensors
            for client_id, tensors in standing.uploads.items()
            if tensors is not before.get(client_id)
        }
        self._report_round(round_idx, time.perf_counter() - began)
        standing.train_s = self.train_s
        standing.duration_s = self.duration_s
        self.keeper.round_done(round_idx, standing, received, accepted)

    def _sketcher(self, mine: Mapping[int, ClientRunner]) -> SketchEngine | None:
        """Computes sketches: once per rank group, on its leader."""
        if not (self.strategy.needs_sketch and self.comm.is_leader and mine):
            return None
        if self.proxy is None:
            raise ConfigError("the proxy model was not loaded on the leader of a rank group")
        return SketchEngine(
            self.proxy,
            self.experiment.sketch,
            self.seed,
            grad_accumulation=self.experiment.optim.grad_accumulation,
        )

    def _aggregate(
        self,
        round_idx: int,
        cohort: Sequence[int],
        updates: dict[int, ClientUpdate],
        state: ServerState,
        uploads: dict[int, SharedTensors],
        mine: Mapping[int, ClientRunner],
    ) -> tuple[ServerState, dict[int, SharedTensors]]:
        """Mixes what was delivered; without a quorum nothing changes."""
        shapes = {client_id: UpdateShape.of(update) for client_id, update in updates.items()}
        accepted = self.guard.admit(shapes, self.hooks.before_aggregation(updates))
        everyone = self.comm.exchange_headers([update.header for update in accepted.values()])
        check_headers(everyone, cohort=cohort, round_idx=round_idx)
        if not self.guard.has_quorum(round_idx, cohort, everyone):
            return state, {}
        for client_id, update in accepted.items():
            uploads[client_id] = update.tensors
        state, plan = self.strategy.plan(state, everyone, self._relevance(everyone, mine))
        plan = self.guard.limit_staleness(plan, round_idx)
        self.sink(
            PlanMade(
                strategy=self.name,
                round_idx=round_idx,
                relevance=to_rows(plan.relevance),
                weights=to_rows(plan.weights),
            )
        )
        received: dict[int, Any] = dict(self.comm.execute(plan, uploads))
        return state, dict(self.hooks.after_aggregation(received))

    def _relevance(
        self, headers: Sequence[UpdateHeader], mine: Mapping[int, ClientRunner]
    ) -> Relevance | None:
        """The similarity that the strategy asks for; sketches stay on their ranks."""
        if self.strategy.similarity is None or not headers:
            return None
        last = {client_id: client.state.sketch for client_id, client in mine.items()}
        held = {client_id: sketch for client_id, sketch in last.items() if sketch is not None}
        fresh = [header.client_id for header in headers]
        return self.comm.relevance(self.strategy.similarity, held, fresh)

    def _report_round(self, round_idx: int, duration_s: float) -> None:
        self.train_s += duration_s
        self.sink(
            RoundFinished(
                strategy=self.name,
                round_idx=round_idx,
                duration_s=duration_s,
                uplink_bytes=dict(self.comm.uplink_bytes),
                downlink_bytes=dict(self.comm.downlink_bytes),
            )
        )

    def _evaluate(self, round_idx: int, mine: Mapping[int, ClientRunner]) -> None:
        last = round_idx == self.num_rounds - 1
        every = self.experiment.evaluation.every
        done = True
        if last or (every and (round_idx + 1) % every == 0):
            done = evaluate_clients(
                strategy=self.strategy,
                experiment=self.experiment,
                data=self.data,
                clients=mine,
                round_idx=round_idx,
                final=last,
                sink=self.sink,
                known=self.life.known,
                should_stop=self.life.should_stop,
            )
        self.life.go_on(self.comm, stopped=not done)
