"""Weighted sums of clients' adapters.

Source: FedMosaic (arXiv 2506.11024): a receiver's global adapter is the relevance-weighted sum of
the other clients' local adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.equations.tiles import in_order

TILE_COLUMNS = 1 << 13
"""Whoever divides the entries of the vectors among several calls of :func:`mix` does so at
multiples of this, passes all sources and rows to each, and gets the bits of one call."""

_FEWEST = 4
"""Rows and sources from which on :func:`mix` is a matrix product."""
_BLOCK_ELEMENTS = 1 << 17


def mix(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``out[t] = sum_s weights[t, s] * sources[s]``, the same bits however the work is divided.

    The shape of the weights alone decides how the sums are made:

    * fewer than 4 rows or fewer than 4 sources: every entry is ``((0 + w_0 x_0) + w_1 x_1) + ...``
      in float32, in the order of the sources, with the product and the sum rounded separately. So
      an entry depends on its own operands only: not on the other rows or entries of the call, nor
      on whether the processor has fused multiply-add; and a zero weight is as if the source (if
      finite) were absent.
    * otherwise: float32 matrix products of all rows with tiles of ``TILE_COLUMNS`` entries, the
      last one filled up with zeros. They have one shape and one alignment, and one thread each; so
      an entry depends on all weights, on its own operands, on the kind of processor and on the
      library of matrix products, but not on the other entries or tiles of the call. A zero weight
      adds exactly 0 if the source is finite; leaving such a source out may round the rest
      differently.

    Neither depends on the number of threads.

    Args:
        sources: S >= 1 tensors (D,), any float dtype, one device; in ascending client order.
        weights: (T, S), floating point; rounded to float32 first.

    Returns:
        (T, D) float32 on the device of the sources.

    Raises:
        PlanError: no source, or shapes that do not belong together.
    """
    if not sources or any(s.ndim != 1 or s.shape != sources[0].shape for s in sources):
        raise PlanError(
            "mixing needs at least one source, all of one shape (D,); got "
            f"{[tuple(source.shape) for source in sources]}"
        )
    if weights.ndim != 2 or weights.shape[1] != len(sources):
        raise PlanError(
            f"mixing {len(sources)} sources needs weights (T, {len(sources)}); got "
            f"{tuple(weights.shape)}"
        )
    mixed = torch.empty(
        weights.shape[0], sources[0].shape[0], dtype=torch.float32, device=sources[0].device
    )
    factors = weights.detach().to(device=mixed.device, dtype=torch.float32)
    with torch.no_grad():
        if min(factors.shape) < _FEWEST:
            _chains(mixed, sources, factors)
        else:
            _products(mixed, sources, factors.contiguous())
    return mixed


def _chains(mixed: Tensor, sources: Sequence[Tensor], weights: Tensor) -> None:
    """One source after the other; equal rounding for every entry."""
    targets, length = mixed.shape
    if targets == 0:
        return
    factors = weights.unsqueeze(2).unbind(1)
    # A block's running sum and product stay in the second-level cache while the sources pass by.
    step = min(max(_BLOCK_ELEMENTS // targets, 1024), 1 << 15)
    storage = torch.empty(2, targets * min(step, length), dtype=torch.float32, device=mixed.device)
    for start in range(0, length, step):
        size = min(step, length - start)
        total, product = storage[:, : targets * size].view(2, targets, size).unbind(0)
        total.zero_()
        for source, factor in zip(sources, factors, strict=True):
            values = source[start : start + size].to(torch.float32)
            total.add_(torch.mul(factor, values, out=product))
        mixed[:, start : start + size] = total


def _products(mixed: Tensor, sources: Sequence[Tensor], weights: Tensor) -> None:
    """One product per tile, from and to buffers of the same shape and alignment."""
    length = mixed.shape[1]
    spare: list[tuple[Tensor, Tensor]] = []

    def multiply(start: int) -> None:
        tile, product = spare.pop() if spare else _buffers(weights)
        size = min(TILE_COLUMNS, length - start)
        pieces = [source[start : start + size].to(torch.float32) for source in sources]
        if size == TILE_COLUMNS:
            torch.stack(pieces, out=tile)
        else:
            tile.zero_()[:, :size] = torch.stack(pieces)
        torch.mm(weights, tile, out=product)
        mixed[:, start : start + size] = product[:, :size]
        spare.append((tile, product))

    for _ in in_order(multiply, range(0, length, TILE_COLUMNS)):
        pass


def _buffers(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Room for one tile of all sources and of all rows."""
    rows, sources = weights.shape
    return weights.new_empty(sources, TILE_COLUMNS), weights.new_empty(rows, TILE_COLUMNS)
