"""How a client's tasks are spread over the rounds: PFL-Dynamic and PFL-Static.

Source: FedMosaic (arXiv 2506.11024), evaluation protocol. In PFL-Dynamic the tasks arrive one
after the other, in PFL-Static all at once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Generic, Literal, TypeVar

from fedml_plugin_fedmosaic.core.errors import DataError

Item = TypeVar("Item")
Arithmetic = Literal["exact", "official"]

_MAX_DENOMINATOR = 10_000


@dataclass(frozen=True, slots=True)
class RoundShare(Generic[Item]):
    """What arrives at a client in one round.

    Attributes:
        items: the arriving samples, in order; at least one.
        task: 0-based task at the beginning of the round; 0 for PFL-Static.
    """

    items: tuple[Item, ...]
    task: int


def split_dynamic(
    tasks: Sequence[Sequence[Item]],
    rounds_per_task: float,
    rng: random.Random,
    *,
    arithmetic: Arithmetic = "exact",
) -> tuple[RoundShare[Item], ...]:
    """PFL-Dynamic: each task is shuffled once; round q takes the interval [q/R, (q+1)/R] of tasks.

    Args:
        tasks: samples per task, in the order in which the tasks arrive.
        rounds_per_task: R > 0; 0.5 puts two tasks into a round.
        rng: shuffles the tasks, in order.
        arithmetic: ``exact`` cuts at exact fractions; ``official`` at floating-point ones as the
            released code does, which moves a cut by one sample now and then.

    Returns:
        ``floor(R * number of tasks)`` rounds.

    Raises:
        DataError: no task, R not positive, no whole round, or a round without a sample.
    """
    if not tasks or not rounds_per_task > 0:
        raise DataError(
            f"cannot spread {len(tasks)} tasks over {rounds_per_task} rounds per task",
            hint="set data.rounds_per_task to a positive number",
        )
    shuffled = [_shuffled(task, rng) for task in tasks]
    rate: Fraction | float = rounds_per_task
    if arithmetic == "exact":
        rate = Fraction(rounds_per_task).limit_denominator(_MAX_DENOMINATOR)
    rounds = []
    for round_idx in range(_num_rounds(rate, len(tasks))):
        begin, end = round_idx / rate, (round_idx + 1) / rate
        items: list[Item] = []
        for position, task in enumerate(shuffled):
            low, high = max(begin - position, 0), min(end - position, 1)
            if high > low:
                items += task[int(low * len(task)) : int(high * len(task))]
        rounds.append(RoundShare(tuple(items), int(begin)))
    return _without_gaps(rounds)


def split_static(
    tasks: Sequence[Sequence[Item]], num_rounds: int, rng: random.Random
) -> tuple[RoundShare[Item], ...]:
    """PFL-Static: all tasks shuffled together and cut into equal rounds.

    As in the released code the remainder, fewer samples than rounds, is left out.

    Args:
        tasks: samples per task.
        num_rounds: rounds of the run, at least 1.
        rng: shuffles the samples.

    Returns:
        ``num_rounds`` rounds of ``floor(samples / num_rounds)`` samples, all of task 0.

    Raises:
        DataError: fewer samples than rounds, or no round.
    """
    if num_rounds < 1:
        raise DataError(f"cannot spread samples over {num_rounds} rounds; expected at least 1")
    items = _shuffled(list(chain.from_iterable(tasks)), rng)
    size = len(items) // num_rounds
    return _without_gaps(
        [RoundShare(tuple(items[at * size : (at + 1) * size]), 0) for at in range(num_rounds)]
    )


def task_start_rounds(num_tasks: int, rounds_per_task: float) -> tuple[int, ...]:
    """The 0-based round in which each task of PFL-Dynamic begins: ``floor(R k)``."""
    rate = Fraction(rounds_per_task).limit_denominator(_MAX_DENOMINATOR)
    return tuple(int(rate * task) for task in range(num_tasks))


def _shuffled(items: Sequence[Item], rng: random.Random) -> list[Item]:
    copy = list(items)
    rng.shuffle(copy)
    return copy


def _num_rounds(rate: Fraction | float, num_tasks: int) -> int:
    count = int(rate * num_tasks)
    if count < 1:
        raise DataError(
            f"{float(rate):g} rounds per task and {num_tasks} tasks make no whole round",
            hint="set data.rounds_per_task to at least 1 / number of tasks",
        )
    return count


def _without_gaps(rounds: list[RoundShare[Item]]) -> tuple[RoundShare[Item], ...]:
    empty = [index + 1 for index, share in enumerate(rounds) if not share.items]
    if empty:
        raise DataError(
            f"no sample arrives in round {', '.join(map(str, empty[:8]))} of {len(rounds)}",
            hint="use fewer rounds or raise data.max_train_samples",
        )
    return tuple(rounds)
