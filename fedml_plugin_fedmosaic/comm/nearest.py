"""The most similar clients of each client as a reduction over ranks, without the matrix of pairs.

Every rank receives all sketches as vectors, which must be short (``sketch.floats``: 16 kB for 4,096
numbers), and searches for its own tiles of receivers; the answers then go to everybody. With M
clients, D numbers per vector, k neighbours and R ranks, the ranks send together
``4 M D (R-1) + 16 M k (R-1)`` bytes. A tile is always searched as a whole, so the bits do not
depend on the ranks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.exchange import Move
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import NearestQuery, Neighbours
from fedml_plugin_fedmosaic.equations.neighbours import RECEIVER_TILE, nearest
from fedml_plugin_fedmosaic.equations.relevance import Similarity, unit_columns


@dataclass(frozen=True, kw_only=True)
class VectorTable:
    """Who holds which vector; the same on every rank.

    Attributes:
        clients: everyone that is asked about, ascending.
        owners: the rank that holds each of their sketches.
        length: numbers of a vector.
        size: number of ranks.
    """

    clients: tuple[int, ...]
    owners: tuple[int, ...]
    length: int
    size: int

    def held(self, rank: int) -> list[int]:
        """Positions of the clients whose sketches a rank holds."""
        return [place for place, owner in enumerate(self.owners) if owner == rank]


def asked_about(queries: Sequence[NearestQuery]) -> tuple[int, ...]:
    """All clients of the queries, ascending."""
    return tuple(sorted({c for query in queries for c in (*query.receivers, *query.sources)}))


def queries_digest(kind: Similarity, queries: Sequence[NearestQuery]) -> str:
    """Hash of the queries; ranks compare it before they move vectors.

    Raises:
        PlanError: ids are not ascending.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for query in queries:
        for ids in (query.receivers, query.sources):
            if any(first >= second for first, second in pairwise(ids)):
                raise PlanError("receivers and sources of a query must be ascending client ids")
            digest.update(array("q", (len(ids), query.k)))
            digest.update(array("q", ids))
    return digest.hexdigest()


def as_vector(kind: Similarity, sketch: Tensor) -> Tensor:
    """(entries,) float32, whose cosines are the similarity of this kind.

    A sketch of one column, which ``sketch.floats`` makes, is such a vector for both kinds.
    """
    if kind == "columns" and sketch.shape[1] > 1:
        return unit_columns(sketch)[0]
    return sketch.reshape(-1)


def find_nearest(
    table: VectorTable,
    rank: int,
    kind: Similarity,
    sketches: Mapping[int, Tensor],
    queries: Sequence[NearestQuery],
    move: Move,
) -> tuple[Neighbours, ...]:
    """The answers, on every rank.

    Args:
        table: who holds which vector.
        rank: this rank.
        kind: which similarity.
        sketches: those that this rank holds, float32 (rows, columns), by client id.
        queries: what is asked; the same on every rank.
        move: exchanges tensors with the other ranks.

    Raises:
        PlanError: a sketch is not finite, or too long for a search.
    """
    vectors = _gather(table, rank, kind, sketches, move)
    position = {client: place for place, client in enumerate(table.clients)}
    return tuple(_answer(table, rank, vectors, position, query, move) for query in queries)


def _gather(
    table: VectorTable, rank: int, kind: Similarity, sketches: Mapping[int, Tensor], move: Move
) -> Tensor:
    """(clients, length) float32: everyone's vector."""
    vectors = torch.empty(len(table.clients), table.length)
    places = {other: table.held(other) for other in range(table.size)}
    for place in places[rank]:
        vectors[place] = as_vector(kind, sketches[table.clients[place]])
    if table.size > 1:
        own = vectors[places[rank]]
        rooms = {
            other: torch.empty(len(held), table.length)
            for other, held in places.items()
            if other != rank and held
        }
        others = [other for other in range(table.size) if other != rank and len(own)]
        move([(other, own) for other in others], [*rooms.items()])
        for other, values in rooms.items():
            vectors[places[other]] = values
    return vectors


def _answer(
    table: VectorTable,
    rank: int,
    vectors: Tensor,
    position: Mapping[int, int],
    query: NearestQuery,
    move: Move,
) -> Neighbours:
    members = sorted({*query.receivers, *query.sources})
    inside = {client: place for place, client in enumerate(members)}
    part = vectors
    if len(members) < len(vectors):
        part = vectors[[position[client] for client in members]]
    parts = [_share(other, table.size, len(members)) for other in range(table.size)]
    found = nearest(
        part, query.k, sources=[inside[c] for c in query.sources], receivers=parts[rank]
    )
    indices, cosines = _spread(found, parts, rank, len(members), move)
    wanted = torch.tensor([inside[client] for client in query.receivers], dtype=torch.int64)
    ids = torch.tensor([*members, -1], dtype=torch.int64)  # -1 stays -1
    return Neighbours(
        receivers=query.receivers, sources=ids[indices[wanted]], cosines=cosines[wanted]
    )


def _share(rank: int, size: int, count: int) -> slice:
    """The receivers that a rank searches for: whole tiles."""
    tiles = -(-count // RECEIVER_TILE)
    first, last = (tiles * place // size * RECEIVER_TILE for place in (rank, rank + 1))
    return slice(min(first, count), min(last, count))


def _spread(
    found: tuple[Tensor, Tensor], parts: Sequence[slice], rank: int, count: int, move: Move
) -> tuple[Tensor, Tensor]:
    """All ranks' rows, on every rank."""
    whole = tuple(torch.empty(count, values.shape[1], dtype=values.dtype) for values in found)
    others = [other for other in range(len(parts)) if other != rank]
    for values, target in zip(found, whole, strict=True):
        target[parts[rank]] = values
        if values.shape[1] == 0:
            continue
        # Rows lie one after the other, so each part is received in its place.
        own = [(other, target[parts[rank]]) for other in others if len(values)]
        rest = [(other, target[parts[other]]) for other in others if _length(parts[other])]
        move(own, rest)
    return whole[0], whole[1]


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length
