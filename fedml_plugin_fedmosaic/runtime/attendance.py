"""Which clients are there in which round; the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.data.base import FederatedData
from fedml_plugin_fedmosaic.data.presence import presence, present_cohort
from fedml_plugin_fedmosaic.data.shifts import check_shift
from fedml_plugin_fedmosaic.runtime.arrivals import Arrivals


class Attendance:
    """Keeps clients that are away, or have no data yet, out of the cohorts.

    Args:
        experiment: the run.
        data: all clients.

    Raises:
        DataError: the options of the shift do not fit the data, or leave a round without clients.
    """

    def __init__(self, experiment: Experiment, data: FederatedData) -> None:
        shift, rounds = experiment.shift, experiment.train.comm_round
        self._seed = experiment.common.random_seed
        self._everyone = tuple(sorted(client.client_id for client in data.clients))
        self._rounds: tuple[tuple[int, ...], ...] | None = None
        check_shift(data, shift, rounds)
        if shift.moves_clients or shift.moves_data:
            first = {
                client.client_id: Arrivals(client, experiment).first_round
                for client in data.clients
            }
            self._rounds = presence(self._everyone, rounds, shift, self._seed, first)

    def present(self, round_idx: int) -> tuple[int, ...]:
        """Who is there, ascending."""
        return self._everyone if self._rounds is None else self._rounds[round_idx]

    def cohort(self, chosen: Collection[int], round_idx: int) -> tuple[int, ...]:
        """What a strategy selected, with absent clients replaced by others that are there."""
        if self._rounds is None:
            return tuple(chosen)
        return present_cohort(chosen, self._rounds[round_idx], self._seed, round_idx)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleTable:
    """Samples that arrive, and who is away, per client and round."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def schedule_table(experiment: Experiment, data: FederatedData) -> ScheduleTable:
    """When samples arrive and clients are there, as ``fedmosaic data schedule`` prints it.

    Args:
        experiment: the run.
        data: all clients.

    Raises:
        DataError: the options of the shift do not fit the data.
        ConfigError: the number of rounds does not fit ``rounds_per_task``.
    """
    attendance, count = Attendance(experiment, data), experiment.train.comm_round
    rows: list[tuple[str, ...]] = []
    for client in data.clients:
        shares = Arrivals(client, experiment).shares(count)
        rows.append(
            (
                str(client.client_id),
                *(
                    ("" if client.client_id in attendance.present(index) else "away ") + _tasks(ids)
                    for index, ids in enumerate(shares)
                ),
            )
        )
    names = [
        f"client {client.client_id}: "
        + ", ".join(f"{place} = {task.name}" for place, task in enumerate(client.tasks))
        for client in data.clients
    ]
    return ScheduleTable(
        columns=("client", *(f"round {index + 1}" for index in range(count))),
        rows=tuple(rows),
        notes=("TASK:SAMPLES that arrive; those of a client that is away wait for it", *names),
    )


def _tasks(items: Collection[str]) -> str:
    """``0:12 1:3``: samples per task."""
    counts = Counter(int(item.partition("/")[0]) for item in items)
    return " ".join(f"{task}:{number}" for task, number in sorted(counts.items())) or "-"
