from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fedml_plugin_fedmosaic.equations.tiles import in_order


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_from_single_threaded_calls(threads: int) -> None:
    seen: list[int] = []

    def work(item: int) -> int:
        seen.append(torch.get_num_threads())
        return item * item

    assert list(in_order(work, range(20))) == [item * item for item in range(20)]
    assert set(seen) == {1}
    assert torch.get_num_threads() == threads


def test_no_more_results_wait_than_there_are_threads(threads: int) -> None:
    started = threading.Semaphore(0)
    results = in_order(lambda item: (started.release(), item)[1], range(100))
    assert next(results) == 0
    results.close()
    count = 0
    while started.acquire(blocking=False):
        count += 1
    assert count <= threads + 1
    assert torch.get_num_threads() == threads


def test_an_error_reaches_the_caller_and_the_setting_is_restored(threads: int) -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(in_order(work, range(10)))
    assert torch.get_num_threads() == threads
