"""When the samples of a client's tasks arrive, as a run folder says it."""

from __future__ import annotations

from fedml_plugin_fedmosaic.config.sections import DataConfig, Experiment, TrainArgs
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample, TaskSpec
from fedml_plugin_fedmosaic.data.scenario import DUMMY
from fedml_plugin_fedmosaic.runtime.folder import schedule_of

TASKS = tuple(TaskSpec(dataset=name, subset_id=0) for name in ("a", "b", "c"))


def federation(sizes: tuple[int, ...], tasks: tuple[TaskSpec, ...] = TASKS) -> FederatedData:
    train = tuple(
        tuple(
            Sample(sample_id=str(number), task=task.name, turns=("?", "!"))
            for number in range(size)
        )
        for task, size in zip(tasks, sizes, strict=True)
    )
    client = ClientData(client_id=0, model_id="m", tasks=tasks, train=train)
    return FederatedData(name="d", clients=(client,), test={}, tasks={})


def experiment(rounds: int, **data: object) -> Experiment:
    return Experiment(train=TrainArgs(comm_round=rounds), data=DataConfig(**data))


def test_tasks_arrive_one_after_the_other() -> None:
    found = schedule_of(experiment(6), federation((8, 8, 8)))
    assert found == {"0": [[0, 1], [2, 3], [4, 5]]}


def test_a_round_may_hold_the_end_of_one_task_and_the_begin_of_the_next() -> None:
    found = schedule_of(experiment(2), federation((8, 8, 8)))
    assert found == {"0": [[0, 0], [0, 1], [1, 1]]}


def test_static_data_arrive_all_the_time() -> None:
    found = schedule_of(experiment(3, split="static"), federation((30, 30, 30)))
    assert found == {"0": [[0, 2], [0, 2], [0, 2]]}


def test_a_time_slot_without_data_has_no_rounds() -> None:
    tasks = (TASKS[0], TaskSpec(dataset=DUMMY, subset_id=0), TASKS[2])
    data = federation((8, 0, 8), tasks)
    found = schedule_of(experiment(2, rounds_per_task=0.67), data)
    assert found["0"][1] is None
