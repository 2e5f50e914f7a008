"""What TAP decides with numbers: replacement, votes, averages, distillation (arXiv 2509.26524).

With ``L_F`` and ``L_P`` the losses of a client's federated and personal model on one key, both
means over that key's samples alone, and a margin mu::

    relative   replace if L_F < (1 - mu) L_P
    absolute   replace if L_F + mu < L_P

A personal model that was never trained loses every comparison; ``mu = inf`` never replaces and
``mu = -inf`` always does, whatever the losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

MarginKind = Literal["relative", "absolute"]


def replaces(
    federated: float | None, personal: float | None, margin: float, kind: MarginKind = "relative"
) -> bool:
    """Whether the federated adapter of a key takes the personal one's place.

    Args:
        federated: L_F, in nats; None if it is not known, which only the rules without a comparison
            can do without.
        personal: L_P; None if the personal adapter was never trained.
        margin: mu; may be infinite.
        kind: how the margin is meant.
    """
    if math.isinf(margin):
        return margin < 0
    if personal is None:
        return True
    if federated is None:
        return False
    if kind == "relative":
        return federated < (1.0 - margin) * personal
    return federated + margin < personal


def shared_is_replaced(votes: int, voters: int, fraction: float) -> bool:
    """Whether the shared adapter is replaced: by at least one vote and at least that fraction.

    Args:
        votes: keys that are replaced.
        voters: keys that were looked at.
        fraction: rho in [0, 1]; 0: any vote is enough, as in the released code.
    """
    return votes > 0 and votes >= math.ceil(fraction * voters - 1e-9)


def average_weights(samples: Mapping[int, int]) -> dict[int, float]:
    """``n_kq / sum over k of n_kq`` of the clients that trained a key, by ascending client id.

    Args:
        samples: client -> its samples of that key; clients without samples have no weight.

    Returns:
        Weights that sum to 1; empty if nobody has samples.
    """
    counts = {client: count for client, count in sorted(samples.items()) if count > 0}
    total = sum(counts.values())
    return {client: count / total for client, count in counts.items()}


def distillation_weight(factor: float, temperature: float) -> float:
    """``lambda T^2``: gradients of a softened divergence shrink with T^2 (arXiv 1503.02531)."""
    return factor * temperature**2
