"""A whole run: load, check, train each strategy, evaluate, write the run folder.

``prepare_run`` loads and checks everything and writes nothing; ``PreparedRun.execute`` makes the
run folder and fills it. All strategies of a run (the main one and those it is compared with) see
the same data in the same order, the same base models and the same seeds.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedml_plugin_fedmosaic.comm.base import Communicator
from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import (
    FedMosaicError,
    LaunchError,
    RunInterrupted,
)
from fedml_plugin_fedmosaic.core.events import EventSink, RunFinished
from fedml_plugin_fedmosaic.core.registry import DATASETS
from fedml_plugin_fedmosaic.data.base import FederatedData
from fedml_plugin_fedmosaic.engine.base import ModelInfo, ShouldStop
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.launch.allocation import check_shared
from fedml_plugin_fedmosaic.launch.base import STARTED_FILE
from fedml_plugin_fedmosaic.launch.env import world
from fedml_plugin_fedmosaic.launch.topology import Topology
from fedml_plugin_fedmosaic.runtime.alignment import check_alignments
from fedml_plugin_fedmosaic.runtime.evaluation import BASE, evaluate_base
from fedml_plugin_fedmosaic.runtime.folder import agree_on_folder, check_not_started, write_header
from fedml_plugin_fedmosaic.runtime.hooks import NoHooks, RoundHooks
from fedml_plugin_fedmosaic.runtime.journal import known_scores, rank_file, settle
from fedml_plugin_fedmosaic.runtime.lives import Life, open_store
from fedml_plugin_fedmosaic.runtime.lock import holding
from fedml_plugin_fedmosaic.runtime.resume import begin_again, check_same_clients, take_folder
from fedml_plugin_fedmosaic.runtime.round import StrategyRun
from fedml_plugin_fedmosaic.runtime.setup import (
    build_strategy,
    check_clients,
    choose_device,
    choose_proxy,
    load_bundles,
    needed_models,
    open_communicator,
    outline_models,
    plan_ranks,
    together,
    used_models,
)
from fedml_plugin_fedmosaic.runtime.signals import never
from fedml_plugin_fedmosaic.runtime.sinks import FanOut, JsonLines
from fedml_plugin_fedmosaic.runtime.status import say_ended, say_running

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run leaves behind.

    Attributes:
        run_dir: the run folder.
        strategies: in the order in which they ran.
        duration_s: wall-clock seconds of all lives of the run, up to the last checkpoint of each.
        train_s: those of the rounds.
    """

    run_dir: Path
    strategies: tuple[str, ...]
    duration_s: float
    train_s: float


def strategies_of(experiment: Experiment) -> tuple[str, ...]:
    """Names of the strategies of a run, in the order they run; the main one is last."""
    compare = [name for name in experiment.evaluation.compare if name != experiment.algo]
    return (*dict.fromkeys(compare), experiment.algo)


@dataclass(slots=True, kw_only=True)
class PreparedRun:
    """A checked run that has not started; made by :func:`prepare_run`."""

    experiment: Experiment
    data: FederatedData
    outlines: Mapping[str, ModelInfo]
    bundles: Mapping[str, ModelBundle]
    proxy: str
    topology: Topology
    comm: Communicator | None
    run_dir: Path
    sinks: tuple[EventSink, ...]
    hooks: RoundHooks
    resume: bool = False
    from_round: int | None = None
    should_stop: ShouldStop = never

    def describe(self) -> list[tuple[str, str]]:
        """What would run, as (label, value) lines for ``--dry-run``."""
        exp = self.experiment
        lines = [
            ("strategies", ", ".join(strategies_of(exp))),
            ("data", f"{self.data.name}, {len(self.data.tasks)} tasks, PFL-{exp.data.split}"),
            ("clients", f"{len(self.data.clients)}, {self._cohort_size()} per round"),
            ("rounds", f"{exp.train.comm_round}, {exp.optim.num_steps} steps each"),
            ("backend", exp.comm.backend),
            ("proxy model", self.proxy),
            ("run folder", str(self.run_dir)),
        ]
        if self.topology.size > 1:
            lines.append(("ranks", str(self.topology.size)))
            lines += self.topology.describe()
        for name, info in self.outlines.items():
            lines.append(
                (
                    f"model {name}",
                    f"{info.family}, {info.num_parameters:,} parameters, {info.num_layers} layers",
                )
            )
        for client in self.data.clients:
            tasks = ", ".join(task.name for task in client.tasks)
            lines.append((f"client {client.client_id}", f"{client.model_id}: {tasks}"))
        return lines

    def _cohort_size(self) -> int:
        return self.experiment.train.client_num_per_round or len(self.data.clients)

    def execute(self) -> RunSummary:
        """Runs every strategy and writes the run folder.

        Raises:
            ClientFailure: a client failed; what finished before is in the run folder.
            CheckpointError: the run folder cannot be written, or a file in it is damaged.
            RunInUse: another process runs in the run folder.
            RunInterrupted: ``should_stop`` said so; the run can be resumed.
        """
        comm = self._communicator()
        with ExitStack() as stack:
            # Before the status is touched, which is the holder's as long as it runs.
            together(comm, lambda: self._lock(stack) if comm.rank == 0 else None)
            try:
                return self._execute(comm)
            except BaseException as error:
                interrupted = isinstance(error, KeyboardInterrupt)
                code = 130 if interrupted else getattr(error, "exit_code", 1)
                text = str(error).partition("\n")[0] or type(error).__name__
                say_ended(self.run_dir, code, text)
                self._note_error(error)
                raise

    def _lock(self, stack: ExitStack) -> None:
        stack.enter_context(holding(self.run_dir))
        if not self.resume:
            # Another run may have taken the folder, and ended, since it was found free.
            check_not_started(self.run_dir)

    def _note_error(self, error: BaseException) -> None:
        """Keeps what ended a rank of an MPI job, because its output may not reach the user."""
        if self.comm is None or self.comm.size == 1 or not self.run_dir.is_dir():
            return
        if isinstance(error, RunInterrupted):
            return
        text = "".join(traceback.format_exception(error))
        try:
            (self.run_dir / f"rank{self.comm.rank}.err").write_text(text, encoding="utf-8")
        except OSError:
            LOG.exception("the error of rank %d cannot be noted", self.comm.rank)

    def _communicator(self) -> Communicator:
        if self.comm is None:
            raise LaunchError(
                f"this run was prepared for {self.topology.size} ranks without starting them",
                hint="start it with --backend MPI -np N, and leave ranks out",
            )
        return self.comm

    def _execute(self, comm: Communicator) -> RunSummary:
        started = time.perf_counter()
        together(comm, lambda: self._open_folder(comm) if comm.rank == 0 else None)
        together(comm, lambda: check_shared(self.run_dir, comm.rank, STARTED_FILE))
        metrics = JsonLines(rank_file(self.run_dir, comm.rank), everything=comm.rank == 0)
        life = Life(
            run_dir=self.run_dir,
            known=together(comm, lambda: known_scores(self.run_dir) if self.resume else ()),
            # A signal reaches the ranks of a group at different moments; they must stop together.
            should_stop=lambda: comm.agree(self.should_stop()),
            sync=metrics.sync,
        )
        # The other ranks of a group see the same events as its leader.
        sink = FanOut([metrics, *self.sinks] if comm.is_leader else [])
        owned = comm.owned([client.client_id for client in self.data.clients])
        train_s = earlier_s = 0.0
        try:
            if self.experiment.evaluation.base:
                done = evaluate_base(
                    self.experiment,
                    self.data,
                    self.bundles,
                    owned,
                    sink,
                    life.known,
                    life.should_stop,
                )
                life.go_on(comm, stopped=not done)
            for name in strategies_of(self.experiment):
                store = open_store(self.run_dir, name, self.experiment, comm)
                earlier = together(comm, store.finished) if self.resume else None
                if earlier is not None:
                    train_s += earlier["train_s"]
                    earlier_s += earlier["duration_s"]
                    continue
                run = StrategyRun(
                    name=name,
                    experiment=self.experiment,
                    data=self.data,
                    bundles=self.bundles,
                    proxy=self.proxy,
                    comm=comm,
                    sink=sink,
                    hooks=self.hooks,
                    run_dir=self.run_dir,
                    life=life,
                )
                run.execute()
                train_s += run.train_s
                earlier_s += run.earlier_s
                took = {"duration_s": run.duration_s, "train_s": run.train_s}
                sink(RunFinished(strategy=name, **took))
                together(comm, metrics.sync)
                finished = partial(store.finish, took)
                together(comm, finished)
        finally:
            metrics.close()
        together(comm, lambda: self._settle() if comm.rank == 0 else None)
        return RunSummary(
            run_dir=self.run_dir,
            strategies=strategies_of(self.experiment),
            duration_s=earlier_s + time.perf_counter() - started,
            train_s=train_s,
        )

    def _open_folder(self, comm: Communicator) -> None:
        """Makes the run folder, or takes up an earlier life's; on rank 0."""
        if self.resume:
            begin_again(
                self.run_dir,
                strategies_of(self.experiment),
                self.experiment,
                comm,
                base=BASE,
                from_round=self.from_round,
            )
        clients = None if self.resume else self.clients()
        write_header(self.run_dir, self.experiment, self.topology, clients, self.data)
        say_running(self.run_dir)

    def _settle(self) -> None:
        settle(self.run_dir, (BASE, *strategies_of(self.experiment)))
        say_ended(self.run_dir, 0)

    def clients(self) -> list[dict[str, Any]]:
        """What ``clients.json`` says of each client."""
        return [
            {
                "client_id": client.client_id,
                "model": client.model_id,
                "family": self.outlines[client.model_id].family,
                "size": self.outlines[client.model_id].size,
                "signature": self.outlines[client.model_id].signature,
                "tasks": [task.name for task in client.tasks],
                "num_examples": sum(len(samples) for samples in client.train),
            }
            for client in self.data.clients
        ]


def _check_strategies(
    names: Sequence[str],
    experiment: Experiment,
    data: FederatedData,
    bundles: Mapping[str, ModelBundle],
    comm: Communicator,
) -> None:
    for name in names:
        try:
            StrategyRun.check(name, experiment, data, bundles, comm)
        except FedMosaicError as error:
            error.add_note(f"while checking strategy {name!r}")
            raise


def prepare_run(
    experiment: Experiment,
    run_dir: Path | None = None,
    sinks: Sequence[EventSink] = (),
    hooks: RoundHooks | None = None,
    *,
    ranks: int | None = None,
    resume: bool = False,
    from_round: int | None = None,
    announce: Callable[[Topology], None] | None = None,
) -> PreparedRun:
    """Loads data and models and checks that every strategy can run; writes no run folder.

    With backend MPI all ranks of the job call it. Each loads the base models of its own clients;
    a mistake that one of them finds is raised on all.

    Args:
        experiment: validated configuration; its ``run.resume`` is followed.
        run_dir: run folder; must not exist or be empty. A new one under ``run.root`` by default.
        sinks: consumers of events, beside the metrics file.
        hooks: the host framework's hooks.
        ranks: plan and check for so many ranks, but in this process alone and without MPI; the
            result can be described, not executed. None: the ranks of this job.
        resume: go on with the run in ``run_dir``.
        from_round: with ``resume``: rounds to keep of the strategy that is not finished.
        announce: told which ranks train which clients, before any model is loaded.

    Raises:
        ConfigError: configuration, scenario and models do not fit together, or the clients need
            more ranks than there are.
        DataError: the data are broken.
        AdapterError: rank or number of blocks is more than a model allows, or an alignment file is
            missing or does not fit.
        CheckpointError: with ``resume``: data or models have changed since.
        RunInUse: with ``resume``: another process runs in the run folder.
        LaunchError: the ranks that were started do not form one MPI job, or backend sp was started
            on several.
    """
    if not resume:
        experiment, run_dir, resume = take_folder(experiment, run_dir)
    world_size = world(experiment.comm.backend)[1] if ranks is None else ranks
    names = strategies_of(experiment)
    for name in names:
        build_strategy(name, experiment)
    if experiment.device.num_threads is not None:
        torch.set_num_threads(experiment.device.num_threads)
    device = choose_device(experiment, world_size if ranks is None else 1)
    data = DATASETS[experiment.data.source](experiment.data)
    check_clients(experiment, data)
    models = used_models(experiment, data)
    outlines = outline_models(models)
    trained = {client.model_id for client in data.clients}
    check_alignments(experiment, {name: outlines[name] for name in sorted(trained)}, names)
    proxy = choose_proxy(experiment, outlines)
    topology = plan_ranks(experiment, data, outlines, world_size)
    if announce is not None:
        announce(topology)
    comm = open_communicator(experiment, topology) if ranks is None else LocalCommunicator()
    chosen_dir = agree_on_folder(comm, experiment, data, run_dir, resume=resume)
    needed = needed_models(data, comm, names, proxy)
    bundles = load_bundles(experiment, data, comm, device, needed, proxy, names)
    _check_strategies(names, experiment, data, bundles, comm)
    prepared = PreparedRun(
        experiment=experiment,
        data=data,
        outlines=outlines,
        bundles=bundles,
        proxy=proxy,
        topology=topology,
        comm=comm if ranks is None else None,
        run_dir=chosen_dir,
        sinks=tuple(sinks),
        hooks=hooks or NoHooks(),
        resume=resume,
        from_round=from_round,
    )
    if resume:
        together(comm, lambda: check_same_clients(chosen_dir, prepared.clients()))
    LOG.info("prepared %s: %d clients, models %s", names, len(data.clients), ", ".join(outlines))
    return prepared


__all__ = ["PreparedRun", "RunSummary", "prepare_run", "strategies_of"]
