"""Online memory sampling: which samples a client trains on as its data arrive.

Source: the released code of FedMosaic (arXiv 2506.11024). Arriving samples enter a memory of
limited capacity; batches are drawn from it, seldom used samples first: with use counts c that
decay by 0.99 per batch, the next batch is drawn with probabilities softmax(-c / 0.125).

Class-balanced batches, the control that beat elaborate methods in FedMedICL (MICCAI 2024), draw a
group by the same rule first, then a sample of it: all groups are used equally often, however many
samples each has.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedml_plugin_fedmosaic.core.errors import CheckpointError, DataError
from fedml_plugin_fedmosaic.core.rng import python_random, torch_generator

SampleId = str | int
Batches = tuple[tuple[SampleId, ...], ...]

_DECAY = 0.99
_TEMPERATURE = 0.125


class Draws(Protocol):
    """The random decisions of one client's stream in one round."""

    exact_budget: bool
    """Whether batches are counted with integers (see :meth:`OnlineMemory.draw`)."""

    def evict(self, size: int) -> int:
        """The position, 0 .. size - 1, that leaves a full memory; uniform."""
        ...

    def choose(self, scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        """``count`` distinct positions, one after the other with probability ~ exp(scores)."""
        ...


class SeededDraws:
    """The package's own draws: a function of seed, client and round only.

    Args:
        seed: root seed of the run.
        client_id: the client.
        round_idx: 0-based round.
    """

    exact_budget = True

    def __init__(self, seed: int, client_id: int, round_idx: int) -> None:
        self._random = python_random(seed, "stream_evict", client_id, round_idx)
        self._generator = torch_generator(seed, "stream_choose", client_id, round_idx)

    def evict(self, size: int) -> int:
        """See :class:`Draws`."""
        return self._random.randrange(size)

    def choose(self, scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        """See :class:`Draws`; the Gumbel top-k trick, which cannot underflow."""
        waits = torch.empty(len(scores), dtype=torch.float64)
        waits.exponential_(generator=self._generator)
        keys = torch.from_numpy(scores) - waits.log_()
        positions: NDArray[np.int64] = torch.topk(keys, count).indices.numpy()
        return positions


class OfficialDraws:
    """The released code's draws, for parity: legacy numpy and Python generators, one per run.

    Args:
        seed: seed of both generators.
    """

    exact_budget = False

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - simulation, not cryptography
        self._numpy = np.random.RandomState(seed)

    def evict(self, size: int) -> int:
        """See :class:`Draws`."""
        return self._random.randrange(size)

    def choose(self, scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        """See :class:`Draws`."""
        weights = np.exp(scores - scores.max())
        chosen = self._numpy.choice(len(scores), count, replace=False, p=weights / weights.sum())
        return np.asarray(chosen, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineMemory:
    """A client's memory; immutable, so a round either happens as a whole or not at all.

    Attributes:
        capacity: samples that fit.
        items: ids of the remembered samples, oldest first.
        counts: decayed use count of each item.
    """

    capacity: int
    items: tuple[SampleId, ...] = ()
    counts: tuple[float, ...] = ()

    def draw(
        self,
        arrivals: Sequence[SampleId],
        num_batches: int,
        batch_size: int,
        draws: Draws,
        group_of: Callable[[SampleId], str] | None = None,
    ) -> tuple[OnlineMemory, Batches]:
        """Lets a round's samples arrive and draws its batches, evenly spread over the arrivals.

        Args:
            arrivals: ids of the round's new samples; may be empty if something is remembered.
            num_batches: batches to draw.
            batch_size: samples per batch; a memory that holds fewer repeats them in the batch.
            draws: random decisions. With its ``exact_budget`` false, batches are counted in
                floating point and at most one that was lost to rounding is added at the end, as
                the released code does; otherwise all ``num_batches`` are always drawn.
            group_of: the group of every sample that arrives or is remembered, for balanced
                batches; their use is counted anew in each call. None: groups play no role.

        Returns:
            The memory after the round, and the batches.

        Raises:
            DataError: nothing arrives and nothing is remembered, or a size below 1.
        """
        self._check(arrivals, num_batches, batch_size)
        working = (
            _Working(self, len(arrivals))
            if group_of is None
            else _BalancedWorking(self, len(arrivals), group_of)
        )
        batches: list[tuple[SampleId, ...]] = []
        budget = 0.0
        for index, item in enumerate(arrivals):
            working.add(item, draws)
            if draws.exact_budget:
                due = (index + 1) * num_batches // len(arrivals) - len(batches)
            else:
                budget += num_batches / len(arrivals)
                due = int(budget)
                budget -= due
            batches += [working.batch(batch_size, draws) for _ in range(due)]
        missing = num_batches - len(batches)
        if missing > 0:
            extra = missing if draws.exact_budget else 1
            batches += [working.batch(batch_size, draws) for _ in range(extra)]
        return working.frozen(), tuple(batches)

    def _check(self, arrivals: Sequence[SampleId], num_batches: int, batch_size: int) -> None:
        if min(self.capacity, num_batches, batch_size) < 1:
            raise DataError(
                f"online memory: capacity {self.capacity}, {num_batches} batches and batch size "
                f"{batch_size} must all be at least 1"
            )
        if not arrivals and not self.items:
            raise DataError(
                "online memory: no sample arrives and none is remembered",
                hint="give the client samples in its first round",
            )

    def to_state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "capacity": self.capacity,
            "items": list(self.items),
            "counts": list(self.counts),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> OnlineMemory:
        """Reads :meth:`to_state` back.

        Raises:
            CheckpointError: a value is missing, or items and counts do not belong together.
        """
        try:
            memory = cls(
                capacity=int(state["capacity"]),
                items=tuple(state["items"]),
                counts=tuple(float(count) for count in state["counts"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"online memory: the state cannot be read ({error!r})") from error
        if len(memory.items) != len(memory.counts):
            raise CheckpointError(
                f"online memory: {len(memory.items)} items but {len(memory.counts)} counts"
            )
        return memory


class _Working:
    """The mutable memory inside one round."""

    def __init__(self, memory: OnlineMemory, num_arrivals: int) -> None:
        self._capacity = memory.capacity
        self._items = list(memory.items)
        room = min(memory.capacity, len(memory.items) + num_arrivals)
        self._counts = np.zeros(max(room, len(memory.items)), dtype=np.float64)
        self._counts[: len(memory.counts)] = memory.counts

    def add(self, item: SampleId, draws: Draws) -> None:
        if len(self._items) >= self._capacity:
            self._remove(draws.evict(len(self._items)))
        self._append(item)

    def _remove(self, gone: int) -> None:
        size = len(self._items)
        del self._items[gone]
        self._counts[gone : size - 1] = self._counts[gone + 1 : size]

    def _append(self, item: SampleId) -> None:
        self._counts[len(self._items)] = 0
        self._items.append(item)

    def batch(self, batch_size: int, draws: Draws) -> tuple[SampleId, ...]:
        counts = self._counts[: len(self._items)]
        counts *= _DECAY
        chosen = draws.choose(-counts / _TEMPERATURE, min(len(counts), batch_size))
        counts[chosen] += 1
        return tuple(islice(cycle([self._items[position] for position in chosen]), batch_size))

    def frozen(self) -> OnlineMemory:
        return OnlineMemory(
            capacity=self._capacity,
            items=tuple(self._items),
            counts=tuple(self._counts[: len(self._items)].tolist()),
        )


class _BalancedWorking(_Working):
    """Draws every sample of a batch from the group that was used least.

    A group that appears starts with the smallest count of the others: it gets its share from then
    on, and does not make up for batches before its time.
    """

    def __init__(
        self, memory: OnlineMemory, num_arrivals: int, group_of: Callable[[SampleId], str]
    ) -> None:
        super().__init__(memory, num_arrivals)
        self._group_of = group_of
        self._numbers: dict[str, int] = {}
        self._uses: dict[int, float] = {}
        self._groups = np.zeros(len(self._counts), dtype=np.int64)
        self._groups[: len(self._items)] = [self._number(item) for item in self._items]

    def _number(self, item: SampleId) -> int:
        return self._numbers.setdefault(self._group_of(item), len(self._numbers))

    def _remove(self, gone: int) -> None:
        size = len(self._items)
        super()._remove(gone)
        self._groups[gone : size - 1] = self._groups[gone + 1 : size]

    def _append(self, item: SampleId) -> None:
        self._groups[len(self._items)] = self._number(item)
        super()._append(item)

    def batch(self, batch_size: int, draws: Draws) -> tuple[SampleId, ...]:
        counts = self._counts[: len(self._items)]
        counts *= _DECAY
        group_of = self._groups[: len(self._items)]
        groups = np.flatnonzero(np.bincount(group_of)).tolist()
        start = min(self._uses.values(), default=0.0)
        uses = np.array([self._uses.get(group, start) for group in groups]) * _DECAY
        members: dict[int, NDArray[np.int64]] = {}
        chosen = []
        for _ in range(batch_size):
            index = int(draws.choose(-uses / _TEMPERATURE, 1)[0])
            group = groups[index]
            if group not in members:
                members[group] = np.flatnonzero(group_of == group)
            positions = members[group]
            position = positions[draws.choose(-counts[positions] / _TEMPERATURE, 1)[0]]
            uses[index] += 1
            counts[position] += 1
            chosen.append(self._items[position])
        self._uses = dict(zip(groups, uses.tolist(), strict=True))
        return tuple(chosen)


def stream_only(arrivals: Sequence[SampleId], num_batches: int, batch_size: int) -> Batches:
    """Batches in order of arrival, without a memory.

    The released code trains less if too few samples arrive; here they are repeated in order, so
    that every round has the same number of optimizer steps.

    Args:
        arrivals: ids of the round's samples.
        num_batches: batches to make.
        batch_size: samples per batch.

    Returns:
        ``num_batches`` tuples of ``batch_size`` ids.

    Raises:
        DataError: no sample, or a size below 1.
    """
    if not arrivals or min(num_batches, batch_size) < 1:
        raise DataError(
            f"cannot make {num_batches} batches of {batch_size} from {len(arrivals)} samples"
        )
    endless = cycle(arrivals)
    return tuple(tuple(islice(endless, batch_size)) for _ in range(num_batches))
