"""The most relevant clients of each client, without the matrix of all pairs.

Source: FedMosaic (arXiv 2506.11024) weights all clients by a softmax of their relevance; with many
clients nearly all of these weights are small, and the matrix alone is quadratic in memory. Here a
receiver keeps its k most relevant sources. All pairs are scored, but in 8-bit integers, which is
several times faster than float32 and exact to about 1 % of the spread of unrelated sketches; a few
more candidates than k are then compared in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.equations.tiles import in_order

_NORM_FLOOR = 1e-12
_LEVELS = 127
RECEIVER_TILE = 512
"""Receivers that are scored together. Whoever divides the receivers among several calls of
:func:`nearest` does so at multiples of this, and gets the bits of one call."""
_SOURCES = 4096
"""Sources per product: their scores stay in cache while the maxima are taken."""
_GROUP = 32
"""Scores of which only the largest is looked at first."""
_GATHERED = 1 << 18
"""Entries of candidates' vectors that are compared at a time: second-level cache."""


def top_k_weights(
    vectors: Tensor,
    k: int,
    temperature: float,
    *,
    sources: Sequence[int] | None = None,
    candidates: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax weights over each receiver's k most relevant sources.

    Args:
        vectors: see :func:`nearest`.
        k: see :func:`nearest`.
        temperature: softmax temperature (tau), positive.
        sources: see :func:`nearest`.
        candidates: see :func:`nearest`.

    Returns:
        Sources (N, k') int64, ascending in each row and -1 at its end where there are fewer; and
        their weights (N, k') float64, which sum to 1 in every row with a source; 0 at -1.

    Raises:
        PlanError: see :func:`nearest`, or a temperature that is not positive.
    """
    indices, cosines = nearest(vectors, k, sources=sources, candidates=candidates)
    return neighbour_weights(indices, cosines, temperature)


def neighbour_weights(
    indices: Tensor, cosines: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Softmax weights over what :func:`nearest` found.

    Args:
        indices: (T, k) int64, -1 where there is no further source.
        cosines: (T, k) float64, descending in each row, -inf where there is none.
        temperature: softmax temperature (tau), positive.

    Returns:
        Sources (T, k) int64, ascending in each row and -1 at its end where there are fewer; and
        their weights (T, k) float64, which sum to 1 in every row with a source; 0 at -1.

    Raises:
        PlanError: the temperature is not positive.
    """
    if not temperature > 0:
        raise PlanError(
            f"relevance temperature is {temperature}; expected a positive number",
            hint="set strategy.temperature",
        )
    absent = indices < 0
    best = cosines[:, :1].nan_to_num(neginf=0.0)
    scaled = ((cosines - best) / temperature).exp_()
    weights = scaled / scaled.sum(dim=1, keepdim=True).clamp_min(_NORM_FLOOR)
    last = torch.iinfo(torch.int64).max
    order = indices.masked_fill(absent, last).argsort(dim=1)
    return indices.gather(1, order), weights.gather(1, order)


def nearest(
    vectors: Tensor,
    k: int,
    *,
    sources: Sequence[int] | None = None,
    candidates: int | None = None,
    receivers: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """The k sources with the largest cosine to each client, itself excluded.

    The integer scores are exact, so the candidates do not depend on the number of threads; neither
    do the float32 products of the final comparison. A true neighbour is missed if its rank by
    integer scores is beyond ``candidates``; the docs page on performance gives measured recalls.

    Memory beside the vectors: a quarter of them for the integers, and for each thread
    512 scores per client.

    Args:
        vectors: (N, D) floating point on the CPU, one client each, any length; D <= 130,000. For
            the column similarity these are the flattened sketches with columns of length 1.
        k: sources per receiver.
        sources: clients that may be sources, all when omitted. Everybody receives.
        candidates: sources per receiver that are compared in float32; 2 k, and at least k + 32,
            when omitted.
        receivers: a range of the clients that begins at a multiple of ``RECEIVER_TILE`` and ends
            at one, or at the last client; all when omitted.

    Returns:
        For the T receivers: sources (T, k') int64 and their cosines (T, k') float64, k' = min(k,
        number of sources), in descending order of cosine, then ascending in client. Where a
        receiver has fewer sources, the last entry is -1 with cosine -inf.

    Raises:
        PlanError: k or the shape is out of range, a source that is no client, or values that are
            not finite.
    """
    pool = _checked_sources(vectors, k, sources)
    norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float32)
    if not bool(norms.isfinite().all()):
        bad = (~norms.isfinite()).nonzero().flatten().tolist()
        raise PlanError(
            f"sketches number {bad[:10]} hold values that are not finite",
            hint="look at the loss of these clients; lower their learning rate",
        )
    norms.clamp_min_(_NORM_FLOOR)
    kept = min(k, len(pool))
    count = len(vectors)
    first, last = _checked_range(receivers, count)
    indices = torch.full((last - first, kept), -1)
    cosines = torch.full((last - first, kept), -torch.inf, dtype=torch.float64)
    if kept == 0 or first == last:
        return indices, cosines
    wanted = min(len(pool), max(2 * k, k + 32) if candidates is None else max(k, candidates))
    integers, scales = _quantised(vectors, norms)
    if len(pool) < count:
        pool_integers, pool_scales = integers[pool], scales[pool]
    else:
        pool_integers, pool_scales = integers, scales

    def compare(start: int) -> tuple[Tensor, Tensor]:
        block = slice(start, min(start + RECEIVER_TILE, last))
        scores = _scores(integers[block], pool_integers, pool_scales)
        own = torch.arange(block.start, block.stop)
        places = torch.searchsorted(pool, own).clamp_max_(len(pool) - 1)
        among = pool[places] == own
        scores[among.nonzero().flatten(), places[among]] = -torch.inf
        found = pool[_largest(scores, wanted)].sort(dim=1).values
        return _ranked(vectors, norms, block, found, kept)

    starts = range(first, last, RECEIVER_TILE)
    for start, (who, how_near) in zip(starts, in_order(compare, starts), strict=True):
        indices[start - first : start - first + len(who)] = who
        cosines[start - first : start - first + len(who)] = how_near
    return indices, cosines


def _checked_range(receivers: slice | None, count: int) -> tuple[int, int]:
    """First receiver, and the one after the last."""
    if receivers is None:
        return 0, count
    first, last = receivers.start, receivers.stop
    aligned = first % RECEIVER_TILE == 0 and (last % RECEIVER_TILE == 0 or last == count)
    if not (0 <= first <= last <= count and aligned):
        raise PlanError(
            f"receivers {first}..{last} of {count} are not whole tiles of {RECEIVER_TILE}"
        )
    return first, last


def _checked_sources(vectors: Tensor, k: int, sources: Sequence[int] | None) -> Tensor:
    """The sources' positions, ascending."""
    if vectors.ndim != 2 or not vectors.dtype.is_floating_point or k < 1:
        raise PlanError(
            f"top-k relevance needs vectors (clients, entries) and k >= 1; got "
            f"{tuple(vectors.shape)} {vectors.dtype} and k = {k}"
        )
    # 127 * 127 * D must fit in 31 bits.
    if not 1 <= vectors.shape[1] <= 130_000:
        raise PlanError(
            f"top-k relevance takes vectors of 1 to 130000 entries; got {vectors.shape[1]}",
            hint="compress the sketches first",
        )
    if sources is None:
        return torch.arange(len(vectors))
    pool = torch.tensor(sorted(set(sources)), dtype=torch.int64)
    if len(pool) and not (int(pool[0]) >= 0 and int(pool[-1]) < len(vectors)):
        raise PlanError(f"sources {pool.tolist()[:10]} are not all among 0..{len(vectors) - 1}")
    return pool


def _quantised(vectors: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (N, D) in -127..127, and what each row times its scale is: a vector of length 1."""
    integers = torch.empty(vectors.shape, dtype=torch.int8)
    steps = torch.empty(len(vectors))
    for start in range(0, len(vectors), RECEIVER_TILE):
        part = vectors[start : start + RECEIVER_TILE].to(torch.float32)
        step = part.abs().amax(dim=1).div_(_LEVELS).clamp_min_(torch.finfo(torch.float32).tiny)
        integers[start : start + len(part)] = (part / step[:, None]).round_().to(torch.int8)
        steps[start : start + len(part)] = step
    return integers, steps / norms


def _scores(receivers: Tensor, sources: Tensor, scales: Tensor) -> Tensor:
    """(R, S) float32: cosines up to a positive factor per receiver."""
    scores = torch.empty(len(receivers), len(sources))
    for start in range(0, len(sources), _SOURCES):
        part = slice(start, min(start + _SOURCES, len(sources)))
        torch.mul(torch._int_mm(receivers, sources[part].T), scales[part], out=scores[:, part])
    return scores


def _largest(scores: Tensor, wanted: int) -> Tensor:
    """Positions (R, wanted) of the largest scores, in no order.

    The largest scores lie in the groups with the largest maxima; so only those are sorted.
    """
    rows, count = scores.shape
    groups = count // _GROUP
    if groups <= 2 * wanted:
        return scores.topk(wanted, dim=1, sorted=False).indices
    whole = scores[:, : groups * _GROUP].view(rows, groups, _GROUP)
    best = whole.amax(dim=2).topk(wanted, dim=1, sorted=False).indices
    inside = torch.arange(_GROUP)
    places = (best[:, :, None] * _GROUP + inside).flatten(1)
    rest = torch.arange(groups * _GROUP, count).expand(rows, -1)
    places = torch.cat((places, rest), dim=1)
    chosen = scores.gather(1, places).topk(wanted, dim=1, sorted=False).indices
    return places.gather(1, chosen)


def _ranked(
    vectors: Tensor, norms: Tensor, block: slice, found: Tensor, kept: int
) -> tuple[Tensor, Tensor]:
    """The nearest of the candidates (R, C), which ascend in each row, by float32 cosines."""
    own = torch.arange(block.start, block.stop)
    products = torch.empty(found.shape, dtype=torch.float32)
    size = max(1, _GATHERED // (found.shape[1] * vectors.shape[1]))
    room = vectors.new_empty(size * found.shape[1], vectors.shape[1])
    for start in range(0, len(found), size):
        some = found[start : start + size]
        theirs = room[: some.numel()]
        torch.index_select(vectors, 0, some.flatten(), out=theirs)
        theirs = theirs.view(*some.shape, -1).to(torch.float32)
        mine = vectors[block][start : start + size].to(torch.float32)
        products[start : start + size] = torch.bmm(theirs, mine[:, :, None]).squeeze(2)
    cosines = products.double() / (norms[own].double()[:, None] * norms[found].double())
    cosines.masked_fill_(found == own[:, None], -torch.inf)
    cosines, order = cosines.sort(dim=1, descending=True, stable=True)
    who = found.gather(1, order)[:, :kept]
    return who.masked_fill(cosines[:, :kept].isneginf(), -1), cosines[:, :kept]
