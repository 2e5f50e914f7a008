"""Weighted sums of clients' adapters.

Source: FedMosaic (arXiv 2506.11024): a receiver's global adapter is the relevance-weighted sum of
the other clients' local adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError

TILE_COLUMNS = 1 << 12
"""Whoever divides the entries of the vectors among several calls of :func:`mix` does so at multiples
of this, passes all sources and rows to each, and gets the same bits as from one call."""

_BLOCK_ELEMENTS = 1 << 17


def mix(sources: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``out[t] = sum_s weights[t, s] * sources[s]``, the same bits however the work is divided.

    Every entry is ``((0 + w_0 x_0) + w_1 x_1) + ...`` in float32, in the order of the sources,
    with the product and the sum rounded separately. So an entry depends on its own operands only:
    not on the other rows or entries of the call, on the number of threads, on blocks, or on
    whether the processor has fused multiply-add; and a zero weight is as if the source (if
    finite) were absent. A matrix product promises none of this.

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
    (length,), device = sources[0].shape, sources[0].device
    targets = weights.shape[0]
    factors = weights.detach().to(device=device, dtype=torch.float32).unsqueeze(2).unbind(1)
    mixed = torch.empty(targets, length, dtype=torch.float32, device=device)
    if targets == 0:
        return mixed
    # A block's running sum and product stay in the second-level cache while the sources pass by.
    step = min(max(_BLOCK_ELEMENTS // targets, 1024), 1 << 15)
    storage = torch.empty(2, targets * min(step, length), dtype=torch.float32, device=device)
    with torch.no_grad():
        for start in range(0, length, step):
            size = min(step, length - start)
            total, product = storage[:, : targets * size].view(2, targets, size).unbind(0)
            total.zero_()
            for source, factor in zip(sources, factors, strict=True):
                values = source[start : start + size].to(torch.float32)
                total.add_(torch.mul(factor, values, out=product))
            mixed[:, start : start + size] = total
    return mixed
