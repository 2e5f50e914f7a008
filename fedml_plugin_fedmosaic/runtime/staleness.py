"""Plans without the sources that have been away for too long.

The rule works on the plan, not inside a strategy, so that it holds for every strategy, also for
those of other packages, and is the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch

from fedml_plugin_fedmosaic.core.types import MixingPlan, MixRow


def without_sources(plan: MixingPlan, sources: Collection[int]) -> MixingPlan:
    """A plan that leaves some sources out; every row keeps the sum of its weights.

    For weights that are proportional to a score per source (uniform, by examples, a softmax) this
    is what the strategy would have made of the remaining sources. A row that loses all its weight
    is left out, and so is a channel without rows.

    Args:
        plan: a strategy's plan.
        sources: client ids to leave out.

    Returns:
        The plan itself if no row names such a source.
    """
    touched = any(
        source in sources for rows in plan.rows.values() for row in rows for source in row.sources
    )
    if not touched:
        return plan
    channels = {
        channel: tuple(kept for row in rows if (kept := _row_without(row, sources)) is not None)
        for channel, rows in plan.rows.items()
    }
    weights = plan.weights
    if weights is not None:
        gone = torch.zeros(weights.shape[1], dtype=torch.bool)
        gone[[source for source in sources if source < len(gone)]] = True
        # Row by row as above; 0 / 0 makes an empty row unknown.
        rest = weights.masked_fill(gone, 0.0)
        weights = rest * (weights.sum(1, keepdim=True) / rest.sum(1, keepdim=True))
    rows = {channel: kept for channel, kept in channels.items() if kept}
    slots = {slot: channel for slot, channel in plan.slots.items() if slot in rows}
    return replace(plan, rows=rows, slots=slots, weights=weights)


def _row_without(row: MixRow, sources: Collection[int]) -> MixRow | None:
    pairs = zip(row.sources, row.weights, strict=True)
    kept = [(source, weight) for source, weight in pairs if source not in sources]
    if len(kept) == len(row.sources):
        return row
    left = math.fsum(weight for _, weight in kept)
    if left == 0.0:
        return None
    scale = math.fsum(row.weights) / left
    return MixRow(
        target=row.target,
        sources=tuple(source for source, _ in kept),
        weights=tuple(weight * scale for _, weight in kept),
    )
