"""Clients that join, leave and return.

Source: the setting of FedTAP, in which tasks and clients come and go. A schedule is a function of
the options and the root seed. A client that is away is not selected and receives what the server
has for it when it is back; its samples wait for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fedml_plugin_fedmosaic.config.shift import ShiftConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random


def presence(
    client_ids: Sequence[int],
    num_rounds: int,
    shift: ShiftConfig,
    seed: int,
    first_data: Mapping[int, int | None] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Who is there in which round.

    Clients of ``shift.present`` follow their list. Of the others, ``late_share`` join at a random
    later round; then each goes away with chance ``leave_rate`` per round and comes back with
    chance ``return_rate``. Rounds with fewer than ``min_present`` are filled up with clients drawn
    from those that are away by chance.

    Args:
        client_ids: all clients.
        num_rounds: rounds of the run.
        shift: the options.
        seed: root seed.
        first_data: client id -> 0-based round in which its first sample arrives, None for never;
            before that it is away. All have data from the beginning when omitted.

    Returns:
        For each round the clients that are there, ascending.

    Raises:
        DataError: fewer than ``min_present`` clients can be there in some round.
    """
    everyone, listed = sorted(client_ids), shift.attendance
    movable = [client for client in everyone if client not in listed]
    joins = _joins(movable, num_rounds, shift.late_share, seed)
    there = {client: _walk(client, joins[client], num_rounds, shift, seed) for client in movable}
    for client in set(everyone) & set(listed):
        ranges = listed[client]
        there[client] = [
            any(first <= index + 1 <= last for first, last in ranges) for index in range(num_rounds)
        ]
    begin = dict.fromkeys(everyone, 0) if first_data is None else dict(first_data)
    rounds: list[tuple[int, ...]] = []
    for index in range(num_rounds):
        ready = [client for client in everyone if _has_begun(begin[client], index)]
        present = {client for client in ready if there[client][index]}
        spare = [client for client in ready if client in joins and client not in present]
        missing = min(shift.min_present, len(everyone)) - len(present)
        if missing > len(spare):
            raise DataError(
                f"round {index + 1}: {len(present)} clients are there and {len(spare)} could come "
                f"back, but shift.min_present is {shift.min_present}",
                hint="change shift.present or shift.windows, or lower min_present",
            )
        if missing > 0:
            present |= {*python_random(seed, "come back", index).sample(spare, missing)}
        rounds.append(tuple(sorted(present)))
    return tuple(rounds)


def present_cohort(
    chosen: Collection[int], present: Collection[int], seed: int, round_idx: int
) -> tuple[int, ...]:
    """The cohort with absent clients replaced by others that are there, as far as there are any.

    If ``chosen`` is a uniform draw from all clients, the result is one from those present.

    Args:
        chosen: what the strategy selected.
        present: who is there.
        seed: root seed.
        round_idx: 0-based round.

    Returns:
        Ascending ids; ``min(len(chosen), len(present))`` of them.
    """
    kept = set(chosen) & set(present)
    spare = sorted(set(present) - kept)
    missing = min(len(chosen) - len(kept), len(spare))
    drawn = python_random(seed, "stand in", round_idx).sample(spare, missing)
    return tuple(sorted(kept | set(drawn)))


def _has_begun(first: int | None, round_idx: int) -> bool:
    return first is not None and first <= round_idx


def _joins(clients: Sequence[int], num_rounds: int, late_share: float, seed: int) -> dict[int, int]:
    """Client id -> 0-based round in which it joins."""
    rng = python_random(seed, "late clients")
    late = set(rng.sample(clients, round(late_share * len(clients)))) if num_rounds > 1 else set()
    return {client: rng.randrange(1, num_rounds) if client in late else 0 for client in clients}


def _walk(client: int, joins: int, num_rounds: int, shift: ShiftConfig, seed: int) -> list[bool]:
    """A two-state chain that is away until the client joins."""
    rng = python_random(seed, "presence", client)
    path: list[bool] = []
    for index in range(num_rounds):
        if index <= joins:
            path.append(index == joins)
        elif path[-1]:
            path.append(rng.random() >= shift.leave_rate)
        else:
            path.append(rng.random() < shift.return_rate)
    return path
