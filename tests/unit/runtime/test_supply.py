from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import text_samples

from fedml_plugin_fedmosaic.config.sections import DataConfig, Experiment, OptimConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.types import Branch, View
from fedml_plugin_fedmosaic.core.work import (
    Distillation,
    ModelRef,
    Objective,
    Pass,
    Probe,
    ProbeResult,
    Proximal,
    Samples,
)
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, TaskSpec
from fedml_plugin_fedmosaic.runtime.supply import (
    one_epoch,
    set_aside,
    shuffled_batches,
    with_public,
)
from fedml_plugin_fedmosaic.runtime.worktree import (
    result_from_tree,
    result_tree,
    work_from_tree,
    work_tree,
)


def client(client_id: int, *counts: int) -> ClientData:
    tasks = tuple(TaskSpec(dataset="words", subset_id=index) for index in range(len(counts)))
    train = tuple(
        tuple(
            replace(sample, sample_id=f"{client_id}-{sample.sample_id}")
            for sample in text_samples(count, task.name)
        )
        for task, count in zip(tasks, counts, strict=True)
    )
    return ClientData(client_id=client_id, model_id="m", tasks=tasks, train=train)


def test_a_share_of_every_task_is_set_aside() -> None:
    whole = client(0, 10, 2, 1)
    rest, taken = set_aside(whole, 0.3, 7, "held out")
    assert [len(samples) for samples in rest.train] == [7, 1, 1]
    assert sorted(sample.task for sample in taken) == ["words-0"] * 3 + ["words-1"]
    kept = [sample.key for samples in rest.train for sample in samples]
    assert sorted([*kept, *(s.key for s in taken)]) == sorted(
        s.key for samples in whole.train for s in samples
    )
    assert set_aside(whole, 0.3, 7, "held out") == (rest, taken)
    assert set_aside(whole, 0.3, 8, "held out")[1] != taken


def experiment(**data: object) -> Experiment:
    optim = OptimConfig(num_steps=10, batch_size=2)
    return Experiment(data=DataConfig(**data), optim=optim)


def federated(*clients: ClientData) -> FederatedData:
    tasks = {task.name: task for one in clients for task in one.tasks}
    return FederatedData(name="words", clients=clients, test={}, tasks=tasks)


def test_public_samples_are_nobodys_training_samples() -> None:
    data = federated(client(0, 20, 20), client(1, 20))
    rest, public = with_public(experiment(), data)
    # A fifth of 10 steps of 2 samples.
    assert len(public) == 4
    trained = {s.key for one in rest.clients for samples in one.train for s in samples}
    assert not trained & {sample.key for sample in public}
    assert with_public(experiment(), data) == (rest, public)
    assert len(with_public(experiment(public_samples=100), data)[1]) == 6


def test_without_enough_samples_nothing_can_be_public() -> None:
    with pytest.raises(DataError, match="there are none"):
        with_public(experiment(), federated(client(0, 1)))


def test_batches_go_through_all_samples_before_any_comes_again() -> None:
    samples = text_samples(5)
    batches = shuffled_batches(samples, 4, 3, 0, "here")
    flat = [sample.sample_id for batch in batches for sample in batch]
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    assert sorted(flat[:5]) == sorted(flat[5:10]) == sorted(s.sample_id for s in samples)
    assert shuffled_batches(samples, 4, 3, 0, "there") != batches
    assert sum(map(len, one_epoch(samples, 2, 0, "e"))) == 5


WORK = (
    Pass(
        name="all of it",
        view=View.SUM,
        train=frozenset({Branch.LOCAL, Branch.GLOBAL}),
        num_steps=3,
        lr_scale=0.5,
        task_weight=0.25,
        proximal=(Proximal(weight=0.1, anchor="a", anchor_branch=Branch.LOCAL),),
        distil=(
            Distillation(weight=2.0, temperature=3.0, teachers=(ModelRef(overlay=("t",)),)),
            Distillation(weight=1.0, targets="received", kind="soft_ce"),
        ),
        overlay=("x", "y"),
        into="x",
        also=(Objective(view=View.GATED, train=frozenset({Branch.SHARED}), overlay=("z",)),),
        route={"words-0": "r"},
        samples=Samples.REPLAY,
        salt="s",
        first_step=1,
    ),
    Pass(name="plain", view=View.LOCAL, train=frozenset({Branch.LOCAL}), num_steps=1),
    Probe(
        name="look",
        models={"own": ModelRef(), "other": ModelRef(overlay=("t",), view=View.GLOBAL)},
        samples=Samples.PUBLIC,
        limit=4,
        what="logits",
    ),
)


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.name)
def test_unfinished_work_survives_a_checkpoint(work: Pass | Probe) -> None:
    import json

    assert work_from_tree(json.loads(json.dumps(work_tree(work)))) == work


def test_results_survive_a_checkpoint() -> None:
    seen = ProbeResult(
        losses={"own": {"words-0": 0.5}}, counts={"words-0": 2}, labels={"k": (1, 2)}, flops=3.0
    )
    assert result_from_tree(result_tree(seen)) == seen
