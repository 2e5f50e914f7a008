from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.partition import split_dynamic, split_static, task_start_rounds


def _tasks(*sizes: int) -> list[list[str]]:
    return [[f"{task}/{index}" for index in range(size)] for task, size in enumerate(sizes)]


@given(st.lists(st.integers(12, 60), min_size=1, max_size=4), st.integers(1, 12))
def test_dynamic_rounds_hold_every_sample_once_in_task_order(sizes: list[int], rate: int) -> None:
    tasks = _tasks(*sizes)
    rounds = split_dynamic(tasks, rate, python_random(0, "split"))
    assert len(rounds) == rate * len(sizes)
    flat = [item for share in rounds for item in share.items]
    assert sorted(flat) == sorted(item for task in tasks for item in task)
    assert [share.task for share in rounds] == [q // rate for q in range(len(rounds))]
    for share in rounds:
        assert {item.split("/")[0] for item in share.items} == {str(share.task)}
        assert len(share.items) in (sizes[share.task] // rate, -(-sizes[share.task] // rate))


def test_exact_cuts_are_even_where_floating_point_ones_are_not() -> None:
    exact = split_dynamic(_tasks(20, 20, 20), 5, python_random(0))
    official = split_dynamic(_tasks(20, 20, 20), 5, python_random(0), arithmetic="official")
    assert {len(share.items) for share in exact} == {4}
    assert {len(share.items) for share in official} == {3, 4, 5}


def test_fractional_rates_join_tasks() -> None:
    rounds = split_dynamic(_tasks(8, 8, 8), 8 / 3, python_random(0))
    assert len(rounds) == 8
    assert [share.task for share in rounds] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sum(len(share.items) for share in rounds) == 24
    assert {item[0] for item in rounds[2].items} == {"0", "1"}
    assert task_start_rounds(3, 8 / 3) == (0, 2, 5)


def test_static_rounds_are_equal_and_mixed() -> None:
    rounds = split_static(_tasks(30, 33), 6, python_random(0))
    assert [len(share.items) for share in rounds] == [10] * 6
    assert all({item[0] for item in share.items} == {"0", "1"} for share in rounds)
    assert len({item for share in rounds for item in share.items}) == 60


def test_splits_depend_on_the_seed_only() -> None:
    first = split_dynamic(_tasks(9, 9), 2, python_random(1))
    assert first == split_dynamic(_tasks(9, 9), 2, python_random(1))
    assert first != split_dynamic(_tasks(9, 9), 2, python_random(2))


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(DataError, match="round 1, 3 of 8"):
        split_dynamic(_tasks(2, 9), 4, python_random(0))
    with pytest.raises(DataError, match="no whole round"):
        split_dynamic(_tasks(9, 9), 0.25, python_random(0))
    with pytest.raises(DataError, match="rounds per task"):
        split_dynamic(_tasks(9), 0, python_random(0))
    with pytest.raises(DataError, match="rounds per task"):
        split_dynamic([], 2, python_random(0))
    with pytest.raises(DataError, match="no sample arrives"):
        split_static(_tasks(3), 4, python_random(0))
    with pytest.raises(DataError, match="over 0 rounds"):
        split_static(_tasks(3), 0, python_random(0))
