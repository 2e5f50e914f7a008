from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.config.shift import ShiftConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.presence import presence, present_cohort


def _rounds(client: int, schedule: tuple[tuple[int, ...], ...]) -> list[int]:
    return [index + 1 for index, there in enumerate(schedule) if client in there]


def test_everybody_is_there_by_default() -> None:
    assert presence(range(4), 3, ShiftConfig(), seed=0) == ((0, 1, 2, 3),) * 3


def test_a_list_says_who_joins_leaves_and_returns() -> None:
    shift = ShiftConfig(present={"1": ((3, 9),), "2": ((1, 2),), "3": ((1, 1), (4, 5))})
    schedule = presence(range(4), 5, shift, seed=0)
    assert [_rounds(client, schedule) for client in range(4)] == [
        [1, 2, 3, 4, 5],
        [3, 4, 5],
        [1, 2],
        [1, 4, 5],
    ]


def test_late_clients_join_once_and_stay() -> None:
    schedule = presence(range(20), 6, ShiftConfig(late_share=0.4), seed=1)
    paths = [_rounds(client, schedule) for client in range(20)]
    late = [path for path in paths if path[0] > 1]
    assert len(late) == 8
    assert all(path == list(range(path[0], 7)) for path in paths)
    assert len({path[0] for path in late}) > 2


def test_clients_leave_and_return_at_their_rates() -> None:
    shift = ShiftConfig(leave_rate=0.2, return_rate=0.5)
    schedule = presence(range(400), 30, shift, seed=2)
    there = [[client in present for present in schedule] for client in range(400)]
    pairs = [pair for path in there for pair in pairwise(path)]
    left = sum(before and not after for before, after in pairs) / sum(b for b, _ in pairs)
    back = sum(after and not before for before, after in pairs) / sum(not b for b, _ in pairs)
    assert abs(left - 0.2) < 0.02
    assert abs(back - 0.5) < 0.03
    assert len(schedule[0]) == 400


def test_who_never_returns_stays_away() -> None:
    schedule = presence(range(50), 12, ShiftConfig(leave_rate=0.3, return_rate=0.0), seed=2)
    assert all(
        len(set(schedule[index + 1]) - set(schedule[index])) <= 1  # min_present brings one back
        for index in range(11)
    )
    assert len(schedule[11]) < 10


CHANCES = st.fixed_dictionaries(
    {"late_share": st.floats(0, 1), "leave_rate": st.floats(0, 1), "return_rate": st.floats(0, 1)}
)


@settings(max_examples=40, deadline=None)
@given(CHANCES, st.integers(1, 5), st.integers(0, 9))
def test_enough_clients_are_always_there(chances: dict[str, Any], least: int, seed: int) -> None:
    shift = ShiftConfig(**chances, min_present=least)
    schedule = presence(range(6), 7, shift, seed)
    assert all(len(there) >= least for there in schedule)
    assert all(list(there) == sorted(set(there)) for there in schedule)
    assert schedule == presence(range(6), 7, shift, seed)


def test_clients_without_data_are_away() -> None:
    schedule = presence(range(3), 4, ShiftConfig(), 0, {0: 0, 1: 2, 2: None})
    assert schedule == ((0,), (0,), (0, 1), (0, 1))


def test_a_round_without_clients_is_refused() -> None:
    shift = ShiftConfig(present={"0": ((1, 1),), "1": ((3, 3),)})
    with pytest.raises(DataError, match="round 2: 0 clients are there and 0 could come back"):
        presence(range(2), 3, shift, 0)


def test_absent_clients_are_replaced_by_present_ones() -> None:
    assert present_cohort((1, 3, 5), range(8), 0, 0) == (1, 3, 5)
    cohort = present_cohort((1, 3, 5), (0, 3, 6, 7), 0, 0)
    assert len(cohort) == 3
    assert 3 in cohort
    assert set(cohort) <= {0, 3, 6, 7}
    assert present_cohort((1, 3, 5), (6, 7), 0, 0) == (6, 7)
    assert present_cohort((0, 1), (), 0, 0) == ()


def test_stand_ins_are_drawn_anew_in_each_round() -> None:
    drawn = {present_cohort((0, 1), range(2, 12), 0, index) for index in range(40)}
    assert len(drawn) > 15
    assert {client for cohort in drawn for client in cohort} == set(range(2, 12))
