"""Times the blocked similarity against a column loop, one plain product, and one read of memory.

Run: ``python tests/benchmarks/bench_relevance.py [clients ...]``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.equations.relevance import column_similarity

ROWS, COLUMNS = 819, 8192  # 40 % of the rows of a 1B proxy's last down_proj gradient
LOOP_COLUMNS = 128


def best_of(call: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def plain_product(sketches: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(sketches))
    stacked /= torch.linalg.vector_norm(stacked, dim=1, keepdim=True)
    flat = stacked.flatten(1)
    return flat @ flat.T / COLUMNS


def column_loop(sketches: Sequence[Tensor]) -> Tensor:
    """One small product per column, as in the definition; the first columns only."""
    total = torch.zeros(len(sketches), len(sketches))
    for column in range(LOOP_COLUMNS):
        vectors = torch.stack([sketch[:, column] for sketch in sketches])
        unit = torch.nn.functional.normalize(vectors, dim=1)
        total += unit @ unit.T
    return total


def main(counts: list[int]) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {ROWS} x {COLUMNS}")
    for count in counts:
        generator = torch.Generator().manual_seed(0)
        sketches = [torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(count)]
        size_gb = count * ROWS * COLUMNS * 4 / 1e9
        ours = best_of(lambda s=sketches: column_similarity(s))
        product = best_of(lambda s=sketches: plain_product(s))
        loop = best_of(lambda s=sketches: column_loop(s), 1) * COLUMNS / LOOP_COLUMNS
        read = best_of(lambda s=sketches: [sketch.sum() for sketch in s])
        print(
            f"N = {count:4d} ({size_gb:.2f} GB): blocked {ours:6.3f} s | one product "
            f"{product:6.3f} s | column loop {loop:7.2f} s | read {read:6.3f} s "
            f"({size_gb / read:.1f} GB/s)"
        )


if __name__ == "__main__":
    main([int(value) for value in sys.argv[1:]] or [10, 100])
