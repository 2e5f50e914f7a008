"""Measures what there is to learn in an experiment, task by task, without a federation.

A task is worth federating if images matter (the blind model stays near the majority baseline), if
the base model leaves something to learn, and if central training shows that it can be learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.events import EvaluationProgress, EventSink
from fedml_plugin_fedmosaic.core.registry import DATASETS
from fedml_plugin_fedmosaic.core.rng import derive_seed, python_random
from fedml_plugin_fedmosaic.core.types import Branch, View
from fedml_plugin_fedmosaic.core.work import Pass
from fedml_plugin_fedmosaic.data.base import FederatedData, Sample
from fedml_plugin_fedmosaic.engine.models import ModelBundle, load_model
from fedml_plugin_fedmosaic.engine.processor import Batch, Processor
from fedml_plugin_fedmosaic.engine.quantize import check_quantised
from fedml_plugin_fedmosaic.engine.torch import TorchEngine

CENTRAL_EFFORT = 6
"""Steps of central training relative to one client's steps in the whole run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadroomTable:
    """Text cells; the last row is the mean over the tasks.

    Attributes:
        columns: headers; a newline starts a second line.
        rows: cells.
        notes: one sentence per line below the table.
        num_left: leading text columns.
        num_footer: rows at the end that sum up the others.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    num_left: int = 1
    num_footer: int = 1


class _BlindProcessor(Processor):
    """Encodes as another processor does, with all images blanked."""

    def __init__(self, source: Processor) -> None:
        # Shares the other's memory of encoded texts.
        self.__dict__.update(vars(source))

    def _batch(self, samples: Sequence[Sample], paths: Sequence[Path], batch: Batch) -> Batch:
        full = super()._batch(samples, paths, batch)
        if "pixel_values" in full:
            full["pixel_values"] = torch.zeros_like(full["pixel_values"])
        return full


def majority(samples: Sequence[Sample]) -> float:
    """Accuracy of always giving the most frequent answer."""
    return max(Counter(sample.answer for sample in samples).values()) / len(samples)


def headroom(
    experiment: Experiment,
    sinks: Sequence[EventSink] = (),
    *,
    num_steps: int | None = None,
) -> HeadroomTable:
    """Majority, blind, base and central accuracy of every task and model.

    ``blind`` and ``central`` train plain LoRA on all clients' samples pooled; ``blind`` sees blank
    images in training and in the test.

    Args:
        experiment: validated configuration.
        sinks: receive progress.
        num_steps: optimizer steps of each training; six times one client's when omitted.

    Raises:
        ConfigError: a client's model is not configured, or a model cannot be loaded.
        DataError: the data are broken.
    """
    if experiment.device.num_threads is not None:
        torch.set_num_threads(experiment.device.num_threads)
    data: FederatedData = DATASETS[experiment.data.source](experiment.data)
    names = sorted({client.model_id for client in data.clients})
    unknown = [name for name in names if name not in experiment.models]
    if unknown:
        raise ConfigError(
            f"the scenario's model {unknown[0]!r} is not among model_args.models",
            hint=f"configured: {', '.join(sorted(experiment.models)) or 'none'}",
        )
    steps = num_steps or CENTRAL_EFFORT * experiment.train.comm_round * experiment.optim.num_steps
    check_quantised({name: experiment.models[name] for name in names}, names)
    results: dict[str, Mapping[str, Mapping[str, float]]] = {}
    for index, name in enumerate(names):
        results[name] = _measure(experiment, data, name, steps)
        for sink in sinks:
            sink(EvaluationProgress(strategy="headroom", done=index + 1, total=len(names)))
    return _table(data, results, steps)


def _measure(
    experiment: Experiment, data: FederatedData, name: str, steps: int
) -> Mapping[str, Mapping[str, float]]:
    """Task -> ``base``, ``blind`` and ``central`` of one model."""
    device = torch.device("cuda" if experiment.device.using_gpu else "cpu")
    bundle = load_model(name, experiment.models[name], device)
    blind = replace(bundle, processor=_BlindProcessor(bundle.processor))
    scores: dict[str, dict[str, float]] = {task: {} for task in data.tasks}
    for kind, chosen in (("central", bundle), ("blind", blind)):
        engine = _engine(experiment, chosen)
        try:
            if kind == "central":
                for task, spec in data.tasks.items():
                    score = engine.evaluate(None, View.BASE, data.test[task], spec)
                    scores[task]["base"] = score.value
            seed = derive_seed(experiment.common.random_seed, "headroom", name, kind)
            trained = engine.fit(
                Pass(
                    name=kind,
                    view=View.LOCAL,
                    train=frozenset({Branch.LOCAL}),
                    num_steps=steps,
                ),
                engine.initial_adapter(),
                _batches(experiment, data, steps),
                seed=seed,
            )
            for task, spec in data.tasks.items():
                score = engine.evaluate(trained.adapter, View.LOCAL, data.test[task], spec)
                scores[task][kind] = score.value
        finally:
            engine.close()
    return scores


def _engine(experiment: Experiment, bundle: ModelBundle) -> TorchEngine:
    return TorchEngine(
        bundle,
        experiment.adapter,
        "lora",
        experiment.optim,
        experiment.evaluation,
        experiment.common.random_seed,
    )


def _batches(experiment: Experiment, data: FederatedData, steps: int) -> list[list[Sample]]:
    """Batches over all clients' samples: epochs in random order."""
    pool = [sample for client in data.clients for rows in client.train for sample in rows]
    size = experiment.optim.batch_size * experiment.optim.grad_accumulation
    rng = python_random(experiment.common.random_seed, "headroom batches")
    order: list[Sample] = []
    while len(order) < steps * size:
        epoch = list(pool)
        rng.shuffle(epoch)
        order += epoch
    return [order[start : start + size] for start in range(0, steps * size, size)]


def _table(
    data: FederatedData, results: Mapping[str, Mapping[str, Mapping[str, float]]], steps: int
) -> HeadroomTable:
    kinds = ("blind", "base", "central")
    columns = ["task", "rows", "images", "majority"]
    columns += [f"{name}\n{kind}" for name in results for kind in kinds]
    rows_of: Counter[str] = Counter()
    for client in data.clients:
        for spec, rows in zip(client.tasks, client.train, strict=True):
            rows_of[spec.name] += len(rows)
    numbers: list[list[float]] = []
    cells: list[tuple[str, ...]] = []
    for task in data.tasks:
        values = [majority(data.test[task])]
        values += [results[name][task][kind] for name in results for kind in kinds]
        numbers.append(values)
        images = max(len(sample.images) for sample in data.test[task])
        cells.append((task, str(rows_of[task]), str(images), *map(_percent, values)))
    means = [sum(column) / len(column) for column in zip(*numbers, strict=True)]
    cells.append(("mean", "", "", *map(_percent, means)))
    return HeadroomTable(
        columns=tuple(columns),
        rows=tuple(cells),
        notes=(
            "Accuracy in percent on the test sets. rows: training samples of all clients together.",
            f"blind, central: plain LoRA on all of them, {steps} steps; blind sees blank images.",
        ),
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
