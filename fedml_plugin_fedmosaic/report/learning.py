"""Scores of every task over the rounds: forgetting, forward transfer, and where tasks begin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedml_plugin_fedmosaic.core.events import Evaluated
from fedml_plugin_fedmosaic.data.continual import Curve, forgetting, forward_transfer
from fedml_plugin_fedmosaic.report.records import Schedule

Scores = Mapping[int, Mapping[int, Mapping[str, Evaluated]]]
"""Round -> client -> task -> evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What is known of the clients' data over time.

    Attributes:
        tasks: client id -> its tasks in time order.
        rounds: when their samples arrive, in the order of ``tasks`` and as many; empty if the run
            folder does not say.
        untrained: client id -> task -> score of the untouched base model; empty without it.
    """

    tasks: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    rounds: Schedule = field(default_factory=dict)
    untrained: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


def task_curves(scores: Scores) -> dict[int, dict[str, dict[int, float]]]:
    """Client -> task -> round -> score, rounds ascending."""
    curves: dict[int, dict[str, dict[int, float]]] = {}
    for round_idx, clients in sorted(scores.items()):
        for client_id, tasks in clients.items():
            for task, event in tasks.items():
                line = curves.setdefault(client_id, {}).setdefault(task, {})
                line[round_idx] = event.value
    return curves


def forgetting_of(scores: Scores, stream: Stream) -> dict[int, float]:
    """Mean forgetting of each client's tasks whose samples no longer arrive, in [-1, 1].

    Clients without such a task are left out; see :func:`data.continual.forgetting`.
    """
    return _over_tasks(
        scores, stream, lambda curve, first, last, _client, _task: forgetting(curve, first, last)
    )


def forward_transfer_of(scores: Scores, stream: Stream) -> dict[int, float]:
    """Mean forward transfer over each client's later tasks, in [-1, 1].

    Clients without a task that begins after an evaluation, or without scores of the base model, are
    left out; see :func:`data.continual.forward_transfer`.
    """

    def transfer(curve: Curve, first: int, _last: int, client_id: int, task: str) -> float | None:
        base = stream.untrained.get(client_id, {}).get(task)
        return None if base is None else forward_transfer(curve, first, base)

    return _over_tasks(scores, stream, transfer)


def _over_tasks(
    scores: Scores,
    stream: Stream,
    measure: Callable[[Curve, int, int, int, str], float | None],
) -> dict[int, float]:
    curves = task_curves(scores)
    found: dict[int, float] = {}
    for client_id, rounds in stream.rounds.items():
        values = []
        if client_id not in stream.tasks:  # nothing says which tasks these rounds belong to
            continue
        for task, arrival in zip(stream.tasks[client_id], rounds, strict=True):
            curve = curves.get(client_id, {}).get(task)
            if arrival is not None and curve:
                value = measure(curve, *arrival, client_id, task)
                if value is not None:
                    values.append(value)
        if values:
            found[client_id] = sum(values) / len(values)
    return dict(sorted(found.items()))


def task_boundaries(schedule: Schedule) -> tuple[int, ...]:
    """0-based rounds in which a new task begins at most of the clients; empty for static data.

    Clients with other numbers of tasks begin theirs in other rounds; a boundary of a few clients
    says nothing about a mean over all of them.
    """
    begins = Counter(
        round_idx
        for tasks in schedule.values()
        for round_idx in {arrival[0] for arrival in tasks if arrival is not None and arrival[0] > 0}
    )
    return tuple(sorted(r for r, count in begins.items() if 2 * count > len(schedule)))


def position_curves(scores: Scores, stream: Stream) -> dict[int, dict[int, float]]:
    """Mean over the clients of the score on their first task, their second, and so on.

    Returns:
        0-based position of the task -> round -> mean over the clients that have a score there.
    """
    curves = task_curves(scores)
    sums: dict[int, dict[int, list[float]]] = {}
    for client_id, names in stream.tasks.items():
        for place, task in enumerate(names):
            for round_idx, value in curves.get(client_id, {}).get(task, {}).items():
                sums.setdefault(place, {}).setdefault(round_idx, []).append(value)
    return {
        place: {r: sum(values) / len(values) for r, values in sorted(rounds.items())}
        for place, rounds in sorted(sums.items())
    }
