"""Self and Others: scoring clients' models on their own and on the others' tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from fedml_plugin_fedmosaic.config.sections import AdapterConfig, Experiment
from fedml_plugin_fedmosaic.core.events import Evaluated, EvaluationProgress, EventSink
from fedml_plugin_fedmosaic.core.types import AdapterState, View
from fedml_plugin_fedmosaic.data.base import FederatedData, Sample
from fedml_plugin_fedmosaic.engine.base import Score, ShouldStop
from fedml_plugin_fedmosaic.engine.factory import make_engine
from fedml_plugin_fedmosaic.engine.mixers import make_mixer
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.runtime.client import ClientRunner, laid_over
from fedml_plugin_fedmosaic.runtime.faults import Attempt, naming
from fedml_plugin_fedmosaic.runtime.journal import ScoreKey
from fedml_plugin_fedmosaic.runtime.shortage import EVALUATE, Needs, evaluation_memory
from fedml_plugin_fedmosaic.runtime.signals import never
from fedml_plugin_fedmosaic.strategies.base import Strategy

BASE = "base"


def _test_samples(
    experiment: Experiment, data: FederatedData, task: str, *, final: bool, own: bool = True
) -> Sequence[Sample]:
    config = experiment.evaluation
    if not final:
        return data.test[task][: config.round_samples]
    return data.test[task] if own else data.test[task][: config.others_samples]


def _scored(data: FederatedData, tasks: Sequence[str]) -> list[str]:
    """The tasks that have a test set; time slots without data have none."""
    return [task for task in tasks if task in data.tasks]


def _scope(task: str, own: Sequence[str]) -> Literal["self", "others"]:
    return "self" if task in own else "others"


def evaluate_base(
    experiment: Experiment,
    data: FederatedData,
    bundles: Mapping[str, ModelBundle],
    owned: Sequence[int],
    sink: EventSink,
    known: Collection[ScoreKey] = (),
    should_stop: ShouldStop = never,
) -> bool:
    """Scores the untouched base models, once per model and task, for every owned client.

    Args:
        experiment: the run.
        data: its data.
        bundles: base models by name.
        owned: clients of this rank.
        sink: takes the scores.
        known: scores that an earlier life of the run has reported.
        should_stop: asked before each task.

    Returns:
        Whether all is done; False if it was stopped.
    """
    clients = [client for client in data.clients if client.client_id in owned]
    others = experiment.evaluation.others
    jobs = [
        (client, task)
        for client in clients
        for task in (data.tasks if others else _scored(data, [own.name for own in client.tasks]))
        if (BASE, -1, client.client_id, str(View.BASE), task, True) not in known
    ]
    wanted = {(client.model_id, task) for client, task in jobs}
    scores: dict[tuple[str, str], Score] = {}
    for model in sorted({model for model, _ in wanted}):
        # A minimal adapter structure: the view "base" switches it off.
        engine = make_engine(
            bundles[model],
            AdapterConfig(rank=1, num_blocks=1),
            "lora",
            experiment.optim,
            experiment.evaluation,
            experiment.engine,
            seed=0,
        )
        try:
            for task in sorted(task for name, task in wanted if name == model):
                if should_stop():
                    return False
                samples = _test_samples(experiment, data, task, final=True)
                with evaluation_memory(experiment, model):
                    scores[model, task] = engine.evaluate(
                        None, View.BASE, samples, data.tasks[task]
                    )
                sink(
                    EvaluationProgress(strategy=BASE, done=len(scores), total=len(wanted)),
                )
        finally:
            engine.close()
    for client, task in jobs:
        score = scores[client.model_id, task]
        sink(
            Evaluated(
                strategy=BASE,
                round_idx=-1,
                client_id=client.client_id,
                view=View.BASE,
                scope=_scope(task, [own.name for own in client.tasks]),
                task=task,
                metric=score.metric,
                value=score.value,
                num_samples=score.num_samples,
                final=True,
            )
        )
    return True


def evaluate_clients(
    *,
    strategy: Strategy,
    experiment: Experiment,
    data: FederatedData,
    clients: Mapping[int, ClientRunner],
    round_idx: int,
    final: bool,
    sink: EventSink,
    needs: Needs | None = None,
    known: Collection[ScoreKey] = (),
    should_stop: ShouldStop = never,
) -> bool:
    """Scores the clients' present models.

    Between rounds: own tasks, the strategy's own view, ``round_samples`` samples. After the last
    round: all samples, also ``others_samples`` of each of the others' tasks, and the further views
    that the configuration asks for. Scores that are ``known`` are left out.

    Returns:
        Whether all is done; False if ``should_stop`` said so before a task.

    Raises:
        ClientFailure: stage "evaluate": a client's evaluation failed, e.g. for lack of memory.
    """
    views = [strategy.eval_view]
    if final:
        wanted = (*strategy.final_views, *experiment.evaluation.views)
        views += [view for view in dict.fromkeys(wanted) if view not in views]
    jobs: list[tuple[ClientRunner, str, str]] = []
    for client in clients.values():
        own = _scored(data, client.manifest.tasks)
        tasks = list(data.tasks) if final and experiment.evaluation.others else own
        where = (strategy.name, round_idx, client.manifest.client_id)
        jobs += [
            (client, view, task)
            for view in views
            for task in tasks
            if (*where, str(view), task, final) not in known
        ]
    last: ClientRunner | None = None
    overlay: tuple[str, ...] = ()
    adapter: AdapterState = {}
    for done, (client, view, task) in enumerate(jobs, start=1):
        if should_stop():
            return False
        is_own = task in client.manifest.tasks
        samples = _test_samples(experiment, data, task, final=final, own=is_own)
        served = client.serve(view, task)
        if served.model.overlay != overlay or client is not last or not overlay:
            adapter = laid_over(client.state, served.model.overlay)
        last, overlay = client, served.model.overlay
        with naming(Attempt(client.client_id, round_idx, EVALUATE, needs)):
            score = client.engine.evaluate(
                adapter,
                served.model.view,
                samples,
                data.tasks[task],
                mixer=make_mixer(served.mixer, served.tensors, served.options),
            )
        sink(
            Evaluated(
                strategy=strategy.name,
                round_idx=round_idx,
                client_id=client.manifest.client_id,
                view=view,
                scope=_scope(task, client.manifest.tasks),
                task=task,
                metric=score.metric,
                value=score.value,
                num_samples=score.num_samples,
                final=final,
            )
        )
        sink(EvaluationProgress(strategy=strategy.name, done=done, total=len(jobs)))
    return True
