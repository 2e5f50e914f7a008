"""Similarity of the clients' sketches as a reduction over ranks: which bytes go where.

The sum over the fixed column segments is the same whoever computes which segment, so both ways
give the same bits:

* by columns: every rank computes some segments between all clients, from slices of everyone's
  sketches; the sums travel once along the ranks, in the order of the segments, and back;
* by rows: every rank receives the fresh sketches whole, computes all segments between these and
  its own clients, and sends its part of the result to all others.

With M clients of which F are fresh, R ranks, and sketches of B bytes, the ranks send together
about ``M B (R-1)/R + 16 (R-1) (F+1) M`` or ``F B (R-1) + 8 (R-1) (F+1) M`` bytes; the exact
numbers are computed from the table of owners, and the smaller one is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.exchange import Move, Scratch
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.equations.relevance import (
    Similarity,
    column_segments,
    finish_similarity,
    segment_products,
)

_FLOAT_BYTES = 4
_SUM_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class SketchTable:
    """Who holds which sketch; the same on every rank.

    Attributes:
        kind: which similarity.
        shape: rows and columns of a sketch.
        clients: everyone with a sketch, ascending.
        owners: the rank that holds each of their sketches.
        fresh: positions in ``clients`` of those whose sketch is new, ascending.
        size: number of ranks.
    """

    kind: Similarity
    shape: tuple[int, int]
    clients: tuple[int, ...]
    owners: tuple[int, ...]
    fresh: tuple[int, ...]
    size: int

    @cached_property
    def segments(self) -> tuple[slice, ...]:
        """The column segments."""
        return column_segments(*self.shape)

    @cached_property
    def shares(self) -> tuple[tuple[slice, ...], ...]:
        """Rank -> the consecutive segments that it computes when the work goes by columns."""
        bounds = [len(self.segments) * rank // self.size for rank in range(self.size + 1)]
        return tuple(self.segments[bounds[r] : bounds[r + 1]] for r in range(self.size))

    def held(self, rank: int, among: Iterable[int]) -> list[int]:
        """The positions whose sketches a rank holds."""
        return [position for position in among if self.owners[position] == rank]

    @property
    def _sums_bytes(self) -> int:
        return _SUM_BYTES * (len(self.fresh) + 1) * len(self.clients)

    @cached_property
    def column_bytes(self) -> int:
        """Bytes that all ranks send together when the work goes by columns."""
        rows, everyone = self.shape[0], range(len(self.clients))
        foreign = [len(self.clients) - len(self.held(r, everyone)) for r in range(self.size)]
        widths = [sum(s.stop - s.start for s in share) for share in self.shares]
        slices: int = sum(count * width for count, width in zip(foreign, widths, strict=True))
        active = sum(bool(share) for share in self.shares)
        hops = (active - 1) + (self.size - 1)
        return _FLOAT_BYTES * rows * slices + self._sums_bytes * hops

    @cached_property
    def row_bytes(self) -> int:
        """Bytes that all ranks send together when the work goes by rows."""
        foreign = sum(len(self.fresh) - len(self.held(rank, self.fresh)) for rank in {*self.owners})
        sketch_bytes = _FLOAT_BYTES * self.shape[0] * self.shape[1]
        return sketch_bytes * foreign + self._sums_bytes * (self.size - 1)

    @property
    def by_columns(self) -> bool:
        """The way that moves fewer bytes."""
        return self.column_bytes <= self.row_bytes

    @property
    def moved_bytes(self) -> int:
        """Bytes that all ranks send together."""
        return min(self.column_bytes, self.row_bytes)


def sketch_problem(client: int, sketch: Tensor) -> str | None:
    """Why a sketch cannot be compared; None if it can."""
    if sketch.ndim != 2 or sketch.numel() == 0:
        return f"client {client}: the sketch has shape {tuple(sketch.shape)}, not (rows, columns)"
    if sketch.dtype != torch.float32 or sketch.device.type != "cpu":
        return (
            f"client {client}: the sketch is {sketch.dtype} on {sketch.device}; expected "
            "torch.float32 on the CPU"
        )
    # The sum is finite nearly always and is ten times faster than looking at every value.
    if not bool(sketch.sum().isfinite()) and not bool(sketch.isfinite().all()):
        return f"client {client}: the sketch holds NaN or infinite values"
    return None


def reduce_similarity(
    table: SketchTable,
    rank: int,
    sketches: Mapping[int, Tensor],
    move: Move,
    scratch: Scratch,
) -> Tensor:
    """The similarities of all clients, on every rank.

    Args:
        table: who holds which sketch.
        rank: this rank.
        sketches: those that this rank holds, float32, by client id.
        move: exchanges tensors with the other ranks.
        scratch: room for slices of sketches.

    Returns:
        (clients, clients) float64, NaN between two different clients that are both not fresh.

    Raises:
        PlanError: a fresh sketch is not finite.
    """
    run = _Reduction(table, rank, sketches, move, scratch)
    sums = run.by_columns() if table.by_columns else run.by_rows()
    count = len(table.clients)
    total = torch.full((count, count), float("nan"), dtype=torch.float64)
    fresh = torch.tensor(table.fresh, dtype=torch.int64)
    total.diagonal().copy_(sums[-1])
    total[fresh] = sums[:-1]
    total[:, fresh] = sums[:-1].T
    return finish_similarity(total, table.kind, table.shape[1])


class _Reduction:
    """One reduction on one rank. Sums are (fresh + 1, clients): fresh rows, then the diagonal."""

    def __init__(
        self,
        table: SketchTable,
        rank: int,
        sketches: Mapping[int, Tensor],
        move: Move,
        scratch: Scratch,
    ) -> None:
        self.table = table
        self.rank = rank
        self.sketches = [sketches.get(client) for client in table.clients]
        self.move = move
        self.scratch = scratch
        self.fresh = torch.tensor(table.fresh, dtype=torch.int64)
        self.room: list[Tensor] = []

    def empty_sums(self) -> Tensor:
        return torch.zeros(len(self.fresh) + 1, len(self.table.clients), dtype=torch.float64)

    def by_columns(self) -> Tensor:
        active = [rank for rank in range(self.table.size) if self.table.shares[rank]]
        everyone = range(len(self.table.clients))
        total, later = self.empty_sums(), list[Tensor]()
        for step in range(max(map(len, self.table.shares))):
            jobs = [share[step] if step < len(share) else None for share in self.table.shares]
            pieces = self.exchange(jobs, everyone)
            if pieces is None:
                continue
            sums = self.sums_of(pieces)
            if self.rank == active[0]:
                total += sums
            else:  # earlier segments are added first
                later.append(sums)
        place = active.index(self.rank) if self.rank in active else None
        if place:
            self.move([], [(active[place - 1], total)])
            for sums in later:
                total += sums
        if place is not None and self.rank != active[-1]:
            self.move([(active[place + 1], total)], [])
        if self.rank == active[-1]:
            others = [rank for rank in range(self.table.size) if rank != self.rank]
            self.move([(rank, total) for rank in others], [])
        else:
            self.move([], [(active[-1], total)])
        return total

    def by_rows(self) -> Tensor:
        table = self.table
        holders = sorted({*table.owners})
        total = self.empty_sums()
        for segment in table.segments:
            jobs = [segment if rank in holders else None for rank in range(table.size)]
            pieces = self.exchange(jobs, table.fresh)
            if pieces is not None:
                total += self.sums_of(pieces)
        parts = {
            rank: torch.tensor(table.held(rank, range(len(table.clients)))) for rank in holders
        }
        others = [rank for rank in range(table.size) if rank != self.rank]
        own = total[:, parts[self.rank]].contiguous() if self.rank in parts else None
        received = {
            rank: torch.empty(len(total), len(part), dtype=torch.float64)
            for rank, part in parts.items()
            if rank != self.rank
        }
        self.move([] if own is None else [(rank, own) for rank in others], [*received.items()])
        for rank, values in received.items():
            total[:, parts[rank]] = values
        return total

    def exchange(self, jobs: Sequence[slice | None], senders: Sequence[int]) -> list[Tensor] | None:
        """One column segment per rank, of the senders' sketches.

        Returns:
            This rank's segment of every sketch; zeros where it is neither held nor received; None
            if this rank has no segment.
        """
        table, rows, own = self.table, self.table.shape[0], jobs[self.rank]
        held = table.held(self.rank, senders)
        others = [rank for rank in range(table.size) if rank != self.rank]
        # A segment that several ranks compute is packed once.
        wanted = {job.start: job for rank in others if (job := jobs[rank]) is not None}
        outgoing = list(wanted.values()) if held else []
        shapes = [(len(held), rows, job.stop - job.start) for job in outgoing]
        incoming: list[tuple[int, list[int]]] = []
        if own is not None:
            positions = [(rank, table.held(rank, senders)) for rank in others]
            incoming = [(rank, theirs) for rank, theirs in positions if theirs]
            shapes += [(len(theirs), rows, own.stop - own.start) for _, theirs in incoming]
        room = self.scratch.take([math.prod(shape) for shape in shapes])
        views = [vector.view(shape) for vector, shape in zip(room, shapes, strict=True)]
        packed, filled = views[: len(outgoing)], views[len(outgoing) :]
        for job, view in zip(outgoing, packed, strict=True):
            torch.stack([*self._columns(held, job)], out=view)
        by_start = {job.start: view for job, view in zip(outgoing, packed, strict=True)}
        self.move(
            [(r, by_start[job.start]) for r in others if held and (job := jobs[r]) is not None],
            [(rank, view) for (rank, _), view in zip(incoming, filled, strict=True)],
        )
        if own is None:
            return None
        nothing = torch.zeros(1, 1).expand(rows, own.stop - own.start)
        pieces = [nothing if s is None else s[:, own] for s in self.sketches]
        for (_, theirs), view in zip(incoming, filled, strict=True):
            for position, piece in zip(theirs, view, strict=True):
                pieces[position] = piece
        return pieces

    def _columns(self, positions: Iterable[int], segment: slice) -> Iterator[Tensor]:
        for position in positions:
            sketch = self.sketches[position]
            if sketch is None:
                raise PlanError(
                    f"the sketch of client {self.table.clients[position]} is not on rank "
                    f"{self.rank}, which owns the client"
                )
            yield sketch[:, segment]

    def sums_of(self, pieces: Sequence[Tensor]) -> Tensor:
        """Rows of the fresh clients, and the diagonal, of one segment's products."""
        products = segment_products(pieces, self.table.kind, fresh=self.table.fresh, room=self.room)
        sums = self.empty_sums()
        # Entries (i, j), i <= j, are valid.
        later = torch.arange(len(pieces))[None, :] >= self.fresh[:, None]
        sums[:-1] = torch.where(later, products[self.fresh], products[:, self.fresh].T)
        sums[-1] = products.diagonal()
        return sums
