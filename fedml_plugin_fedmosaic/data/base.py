"""Samples, tasks and clients' data as frozen records; the contract of a data set loader.

A loader is a function ``(DataConfig) -> FederatedData`` on the data set shelf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

AnswerKind = Literal["multi-choice", "open-ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """One task (a data set's subset) as a scenario file names it."""

    dataset: str
    subset_id: int
    kind: AnswerKind = "open-ended"
    metric: str | None = None

    @property
    def name(self) -> str:
        """``<dataset>-<subset_id>``, the task's name everywhere."""
        return f"{self.dataset}-{self.subset_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question, with its images and answer.

    Attributes:
        sample_id: unique inside its task and split.
        task: name of the task.
        turns: conversation texts, user first, alternating; ``<image>`` marks stand for images.
        images: files in the order of the marks.
        attributes: further fields of the sample with one value each, by name.
    """

    sample_id: str
    task: str
    turns: tuple[str, ...]
    images: tuple[Path, ...] = ()
    attributes: tuple[tuple[str, str | int | float], ...] = ()

    @property
    def key(self) -> str:
        """``<task>/<sample_id>``: unique in a data set's split."""
        return f"{self.task}/{self.sample_id}"

    @property
    def prompt(self) -> str:
        """The first user turn."""
        return self.turns[0]

    @property
    def answer(self) -> str:
        """The first assistant turn: the gold answer."""
        return self.turns[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientData:
    """A client of a scenario with its samples, per task in time order."""

    client_id: int
    model_id: str
    tasks: tuple[TaskSpec, ...]
    train: tuple[tuple[Sample, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FederatedData:
    """All clients, and one test set per task (clients that share a task share its test set)."""

    name: str
    clients: tuple[ClientData, ...]
    test: Mapping[str, tuple[Sample, ...]]
    tasks: Mapping[str, TaskSpec]
