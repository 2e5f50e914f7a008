"""Top-k mixing weights of many clients: time, memory, and recall against the exact neighbours.

Run: ``python tests/benchmarks/bench_neighbours.py [--clients 100000] [--data unrelated ...]``

Recall is the share of a receiver's exact k nearest that is found, over sampled receivers; "weight"
is the share of the exact softmax weights (among the exact k) that the found ones carry.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.equations.neighbours import nearest, top_k_weights

KINDS = ("unrelated", "clustered", "heavy tails")
TEMPERATURE = 0.5


def made(kind: str, clients: int, entries: int) -> Tensor:
    """Sketches: independent; around one of 200 centres; or with a few very large entries."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.empty(clients, entries)
    centres = torch.randn(200, entries, generator=generator)
    for start in range(0, clients, 1000):
        part = vectors[start : start + 1000]
        part.normal_(generator=generator)
        if kind == "clustered":
            part += centres[torch.randint(0, 200, (len(part),), generator=generator)]
        if kind == "heavy tails":
            part /= torch.rand(part.shape, generator=generator).add_(1e-3)
    return vectors


def report(kind: str, args: argparse.Namespace) -> None:
    vectors = made(kind, args.clients, args.entries)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    indices, _ = top_k_weights(vectors, args.k, TEMPERATURE)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Small runs: what else the process holds is not the work's.
    generator = torch.Generator().manual_seed(1)
    sample = torch.randperm(args.clients, generator=generator)[: args.sample]
    unit = vectors.div_(vectors.norm(dim=1, keepdim=True))
    cosines = unit[sample] @ unit.T
    cosines[torch.arange(len(sample)), sample] = -torch.inf
    exact, expected = cosines.topk(args.k, dim=1)
    recall = (indices[sample][:, :, None] == expected[:, None, :]).any(2).double().mean()
    found = (cosines.gather(1, indices[sample]) / TEMPERATURE).exp().sum(1)
    best = (exact / TEMPERATURE).exp().sum(1)
    print(
        f"{kind:<12} {wall:8.1f} s wall {cpu:8.1f} s CPU | peak {peak / 2**20:5.2f} GiB, of which "
        f"{before / 2**20:5.2f} before | recall@{args.k} {float(recall):.5f} | weight "
        f"{float((found / best).mean()):.7f} | median cosine of neighbours "
        f"{float(exact.median()):.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--entries", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--data", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.clients} clients "
        f"x {args.entries} floats ({args.clients * args.entries * 4 / 2**30:.2f} GiB), k = {args.k}"
    )
    nearest(torch.eye(100), 1)  # load the libraries
    for kind in args.data:
        report(kind, args)


if __name__ == "__main__":
    main()
