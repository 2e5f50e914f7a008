"""Which ranks train which clients: a pure function of the world's size and the clients' costs.

The ranks of a job are split into groups. Every client belongs to one group for the whole run, and
a group has exactly as many ranks as its clients need. Clients of equal need are spread over their
groups by the rule *longest processing time first* (R. L. Graham, Bounds on Multiprocessing Timing
Anomalies, SIAM J. Appl. Math. 17(2), 1969): the most expensive client first, each to the group with
the least work so far. The longest group then works at most 4/3 - 1/(3m) times as long as in the
best split over m groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedml_plugin_fedmosaic.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLoad:
    """What a client asks of the ranks.

    Attributes:
        client_id: who.
        ranks: ranks that train it together, at least 1.
        cost: work of one round in any unit that all clients share, finite and not negative.
    """

    client_id: int
    ranks: int
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """Ranks that train their clients together, one client after the other.

    Attributes:
        index: position among the groups, 0-based.
        ranks: ranks of the job, ascending and without gaps; the first one leads.
        clients: client ids, the most expensive first; empty for an idle rank.
        cost: sum of the clients' costs.
    """

    index: int
    ranks: tuple[int, ...]
    clients: tuple[int, ...]
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Every rank in one group, every client in one group.

    Attributes:
        groups: by index. Groups of many ranks come first; idle ranks, each a group of its own
            without clients, come last.
    """

    groups: tuple[RankGroup, ...]

    @property
    def size(self) -> int:
        """Ranks of the job."""
        return sum(len(group.ranks) for group in self.groups)

    @property
    def idle(self) -> tuple[int, ...]:
        """Ranks without a client."""
        return tuple(rank for group in self.groups if not group.clients for rank in group.ranks)

    @property
    def owners(self) -> dict[int, int]:
        """Client id -> index of its group, ascending by client id."""
        return dict(
            sorted((client, group.index) for group in self.groups for client in group.clients)
        )

    def group_of(self, rank: int) -> int:
        """Index of a rank's group.

        Raises:
            KeyError: the job has no such rank.
        """
        for group in self.groups:
            if rank in group.ranks:
                return group.index
        raise KeyError(f"rank {rank} of a job with {self.size} ranks")

    def owner(self, client_id: int) -> int:
        """Index of a client's group.

        Raises:
            KeyError: no such client.
        """
        return self.owners[client_id]

    def describe(self) -> list[tuple[str, str]]:
        """One (label, value) line per group that has clients, and one for the idle ranks."""
        total = sum(group.cost for group in self.groups)
        lines = []
        for group in self.groups:
            if group.clients:
                share = group.cost / total if total else 0.0
                text = f"{_ranks_text(group.ranks)}: {_clients_text(group.clients)}"
                lines.append((f"group {group.index}", f"{text}, {share:.0%} of the work"))
        if self.idle:
            lines.append(("idle", f"{_ranks_text(self.idle)}: more ranks than the clients can use"))
        return lines

    def to_json(self) -> dict[str, object]:
        """JSON values for the run folder."""
        return {
            "size": self.size,
            "groups": [
                {
                    "index": group.index,
                    "ranks": list(group.ranks),
                    "clients": list(group.clients),
                    "cost": group.cost,
                }
                for group in self.groups
            ],
        }


def _ranks_text(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {ranks[0]}-{ranks[-1]}"


def _clients_text(clients: Sequence[int], shown: int = 8) -> str:
    names = ", ".join(str(client) for client in clients[:shown])
    more = len(clients) - shown
    word = "client" if len(clients) == 1 else "clients"
    return f"{word} {names}" + (f" and {more} more" if more > 0 else "")


def smallest_world(loads: Sequence[ClientLoad]) -> int:
    """Fewest ranks that can train all clients: one group for every need that occurs."""
    return sum({load.ranks for load in loads})


def plan_topology(world_size: int, loads: Sequence[ClientLoad]) -> Topology:
    """Splits the ranks into groups and gives every client a group.

    The number of groups per need is chosen so that the longest group is as short as the rule in
    the module docstring makes it; what is left shortens the other groups. The same input, in any
    order, gives the same topology.

    Args:
        world_size: ranks of the job.
        loads: one entry per client, in any order.

    Raises:
        ConfigError: the world is smaller than :func:`smallest_world`, a client occurs twice, or a
            need or cost is out of range.
    """
    _check(world_size, loads)
    kinds: dict[int, list[ClientLoad]] = {}
    for load in sorted(loads, key=lambda item: (-item.cost, item.client_id)):
        kinds.setdefault(load.ranks, []).append(load)
    counts = _group_counts(world_size, kinds)
    groups: list[RankGroup] = []
    next_rank = 0
    for need in sorted(kinds, reverse=True):
        for share in _longest_first(kinds[need], counts[need]):
            groups.append(
                RankGroup(
                    index=len(groups),
                    ranks=tuple(range(next_rank, next_rank + need)),
                    clients=tuple(load.client_id for load in share),
                    cost=math.fsum(load.cost for load in share),
                )
            )
            next_rank += need
    for rank in range(next_rank, world_size):
        groups.append(RankGroup(index=len(groups), ranks=(rank,), clients=(), cost=0.0))
    return Topology(groups=tuple(groups))


def _check(world_size: int, loads: Sequence[ClientLoad]) -> None:
    if world_size < 1:
        raise ConfigError(f"a job has at least 1 rank, got {world_size}")
    seen: set[int] = set()
    for load in loads:
        if load.client_id in seen:
            raise ConfigError(f"client {load.client_id} occurs twice among the loads")
        seen.add(load.client_id)
        if load.ranks < 1:
            raise ConfigError(
                f"client {load.client_id} needs {load.ranks} ranks; expected 1 or more"
            )
        if not (math.isfinite(load.cost) and load.cost >= 0):
            raise ConfigError(
                f"client {load.client_id} has cost {load.cost}; expected a finite number >= 0"
            )
    needed = smallest_world(loads)
    if world_size < needed:
        needs = sorted({load.ranks for load in loads}, reverse=True)
        largest = next(load for load in loads if load.ranks == needs[0])
        have = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise ConfigError(
            f"{have} cannot train these clients: client {largest.client_id} needs {needs[0]} "
            f"ranks, and one group each of {' + '.join(map(str, needs))} makes {needed}",
            hint=f"start at least {needed} ranks: --backend MPI -np {needed}",
        )


def _longest_first(loads: Sequence[ClientLoad], num_groups: int) -> list[list[ClientLoad]]:
    """Splits loads, already longest first, over groups; every group gets at least one."""
    shares: list[list[ClientLoad]] = [[] for _ in range(num_groups)]
    totals = [0.0] * num_groups
    for load in loads:
        # The number of clients decides between groups with equal work, such as clients at no cost.
        least = min(range(num_groups), key=lambda i: (totals[i], len(shares[i]), i))
        shares[least].append(load)
        totals[least] += load.cost
    return shares


def _longest(loads: Sequence[ClientLoad], num_groups: int) -> float:
    """Work of the longest group."""
    return max(
        math.fsum(load.cost for load in share) for share in _longest_first(loads, num_groups)
    )


def _group_counts(world_size: int, kinds: Mapping[int, Sequence[ClientLoad]]) -> dict[int, int]:
    """Number of groups per need.

    Raises the count of the need with the longest group, as far as the ranks reach and as long as
    that makes it shorter; then spreads what is left over the other needs in the same way.
    """
    counts = dict.fromkeys(kinds, 1)
    spare = world_size - sum(kinds)
    lengths = {need: _longest(loads, 1) for need, loads in kinds.items()}
    growing = set(kinds)
    while growing:
        need = max(growing, key=lambda item: (lengths[item], item))
        better = _next_shorter(kinds[need], counts[need], lengths[need], spare // need)
        if better is None:
            growing.discard(need)
            continue
        spare -= (better - counts[need]) * need
        counts[need] = better
        lengths[need] = _longest(kinds[need], better)
    # One more group may not shorten the longest of its need, but it shortens another.
    for need in sorted(kinds, key=lambda item: (-lengths[item], -item)):
        extra = min(spare // need, len(kinds[need]) - counts[need])
        counts[need] += extra
        spare -= extra * need
    return counts


def _next_shorter(loads: Sequence[ClientLoad], count: int, length: float, more: int) -> int | None:
    """The smallest larger count with a shorter longest group, or None."""
    for candidate in range(count + 1, min(count + more, len(loads)) + 1):
        if _longest(loads, candidate) < length:
            return candidate
    return None


__all__ = ["ClientLoad", "RankGroup", "Topology", "plan_topology", "smallest_world"]
