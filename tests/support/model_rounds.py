"""A strategy's rounds with real tiny models and in-memory samples: no files, no loop, no report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import save_text_model
from torch import Tensor

from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.config.sections import (
    AdapterConfig,
    CommonArgs,
    DataConfig,
    EvalConfig,
    Experiment,
    ModelSpec,
    OptimConfig,
    TrainArgs,
)
from fedml_plugin_fedmosaic.core.types import ClientState, ClientUpdate, MixingPlan, UpdateHeader
from fedml_plugin_fedmosaic.core.work import Pass, Probe, Result, Work
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample, TaskSpec
from fedml_plugin_fedmosaic.engine.models import ModelBundle, load_model
from fedml_plugin_fedmosaic.runtime.client import ClientRunner, EnginePool, build_clients
from fedml_plugin_fedmosaic.runtime.setup import build_strategy

SHAPES: Mapping[str, tuple[str, int, int]] = {"small": ("llama", 16, 2), "large": ("qwen2", 32, 4)}
"""Model -> family, hidden size, decoder layers."""
ANIMALS = ("cat", "dog", "bird", "fish")
TRAIN = "train"


def load_bundles(folder: Path) -> dict[str, ModelBundle]:
    """The tiny models of ``SHAPES``."""
    bundles = {}
    for name, (family, hidden, layers) in SHAPES.items():
        path = save_text_model(folder / name, family, hidden=hidden, layers=layers)
        bundles[name] = load_model(name, ModelSpec(path=str(path)), torch.device("cpu"))
    return bundles


def questions(task: TaskSpec, count: int, client: int = 0) -> tuple[Sample, ...]:
    """Questions whose answers depend on the task's subset and the client."""
    return tuple(
        Sample(
            sample_id=f"{client}-{index}",
            task=task.name,
            turns=(
                f"which {ANIMALS[index % 4]} is this ? choose from Choice list:[cat, dog, fish].",
                ANIMALS[(index + task.subset_id + client) % 4],
            ),
        )
        for index in range(count)
    )


@dataclass(frozen=True, kw_only=True)
class Member:
    """One client: its model and the number of its samples of each ``<dataset>-<subset>``."""

    model: str = "small"
    dataset: str = "words"
    samples: Mapping[int, int] = field(default_factory=lambda: {0: 8, 1: 8})

    def data(self, client_id: int) -> ClientData:
        tasks = tuple(TaskSpec(dataset=self.dataset, subset_id=subset) for subset in self.samples)
        return ClientData(
            client_id=client_id,
            model_id=self.model,
            tasks=tasks,
            train=tuple(
                questions(task, count, client_id)
                for task, count in zip(tasks, self.samples.values(), strict=True)
            ),
        )


Watch = Callable[[ClientRunner, Work], None]


class ModelRounds:
    """Plays rounds as the runtime does.

    Args:
        name: strategy.
        options: its options.
        bundles: of :func:`load_bundles`; free again after :meth:`close`.
        members: one per client.
        num_rounds: of the run.
        optim: changes of the training options.
        watch: called before each piece of work.

    Attributes:
        clients: runners by id.
        plan: of the last round.
        downlinks: what every client received last.
        uploads: what every client sent last.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        bundles: Mapping[str, ModelBundle],
        members: Sequence[Member],
        *,
        num_rounds: int = 3,
        optim: Mapping[str, Any] | None = None,
        watch: Watch | None = None,
    ) -> None:
        training = {"num_steps": 4, "batch_size": 2, "learning_rate": 1e-2, **(optim or {})}
        self.experiment = Experiment(
            common=CommonArgs(random_seed=1),
            train=TrainArgs(federated_optimizer=name, comm_round=num_rounds),
            data=DataConfig(split="static"),
            adapter=AdapterConfig(
                rank=2, alpha=4, dropout=0.0, num_blocks=2, target_modules=("q_proj", "v_proj")
            ),
            optim=OptimConfig(**training),
            evaluation=EvalConfig(batch_size=4, max_new_tokens=2),
            strategy=dict(options),
        )
        clients = tuple(member.data(index) for index, member in enumerate(members))
        tasks = {task.name: task for client in clients for task in client.tasks}
        self.data = FederatedData(
            name="words",
            clients=clients,
            test={name: questions(task, 4) for name, task in tasks.items()},
            tasks=tasks,
        )
        self.strategy: Any = build_strategy(name, self.experiment)
        self.pool = EnginePool(self.experiment, bundles, self.strategy.adapter)
        ids = [client.client_id for client in clients]
        self.clients = build_clients(self.experiment, self.data, self.pool, self.strategy, ids)
        self.state = self.strategy.init([c.manifest for c in self.clients.values()], seed=1)
        self.comm = LocalCommunicator()
        self.watch = watch
        self.round_idx = 0
        self.plan = MixingPlan()
        self.headers: tuple[UpdateHeader, ...] = ()
        self.downlinks: dict[int, Mapping[str, Tensor]] = {}
        self.uploads: dict[int, Mapping[str, Tensor]] = {}

    def __enter__(self) -> ModelRounds:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.pool.close()

    def states(self) -> dict[int, ClientState]:
        return {client_id: client.state for client_id, client in self.clients.items()}

    def work(self, client: ClientRunner, work: Work) -> Result:
        """Does one piece of work."""
        if self.watch is not None:
            self.watch(client, work)
        if isinstance(work, Probe):
            return client.look(work, self.round_idx)
        assert isinstance(work, Pass)
        return client.fit(work, self.round_idx, lambda *_: None)

    def train(self, client_id: int, stage: str = TRAIN) -> ClientUpdate:
        """One client's part of a stage."""
        client = self.clients[client_id]
        works = client.prepare(self.downlinks.get(client_id, {}), self.round_idx, stage)
        while works:
            results = {work.name: self.work(client, work) for work in works}
            works = client.advance(results, self.round_idx, stage)
        return client.finish(self.round_idx, stage)

    def play(self, *cohort: int) -> ModelRounds:
        """One round of some clients; of all without any."""
        updates = [self.train(client_id) for client_id in cohort or tuple(self.clients)]
        self.headers = self.comm.exchange_headers([update.header for update in updates])
        self.uploads |= {update.header.client_id: update.tensors for update in updates}
        self.state, self.plan = self.strategy.plan(self.state, self.headers)
        self.downlinks.update(self.comm.execute(self.plan, self.uploads))
        self.round_idx += 1
        return self

    def finalize(self) -> ModelRounds:
        """The stages after the last round, for all clients."""
        self.round_idx = self.experiment.train.comm_round
        for stage in self.strategy.final_stages:
            for client_id in self.strategy.select_stage(
                self.state, stage, self.round_idx, tuple(self.clients)
            ):
                update = self.train(client_id, stage)
                assert not update.tensors
        return self

    def restart(self, client_id: int, state: ClientState) -> None:
        """The client in a new process that has read a saved state."""
        old = self.clients[client_id]
        fresh = build_clients(self.experiment, self.data, self.pool, self.strategy, [client_id])
        self.clients[client_id] = fresh[client_id]
        assert fresh[client_id] is not old
        if "arrivals" in state.extra:
            fresh[client_id].adopt(state)
        else:
            fresh[client_id].go_on(replace(state))
