"""What the tasks of a federation are like, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedml_plugin_fedmosaic.data.base import FederatedData, Sample
from fedml_plugin_fedmosaic.data.metrics import parse_choices


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStats:
    """Numbers of one task.

    Attributes:
        name: of the task.
        kind: how it is judged.
        clients: ids of those that have it.
        train: training samples of all clients together.
        test: test samples.
        images: largest number of images in a sample.
        distinct_images: image files of training and test together.
        shared_images: image files that are in both; 0 in a clean split.
        answers: different answers in the test set.
        majority: share of the most frequent one.
        words: mean number of words of a question.
    """

    name: str
    kind: str
    clients: tuple[int, ...]
    train: int
    test: int
    images: int
    distinct_images: int
    shared_images: int
    answers: int
    majority: float
    words: float


def task_stats(data: FederatedData) -> tuple[TaskStats, ...]:
    """Numbers of every task, in the order of the data."""
    return tuple(_one(data, name) for name in data.tasks)


def _one(data: FederatedData, name: str) -> TaskStats:
    owners: list[int] = []
    train: list[Sample] = []
    for client in data.clients:
        for task, rows in zip(client.tasks, client.train, strict=True):
            if task.name == name:
                owners.append(client.client_id)
                train += rows
    test = data.test[name]
    seen, tested = _images(train), _images(test)
    answers = Counter(sample.answer for sample in test)
    every = [*train, *test]
    return TaskStats(
        name=name,
        kind=data.tasks[name].kind,
        clients=tuple(owners),
        train=len(train),
        test=len(test),
        images=max((len(sample.images) for sample in every), default=0),
        distinct_images=len(seen | tested),
        shared_images=len(seen & tested),
        answers=len(answers),
        majority=max(answers.values()) / len(test) if test else 0.0,
        words=sum(len(sample.prompt.split()) for sample in every) / max(1, len(every)),
    )


def _images(samples: Sequence[Sample]) -> set[str]:
    return {str(path) for sample in samples for path in sample.images}


def num_choices(sample: Sample) -> int:
    """How many options a sample's prompt offers; 0 for an open question."""
    return len(parse_choices(sample.prompt, sample.answer))


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsTable:
    """Text cells, one row per task.

    Attributes:
        columns: headers.
        rows: cells.
        notes: one sentence per line below the table.
        num_left: leading text columns.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    num_left: int = 3


def stats_table(data: FederatedData) -> StatsTable:
    """The numbers of every task as a table."""
    found = task_stats(data)
    shared = [stats.name for stats in found if stats.shared_images]
    return StatsTable(
        columns=(
            "task", "kind", "clients", "train", "test", "images", "files", "shared", "answers",
            "majority", "words",
        ),
        rows=tuple(
            (
                stats.name, stats.kind, ", ".join(map(str, stats.clients)), str(stats.train),
                str(stats.test), str(stats.images), str(stats.distinct_images),
                str(stats.shared_images), str(stats.answers), f"{100 * stats.majority:.1f}",
                f"{stats.words:.0f}",
            )
            for stats in found
        ),
        notes=(
            "images: per sample; files: different images; shared: images in both training and "
            "test; majority: share of the most frequent answer of the test set in percent.",
            f"Images in both splits: {', '.join(shared)}." if shared
            else "No image is in both splits of a task.",
        ),
    )  # fmt: skip
