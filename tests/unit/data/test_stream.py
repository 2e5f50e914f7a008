from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import CheckpointError, DataError
from fedml_plugin_fedmosaic.data.stream import OnlineMemory, SampleId, SeededDraws, stream_only


def _draws(round_idx: int = 0, client_id: int = 0) -> SeededDraws:
    return SeededDraws(7, client_id, round_idx)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 6), st.integers(1, 80))
def test_all_batches_are_drawn_from_what_has_arrived(
    arrivals: int, num_batches: int, batch_size: int, capacity: int
) -> None:
    ids = [f"s{index}" for index in range(arrivals)]
    empty = OnlineMemory(capacity=capacity)
    memory, batches = empty.draw(ids, num_batches, batch_size, _draws())
    assert [len(batch) for batch in batches] == [batch_size] * num_batches
    assert len(memory.items) == len(memory.counts) == min(capacity, arrivals)
    assert set(memory.items) <= set(ids)
    for number, batch in enumerate(batches, start=1):
        arrived = -(-number * arrivals // num_batches)
        assert {ids.index(str(item)) for item in batch} <= set(range(arrived))
        distinct = min(batch_size, min(capacity, arrived))
        assert len(set(batch)) == distinct


def test_a_round_is_a_function_of_seed_client_and_round() -> None:
    memory = OnlineMemory(capacity=5)
    ids = list(range(20))
    again = [memory.draw(ids, 9, 3, _draws()) for _ in range(2)]
    assert again[0] == again[1]
    assert memory.draw(ids, 9, 3, _draws(round_idx=1))[1] != again[0][1]
    assert memory.draw(ids, 9, 3, _draws(client_id=1))[1] != again[0][1]
    assert memory == OnlineMemory(capacity=5)


def test_resuming_from_json_changes_nothing() -> None:
    first, _ = OnlineMemory(capacity=6).draw(list("abcdefghij"), 7, 3, _draws())
    restored = OnlineMemory.from_state(json.loads(json.dumps(first.to_state())))
    assert restored == first
    expected = first.draw(list("klmno"), 7, 3, _draws(1))
    assert restored.draw(list("klmno"), 7, 3, _draws(1)) == expected


def test_a_round_without_arrivals_uses_the_memory() -> None:
    memory, _ = OnlineMemory(capacity=9).draw(list("abc"), 2, 2, _draws())
    after, batches = memory.draw([], 4, 2, _draws(1))
    assert len(batches) == 4
    assert after.items == memory.items


def test_seldom_used_samples_come_first() -> None:
    memory = OnlineMemory(capacity=12, items=tuple(range(12)), counts=(4.0,) * 6 + (0.0,) * 6)
    memory, batches = memory.draw([], 6, 4, _draws())
    assert {item for batch in batches for item in batch} == {6, 7, 8, 9, 10, 11}
    _, batches = memory.draw([], 30, 4, _draws(1))
    uses = Counter(item for batch in batches for item in batch)
    assert set(uses) == set(range(12))
    assert max(uses.values()) - min(uses.values()) <= 3


def test_choice_probabilities_follow_the_softmax() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.2]))
    draws = _draws()
    seen = Counter(tuple(draws.choose(scores, 2).tolist()) for _ in range(6000))
    for (first, second), number in seen.items():
        p = np.exp(scores)
        expected = p[first] * p[second] / (1 - p[first])
        assert number / 6000 == pytest.approx(expected, abs=0.03)
    assert len(seen) == 6


def test_extreme_counts_do_not_underflow() -> None:
    memory = OnlineMemory(capacity=9, items=(1, 2, 3), counts=(0.0, 500.0, 900.0))
    _, batches = memory.draw([], 1, 3, _draws())
    assert batches == ((1, 2, 3),)


def test_broken_states_and_sizes_are_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        OnlineMemory.from_state({"capacity": 3, "items": ["a"]})
    with pytest.raises(CheckpointError, match="1 items but 2 counts"):
        OnlineMemory.from_state({"capacity": 3, "items": ["a"], "counts": [0, 1]})
    with pytest.raises(DataError, match="none is remembered"):
        OnlineMemory(capacity=3).draw([], 1, 1, _draws())
    with pytest.raises(DataError, match="at least 1"):
        OnlineMemory(capacity=3).draw(["a"], 0, 1, _draws())


def test_stream_only_keeps_the_order_and_repeats_when_short() -> None:
    assert stream_only(list("abcdef"), 2, 2) == (("a", "b"), ("c", "d"))
    assert stream_only(list("abc"), 2, 2) == (("a", "b"), ("c", "a"))
    with pytest.raises(DataError, match="from 0 samples"):
        stream_only([], 1, 1)


def _first_letter(item: SampleId) -> str:
    return str(item)[0]


def test_balanced_batches_use_all_groups_equally_and_spread_over_their_samples() -> None:
    ids = [
        f"{group}{index}"
        for group, count in (("a", 40), ("b", 8), ("c", 2))
        for index in range(count)
    ]
    held = OnlineMemory(capacity=50, items=tuple(ids), counts=(0.0,) * 50)
    _, batches = held.draw((), 60, 4, _draws(), _first_letter)
    drawn = Counter(str(item) for batch in batches for item in batch)
    by_group = Counter(str(item)[0] for batch in batches for item in batch)
    assert sum(by_group.values()) == 240
    assert max(by_group.values()) - min(by_group.values()) <= 4
    assert set(drawn) == set(ids)
    assert max(drawn[item] for item in ids[:40]) <= 4
    plain = Counter(str(item)[0] for batch in held.draw((), 60, 4, _draws())[1] for item in batch)
    assert plain["a"] > 3 * plain["b"]


def test_balanced_batches_stay_balanced_when_samples_are_forgotten() -> None:
    # Two thirds a, one third b, shuffled; the memory is full from the start, so that every arrival
    # pushes a sample of either group out, at any position.
    held = OnlineMemory(
        capacity=12, items=tuple(f"{'aab'[i % 3]}{i}" for i in range(12)), counts=(0.0,) * 12
    )
    arrivals = [f"{'aba'[i % 3]}{i}" for i in range(100, 190)]
    memory, batches = held.draw(arrivals, 90, 2, _draws(), _first_letter)
    drawn = Counter(str(item)[0] for batch in batches for item in batch)
    assert abs(drawn["a"] - drawn["b"]) <= 2
    assert len(memory.items) == 12
    assert set(memory.items) <= {*held.items, *arrivals}


def test_a_group_that_arrives_late_does_not_make_up_for_what_it_missed() -> None:
    ids = [*(f"a{index}" for index in range(20)), *(f"b{index}" for index in range(20))]
    memory, batches = OnlineMemory(capacity=40).draw(ids, 40, 4, _draws(), _first_letter)
    assert all(str(item)[0] == "a" for batch in batches[:20] for item in batch)
    late = Counter(str(item)[0] for batch in batches[20:] for item in batch)
    assert abs(late["a"] - late["b"]) <= 6
    again = OnlineMemory.from_state(json.loads(json.dumps(memory.to_state())))
    assert again.draw([], 3, 4, _draws(1), _first_letter) == memory.draw(
        [], 3, 4, _draws(1), _first_letter
    )
