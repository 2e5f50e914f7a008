"""Relevance between clients, and the mixing weights that follow from it.

Source: FedMosaic (arXiv 2506.11024), relevance-guided aggregation. The relevance of two clients is
the mean over columns of the cosine of their sketches' columns; a receiver's weights are a softmax
of its relevance to everybody else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.equations.tiles import in_order

Similarity = Literal["columns", "flat"]
"""``columns``: see :func:`column_similarity`; ``flat``: see :func:`flat_similarity`."""

_NORM_FLOOR = 1e-12
_MAX_SEGMENTS = 16
_SEGMENT_ELEMENTS = 1 << 12
_SEGMENT_STEP = 16
_TILE_CLIENTS = 32
_BLOCK_COLUMNS = 1 << 12
_TILE_ENTRIES = 1 << 14
"""Entries of one client in a tile, and terms of an inner product that are summed in float32 before
float64 takes over."""
_ALL_ENTRIES = 1 << 21
"""Entries of all clients in a tile, from where on a client has fewer: they stay in the cache."""
_LEAST_ENTRIES = 1 << 12


def column_similarity(sketches: Sequence[Tensor], block_columns: int | None = None) -> Tensor:
    """Mean cosine of corresponding columns, for all pairs of clients.

    The released code gathers one column at a time. With every column scaled to length 1 and the
    sketch flattened to x_i, the same number is x_i . x_j / columns: one matrix product, done here
    in column blocks, half of it by symmetry, and summed over blocks in float64.

    Args:
        sketches: N >= 1 tensors (rows, columns) of one shape; float64 is computed in float64,
            anything else in float32. Norms are floored at 1e-12, so a zero column counts as
            cosine 0, even with itself.
        block_columns: columns per block; at most 4,096 when omitted.

    Returns:
        (N, N) float64 on the CPU, exactly symmetric, in [-1, 1] up to rounding.

    Raises:
        PlanError: no sketch, different shapes, or a value that is not finite.
    """
    return _similarity(sketches, "columns", block_columns)


def flat_similarity(sketches: Sequence[Tensor], block_columns: int | None = None) -> Tensor:
    """Cosine of the flattened sketches, for all pairs of clients.

    Unlike :func:`column_similarity`, columns count in proportion to their length.

    Args:
        sketches: see :func:`column_similarity`; a zero sketch has cosine 0 with all.
        block_columns: see :func:`column_similarity`.

    Returns:
        (N, N) float64 on the CPU, exactly symmetric.

    Raises:
        PlanError: see :func:`column_similarity`.
    """
    return _similarity(sketches, "flat", block_columns)


def unit_columns(sketch: Tensor) -> Tensor:
    """A sketch as one vector whose inner products are the column similarity.

    For comparing by flattened vectors what is defined by columns: nearest neighbours, or a random
    projection of the whole vector (:func:`~.gradient.compress`), which keeps inner products in
    expectation and makes a sketch of millions of entries one of a few thousand.

    Args:
        sketch: (rows, columns), floating point.

    Returns:
        (1, rows * columns) float32 (float64 if the sketch is): columns of length
        ``columns ** -0.5``, or 0 if they are 0; so its length is 1 if no column is 0.
    """
    wide = sketch.to(torch.float64 if sketch.dtype == torch.float64 else torch.float32)
    norms = torch.linalg.vector_norm(wide, dim=0).clamp_min_(_NORM_FLOOR)
    unit: Tensor = wide / norms.mul_(math.sqrt(sketch.shape[1]))
    return unit.view(1, -1)


def column_segments(rows: int, columns: int) -> tuple[slice, ...]:
    """The column ranges whose inner products are summed one after the other.

    They depend on the shape of a sketch only, so the sum has the same bits whoever computes which
    segment: at most 16, none below 4,096 entries (except the last), bounds at multiples of 16.
    """
    width = max(-(-columns // _MAX_SEGMENTS), -(-_SEGMENT_ELEMENTS // rows))
    width = -(-width // _SEGMENT_STEP) * _SEGMENT_STEP
    return tuple(slice(at, min(at + width, columns)) for at in range(0, columns, width))


def segment_products(
    pieces: Sequence[Tensor],
    kind: Similarity,
    *,
    fresh: Collection[int] | None = None,
    block_columns: int | None = None,
    room: list[Tensor] | None = None,
) -> Tensor:
    """One segment's part of the similarities, before :func:`finish_similarity`.

    A client's entries depend on the pieces of the two clients, on their positions and on the
    number of pieces; not on the values of other pieces. So a piece that is not at hand may be
    replaced by zeros: entries between the others keep their bits.

    Args:
        pieces: the segment's columns of all M sketches, (rows, width) each.
        kind: which similarity.
        fresh: positions whose rows and columns are wanted; all when omitted. Other entries are
            undefined, except the diagonal.
        block_columns: see :func:`column_similarity`.
        room: a list, empty at first, that keeps the working memory (8 to 16 MB per thread) for the
            next segment.

    Returns:
        (M, M) float64 on the CPU; the entries (i, j), j >= i, are valid.

    Raises:
        PlanError: see :func:`column_similarity`.
    """
    _check_sketches(pieces)
    wanted = None if fresh is None else frozenset(fresh)
    kept = [] if room is None else room
    return _gram(pieces, block_columns, kept, normalise=kind == "columns", wanted=wanted)


def finish_similarity(total: Tensor, kind: Similarity, columns: int) -> Tensor:
    """Similarities from the sum of all segments' products, added in ascending order.

    Args:
        total: (M, M) float64 sum of :func:`segment_products` over :func:`column_segments`.
        kind: which similarity.
        columns: columns of a whole sketch.

    Returns:
        (M, M) float64, exactly symmetric; undefined where ``total`` is.

    Raises:
        PlanError: a diagonal entry is not finite: that sketch holds NaN or infinity.
    """
    if kind == "columns":
        return _finish(total / columns)
    norms = total.diagonal().sqrt().clamp_min(_NORM_FLOOR)
    return _finish(total / torch.outer(norms, norms))


def _similarity(
    sketches: Sequence[Tensor], kind: Similarity, block_columns: int | None = None
) -> Tensor:
    rows, columns = _check_sketches(sketches)
    total = torch.zeros(len(sketches), len(sketches), dtype=torch.float64)
    room: list[Tensor] = []
    for segment in column_segments(rows, columns):
        pieces = [sketch[:, segment] for sketch in sketches]
        total += segment_products(pieces, kind, block_columns=block_columns, room=room)
    return finish_similarity(total, kind, columns)


def _check_sketches(sketches: Sequence[Tensor]) -> tuple[int, int]:
    if not sketches:
        raise PlanError("relevance needs at least one sketch; got none")
    shapes = {tuple(sketch.shape) for sketch in sketches}
    first = sketches[0]
    if len(shapes) != 1 or first.ndim != 2 or first.numel() == 0:
        raise PlanError(
            f"sketches must all have one shape (rows, columns); got {sorted(shapes)}",
            hint="all clients need the same proxy model and sketch options",
        )
    return first.shape[0], first.shape[1]


def _gram(
    sketches: Sequence[Tensor],
    block_columns: int | None,
    room: list[Tensor],
    *,
    normalise: bool,
    wanted: frozenset[int] | None,
) -> Tensor:
    """Upper triangle (in tiles) of the inner products of the flattened sketches.

    Two reads from memory and no write: one for the lengths of the columns, one that scales a tile
    of all clients into the cache, where it is multiplied.
    """
    count, (rows, columns) = len(sketches), _check_sketches(sketches)
    width = max(1, min(block_columns or _BLOCK_COLUMNS, columns))
    wide = any(sketch.dtype == torch.float64 for sketch in sketches)
    dtype = torch.float64 if wide else torch.float32
    entries = min(_TILE_ENTRIES, max(_LEAST_ENTRIES, _ALL_ENTRIES // count))
    height = min(rows, max(1, entries // width))
    gram = torch.zeros(count, count, dtype=torch.float64)
    pairs = _tile_pairs(count, wanted)
    for start in range(0, columns, width):
        pieces = [sketch[:, start : start + width] for sketch in sketches]
        scales = _inverse_norms(pieces, dtype) if normalise else None

        def products(
            top: int, pieces: list[Tensor] = pieces, scales: Tensor | None = scales
        ) -> list[Tensor]:
            tile = _take(room, count * height * width, dtype, pieces[0].device)
            made = _tile_products(pieces, scales, slice(top, top + height), tile, pairs)
            room.append(tile)
            return made

        for made in in_order(products, range(0, rows, height)):
            for (upper, lower), product in zip(pairs, made, strict=True):
                gram[upper, lower] += product
    return gram


def _take(room: list[Tensor], length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Working memory that no other thread has; of the kept kind if it fits."""
    while room:
        kept = room.pop()
        if kept.numel() >= length and (kept.dtype, kept.device) == (dtype, device):
            return kept
    return torch.empty(length, dtype=dtype, device=device)


def _inverse_norms(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(N, 1, width): what the columns of each piece are multiplied by to have length 1."""

    def squares(piece: Tensor) -> Tensor:
        values = piece.to(dtype)
        return torch.mul(values, values).sum(dim=0)

    lengths = torch.stack(list(in_order(squares, pieces))).sqrt_()
    return lengths.clamp_min_(_NORM_FLOOR).reciprocal_()[:, None, :]


def _tile_products(
    pieces: Sequence[Tensor],
    scales: Tensor | None,
    rows: slice,
    storage: Tensor,
    pairs: Sequence[tuple[slice, slice]],
) -> list[Tensor]:
    """Inner products of some rows of all pieces, scaled, for each pair of client tiles."""
    parts = [piece[rows] for piece in pieces]
    height, width = parts[0].shape
    tile = storage[: len(parts) * height * width].view(len(parts), height, width)
    if parts[0].dtype == tile.dtype and len({part.dtype for part in parts}) == 1:
        torch.stack(parts, out=tile)
    else:
        for values, part in zip(tile, parts, strict=True):
            values.copy_(part)
    if scales is not None:
        tile.mul_(scales)
    flat = tile.view(len(parts), height * width)
    return [torch.mm(flat[upper], flat[lower].T).cpu() for upper, lower in pairs]


def _tile_pairs(count: int, wanted: frozenset[int] | None) -> list[tuple[slice, slice]]:
    """The pairs of client tiles, upper first, that hold a wanted entry or the diagonal."""
    tiles = [slice(at, min(at + _TILE_CLIENTS, count)) for at in range(0, count, _TILE_CLIENTS)]
    used = [wanted is None or not wanted.isdisjoint(range(tile.start, tile.stop)) for tile in tiles]
    return [
        (tiles[upper], tiles[lower])
        for upper in range(len(tiles))
        for lower in range(upper, len(tiles))
        if upper == lower or used[upper] or used[lower]
    ]


def _finish(similarity: Tensor) -> Tensor:
    """Mirrors the upper triangle and refuses values that are not finite."""
    similarity = similarity.triu() + similarity.triu(1).T
    finite = similarity.diagonal().isfinite()
    if not bool(finite.all()):
        bad = [int(client) for client in (~finite).nonzero().flatten()]
        raise PlanError(
            f"sketches number {bad} hold values that are not finite",
            hint="look at the loss of these clients; lower their learning rate",
        )
    return similarity


def relevance_weights(
    similarity: Tensor, temperature: float, participants: Collection[int] | None = None
) -> Tensor:
    """Softmax of each participant's relevance to the other participants.

    The released code masks with -1e9 and leaves partial participation undefined; here everybody
    who is no peer is left out of the softmax, so that every row with a peer sums to 1.

    Args:
        similarity: (N, N), floating point; entries of non-participants are ignored (may be NaN).
        temperature: softmax temperature (tau), positive; towards 0 the nearest peer gets it all.
        participants: clients that send and receive; all when omitted.

    Returns:
        (N, N) float64, row i for receiver i. The diagonal, and rows and columns of
        non-participants, are exactly 0; so is the row of a sole participant.

    Raises:
        PlanError: not square, a participant that is not there, a temperature that is not
            positive, or an entry between two participants that is not finite.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise PlanError(f"relevance must be a square matrix; got {tuple(similarity.shape)}")
    if not temperature > 0:
        raise PlanError(
            f"relevance temperature is {temperature}; expected a positive number",
            hint="set strategy.temperature",
        )
    count = similarity.shape[0]
    members = sorted(set(range(count) if participants is None else participants))
    if members and not (members[0] >= 0 and members[-1] < count):
        raise PlanError(f"participants {members} are not all among the clients 0..{count - 1}")
    weights = torch.zeros(count, count, dtype=torch.float64)
    if len(members) < 2:
        return weights
    index = torch.tensor(members)
    scores = similarity.detach().to("cpu", torch.float64)[index][:, index]
    peers = ~torch.eye(len(members), dtype=torch.bool)
    weights[index[:, None], index] = peer_weights(scores, peers, temperature)
    return weights


def peer_weights(
    scores: Tensor, peers: Tensor, temperature: float, top_k: int | None = None
) -> Tensor:
    """Softmax of each receiver's relevance to its own peers.

    Args:
        scores: (T, S) float64, row t for receiver t; ignored (may be NaN) where nobody is a peer.
        peers: (T, S) bool, which sources a receiver may have.
        temperature: softmax temperature (tau), positive.
        top_k: only the k most relevant peers have a weight, of equal ones the first; all when
            omitted.

    Returns:
        (T, S) float64, exactly 0 for who is no peer; rows without a peer are 0, others sum to 1.

    Raises:
        PlanError: an entry between a receiver and its peer is not finite.
    """
    if not bool(scores.masked_fill(~peers, 0).isfinite().all()):
        raise PlanError("relevance between participants must be finite; found NaN or infinity")
    masked = scores.masked_fill(~peers, -torch.inf)
    if top_k is not None and top_k < masked.shape[1]:
        beyond = masked.argsort(dim=1, descending=True, stable=True)[:, top_k:]
        masked.scatter_(1, beyond, -torch.inf)
    if masked.numel() == 0:
        return masked
    # The difference comes first: it stays small and exact, whatever it is divided by.
    scaled = (masked - masked.amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)) / temperature
    exponentials = scaled.masked_fill(masked.isneginf(), -torch.inf).exp()
    sums = exponentials.sum(dim=1, keepdim=True)
    return exponentials / sums.masked_fill(sums == 0, 1.0)
