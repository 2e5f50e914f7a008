"""Unseen tasks: what a federation's adapters are worth to a client that has just joined.

A new client starts from the aggregated adapters of a finished run and makes a few optimizer steps
on a task that no client has had; the same steps from fresh adapters are what it could do alone. The
protocol follows FedMosaic (arXiv 2506.11024), which adapts the aggregated adapters to unseen tasks;
score before the first step is zero-shot, and it is also found by the likelihood of the choices,
because a model that has never seen an answer's form may know the answer and not say it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.core.registry import DATASETS
from fedml_plugin_fedmosaic.core.rng import derive_seed
from fedml_plugin_fedmosaic.core.types import AdapterState, View
from fedml_plugin_fedmosaic.data.base import FederatedData, Sample, TaskSpec
from fedml_plugin_fedmosaic.engine.models import ModelBundle, load_model
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.runtime.client import EnginePool
from fedml_plugin_fedmosaic.runtime.newcomer import (
    Donor,
    adapt,
    aggregated_adapter,
    check_updates,
    training_batches,
)
from fedml_plugin_fedmosaic.runtime.setup import build_strategy, choose_device
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore
from fedml_plugin_fedmosaic.runtime.treefile import write_atomic

ADAPTATION_FILE = "adaptation.json"
UPDATES = (0, 5, 10, 20, 50)
"""Optimizer steps after which a new client is scored."""
AGGREGATED, FRESH = "aggregated", "fresh"
_VERSION = 1

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """How a new client does on one task.

    Attributes:
        task: its name.
        model: the new client's model.
        metric: of the scores.
        num_samples: test samples.
        scores: start -> optimizer steps -> score in [0, 1].
        likelihood: start -> score before the first step by the likelihood of the choices; equal to
            the other score on open-ended tasks.
    """

    task: str
    model: str
    metric: str
    num_samples: int
    scores: Mapping[str, Mapping[int, float]]
    likelihood: Mapping[str, float] = field(default_factory=dict)


def adapt_run(
    run_dir: Path,
    scenario: str,
    *,
    strategy: str | None = None,
    model: str | None = None,
    updates: Sequence[int] = UPDATES,
    max_test_samples: int | None = None,
    say: Say = str,
) -> list[Adaptation]:
    """Adapts a finished run's adapters to the tasks of another scenario.

    Args:
        run_dir: a run folder with a checkpoint.
        scenario: name or path of a scenario of the same data set; its clients are new ones.
        strategy: of the run; the main one by default.
        model: model of all new clients; the scenario's own by default.
        updates: optimizer steps after which to score.
        max_test_samples: test samples per task; the run's own limit when omitted.
        say: told about each task.

    Returns:
        One result per client and task of the scenario; also written to ``adaptation.json`` in the
        run folder, where it takes the place of an earlier one of that strategy and scenario.

    Raises:
        ConfigError: not a run folder, or a model that the run does not have.
        CheckpointError: no checkpoint, or no adapter fits.
        DataError: the scenario cannot be read, or a task has no samples.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.yaml")
    experiment = load_experiment(config)
    name = strategy or experiment.algo
    numbers = check_updates(updates)
    data = unseen_data(experiment, scenario, max_test_samples)
    jobs = [
        (client.client_id, place, model or client.model_id)
        for client in data.clients
        for place in range(len(client.tasks))
    ]
    check_models(experiment, {chosen for *_, chosen in jobs})
    donors = read_donors(run_dir, name)
    found: dict[tuple[int, int], Adaptation] = {}
    for chosen in sorted({job[2] for job in jobs}):
        bundle = load_model(chosen, experiment.models[chosen], choose_device(experiment, 1))
        mine = [(client, place) for client, place, other in jobs if other == chosen]
        adapter = build_strategy(name, experiment).adapter
        found |= _adapt_model(experiment, bundle, adapter, data, mine, donors, numbers, say)
    results = [found[client, place] for client, place, _ in jobs]
    _write(run_dir, name, scenario, experiment, numbers, results)
    return results


def unseen_data(
    experiment: Experiment, scenario: str, max_test_samples: int | None = None
) -> FederatedData:
    """The tasks of a scenario, with the data set and limits of a run.

    Raises:
        DataError: the scenario cannot be read.
    """
    config = replace(experiment.data, scenario=scenario)
    if max_test_samples is not None:
        config = replace(config, max_test_samples=max_test_samples)
    data: FederatedData = DATASETS[config.source](config)
    return data


def check_models(experiment: Experiment, names: Iterable[str]) -> None:
    """Whether the run's configuration has the models, on one rank each.

    Raises:
        ConfigError: it has not.
    """
    for name in sorted(names):
        if name not in experiment.models:
            raise ConfigError(
                f"the scenario's new clients have model {name!r}, which the run does not define; "
                f"it has: {', '.join(experiment.models)}",
                hint="name one of them with --model",
            )
        if experiment.models[name].sharded:
            raise ConfigError(f"model {name!r} is trained by several ranks; adaptation uses one")


def read_donors(run_dir: Path, strategy: str) -> list[Donor]:
    """The clients of a run that have trained, with their last adapters.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: the run folder has no ``clients.json``.
    """
    path = run_dir / "clients.json"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no clients.json")
    signatures = {item["client_id"]: item["signature"] for item in json.loads(path.read_text())}
    checkpoint = CheckpointStore(run_dir / "checkpoints" / strategy, keep_last=1).load()
    return [
        Donor(signature=signatures[client_id], adapter=state.adapter)
        for client_id, state in sorted(checkpoint.clients.items())
    ]


def _adapt_model(
    experiment: Experiment,
    bundle: ModelBundle,
    adapter: str,
    data: FederatedData,
    jobs: Sequence[tuple[int, int]],
    donors: Sequence[Donor],
    updates: Sequence[int],
    say: Say,
) -> dict[tuple[int, int], Adaptation]:
    """The jobs (client, task) of one model: trained and generated, then ranked by likelihood."""
    optim = replace(experiment.optim, schedule="constant")
    chosen = replace(experiment, optim=optim)
    ranked = replace(chosen, evaluation=replace(experiment.evaluation, mode="likelihood"))
    clients = {client.client_id: client for client in data.clients}
    name = bundle.info.name
    seed = experiment.common.random_seed
    size = optim.batch_size * optim.grad_accumulation
    found: dict[tuple[int, int], Adaptation] = {}
    for settings in (chosen, ranked):
        pool = EnginePool(settings, {name: bundle}, adapter)
        try:
            engine = pool.engine(name)
            fresh = engine.initial_adapter()
            aggregated = aggregated_adapter(fresh, engine.info.signature, donors)
            starts = {AGGREGATED: aggregated, FRESH: fresh}
            for client_id, place in jobs:
                task = clients[client_id].tasks[place]
                score = _scorer(engine, task, data.test[task.name])
                if settings is ranked:
                    zero = {start: score(state) for start, state in starts.items()}
                    found[client_id, place] = replace(found[client_id, place], likelihood=zero)
                    continue
                samples = clients[client_id].train[place]
                batches = training_batches(samples, max(updates), size, seed, task.name)
                dropout = derive_seed(seed, "adaptation", task.name)
                result = Adaptation(
                    task=task.name,
                    model=name,
                    metric=task.metric or ("accuracy" if task.kind == "multi-choice" else "RougeL"),
                    num_samples=len(data.test[task.name]),
                    scores={
                        start: adapt(engine, state, batches, updates, score, dropout)
                        for start, state in starts.items()
                    },
                )
                found[client_id, place] = result
                say(_sentence(result))
        finally:
            pool.close()
    return found


def _scorer(
    engine: TorchEngine, task: TaskSpec, samples: Sequence[Sample]
) -> Callable[[AdapterState], float]:
    return lambda adapter: engine.evaluate(adapter, View.LOCAL, samples, task).value


def _sentence(result: Adaptation) -> str:
    last = max(result.scores[FRESH])
    parts = [
        f"{start} {100 * line[min(line)]:.1f} % to {100 * line[last]:.1f} %"
        for start, line in result.scores.items()
    ]
    return f"{result.task}: {', '.join(parts)} after {last} updates"


def _write(
    run_dir: Path,
    strategy: str,
    scenario: str,
    experiment: Experiment,
    updates: Sequence[int],
    results: Sequence[Adaptation],
) -> None:
    path = run_dir / ADAPTATION_FILE
    runs: list[dict[str, Any]] = []
    if path.is_file():
        try:
            runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error}", hint="move it away") from error
    short = Path(scenario).stem if scenario.endswith(".json") else scenario
    kept = [run for run in runs if (run["strategy"], run["scenario"]) != (strategy, short)]
    kept.append(
        {
            "strategy": strategy,
            "scenario": short,
            "seed": experiment.common.random_seed,
            "updates": list(updates),
            "samples_per_update": experiment.optim.batch_size * experiment.optim.grad_accumulation,
            "tasks": [asdict(result) for result in results],
        }
    )
    record = {"version": _VERSION, "runs": kept}
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
