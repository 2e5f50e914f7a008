"""Times the reproducible mixing against a matrix product and a copy of the same memory.

Run: ``python tests/benchmarks/bench_mixing.py [clients ...]``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from fedml_plugin_fedmosaic.equations.mixing import mix

LENGTH = 462_336  # PQ parameters of one client at rank 128 with 4 blocks of 7 modules


def best_of(call: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main(counts: list[int]) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), D = {LENGTH}")
    for count in counts:
        generator = torch.Generator().manual_seed(0)
        sources = list(torch.randn(count, LENGTH, generator=generator))
        weights = torch.rand(count, count, generator=generator)
        ours = best_of(lambda s=sources, w=weights: mix(s, w))
        product = best_of(lambda s=sources, w=weights: w @ torch.stack(s))
        # Every source read once and every result written once: the least that can be done.
        target = torch.empty(count, LENGTH)
        copy = best_of(lambda s=sources, t=target: [t[i].copy_(x) for i, x in enumerate(s)])
        print(
            f"S = T = {count:4d}: mix {ours * 1e3:8.2f} ms | W @ X {product * 1e3:8.2f} ms "
            f"(x{ours / product:.2f}) | copy {copy * 1e3:7.2f} ms "
            f"({2 * count * LENGTH * 4 / copy / 1e9:.1f} GB/s)"
        )


if __name__ == "__main__":
    main([int(value) for value in sys.argv[1:]] or [10, 100])
