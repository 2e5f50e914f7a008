"""Matrix products whose bits do not depend on the number of threads.

A multi-threaded product may cut the sums themselves, and does so differently for every number of
threads. Here every product is computed by one thread, and the threads share out whole products.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# The number of threads is one setting of the whole process.
_SETTING = threading.RLock()


@contextmanager
def _one_thread_per_call() -> Iterator[int]:
    """Torch's calls use one thread each; yields how many there were for one call."""
    with _SETTING:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield threads
        finally:
            torch.set_num_threads(threads)


def in_order(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """``map(work, items)`` on as many threads as torch has, each call of torch on one thread.

    At most one result per thread waits to be taken. Other threads of the process are slowed down
    while this runs, because the number of threads per call is one setting of the process. The
    setting is restored at the end or when the iterator is closed; exhaust it or close it.

    Args:
        work: called on threads of a pool, for several items at once; must not call this itself.
        items: consumed as the work proceeds.

    Yields:
        Results in the order of the items.
    """
    with _one_thread_per_call() as threads:
        if threads == 1:
            yield from map(work, items)
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="tiles") as pool:
            waiting: deque[Future[_Result]] = deque()
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
