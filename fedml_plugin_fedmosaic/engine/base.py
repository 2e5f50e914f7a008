"""Contract of an engine: trains and evaluates one model with swappable adapters.

One engine holds one base model and one adapter structure; clients of the same signature take
turns on it by swapping adapter tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedml_plugin_fedmosaic.core.types import AdapterState, LocalResult, Pass, View
from fedml_plugin_fedmosaic.data.base import Sample, TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the rest of the program may know of a base model."""

    name: str
    family: str
    size: str
    signature: str
    num_layers: int
    num_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Result of one task's evaluation: ``value`` is in [0, 1] (accuracy, F1 or ROUGE-L)."""

    task: str
    value: float
    num_samples: int
    metric: str


class Engine(Protocol):
    """Local training and evaluation.

    Attributes:
        info: the base model.
    """

    info: ModelInfo

    def initial_adapter(self) -> AdapterState:
        """Freshly initialised adapter tensors; the same for every client of this engine."""
        ...

    def layouts(self) -> Mapping[str, str]:
        """Channel -> digest of share keys and shapes of the uploaded (local) branch."""
        ...

    def fit(
        self,
        pass_: Pass,
        adapter: AdapterState,
        batches: Sequence[Sequence[Sample]],
        *,
        seed: int,
    ) -> LocalResult:
        """Trains ``pass_.num_steps`` optimizer steps, one item of ``batches`` per step."""
        ...

    def evaluate(
        self,
        adapter: AdapterState | None,
        view: View,
        samples: Sequence[Sample],
        task: TaskSpec,
    ) -> Score:
        """Scores one task; ``adapter=None`` means the untouched base model."""
        ...
