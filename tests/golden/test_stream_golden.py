from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from fedml_plugin_fedmosaic.data.partition import split_dynamic, split_static, task_start_rounds
from fedml_plugin_fedmosaic.data.stream import OfficialDraws, OnlineMemory
from fedml_plugin_fedmosaic.equations.gradient import sketch_updates

ORDER = random.Random  # the reference shuffles with Python's generator
ARRAYS = np.load(Path(__file__).parent / "stream_schedule_split.npz", allow_pickle=False)


@pytest.mark.parametrize("case", ["a", "b", "c", "d"])
def test_online_memory_draws_the_reference_sequence(case: str) -> None:
    num_items, num_batches, batch_size, capacity, seed = ARRAYS[f"stream_{case}/cfg"].tolist()
    draws = OfficialDraws(seed)
    memory = OnlineMemory(capacity=capacity)
    for round_idx in range(2):
        arrivals = [round_idx * 1000 + index for index in range(num_items)]
        memory, batches = memory.draw(arrivals, num_batches, batch_size, draws)
        flat = [item for batch in batches for item in batch]
        assert flat == ARRAYS[f"stream_{case}/round{round_idx}"].tolist()
    assert list(memory.items) == ARRAYS[f"stream_{case}/memory"].tolist()
    np.testing.assert_allclose(memory.counts, ARRAYS[f"stream_{case}/count"], rtol=1e-12)


def _tasks() -> list[list[int]]:
    return [
        [task * 10000 + index for index in range(size)]
        for task, size in enumerate(ARRAYS["split/sizes"].tolist())
    ]


@pytest.mark.parametrize("rate", [5.0, 2.0, 0.5, 3.0])
def test_dynamic_split_equals_the_reference(rate: float) -> None:
    rounds = split_dynamic(_tasks(), rate, ORDER(1), arithmetic="official")
    flat = [item for share in rounds for item in share.items]
    assert flat == ARRAYS[f"split/R{rate}/flat"].tolist()
    assert [len(share.items) for share in rounds] == ARRAYS[f"split/R{rate}/len"].tolist()
    assert [share.task for share in rounds] == ARRAYS[f"split/R{rate}/task"].tolist()
    assert list(task_start_rounds(4, rate)) == ARRAYS[f"split/R{rate}/test_start_round"].tolist()


def test_static_split_equals_the_reference() -> None:
    rounds = split_static(_tasks(), 20, ORDER(1))
    assert [len(share.items) for share in rounds] == ARRAYS["split/static_len"].tolist()
    flat = [item for share in rounds for item in share.items]
    assert flat == ARRAYS["split/static_flat"].tolist()


def test_official_sketch_schedule_equals_the_reference() -> None:
    table = zip(
        ARRAYS["schedule/cfg_iter_gas_freq"].tolist(),
        ARRAYS["schedule/updates_1based"].tolist(),
        strict=True,
    )
    for (num_updates, accumulation, frequency), row in table:
        expected = tuple(update for update in row if update > 0)
        got = sketch_updates(num_updates, frequency, "official", accumulation)
        assert got == expected, (num_updates, accumulation, frequency)
