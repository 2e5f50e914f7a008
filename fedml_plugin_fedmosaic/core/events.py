"""What happens in a run, as typed events; consumers (progress, metrics, plots) are sinks.

The runtime emits; nobody below it does. One line of ``metrics.jsonl`` is ``to_record(event)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events; ``strategy`` says which part of the run it belongs to."""

    strategy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """Before round 1 of one strategy."""

    num_rounds: int
    num_clients: int
    clients_per_round: int
    run_dir: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStarted(Event):
    """The cohort is known."""

    round_idx: int
    cohort: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsDone(Event):
    """A client has finished some optimizer steps (for progress bars; not stored)."""

    round_idx: int
    client_id: int
    steps: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTrained(Event):
    """One pass of one client is over. ``mean_loss`` is over the pass's steps, in nats.

    ``flops`` are the estimated floating-point operations of its forward and backward passes.
    """

    round_idx: int
    client_id: int
    pass_name: str
    num_steps: int
    num_examples: int
    num_tokens: int
    mean_loss: float
    duration_s: float
    flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientProbed(Event):
    """A client has looked at models without training them."""

    round_idx: int
    client_id: int
    probe_name: str
    num_models: int
    num_examples: int
    duration_s: float
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientReported(Event):
    """What a strategy says about one client in a round: ``report`` of its header's notes.

    Entries of ``values`` with ``replaced`` say what was compared and replaced.
    """

    round_idx: int
    client_id: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientDropped(Event):
    """A client of the cohort did not deliver; it goes on from its state before the round.

    ``stage`` is where it failed: "prepare", "fit", "sketch", "finish", "update" (what it sent was
    refused) or "deadline".
    """

    round_idx: int
    client_id: int
    stage: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSkipped(Event):
    """Too few clients delivered: nothing was mixed, everyone keeps its last downlink."""

    round_idx: int
    delivered: int
    needed: int
    cohort_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanMade(Event):
    """Relevance and mixing weights, receivers as rows; None where unknown.

    ``groups`` says which group a client is in; None if the strategy does not look for any.
    """

    round_idx: int
    relevance: tuple[tuple[float | None, ...], ...] | None
    weights: tuple[tuple[float | None, ...], ...] | None
    groups: Mapping[int, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFinished(Event):
    """Bytes are per client in the order of the cohort (uplink) and of ``receivers``."""

    round_idx: int
    duration_s: float
    uplink_bytes: Mapping[int, int]
    downlink_bytes: Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """One client's model scored on one task.

    ``scope`` is "self" if the task is one of the client's own, else "others". ``round_idx`` is
    the number of finished rounds minus one; -1 is the base model. ``final`` marks the last one.
    """

    round_idx: int
    client_id: int
    view: str
    scope: Literal["self", "others"]
    task: str
    metric: str
    value: float
    num_samples: int
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProgress(Event):
    """Evaluation work done so far (for progress bars; not stored)."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(Event):
    """After finalisation and the last evaluation of one strategy.

    Wall-clock seconds of all lives of a run that was resumed; work that was done again counts once.
    """

    duration_s: float
    train_s: float


class EventSink(Protocol):
    """A consumer of events."""

    def __call__(self, event: Event) -> None:
        """Takes one event; must not raise for an event type it does not know."""
        ...


TRANSIENT: tuple[type[Event], ...] = (StepsDone, EvaluationProgress)
"""Events for the screen only; they are not written to ``metrics.jsonl``."""


_LASTING: Mapping[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        RunStarted,
        RoundStarted,
        ClientTrained,
        ClientProbed,
        ClientReported,
        ClientDropped,
        RoundSkipped,
        PlanMade,
        RoundFinished,
        Evaluated,
        RunFinished,
    )
}


def to_record(event: Event) -> dict[str, Any]:
    """The event as a JSON-ready dictionary with its type under ``event``."""
    return {"event": type(event).__name__, **asdict(event)}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def from_record(record: Mapping[str, Any]) -> Event | None:
    """The inverse of :func:`to_record`.

    Args:
        record: one JSON object of ``metrics.jsonl``.

    Returns:
        The event; None for an event type that this version does not know.

    Raises:
        KeyError: the record has no ``event`` or lacks a field.
    """
    kind = _LASTING.get(record["event"])
    if kind is None:
        return None
    values: dict[str, Any] = {}
    for item in fields(kind):
        if item.name not in record and item.default is not MISSING:
            continue
        value = record[item.name]
        if item.name.endswith("_bytes"):
            value = {int(key): int(number) for key, number in value.items()}
        elif item.name == "groups" and value is not None:
            value = {int(key): str(name) for key, name in value.items()}
        values[item.name] = _tuples(value)
    return kind(**values)
