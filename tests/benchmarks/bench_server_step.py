"""The server's step at full size, beside one matrix product of the same size.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_server_step.py [--clients 10 100 1000]``

Every time is the smallest of some interleaved repetitions on the same machine and threads; look at
the ratios. ``extra`` is the peak of resident memory during the call beyond what was resident
before, the result included, as a share of the input. Sketches of more than ``--limit`` GiB are
generated segment by segment while they are needed (generation is not counted in the time), and
their yardstick is measured on a part of the columns and scaled.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.equations.gradient import column_projection, compress
from fedml_plugin_fedmosaic.equations.mixing import mix
from fedml_plugin_fedmosaic.equations.relevance import (
    column_segments,
    column_similarity,
    finish_similarity,
    flat_similarity,
    segment_products,
    unit_columns,
)

ROWS, COLUMNS = 819, 8192  # 40 % of the rows of a 1B proxy's last down_proj gradient
LENGTH = 28 * (128 * 128 + 128)  # P and Q of 4 blocks of 7 modules at rank 128
COMPRESSED = 4096
LOOP_COLUMNS = 64


class Clients:
    """Synthetic sketches: noise around one of five centres, so that relevance differs."""

    def __init__(self, count: int) -> None:
        self.count = count

    def columns(self, part: slice) -> Tensor:
        """(count, rows, width), the same values whenever they are asked for."""
        generator = torch.Generator().manual_seed(part.start)
        width = part.stop - part.start
        centres = torch.randn(5, ROWS, width, generator=generator)
        noise = torch.randn(self.count, ROWS, width, generator=generator)
        for client, values in enumerate(noise):
            values.add_(centres[client % 5], alpha=0.5 + client % 3)
        return noise

    def whole(self) -> list[Tensor]:
        sketches = torch.empty(self.count, ROWS, COLUMNS)
        for part in column_segments(ROWS, COLUMNS):
            sketches[:, :, part] = self.columns(part)
        return list(sketches)


def best_of(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """Smallest time of each call; the calls take turns."""
    times = [float("inf")] * len(calls)
    for _ in range(repeats):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[index] = min(times[index], time.perf_counter() - start)
    return times


def memory(name: str) -> int:
    """Bytes of an entry of this process's status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def extra_bytes(call: Callable[[], object]) -> int:
    """Peak of resident memory during a call beyond what was resident before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before


def exact_similarity(sketches: list[Tensor]) -> Tensor:
    """In float64 throughout."""
    total = torch.zeros(len(sketches), len(sketches), dtype=torch.float64)
    for part in column_segments(ROWS, COLUMNS):
        block = torch.stack([sketch[:, part] for sketch in sketches]).double()
        flat = (block / block.norm(dim=1, keepdim=True)).flatten(1)
        total += flat @ flat.T
    return total / COLUMNS


def column_loop(sketches: list[Tensor]) -> None:
    """One small product per column, as in the definition; some columns only."""
    for column in range(LOOP_COLUMNS):
        vectors = torch.stack([sketch[:, column] for sketch in sketches])
        unit = torch.nn.functional.normalize(vectors, dim=1)
        unit @ unit.T


def error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).abs().max())


def similarity_in_memory(count: int, repeats: int) -> None:
    sketches = Clients(count).whole()
    base = sketches[0]._base
    assert base is not None
    flat = base.flatten(1)
    # First, while the allocator keeps nothing.
    extra = extra_bytes(lambda: column_similarity(sketches)) / base.nbytes
    ours, product = best_of(
        repeats, lambda: column_similarity(sketches), lambda: torch.mm(flat, flat.T)
    )
    (loop,) = best_of(2, lambda: column_loop(sketches))
    loop *= COLUMNS / LOOP_COLUMNS
    exact = exact_similarity(sketches)
    print(
        f"similarity  N={count:5d} {base.nbytes / 1e9:6.2f} GB | ours {ours:8.3f} s | X @ X.T "
        f"{product:8.3f} s | ratio {ours / product:5.2f} | column loop {loop:8.2f} s "
        f"({loop / ours:.0f}x) | extra {extra:5.3f} | error "
        f"{error(column_similarity(sketches), exact):.1e}",
        flush=True,
    )
    compressed(sketches, exact, repeats)


def compressed(sketches: list[Tensor], exact: Tensor, repeats: int) -> None:
    projection = column_projection(ROWS * COLUMNS, COMPRESSED, seed=0)
    (each,) = best_of(repeats, lambda: compress(unit_columns(sketches[0]), projection))
    small = [compress(unit_columns(sketch), projection) for sketch in sketches]
    (ours,) = best_of(repeats, lambda: flat_similarity(small))
    off = ~torch.eye(len(sketches), dtype=torch.bool)
    wrong = (flat_similarity(small) - exact)[off]
    raw, sent = ROWS * COLUMNS * 4, COMPRESSED * 4
    print(
        f"compressed  N={len(sketches):5d} {sent / 1e3:.1f} kB instead of {raw / 1e6:.1f} MB each "
        f"({raw / sent:.0f}x less) | {each:.3f} s per client | similarity {ours * 1e3:8.2f} ms | "
        f"error rms {float(wrong.square().mean().sqrt()):.4f}, largest "
        f"{float(wrong.abs().max()):.4f} | exact ranges {float(exact[off].min()):.3f} to "
        f"{float(exact[off].max()):.3f}",
        flush=True,
    )


def similarity_in_segments(count: int) -> None:
    """Sketches that are never there as a whole."""
    clients, segments = Clients(count), column_segments(ROWS, COLUMNS)
    seconds = {"ours": 0.0, "product": 0.0}

    def timed(name: str, call: Callable[[], Tensor]) -> Tensor:
        start = time.perf_counter()
        result = call()
        seconds[name] += time.perf_counter() - start
        return result

    def parts() -> Iterator[Tensor]:
        for part in segments:
            pieces = list(clients.columns(part))
            yield timed("ours", partial(segment_products, pieces, "columns"))

    def run() -> Tensor:
        total = torch.zeros(count, count, dtype=torch.float64)
        for products in parts():
            total += products
        return finish_similarity(total, "columns", COLUMNS)

    size = count * ROWS * COLUMNS * 4
    results: list[Tensor] = []
    extra = extra_bytes(lambda: results.append(run()))
    flat = clients.columns(segments[0]).flatten(1)
    (product,) = best_of(2, lambda: torch.mm(flat, flat.T))
    product *= len(segments)
    ours = seconds["ours"]
    print(
        f"similarity  N={count:5d} {size / 1e9:6.2f} GB | ours {ours:8.3f} s | X @ X.T "
        f"{product:8.3f} s (scaled) | ratio {ours / product:5.2f} | extra {extra / size:5.3f} = "
        f"{extra / 1e9:.2f} GB, generated pieces included",
        flush=True,
    )


def mixing(count: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(count, LENGTH, generator=generator)
    sources = list(stacked)
    weights = torch.rand(count, count, generator=generator).fill_diagonal_(0.0)
    weights /= weights.sum(dim=1, keepdim=True)
    # First, while the allocator keeps nothing.
    extra = extra_bytes(lambda: mix(sources, weights)) / stacked.nbytes
    ours, product = best_of(repeats, lambda: mix(sources, weights), lambda: weights @ stacked)
    part = slice(0, 20_000)
    exact = weights.double() @ stacked[:, part].double()
    wrong = error(mix([source[part] for source in sources], weights), exact)
    print(
        f"mixing      N={count:5d} {stacked.nbytes / 1e9:6.2f} GB | ours {ours:8.3f} s | W @ X "
        f"  {product:8.3f} s | ratio {ours / product:5.2f} | extra {extra:5.3f}, of which the "
        f"result is 1 | error {wrong:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=4.0, help="GiB of sketches kept in memory")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); sketches {ROWS} x "
        f"{COLUMNS}, vectors of {LENGTH}, float32"
    )
    for count in args.clients:
        if count * ROWS * COLUMNS * 4 <= args.limit * 2**30:
            similarity_in_memory(count, args.repeats)
        else:
            similarity_in_segments(count)
        mixing(count, args.repeats)


if __name__ == "__main__":
    main()
