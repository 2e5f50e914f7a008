"""Mixing over ranks: which rows are computed together, and which bytes go where.

Rows of a channel fall into groups by a rule that looks at the plan only, and a group is always
computed as a whole over fixed tiles of its vectors; so the bits do not depend on the ranks. A group
travels one of two ways, whichever moves fewer bytes (equal: slices):

* directly: every source's vector goes to the ranks that own a receiver;
* in slices, as a reduce-scatter does it: every rank receives one range of tiles of all sources,
  computes all rows there, and sends its range of each row to the ranks that own its receivers.

For S sources and T rows of B bytes, spread evenly over R ranks, that is ``S B (R-1)`` against
``(S + T) B (R-1)/R`` bytes in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.codec import FLOAT_BYTES, Layout, new_floats
from fedml_plugin_fedmosaic.comm.exchange import Move, Scratch
from fedml_plugin_fedmosaic.core.types import MixRow
from fedml_plugin_fedmosaic.equations.mixing import TILE_COLUMNS, mix


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Rows that are computed together.

    Attributes:
        layout: of all sources and receivers.
        sources: ascending client ids.
        weights: one tuple per different row, over ``sources``; 0 where a row does not name it.
        targets: the receivers of each row, ascending.
    """

    layout: Layout
    sources: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    targets: tuple[tuple[int, ...], ...]

    def mix(self, pieces: Sequence[Tensor]) -> Tensor:
        """All rows, (rows, width), of the sources' pieces (width,), which start at a tile."""
        if pieces[0].numel() == 0:
            return torch.empty(len(self.weights), 0)
        return mix(pieces, torch.tensor(self.weights, dtype=torch.float64))


def row_groups(rows: Sequence[MixRow], layouts: Mapping[int, Layout]) -> tuple[RowGroup, ...]:
    """Groups of a channel's rows; a function of the plan only.

    Rows of one layout that name at least half of all their sources on average make one group, so
    that every source is read once for all; otherwise rows with the same sources do.

    Args:
        rows: of one channel.
        layouts: of all sources.
    """
    by_layout: dict[str, list[MixRow]] = {}
    for row in sorted(rows, key=lambda row: row.target):
        by_layout.setdefault(layouts[row.sources[0]].digest, []).append(row)
    groups: list[RowGroup] = []
    for members in by_layout.values():
        union = tuple(sorted({client for row in members for client in row.sources}))
        named = sum(len(row.sources) for row in members)
        if 2 * named >= len(members) * len(union):
            parts = {union: members}
        else:
            parts = {}
            for row in members:
                parts.setdefault(row.sources, []).append(row)
        for sources, together in parts.items():
            groups.append(_group(layouts[sources[0]], sources, together))
    return tuple(groups)


def _group(layout: Layout, sources: tuple[int, ...], rows: Sequence[MixRow]) -> RowGroup:
    targets: dict[tuple[float, ...], list[int]] = {}
    for row in rows:
        given = dict(zip(row.sources, row.weights, strict=True))
        weights = tuple(given.get(client, 0.0) for client in sources)
        targets.setdefault(weights, []).append(row.target)
    return RowGroup(
        layout=layout,
        sources=sources,
        weights=tuple(targets),
        targets=tuple(tuple(clients) for clients in targets.values()),
    )


def tile_shares(length: int, size: int) -> tuple[slice, ...]:
    """Rank -> its range of a vector's entries; bounds are bounds of tiles."""
    tiles = -(-length // TILE_COLUMNS)
    bounds = [min(tiles * rank // size * TILE_COLUMNS, length) for rank in range(size + 1)]
    return tuple(slice(bounds[rank], bounds[rank + 1]) for rank in range(size))


@dataclass(frozen=True, kw_only=True)
class Route:
    """How one group travels; the same on every rank.

    Attributes:
        group: the rows.
        owners: client -> rank, for all sources and receivers.
        size: number of ranks.
    """

    group: RowGroup
    owners: Mapping[int, int]
    size: int

    @cached_property
    def shares(self) -> tuple[slice, ...]:
        """Rank -> its range when the group travels in slices."""
        return tile_shares(self.group.layout.numel, self.size)

    @cached_property
    def receivers(self) -> tuple[frozenset[int], ...]:
        """Row -> the ranks that own its receivers."""
        return tuple(
            frozenset(self.owners[client] for client in clients) for clients in self.group.targets
        )

    @cached_property
    def readers(self) -> frozenset[int]:
        """Ranks that own a receiver of any row."""
        return frozenset[int]().union(*self.receivers)

    @cached_property
    def direct_bytes(self) -> int:
        """Bytes that all ranks send together if every source goes to all readers."""
        pairs = sum(len(self.readers - {self.owners[c]}) for c in self.group.sources)
        return pairs * self.group.layout.num_bytes

    @cached_property
    def slice_bytes(self) -> int:
        """Bytes that all ranks send together if the group travels in slices."""
        total = 0
        for rank, share in enumerate(self.shares):
            foreign = sum(self.owners[client] != rank for client in self.group.sources)
            answers = sum(len(ranks - {rank}) for ranks in self.receivers)
            total += (foreign + answers) * (share.stop - share.start) * FLOAT_BYTES
        return total

    @property
    def in_slices(self) -> bool:
        """The way that moves fewer bytes."""
        return self.size > 1 and self.slice_bytes <= self.direct_bytes


def planned_bytes(routes: Sequence[Route]) -> int:
    """Bytes that all ranks send together for one channel; a vector goes to a rank once."""
    pairs: dict[tuple[int, int], int] = {}
    total = 0
    for route in routes:
        if route.in_slices:
            total += route.slice_bytes
            continue
        for client in route.group.sources:
            for rank in route.readers - {route.owners[client]}:
                pairs[client, rank] = route.group.layout.num_bytes
    return total + sum(pairs.values())


class ChannelMixer:
    """Executes the rows of one channel on one rank.

    Args:
        routes: of all groups.
        rank: this rank.
        vectors: this rank's own sources, float32 (D,) by client id.
        move: exchanges tensors with the other ranks.
        scratch: room for received sources.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        rank: int,
        vectors: Mapping[int, Tensor],
        move: Move,
        scratch: Scratch,
    ) -> None:
        self._routes = routes
        self._rank = rank
        self._vectors = vectors
        self._move = move
        self._scratch = scratch
        self._mixed: dict[int, tuple[Layout, Tensor]] = {}

    def run(self) -> dict[int, tuple[Layout, Tensor]]:
        """Receiver -> layout and float32 (D,), for this rank's receivers.

        No two vectors share memory with each other.
        """
        direct = [route for route in self._routes if not route.in_slices]
        fetched = self._fetch(direct)
        for route in direct:
            if self._rank in route.readers:
                mixed = route.group.mix([fetched[client] for client in route.group.sources])
                self._deliver(route, dict(enumerate(mixed)))
        del fetched
        for route in self._routes:
            if route.in_slices:
                self._deliver(route, self._answers(route, self._mix_slice(route)))
        return dict(sorted(self._mixed.items()))

    def _fetch(self, routes: Sequence[Route]) -> dict[int, Tensor]:
        """All vectors that this rank's receivers need, and sends its own to whom needs them."""
        readers: dict[int, set[int]] = {}
        layouts: dict[int, Layout] = {}
        owners: dict[int, int] = {}
        for route in routes:
            for client in route.group.sources:
                readers.setdefault(client, set()).update(route.readers)
                layouts[client], owners[client] = route.group.layout, route.owners[client]
        found: dict[int, Tensor] = {}
        absent = [
            client
            for client in sorted(readers)
            if owners[client] != self._rank and self._rank in readers[client]
        ]
        room = self._scratch.take([layouts[client].numel for client in absent])
        found.update(zip(absent, room, strict=True))
        receives = [(owners[client], found[client]) for client in absent]
        sends = []
        for client in sorted(readers):
            if owners[client] == self._rank:
                found[client] = self._vectors[client]
                sends += [(rank, found[client]) for rank in sorted(readers[client] - {self._rank})]
        self._move(sends, receives)
        return found

    def _mix_slice(self, route: Route) -> Tensor:
        """All rows of this rank's range, (rows, width)."""
        own = route.shares[self._rank]
        pieces: list[Tensor] = []
        sends, receives = [], []
        foreign = sum(route.owners[client] != self._rank for client in route.group.sources)
        room = iter(self._scratch.take([own.stop - own.start] * foreign))
        for client in route.group.sources:
            if route.owners[client] == self._rank:
                vector = self._vectors[client]
                pieces.append(vector[own])
                for rank, share in enumerate(route.shares):
                    if rank != self._rank:
                        sends.append((rank, vector[share]))
            else:
                pieces.append(next(room))
                receives.append((route.owners[client], pieces[-1]))
        self._move(sends, receives)
        return route.group.mix(pieces)

    def _answers(self, route: Route, mixed: Tensor) -> dict[int, Tensor]:
        """The whole rows that this rank's receivers get, by row."""
        own = route.shares[self._rank]
        rows: dict[int, Tensor] = {}
        sends, receives = [], []
        for index, ranks in enumerate(route.receivers):
            sends += [(rank, mixed[index]) for rank in sorted(ranks - {self._rank})]
            if self._rank in ranks:
                rows[index] = new_floats(route.group.layout.numel)
                rows[index][own] = mixed[index]
                for rank, share in enumerate(route.shares):
                    if rank != self._rank:
                        receives.append((rank, rows[index][share]))
        self._move(sends, receives)
        return rows

    def _deliver(self, route: Route, rows: Mapping[int, Tensor]) -> None:
        for index, clients in enumerate(route.group.targets):
            own = [client for client in clients if route.owners[client] == self._rank]
            for place, client in enumerate(own):
                vector = rows[index].clone() if place else rows[index]
                self._mixed[client] = (route.group.layout, vector)
