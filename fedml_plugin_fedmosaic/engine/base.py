"""Contract of an engine: trains and evaluates one model with swappable adapters.

One engine holds one base model and one adapter structure; clients of the same signature take
turns on it by swapping adapter tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedml_plugin_fedmosaic.core.types import AdapterState, OptimizerState, View
from fedml_plugin_fedmosaic.core.work import FitProgress, LocalResult, Pass
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
    linears: tuple[str, ...] = ()
    """Last names of the linears of a decoder layer, ascending: what ``all-linear`` stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Result of one task's evaluation: ``value`` is in [0, 1] (accuracy, F1 or ROUGE-L)."""

    task: str
    value: float
    num_samples: int
    metric: str


StepCallback = Callable[[int, int], None]
"""Called after every optimizer step with (steps done, steps in all)."""

ShouldStop = Callable[[], bool]
"""Asked between two optimizer steps; an engine of several ranks agrees among them on the answer."""


class FitStopped(Exception):
    """A pass was stopped between two steps, as it was asked to.

    Args:
        progress: where to go on.
    """

    def __init__(self, progress: FitProgress) -> None:
        super().__init__(f"stopped after {len(progress.losses)} steps")
        self.progress = progress


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
        on_step: StepCallback | None = None,
        moments: OptimizerState | None = None,
        progress: FitProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> LocalResult:
        """Trains ``pass_.num_steps`` optimizer steps, one item of ``batches`` per step.

        ``moments`` are those of the client's last round; ``progress`` goes on where an earlier
        call with the same arguments was stopped. Raises :class:`FitStopped` when ``should_stop``
        says so before the last step.
        """
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
