from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import text_samples

from fedml_plugin_fedmosaic.config.sections import CommonArgs, DataConfig, Experiment, TrainArgs
from fedml_plugin_fedmosaic.config.shift import ShiftConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, TaskSpec
from fedml_plugin_fedmosaic.runtime.arrivals import Arrivals
from fedml_plugin_fedmosaic.runtime.attendance import Attendance, schedule_table
from fedml_plugin_fedmosaic.runtime.supply import balanced_batches


def _data(clients: int = 3) -> FederatedData:
    task = TaskSpec(dataset="words", subset_id=0)
    return FederatedData(
        name="words",
        clients=tuple(
            ClientData(client_id=i, model_id="m", tasks=(task,), train=(text_samples(12),))
            for i in range(clients)
        ),
        test={},
        tasks={task.name: task},
    )


def _experiment(rounds: int = 4, stream: str = "memory", **shift: object) -> Experiment:
    return Experiment(
        common=CommonArgs(random_seed=3),
        train=TrainArgs(comm_round=rounds),
        data=DataConfig(stream=stream),
        shift=ShiftConfig(**shift),
    )


def test_without_a_shift_the_strategy_chooses() -> None:
    attendance = Attendance(_experiment(), _data())
    assert attendance.cohort((0, 2), 1) == (0, 2)
    assert attendance.present(3) == (0, 1, 2)


def test_who_is_away_is_never_selected() -> None:
    attendance = Attendance(_experiment(present={"1": ((3, 4),), "2": ((1, 2),)}), _data())
    assert [attendance.present(index) for index in range(4)] == [(0, 2), (0, 2), (0, 1), (0, 1)]
    assert attendance.cohort((0, 1, 2), 0) == (0, 2)
    assert attendance.cohort((1,), 0) in ((0,), (2,))
    assert attendance.cohort((2,), 3) in ((0,), (1,))


def test_samples_of_absent_rounds_wait_for_the_client() -> None:
    data, experiment = _data(), _experiment(rounds=4, label_alpha=0.5)
    shares = Arrivals(data.clients[0], experiment).shares(4)
    stream = Arrivals(data.clients[0], replace(experiment, data=DataConfig(stream="stream_only")))
    stream.batches(0, 1)
    late = stream.batches(3, 9 // 4 + 1)  # it was away in rounds 2 and 3
    waited = [item for share in shares[1:] for item in share]
    assert len(waited) == 9
    expected = [data.clients[0].train[0][int(item.split("/")[1])] for item in waited]
    assert [sample for batch in late for sample in batch][:9] == expected


def test_a_client_without_data_joins_when_its_first_sample_arrives() -> None:
    experiment = _experiment(rounds=5, windows={"words-0": (3, 4)}, present={"0": ((1, 5),)})
    with pytest.raises(DataError, match="round 1: 0 clients are there"):
        Attendance(experiment, _data())
    other = TaskSpec(dataset="more", subset_id=0)
    data = _data()
    data = replace(
        data,
        clients=(
            replace(
                data.clients[0],
                tasks=(*data.clients[0].tasks, other),
                train=(*data.clients[0].train, text_samples(20, "more-0")),
            ),
            *data.clients[1:],
        ),
        tasks={**data.tasks, "more-0": other},
    )
    experiment = replace(
        experiment, shift=ShiftConfig(windows={"words-0": (3, 4), "more-0": (1, 5)})
    )
    attendance = Attendance(experiment, data)
    assert [attendance.present(i) for i in range(5)] == [(0,), (0,), *[(0, 1, 2)] * 3]
    # In round 5 nothing arrives for clients 1 and 2: their batches come from memory.
    arrivals = Arrivals(data.clients[1], experiment)
    assert [len(share) for share in arrivals.shares(5)] == [0, 0, 6, 6, 0]
    arrivals.batches(2, 2)
    assert len(arrivals.batches(4, 2)) == 2


def test_a_stream_without_memory_needs_samples_in_every_round() -> None:
    with pytest.raises(DataError, match="no sample arrives in round 3, 4"):
        Arrivals(_data().clients[0], _experiment(stream="stream_only", windows={"words-0": (1, 2)}))


def test_the_schedule_is_a_table() -> None:
    table = schedule_table(
        _experiment(present={"1": ((2, 2),)}, windows={"words-0": (1, 3)}), _data(2)
    )
    assert table.columns == ("client", "round 1", "round 2", "round 3", "round 4")
    assert table.rows == (
        ("0", "0:4", "0:4", "0:4", "-"),
        ("1", "away 0:4", "0:4", "away 0:4", "away -"),
    )
    assert "client 0: 0 = words-0" in table.notes


def test_fields_of_the_samples_are_read(tmp_path: Path) -> None:
    from tiny_world import write_world

    from fedml_plugin_fedmosaic.data.drake import load_drake

    write_world(tmp_path)
    data = load_drake(DataConfig(source="drake", root=str(tmp_path / "data"), scenario="tiny"))
    assert data.clients[0].train[0][0].attributes == ()
    path = tmp_path / "data/dataset/Pets0/train/dataset-0.json"
    path.write_text(path.read_text().replace('"id": "0"', '"id": "0", "year": 1999, "tags": []'))
    data = load_drake(DataConfig(source="drake", root=str(tmp_path / "data"), scenario="tiny"))
    assert data.clients[0].train[0][0].attributes == (("year", 1999),)


def test_the_balanced_stream_draws_rare_answers_as_often_as_frequent_ones() -> None:
    data = _data(1)
    samples = tuple(
        replace(sample, turns=(sample.prompt, "rare" if index < 2 else "frequent"))
        for index, sample in enumerate(data.clients[0].train[0])
    )
    client = replace(data.clients[0], train=(samples,))
    drawn = {
        stream: Counter(
            sample.answer
            for batch in Arrivals(client, _experiment(1, stream)).batches(0, 24)
            for sample in batch
        )
        for stream in ("memory", "balanced")
    }
    assert drawn["memory"]["rare"] < drawn["memory"]["frequent"] / 3
    half = sum(drawn["balanced"].values()) / 2
    # Only one of the two answers may have arrived at first.
    assert drawn["balanced"]["rare"] > half / 2
    again = balanced_batches(samples, 30, 4, 0, "again")
    assert Counter(sample.answer for batch in again for sample in batch)["rare"] in range(56, 65)
