"""What 8-bit weights change in the quickstart's proxy: gradients, sketches, memory, time.

Both versions see the same samples, turn by turn, in one process. Similarities are of sketches
without noise, between the first clients of the quickstart.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_quantised_proxy.py``
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import fedml_plugin_fedmosaic.runtime.federation  # noqa: F401, registers the data sources
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.registry import DATASETS
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.equations.relevance import column_similarity

BATCH = 4


def linear_bytes(body: nn.Module) -> int:
    """Bytes of the weights of all linears, with the scales of quantised ones."""

    def size(weight: Any) -> int:
        if not hasattr(weight, "__tensor_flatten__"):
            return int(weight.nbytes)
        return sum(size(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])

    return sum(size(part.weight) for part in body.modules() if isinstance(part, nn.Linear))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32, help="of each client")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    experiment = load_experiment(None)
    data = DATASETS[experiment.data.source](experiment.data)
    clients = []
    for client in data.clients[: args.clients]:
        samples = [sample for task in client.train for sample in task][: args.samples]
        clients.append([samples[i : i + BATCH] for i in range(0, len(samples), BATCH)])
    config = replace(experiment.sketch, noise_std=0.0, floats=None, frequency=1)
    for name, spec in experiment.models.items():
        bundles = [
            load_model(name, replace(spec, quantization=kind), torch.device("cpu"))
            for kind in ("none", "int8")
        ]
        engines = [SketchEngine(bundle, config, 0) for bundle in bundles]
        seconds = [0.0, 0.0]
        for repetition in range(args.repeat + 1):
            gradients: list[list[torch.Tensor]] = [[], []]
            for batches in clients:
                for slot, engine in enumerate(engines):
                    start = time.process_time()
                    gradients[slot] += [engine.gradient(batch).flatten() for batch in batches]
                    # The first repetition warms up.
                    seconds[slot] += (time.process_time() - start) * (repetition > 0)
        cosines = torch.cosine_similarity(*map(torch.stack, gradients))
        sketches = [
            [engine.compute(batches, client_id=0, round_idx=0) for batches in clients]
            for engine in engines
        ]
        same = torch.cosine_similarity(*(torch.stack(own).flatten(1) for own in sketches))
        similarity = [column_similarity(own) for own in sketches]
        change = (similarity[0] - similarity[1]).abs().max()
        memory = [linear_bytes(bundle.body) for bundle in bundles]
        print(f"{name}: {bundles[0].info.num_parameters:,} parameters")
        print(f"  cosine of gradients, int8 and {spec.dtype}: min {cosines.min():.5f}", end="")
        print(f", mean {cosines.mean():.5f} ({len(cosines)} batches of {BATCH})")
        print(f"  cosine of sketches: min {same.min():.5f}; similarities differ by {change:.5f}")
        print(f"  linears of the body: {memory[0]:,} -> {memory[1]:,} bytes")
        print(f"  CPU time: {seconds[0]:.2f} -> {seconds[1]:.2f} s", end="")
        print(f", ratio {seconds[1] / seconds[0]:.2f}", flush=True)


if __name__ == "__main__":
    main()
