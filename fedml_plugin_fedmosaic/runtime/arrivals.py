"""A client's data over time: which samples arrive in a round, and the round's batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import CheckpointError, ConfigError, DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import ClientData, Sample
from fedml_plugin_fedmosaic.data.partition import split_dynamic, split_static
from fedml_plugin_fedmosaic.data.shifts import arrivals
from fedml_plugin_fedmosaic.data.stream import OnlineMemory, SampleId, SeededDraws, stream_only
from fedml_plugin_fedmosaic.runtime.supply import answer_group


class Arrivals:
    """The stream of one client.

    Samples that arrive while the client sits rounds out wait for its next round. The same seed
    gives every strategy the same samples in the same order.

    Args:
        data: the client's training samples per task, in time order.
        experiment: the run.

    Raises:
        ConfigError: the number of rounds does not fit ``rounds_per_task``.
        DataError: the client has no samples, or fewer than rounds.
    """

    def __init__(self, data: ClientData, experiment: Experiment) -> None:
        self._client_id = data.client_id
        self._num_tasks = len(data.tasks)
        self._config = experiment.data
        self._shift = experiment.shift
        self._batch_size = experiment.optim.batch_size * experiment.optim.grad_accumulation
        self._seed = experiment.common.random_seed
        self._samples: dict[str, Sample] = {
            f"{task}/{position}": sample
            for task, samples in enumerate(data.train)
            for position, sample in enumerate(samples)
        }
        self._rounds = self._split(data, experiment.train.comm_round)
        self._next_round = 0
        self._memory = OnlineMemory(capacity=experiment.data.memory_size)

    def _split(self, data: ClientData, num_rounds: int) -> list[tuple[str, ...]]:
        ids = [
            [f"{task}/{position}" for position in range(len(samples))]
            for task, samples in enumerate(data.train)
        ]
        rng = python_random(self._seed, "arrival order", data.client_id)
        per_task = self._config.rounds_per_task
        if per_task is not None and int(per_task * len(ids)) != num_rounds:
            raise ConfigError(
                f"client {data.client_id} has {len(ids)} tasks: data.rounds_per_task {per_task:g} "
                f"makes {int(per_task * len(ids))} rounds, but train_args.comm_round is "
                f"{num_rounds}",
                hint="leave rounds_per_task out to spread the tasks over all rounds",
            )
        try:
            if self._shift.moves_data:
                return self._shifted(data, num_rounds)
            if self._config.split == "static":
                shares = split_static(ids, num_rounds, rng)
            else:
                shares = split_dynamic(ids, per_task or num_rounds / len(ids), rng)
        except DataError as error:
            raise DataError(f"client {data.client_id}: {error.message}", hint=error.hint) from error
        return [share.items for share in shares]

    def _shifted(self, data: ClientData, num_rounds: int) -> list[tuple[str, ...]]:
        rounds = arrivals(
            data, num_rounds=num_rounds, data=self._config, shift=self._shift, seed=self._seed
        )
        empty = [index + 1 for index, items in enumerate(rounds) if not items]
        if empty and self._config.stream == "stream_only":
            raise DataError(
                f"no sample arrives in round {', '.join(map(str, empty[:8]))} of {num_rounds}",
                hint="stream: memory draws from what arrived before",
            )
        return [tuple(f"{task}/{position}" for task, position in items) for items in rounds]

    @property
    def first_round(self) -> int | None:
        """0-based round in which the first sample arrives; None for never."""
        return next((index for index, items in enumerate(self._rounds) if items), None)

    def batches(self, round_idx: int, num_steps: int) -> Sequence[Sequence[Sample]]:
        """The batches of a round, one per optimizer step; call once per round, in order."""
        arrived = [
            item for share in self._rounds[self._next_round : round_idx + 1] for item in share
        ]
        self._next_round = round_idx + 1
        if self._config.stream == "stream_only":
            drawn = stream_only(arrived, num_steps, self._batch_size)
        else:
            draws = SeededDraws(self._seed, self._client_id, round_idx)
            group_of = self._group if self._config.stream == "balanced" else None
            self._memory, drawn = self._memory.draw(
                arrived, num_steps, self._batch_size, draws, group_of
            )
        return [[self._samples[str(item)] for item in batch] for batch in drawn]

    def _group(self, item: SampleId) -> str:
        return answer_group(self._samples[str(item)])

    def shares(self, num_rounds: int) -> tuple[tuple[str, ...], ...]:
        """Ids of the samples that arrive in each of the first rounds."""
        return tuple(self._rounds[:num_rounds])

    def task_rounds(self, num_rounds: int) -> tuple[tuple[int, int] | None, ...]:
        """For each task the first and the last 0-based round in which its samples arrive.

        None for a task of which nothing arrives in the first ``num_rounds`` rounds.
        """
        found: dict[int, list[int]] = {}
        for round_idx, items in enumerate(self._rounds[:num_rounds]):
            for task in {int(item.partition("/")[0]) for item in items}:
                found.setdefault(task, []).append(round_idx)
        return tuple(
            (found[task][0], found[task][-1]) if task in found else None
            for task in range(self._num_tasks)
        )

    def arrived(self, num_rounds: int) -> tuple[Sample, ...]:
        """All samples of the first rounds, in order of arrival."""
        return tuple(self._samples[item] for share in self.shares(num_rounds) for item in share)

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"next_round": self._next_round, "memory": self._memory.to_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state`.

        Raises:
            CheckpointError: the state names samples that the client does not have.
        """
        memory = OnlineMemory.from_state(state["memory"])
        unknown = [item for item in memory.items if item not in self._samples]
        if unknown:
            raise CheckpointError(
                f"client {self._client_id}: the checkpoint remembers sample {unknown[0]!r}, which "
                "the data no longer hold",
                hint="resume with the data of the original run",
            )
        self._memory = memory
        self._next_round = int(state["next_round"])
