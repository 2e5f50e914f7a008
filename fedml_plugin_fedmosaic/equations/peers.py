"""Who counts as a peer: rules that cut a row of similarities.

Sources: the largest gap is the "maximum difference segmentation" of FedReMa (ECAI 2024); the
threshold with a least number of peers is the rule of Factorized-FL (NeurIPS 2022, arXiv
2202.00270).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from fedml_plugin_fedmosaic.core.errors import PlanError


def largest_gap(similarities: Sequence[float]) -> tuple[tuple[int, ...], float]:
    """Peers above the largest gap of the sorted similarities.

    Args:
        similarities: of the other clients, finite.

    Returns:
        Positions of the peers, ascending, and the width of the gap. With one client it is the peer
        and the gap is 0; likewise all are peers if all are equal.

    Raises:
        PlanError: a similarity is not finite.
    """
    _check(similarities)
    order = sorted(range(len(similarities)), key=lambda place: (-similarities[place], place))
    gaps = [similarities[high] - similarities[low] for high, low in pairwise(order)]
    width = max(gaps, default=0.0)
    if width <= 0:
        return tuple(range(len(similarities))), 0.0
    # Of equal gaps the first: the fewest and most similar peers.
    return tuple(sorted(order[: gaps.index(width) + 1])), width


def above_threshold(similarities: Sequence[float], threshold: float, least: int) -> tuple[int, ...]:
    """Positions with a similarity of at least ``threshold``, and the ``least`` largest anyway.

    Args:
        similarities: finite; include the client itself if it is to count as its own peer.
        threshold: smallest similarity of a peer.
        least: smallest number of peers, as far as there are any.

    Returns:
        Ascending positions; of equal similarities the first.

    Raises:
        PlanError: a similarity is not finite.
    """
    _check(similarities)
    order = sorted(range(len(similarities)), key=lambda place: (-similarities[place], place))
    return tuple(
        sorted(
            place
            for rank, place in enumerate(order)
            if rank < least or similarities[place] >= threshold
        )
    )


def scaled_softmax(values: Sequence[float], scale: float) -> tuple[float, ...]:
    """``exp(scale v) / sum of exp(scale v)``, in float64."""
    top = max(values)
    exponentials = [math.exp(scale * (value - top)) for value in values]
    total = math.fsum(exponentials)
    return tuple(value / total for value in exponentials)


def _check(similarities: Sequence[float]) -> None:
    if not all(math.isfinite(value) for value in similarities):
        raise PlanError(f"similarities must be finite; got {list(similarities)[:10]}")
