"""One strategy over all rounds: the loop that the strategy, engines and communicator plug into."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    MixingPlan,
    Relevance,
    SharedTensors,
    UpdateHeader,
    channel_of,
)
from fedml_plugin_fedmosaic.data.base import FederatedData
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.runtime.attendance import Attendance
from fedml_plugin_fedmosaic.runtime.client import ClientRunner, EnginePool, build_clients
from fedml_plugin_fedmosaic.runtime.cohort import CohortTrainer, Stage
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
from fedml_plugin_fedmosaic.runtime.shortage import Needs
from fedml_plugin_fedmosaic.runtime.validation import UpdateShape, check_headers
from fedml_plugin_fedmosaic.runtime.wordings import share_wordings
from fedml_plugin_fedmosaic.strategies.base import SERVER, TRAIN, ServerState


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


@dataclass(slots=True)
class Traffic:
    """Bytes per client over the stages of a round."""

    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)

    def add(self, comm: Communicator, *, uplink: bool) -> None:
        """Adds those of the last stage; what the server sends to itself is no uplink."""
        sent = comm.uplink_bytes if uplink else {}
        for total, new in ((self.up, sent), (self.down, comm.downlink_bytes)):
            for client_id, count in new.items():
                total[client_id] = total.get(client_id, 0) + count


def with_channels(old: SharedTensors, new: SharedTensors) -> SharedTensors:
    """Old tensors with whole channels replaced by new ones."""
    channels = {channel_of(key) for key in new}
    return {**{key: old[key] for key in old if channel_of(key) not in channels}, **new}


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
        needs = Needs(
            experiment=experiment,
            models={client.client_id: client.model_id for client in data.clients},
            proxy=proxy,
        )
        self.guard = FaultGuard(
            experiment.faults, name, sink, group_size=comm.group_size, needs=needs
        )
        self.keeper = Keeper(
            open_store(run_dir, name, experiment, comm),
            comm,
            self.guard.ledger,
            save_every=experiment.run.save_every,
            num_rounds=self._num_steps,
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
        share_wordings(self.comm, self.strategy, manifests, mine)
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
        for round_idx in range(standing.next_round, self._num_steps):
            self._round(round_idx, standing, mine, trainer)
            self._evaluate(round_idx, mine)

    @property
    def _num_steps(self) -> int:
        """Rounds, and one more for the stages after the last."""
        return self.num_rounds + bool(self.strategy.final_stages)

    def _round(
        self,
        round_idx: int,
        standing: Standing,
        mine: Mapping[int, ClientRunner],
        trainer: CohortTrainer,
    ) -> None:
        began = time.perf_counter()
        self.hooks.begin_round(round_idx)
        last = round_idx == self.num_rounds
        names = self.strategy.final_stages if last else self.strategy.stages
        if last:
            cohort = tuple(sorted(client.client_id for client in self.data.clients))
        else:
            chosen = self.strategy.select(standing.server, round_idx, self.clients_per_round)
            cohort = self.attendance.cohort(chosen, round_idx)
            self.sink(RoundStarted(strategy=self.name, round_idx=round_idx, cohort=cohort))
        before = dict(standing.uploads)
        received: dict[int, SharedTensors] = {}
        traffic = Traffic()
        for index, name in enumerate(names):
            stage = Stage(index, name)
            new = self._stage(round_idx, stage, cohort, standing, mine, trainer)
            traffic.add(self.comm, uplink=name != SERVER)
            if new is None:
                break
            received.update(new)
        accepted = {
            client_id: tensors
            for client_id, tensors in standing.uploads.items()
            if tensors is not before.get(client_id)
        }
        self.train_s += time.perf_counter() - began
        if not last:
            self._report_round(round_idx, time.perf_counter() - began, traffic)
        standing.train_s = self.train_s
        standing.duration_s = self.duration_s
        self.keeper.round_done(round_idx, standing, received, accepted)

    def _stage(
        self,
        round_idx: int,
        stage: Stage,
        cohort: Sequence[int],
        standing: Standing,
        mine: Mapping[int, ClientRunner],
        trainer: CohortTrainer,
    ) -> dict[int, SharedTensors] | None:
        """One stage; new downlinks of owned clients, or None if too few clients delivered."""
        first = stage.name == TRAIN
        if not first:
            cohort = self.strategy.select_stage(standing.server, stage.name, round_idx, cohort)
        self.guard.begin_round(standing.uploads if first else {})
        trained = {client_id: mine[client_id] for client_id in cohort if client_id in mine}
        updates = trainer.train(round_idx, trained, standing.downlinks, stage)
        self.life.go_on(self.comm, stopped=trainer.stopped)
        headers, accepted = self._collect(round_idx, cohort, updates)
        if first:
            if not self.guard.has_quorum(round_idx, cohort, headers):
                return None
            standing.uploads.update(accepted)
            relevance = self._relevance(standing.server, headers, mine)
            standing.server, plan = self.strategy.plan(standing.server, headers, relevance)
            plan = self.guard.limit_staleness(plan, round_idx)
        elif headers:
            standing.server, plan = self.strategy.plan_stage(standing.server, stage.name, headers)
        else:
            return {}
        if first or plan.weights is not None:
            self._report_plan(round_idx, plan)
        # Later stages mix what was sent in them; what they deliver adds to the downlinks.
        mixed: dict[int, Any] = dict(
            self.comm.execute(plan, standing.uploads if first else accepted)
        )
        received = dict(self.hooks.after_aggregation(mixed))
        if not first:
            received = {
                client_id: with_channels(standing.downlinks.get(client_id, {}), tensors)
                for client_id, tensors in received.items()
                if tensors
            }
        standing.downlinks.update(received)
        return received

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

    def _collect(
        self, round_idx: int, cohort: Sequence[int], updates: dict[int, ClientUpdate]
    ) -> tuple[tuple[UpdateHeader, ...], dict[int, SharedTensors]]:
        """All ranks' headers, and the tensors of owned clients that were accepted."""
        shapes = {client_id: UpdateShape.of(update) for client_id, update in updates.items()}
        accepted = self.guard.admit(shapes, self.hooks.before_aggregation(updates))
        everyone = self.comm.exchange_headers([update.header for update in accepted.values()])
        check_headers(everyone, cohort=cohort, round_idx=round_idx)
        return everyone, {client_id: update.tensors for client_id, update in accepted.items()}

    def _report_plan(self, round_idx: int, plan: MixingPlan) -> None:
        self.sink(
            PlanMade(
                strategy=self.name,
                round_idx=round_idx,
                relevance=to_rows(plan.relevance),
                weights=to_rows(plan.weights),
                groups=dict(plan.groups) or None,
            )
        )

    def _relevance(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        mine: Mapping[int, ClientRunner],
    ) -> Relevance | None:
        """The similarity that the strategy asks for, of all clients or of the nearest ones."""
        kind = self.strategy.similarity
        if kind is None or not headers:
            return None
        last = {client_id: client.state.sketch for client_id, client in mine.items()}
        held = {client_id: sketch for client_id, sketch in last.items() if sketch is not None}
        queries = self.strategy.queries(state, headers)
        if queries is not None:
            found = self.comm.nearest(kind, held, queries)
            return Relevance(clients=(), values=torch.zeros(0, 0), neighbours=found)
        fresh = [header.client_id for header in headers]
        return self.comm.relevance(kind, held, fresh)

    def _report_round(self, round_idx: int, duration_s: float, traffic: Traffic) -> None:
        self.sink(
            RoundFinished(
                strategy=self.name,
                round_idx=round_idx,
                duration_s=duration_s,
                uplink_bytes=traffic.up,
                downlink_bytes=traffic.down,
            )
        )

    def _evaluate(self, round_idx: int, mine: Mapping[int, ClientRunner]) -> None:
        last = round_idx == self._num_steps - 1
        round_idx = min(round_idx, self.num_rounds - 1)
        # Stages after the last round change what the last round is judged by.
        between = round_idx < self.num_rounds - 1
        every = self.experiment.evaluation.every if between else 0
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
                needs=self.guard.needs,
                known=self.life.known,
                should_stop=self.life.should_stop,
            )
        self.life.go_on(self.comm, stopped=not done)
