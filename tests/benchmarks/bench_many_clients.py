"""FedMosaic's server step with ``top_k`` and many clients: from sketches to downlinks.

    OMP_NUM_THREADS=2 python tests/benchmarks/bench_many_clients.py --clients 10000

prints the CPU seconds of each part and the peak of memory. Sketches are vectors as
``sketch.floats`` makes them, around a few centres; uploads are small, so that mixing measures what
many rows cost and not what large tensors do.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedml_plugin_fedmosaic.comm.codec import Layout
from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.core.types import ClientManifest, Relevance, UpdateHeader
from fedml_plugin_fedmosaic.strategies.fedmosaic import FedMosaic, FedMosaicOptions

CENTRES = 50
MODELS = 3


@contextmanager
def timed(name: str) -> Iterator[None]:
    began, wall = time.process_time(), time.perf_counter()
    yield
    cpu, took = time.process_time() - began, time.perf_counter() - wall
    print(f"{name:34s} {cpu:8.2f} s CPU {took:8.2f} s wall", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--floats", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CENTRES, args.floats, generator=generator)
    everyone = range(args.clients)
    uploads = {
        client: {
            "pq/0/m/P": torch.randn(4, 4, generator=generator),
            f"conv/0/m/A{client % MODELS}": torch.randn(4, 8, generator=generator),
        }
        for client in everyone
    }
    layouts = [
        {
            "pq": Layout.of({"pq/0/m/P": uploads[client]["pq/0/m/P"]}).digest,
            "conv": f"model {client % MODELS}",
        }
        for client in range(MODELS)
    ]
    manifests = [
        ClientManifest(
            client_id=client,
            model=str(client % MODELS),
            family="none",
            signature=str(client % MODELS),
            num_layers=1,
            num_blocks=1,
            num_examples=1,
            tasks=(),
            layouts=layouts[client % MODELS],
        )
        for client in everyone
    ]
    sketches = {
        client: (centres[client % CENTRES] + torch.randn(args.floats, generator=generator)).reshape(
            -1, 1
        )
        for client in everyone
    }
    headers = [
        UpdateHeader(
            client_id=client,
            round_idx=0,
            num_examples=1,
            sketch=torch.empty(args.floats, 1, device="meta"),
        )
        for client in everyone
    ]
    strategy = FedMosaic(FedMosaicOptions(top_k=args.k, matrix_clients=0))
    comm = LocalCommunicator()
    state = strategy.init(manifests, 0)
    with timed("queries"):
        queries = strategy.queries(state, headers)
    assert queries is not None
    with timed("nearest clients, three kinds of rows"):
        found = comm.nearest("columns", sketches, queries)
    relevance = Relevance(clients=(), values=torch.zeros(0, 0), neighbours=found)
    with timed("rows"):
        _, plan = strategy.plan(state, headers, relevance)
    comm.exchange_headers([])
    with timed("checking and mixing"):
        downlinks = comm.execute(plan, uploads)
    assert len(downlinks) == args.clients
    rows = sum(map(len, plan.rows.values()))
    same = [
        sum(source % CENTRES == row.target % CENTRES for source in row.sources) / len(row.sources)
        for row in plan.rows["pq"][:1000]
    ]
    print(f"{rows} rows; {sum(same) / len(same):.3f} of the sources share the receiver's centre")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
