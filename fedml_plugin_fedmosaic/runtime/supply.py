"""Samples that do not stream: kept away from training, public, or drawn again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.cost import PUBLIC_SHARE
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import derive_seed, python_random
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample
from fedml_plugin_fedmosaic.data.public import public_split, samples_at
from fedml_plugin_fedmosaic.data.stream import OnlineMemory, SeededDraws


def batch_size(experiment: Experiment) -> int:
    """Samples of one optimizer step."""
    return experiment.optim.batch_size * experiment.optim.grad_accumulation


def set_aside(
    data: ClientData, share: float, seed: int, purpose: str
) -> tuple[ClientData, tuple[Sample, ...]]:
    """A client without a share of every task's training samples, and these samples.

    Every task gives ``round(share * samples)``, at least one, and keeps at least one. What is set
    aside comes in turns from the tasks, so that its first part is from all of them.

    Args:
        data: of one client.
        share: in (0, 1).
        seed: root seed.
        purpose: names the draw.
    """
    kept: list[tuple[Sample, ...]] = []
    taken: list[list[Sample]] = []
    for task, samples in zip(data.tasks, data.train, strict=True):
        count = min(max(1, round(share * len(samples))), len(samples) - 1)
        rng = python_random(seed, purpose, data.client_id, task.name)
        chosen = set(rng.sample(range(len(samples)), max(count, 0)))
        taken.append([sample for index, sample in enumerate(samples) if index in chosen])
        kept.append(tuple(s for index, s in enumerate(samples) if index not in chosen))
    turns = itertools.zip_longest(*taken)
    aside = tuple(sample for turn in turns for sample in turn if sample is not None)
    return replace(data, train=tuple(kept)), aside


def with_public(
    experiment: Experiment, data: FederatedData
) -> tuple[FederatedData, tuple[Sample, ...]]:
    """The run's public samples, and the clients without them.

    They come from ``data.public`` if it is given, else from the ``public`` split below the data
    root if there is one, else from the clients: a share ``data.reserve`` of every task's training
    samples, which the clients then do not have.

    Args:
        experiment: the run.
        data: all clients.

    Raises:
        DataError: there are no public samples, or they are broken.
    """
    seed, config = experiment.common.random_seed, experiment.data
    pool: Sequence[Sample] = ()
    if config.public is not None:
        pool = samples_at(Path(config.public))
    elif config.root is not None:
        pool = public_split(Path(config.root))
    if not pool:
        parts = [set_aside(client, config.reserve, seed, "public") for client in data.clients]
        data = replace(data, clients=tuple(client for client, _ in parts))
        pool = list({sample.key: sample for _, taken in parts for sample in taken}.values())
    wanted = config.public_samples or max(
        1, round(PUBLIC_SHARE * experiment.optim.num_steps * batch_size(experiment))
    )
    if not pool:
        raise DataError(
            "this strategy needs public samples, and there are none",
            hint="name a file with data.public, or give the tasks more than one sample",
        )
    order = sorted(pool, key=lambda sample: sample.key)
    rng = python_random(seed, "public samples")
    chosen = rng.sample(range(len(order)), min(wanted, len(order)))
    return data, tuple(order[index] for index in sorted(chosen))


def shuffled_batches(
    samples: Sequence[Sample], num_steps: int, size: int, seed: int, *path: int | str
) -> list[list[Sample]]:
    """Batches of epochs in random order.

    Args:
        samples: at least one.
        num_steps: batches.
        size: samples of a batch.
        seed: root seed.
        path: names the order.
    """
    rng = python_random(seed, *path)
    order: list[Sample] = []
    while len(order) < num_steps * size:
        epoch = list(samples)
        rng.shuffle(epoch)
        order += epoch
    return [order[start : start + size] for start in range(0, num_steps * size, size)]


def balanced_batches(
    samples: Sequence[Sample], num_steps: int, size: int, seed: int, *path: int | str
) -> list[list[Sample]]:
    """Batches in which all answers of all tasks are equally frequent.

    Args:
        samples: at least one.
        num_steps: batches.
        size: samples of a batch.
        seed: root seed.
        path: names the draw.
    """
    count = len(samples)
    memory = OnlineMemory(capacity=count, items=tuple(range(count)), counts=(0.0,) * count)
    draws = SeededDraws(derive_seed(seed, *path), 0, 0)
    _, batches = memory.draw(
        (), num_steps, size, draws, lambda index: answer_group(samples[int(index)])
    )
    return [[samples[int(index)] for index in batch] for batch in batches]


def answer_group(sample: Sample) -> str:
    """Names the samples of a task with the same answer, for balanced batches."""
    return f"{sample.task}\n{sample.answer}"


def one_epoch(
    samples: Sequence[Sample], size: int, seed: int, *path: int | str
) -> list[list[Sample]]:
    """Batches of one epoch in random order; the last one may be smaller."""
    order = list(samples)
    python_random(seed, *path).shuffle(order)
    return [order[start : start + size] for start in range(0, len(order), size)]
