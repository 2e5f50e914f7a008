from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.config.shift import ShiftConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample, TaskSpec
from fedml_plugin_fedmosaic.data.shifts import (
    Window,
    arrivals,
    check_shift,
    group_of,
    label_of,
)

ANSWERS = ("Cat", "dog", "Bird ")
WARDS = ("north", "south")


def _samples(task: str, count: int) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            sample_id=str(index),
            task=task,
            turns=("which ?", ANSWERS[index % 3]),
            images=(Path(WARDS[index % 2]) / f"{index}.png",),
            attributes=(("year", 2000 + 7 * index % 30), ("ward", WARDS[index // 2 % 2])),
        )
        for index in range(count)
    )


def _client(client_id: int = 0, sizes: tuple[int, ...] = (24, 36, 12)) -> ClientData:
    tasks = tuple(TaskSpec(dataset=f"T{place}", subset_id=0) for place in range(len(sizes)))
    return ClientData(
        client_id=client_id,
        model_id="m",
        tasks=tasks,
        train=tuple(_samples(task.name, size) for task, size in zip(tasks, sizes, strict=True)),
    )


def _play(
    client: ClientData | None = None, rounds: int = 6, split: str = "dynamic", **options: Any
) -> tuple[tuple[tuple[int, int], ...], ...]:
    return arrivals(
        client or _client(),
        num_rounds=rounds,
        data=DataConfig(split=split),
        shift=ShiftConfig(**options),
        seed=4,
    )


def _tasks(rounds: tuple[tuple[tuple[int, int], ...], ...]) -> list[dict[int, int]]:
    return [dict(sorted(Counter(task for task, _ in items).items())) for items in rounds]


def _answers(client: ClientData, items: tuple[tuple[int, int], ...]) -> Counter[str]:
    return Counter(label_of(client.train[task][place]) for task, place in items)


def test_a_window_delivers_at_a_constant_rate() -> None:
    window = Window(Fraction(3, 2), Fraction(4))
    assert window.counts(10, 6) == [0, 2, 4, 4, 0, 0]
    assert Window(Fraction(0), Fraction(3)).counts(7, 3) == [2, 2, 3]
    assert Window(Fraction(4), Fraction(8)).counts(8, 6) == [0, 0, 0, 0, 2, 2]


def test_what_is_held_back_comes_in_what_is_left_of_the_window() -> None:
    window = Window(Fraction(1), Fraction(4))
    assert window.not_before(Fraction(0), 6) == window
    assert window.not_before(Fraction(2), 6) == Window(Fraction(2), Fraction(4))
    assert window.not_before(Fraction(4), 6) == Window(Fraction(4), Fraction(6))
    assert window.not_before(Fraction(6), 6) is None


ANY = st.fixed_dictionaries(
    {},
    optional={
        "label_alpha": st.floats(0.05, 10),
        "group_alpha": st.floats(0.05, 10),
        "task_order": st.sampled_from(["scenario", "rotated", "shuffled"]),
        "overlap": st.floats(0, 2),
    },
)


@settings(max_examples=25, deadline=None)
@given(ANY, st.sampled_from(["dynamic", "static"]), st.integers(3, 9), st.integers(0, 3))
def test_every_sample_arrives_once_whatever_shifts(
    options: dict[str, Any], split: str, rounds: int, client: int
) -> None:
    data = _client(client)
    shares = _play(data, rounds, split, **options)
    assert len(shares) == rounds
    flat = [item for items in shares for item in items]
    assert sorted(flat) == [(t, p) for t, size in enumerate((24, 36, 12)) for p in range(size)]
    assert shares == _play(data, rounds, split, **options)


def test_tasks_follow_the_scenario_are_rotated_or_overlap() -> None:
    a, b, c = {0: 12}, {1: 18}, {2: 6}
    assert _tasks(_play(label_alpha=1e3)) == [a, a, b, b, c, c]
    assert _tasks(_play(_client(1), task_order="rotated")) == [b, b, c, c, a, a]
    a, b = {0: 8}, {1: 12}
    assert _tasks(_play(overlap=0.5)) == [a, a, a | b, b, b | c, c]


def test_tasks_are_shuffled_per_client() -> None:
    firsts = {
        next(iter(_tasks(_play(_client(client), task_order="shuffled"))[0])) for client in range(12)
    }
    assert firsts == {0, 1, 2}


def test_a_task_has_the_rounds_that_it_is_given() -> None:
    shares = _tasks(_play(split="static", windows={"T1-0": (3, 4)}))
    assert [share.get(1, 0) for share in shares] == [0, 0, 18, 18, 0, 0]
    assert [share.get(0, 0) for share in shares] == [4] * 6


def test_labels_come_in_few_rounds_when_alpha_is_small() -> None:
    client = _client(sizes=(900,))
    uneven, even = (
        [_answers(client, items) for items in _play(client, 5, label_alpha=alpha)]
        for alpha in (0.05, 1e4)
    )
    assert [sum(counts.values()) for counts in uneven] == [180] * 5
    # With equal shares each answer has 60 of the 180 samples of a round, give or take 7.
    assert all(30 < count < 90 for counts in even for count in counts.values())
    assert sum(max(counts.values()) > 120 for counts in uneven) >= 3


def test_groups_shift_by_folder_or_by_field() -> None:
    client = _client(sizes=(400,))
    for field in (None, "ward"):
        shares = _play(client, 4, group_alpha=0.05, group_field=field)
        shares_of_north = [
            sum(group_of(client.train[t][p], field) == "north" for t, p in items) / len(items)
            for items in shares
        ]
        assert max(shares_of_north) - min(shares_of_north) > 0.5


def test_samples_follow_a_time_field() -> None:
    client = _client(sizes=(60,))
    years = [
        [dict(client.train[t][p].attributes)["year"] for t, p in items]
        for items in _play(client, 4, time_field="year")
    ]
    flat = [year for share in years for year in share]
    assert flat == sorted(flat)
    assert flat != sorted(flat, reverse=True)


@pytest.mark.parametrize(
    ("novel", "field"), [("label:  cat", None), ("task:T0-0", None), ("group:south", "ward")]
)
def test_what_is_new_reaches_one_client_after_the_other(novel: str, field: str | None) -> None:
    firsts = []
    for client_id in range(4):
        client = _client(client_id)
        shares = _play(
            client, 6, "static", novel=novel, novel_round=2, novel_lag=1.5, group_field=field
        )
        kind, _, value = novel.partition(":")
        found = [
            index
            for index, items in enumerate(shares)
            for task, place in items
            if {
                "label": label_of(client.train[task][place]),
                "task": client.train[task][place].task,
                "group": group_of(client.train[task][place], field),
            }[kind]
            == value.strip()
        ]
        firsts.append(min(found, default=None))
        assert len(found) == 72 // {"label": 3, "task": 3, "group": 2}[kind]
    # Released at rounds 1, 2.5, 4 and 5.5, counted from 0.
    assert firsts == [1, 2, 4, 5]


def test_what_is_released_after_the_last_round_never_comes() -> None:
    client = _client(3)
    shares = _play(client, 6, "static", novel="label:dog", novel_round=4, novel_lag=1.0)
    assert "dog" not in _answers(client, tuple(item for items in shares for item in items))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(DataError, match=r"no field 'month'.*its fields: year, ward"):
        _play(time_field="month")
    bare = replace(
        _client(), train=((replace(_samples("T0-0", 1)[0], images=()),),), tasks=_client().tasks[:1]
    )
    with pytest.raises(DataError, match="no image whose folder"):
        _play(bare, 1, group_alpha=0.5)


def test_names_are_checked_against_the_data() -> None:
    client = _client()
    data = FederatedData(
        name="s", clients=(client,), test={}, tasks={task.name: task for task in client.tasks}
    )
    check_shift(data, ShiftConfig(windows={"T1-0": (1, 2)}, novel="label:CAT"), 4)
    for options, text in (
        ({"windows": {"T9-0": (1, 2)}}, r"\['T9-0'\]"),
        ({"windows": {"T1-0": (5, 6)}}, "after the last round, 4"),
        ({"present": {"7": ((1, 2),)}}, r"clients \[7\]"),
        ({"novel": "label:cow"}, "no training sample"),
    ):
        with pytest.raises(DataError, match=text):
            check_shift(data, ShiftConfig(**options), 4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"time_field": "year", "label_alpha": 1.0}, "time_field fixes the order"),
        ({"windows": {"T": (3, 2)}}, "first <= last"),
        ({"present": {"0": ((3, 2),)}}, "present of client 0"),
        ({"present": {"two": ((1, 2),)}}, "expected an id"),
        ({"novel": "colour:red"}, "task:NAME, label:ANSWER or group:NAME"),
        ({"novel": "label:"}, "task:NAME"),
        ({"label_alpha": 0.0}, "greater than 0"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        ShiftConfig(**options)


def test_nothing_moves_by_default() -> None:
    assert not ShiftConfig().moves_data
    assert not ShiftConfig().moves_clients
