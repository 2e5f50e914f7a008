"""How well sketches tell related clients from unrelated ones, and what the settings change.

Takes the clients and the proxy of a configuration, computes their proxy gradients once, and then
tries noise, sub-selection of rows, kind of similarity and temperature on the same gradients.
Clients are related if the folder's ``origin.json`` puts their tasks into one group. Prints Markdown
and, with ``--plot``, draws the heat map of the documentation.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/study_relevance.py --plot relevance.png``
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import fedml_plugin_fedmosaic.runtime.federation  # noqa: F401, registers the data sources
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.registry import DATASETS
from fedml_plugin_fedmosaic.core.rng import python_random, torch_generator
from fedml_plugin_fedmosaic.data.text_tasks import default_root
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.equations.gradient import kept_rows, sanitise
from fedml_plugin_fedmosaic.equations.relevance import (
    column_similarity,
    flat_similarity,
    peer_weights,
)

CONFIG = Path(__file__).parents[2] / "configs" / "text" / "cross_family_cpu.yaml"
PAPER = {"fraction": 0.4, "rows": "first", "std": 1e-4, "kind": "columns", "temperature": 0.5}
OURS = {"fraction": 0.4, "rows": "random", "std": 1e-4, "kind": "columns", "temperature": 0.2}


def gradients(
    cf: Path, updates: int, samples: int, seed: int
) -> tuple[list[str], list[list[Tensor]]]:
    """Task of each client, and its proxy gradients (d, inter) of so many updates."""
    experiment = load_experiment(cf, [])
    data = DATASETS[experiment.data.source](experiment.data)
    proxy = experiment.sketch.proxy or data.clients[0].model_id
    bundle = load_model(proxy, experiment.models[proxy], torch.device("cpu"))
    config = replace(experiment.sketch, row_fraction=1.0, rows="first", noise="none")
    sketcher = SketchEngine(bundle, config, seed)
    tasks, found = [], []
    for client in data.clients:
        rows = [sample for task in client.train for sample in task]
        drawn = python_random(seed, "study", client.client_id).sample(rows, updates * samples)
        tasks.append(client.tasks[0].name)
        found.append(
            [
                sketcher.gradient(drawn[start : start + samples])
                for start in range(0, len(drawn), samples)
            ]
        )
    return tasks, found


def similarity(
    found: Sequence[Sequence[Tensor]],
    *,
    fraction: float,
    rows: str,
    std: float,
    kind: str,
    seed: int,
) -> Tensor:
    """(N, N) float64 similarity of the sanitised mean gradients."""
    chosen = kept_rows(found[0][0].shape[0], fraction, rows, seed)  # type: ignore[arg-type]
    sketches = []
    for client, client_gradients in enumerate(found):
        parts = [
            sanitise(
                gradient,
                rows=chosen,
                clip_norm=None,
                noise="gaussian" if std else "none",
                noise_std=std,
                generator=torch_generator(seed, "noise", client, update),
            )
            for update, gradient in enumerate(client_gradients)
        ]
        sketches.append(torch.stack(parts).mean(0))
    return column_similarity(sketches) if kind == "columns" else flat_similarity(sketches)


def weights(scores: Tensor, temperature: float) -> Tensor:
    """(N, N) mixing weights over the other clients."""
    return peer_weights(scores, ~torch.eye(len(scores), dtype=torch.bool), temperature)


def contrast(matrix: Tensor, groups: Sequence[str]) -> tuple[float, float, int]:
    """Mean over related and unrelated pairs, and clients whose nearest peer is related."""
    related, unrelated, nearest = [], [], 0
    for i, j in itertools.permutations(range(len(groups)), 2):
        (related if groups[i] == groups[j] else unrelated).append(float(matrix[i, j]))
    for i, row in enumerate(matrix.clone().fill_diagonal_(-torch.inf)):
        nearest += groups[int(row.argmax())] == groups[i]
    return sum(related) / len(related), sum(unrelated) / len(unrelated), nearest


def study(found: Sequence[Sequence[Tensor]], groups: Sequence[str], seed: int) -> None:
    """One row per setting, each changing one thing of ours."""
    print(
        "| setting | similarity, related | unrelated | weight, related | unrelated | ratio "
        "| nearest |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    changes = [
        ("the paper's (first rows, temperature 0.5)", PAPER),
        ("this configuration's", OURS),
        ("no noise", OURS | {"std": 0.0}),
        ("ten times the noise", OURS | {"std": 1e-3}),
        ("all rows", OURS | {"fraction": 1.0}),
        ("a tenth of the rows", OURS | {"fraction": 0.1}),
        ("a hundredth of the rows", OURS | {"fraction": 0.01}),
        ("temperature 1", OURS | {"temperature": 1.0}),
        ("temperature 0.1", OURS | {"temperature": 0.1}),
        ("temperature 0.05", OURS | {"temperature": 0.05}),
        ("one cosine of the whole sketch", OURS | {"kind": "flat"}),
        ("the same, ten times the noise", OURS | {"kind": "flat", "std": 1e-3}),
    ]
    for name, setting in changes:
        options = dict(setting)
        temperature = float(options.pop("temperature"))  # type: ignore[arg-type]
        scores = similarity(found, **options, seed=seed)  # type: ignore[arg-type]
        near, far, hits = contrast(scores, groups)
        heavy, light, _ = contrast(weights(scores, temperature), groups)
        print(
            f"| {name} | {near:.3f} | {far:.3f} | {heavy:.3f} | {light:.3f} | {heavy / light:.2f} "
            f"| {hits} of {len(groups)} |"
        )


def table(matrix: Tensor, names: Sequence[str]) -> None:
    """A matrix as Markdown."""
    print("| | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names))
    for name, row in zip(names, matrix, strict=True):
        print(f"| {name} | " + " | ".join(f"{float(value):.2f}" for value in row) + " |")


def plot(path: Path, matrices: Sequence[tuple[str, Tensor]], names: Sequence[str]) -> None:
    """Heat maps side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(matrices), figsize=(4.6 * len(matrices), 4.4), dpi=80)
    for axis, (title, matrix) in zip(axes, matrices, strict=True):
        axis.imshow(matrix, cmap="Blues", vmin=0)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axis.set_yticks(range(len(names)), names)
        for i, j in itertools.product(range(len(names)), repeat=2):
            value = float(matrix[i, j])
            colour = "white" if value > 0.6 * float(matrix.max()) else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Prints the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cf", type=Path, default=CONFIG)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    origin = json.loads((default_root() / "origin.json").read_text(encoding="utf-8"))
    tasks, found = gradients(options.cf, options.updates, options.samples, options.seed)
    groups = [origin["tasks"][task]["group"] for task in tasks]
    names = [f"{index}: {task}" for index, task in enumerate(tasks)]
    norms = [float(part.norm()) for client in found for part in client]
    print(
        f"gradient norms {min(norms):.2f} to {max(norms):.2f}, shape {tuple(found[0][0].shape)}\n"
    )
    maps = []
    for title, setting in (("the paper's settings", PAPER), ("this configuration", OURS)):
        chosen = dict(setting)
        temperature = float(chosen.pop("temperature"))  # type: ignore[arg-type]
        scores = similarity(found, **chosen, seed=options.seed)  # type: ignore[arg-type]
        maps.append((title, weights(scores, temperature)))
        print(f"weights, {title}\n")
        table(maps[-1][1], names)
        print()
    study(found, groups, options.seed)
    if options.plot is not None:
        plot(options.plot, maps, names)


if __name__ == "__main__":
    main()
