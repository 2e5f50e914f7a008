"""Times the exchange of a mixing plan against raw mpi4py buffers of the same bytes.

Run: ``python tests/benchmarks/bench_exchange.py [ranks] [megabytes per rank ...]``; it starts
itself under mpiexec. One client per rank, whose vector has that many megabytes. Two plans:

* ring: every client receives its neighbour's vector, sent directly;
* dense: every client receives its own mix of all others, sent in slices.

"raw" sends the same messages between the same ranks with Isend, Irecv and Waitall: "kept" into
buffers that are allocated once, "new" into buffers that are allocated every time, as results that
are handed out must be. "exchange" is the time inside the communicator's exchange of tensors;
"round" is the whole call, with packing, mixing and agreeing on the plan. Each number is the
slowest rank's, and of all repetitions the fastest.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedml_plugin_fedmosaic.comm.exchange import Parcels, catalogue_of
from fedml_plugin_fedmosaic.comm.mixing import planned_bytes
from fedml_plugin_fedmosaic.comm.mpi import MPICommunicator
from fedml_plugin_fedmosaic.core.types import MixingPlan, MixRow

SIZES_MB = (1, 64)
REPEATS = 25
KEY = "pq/0/m/P"
_OTHER_DATA = np.zeros(96 << 20, dtype=np.uint8)


class TimedCommunicator(MPICommunicator):
    """Notes what it exchanges and how long that takes."""

    def __init__(self) -> None:
        super().__init__()
        self.exchange_s = 0.0
        self.calls: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = []

    def _swap(self, sends: Parcels, receives: Parcels) -> None:
        cold()
        self.barrier()  # waiting for a rank that is still packing is not exchanging
        start = time.perf_counter()
        super()._swap(sends, receives)
        self.exchange_s += time.perf_counter() - start
        self.calls.append(([(r, t.nbytes) for r, t in sends], [(r, t.nbytes) for r, t in receives]))


def plans(size: int) -> dict[str, MixingPlan]:
    ring = [MixRow(target=t, sources=((t + 1) % size,), weights=(1.0,)) for t in range(size)]
    dense = [
        MixRow(
            target=t,
            sources=tuple(s for s in range(size) if s != t),
            weights=tuple(0.1 + 0.01 * (t + s) for s in range(size - 1)),
        )
        for t in range(size)
    ]
    return {
        name: MixingPlan(rows={"pq": tuple(r)}) for name, r in (("ring", ring), ("dense", dense))
    }


def slowest(comm: TimedCommunicator, seconds: float) -> float:
    return max(map(float, comm.share(repr(seconds))))


def best(comm: TimedCommunicator, calls: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Seconds of each call; they take turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            comm.barrier()
            times[name].append(slowest(comm, call()))
    return {name: min(found) for name, found in times.items()}


def cold() -> None:
    """Empties the caches, so that both sides of the comparison find their buffers in memory."""
    _OTHER_DATA[:] += 1


def raw(world: Any, calls: Any, *, keep: bool) -> Callable[[], float]:
    """Sends the messages of ``calls``; returns the seconds without allocating what is sent."""
    outgoing = [[(r, np.ones(n, dtype=np.uint8)) for r, n in sends] for sends, _ in calls]
    kept = [[(r, np.ones(n, dtype=np.uint8)) for r, n in receives] for _, receives in calls]

    def run() -> float:
        cold()
        world.Barrier()
        start = time.perf_counter()
        for number, (_, receives) in enumerate(calls):
            into = kept[number] if keep else [(r, np.empty(n, dtype=np.uint8)) for r, n in receives]
            requests = [world.Irecv(buffer, source=r) for r, buffer in into]
            requests += [world.Isend(buffer, dest=r) for r, buffer in outgoing[number]]
            type(requests[0]).Waitall(requests) if requests else None
        return time.perf_counter() - start

    return run


def rank_main(sizes: list[int]) -> None:
    from mpi4py import MPI

    comm = TimedCommunicator()
    world = MPI.COMM_WORLD.Dup()
    torch.set_num_threads(1)
    for megabytes in sizes:
        length = megabytes * (1 << 20) // 4
        upload = {comm.rank: {KEY: torch.full((length,), 1.0 + comm.rank)}}
        everyone = catalogue_of({r: {KEY: torch.empty(length)} for r in range(comm.size)})
        for name, plan in plans(comm.size).items():

            def exchange_s(plan: MixingPlan = plan, upload: Any = upload) -> float:
                before = comm.exchange_s
                comm.execute(plan, upload)
                return comm.exchange_s - before

            def round_s(plan: MixingPlan = plan, upload: Any = upload) -> float:
                start = time.perf_counter()
                comm.execute(plan, upload)
                return time.perf_counter() - start

            comm.calls.clear()
            round_s()
            calls = list(comm.calls)
            seconds = best(
                comm,
                {
                    "kept": raw(world, calls, keep=True),
                    "new": raw(world, calls, keep=False),
                    "exchange": exchange_s,
                    "round": round_s,
                },
            )
            kept, new, exchange, whole = seconds.values()
            moved = sum(map(int, comm.share(str(comm.moved_bytes["mixing"]))))
            formula = planned_bytes(comm.routes(plan, "pq", everyone))
            if comm.rank == 0:
                print(
                    f"{comm.size} ranks, {megabytes:3d} MB, {name:5s}: raw kept {kept * 1e3:8.2f} "
                    f"new {new * 1e3:8.2f} | exchange {exchange * 1e3:8.2f} ms "
                    f"(x{exchange / kept:.2f} kept, x{exchange / new:.2f} new) | round "
                    f"{whole * 1e3:8.2f} ms | moved {moved / 2**20:.1f} MB, formula "
                    f"{'equal' if moved == formula else f'{formula / 2**20:.1f} MB'}",
                    flush=True,
                )


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--rank":
        rank_main([int(value) for value in sys.argv[2:]])
        return
    ranks = sys.argv[1] if len(sys.argv) > 1 else "2"
    sizes = sys.argv[2:] or [str(size) for size in SIZES_MB]
    beside = Path(sysconfig.get_path("scripts")) / "mpiexec"
    launcher = str(beside) if beside.exists() else "mpiexec"
    command = [launcher, "--oversubscribe", "-n", ranks, sys.executable, __file__, "--rank", *sizes]
    raise SystemExit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
