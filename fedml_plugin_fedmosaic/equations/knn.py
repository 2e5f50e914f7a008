"""Next-token probabilities from a store of what was seen before.

Sources: kNN-Per (Marfoq et al., ICML 2022, arXiv 2111.09360): each client mixes its model with a
nearest-neighbour model on its own representations. For language models: kNN-LM (Khandelwal et al.,
ICLR 2020, arXiv 1911.00172)::

    p_knn(y) ~ sum over the k nearest keys h_j with value y of exp(-|h - h_j|^2 / (d scale))
    p(y)     = lam p_knn(y) + (1 - lam) p_model(y)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError

_QUERIES = 256
"""Queries compared at a time."""


def neighbour_shares(queries: Tensor, keys: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """The k nearest keys of each query and their shares of the probability.

    Args:
        queries: (q, d) floating point.
        keys: (n, d), n >= 1, of any floating type on the same device.
        k: neighbours; all keys if there are fewer.
        scale: distances are divided by ``d * scale``, positive.

    Returns:
        Positions (q, k') int64, nearest first, and shares (q, k') float32 that sum to 1.

    Raises:
        PlanError: an empty store, or another width.
    """
    if keys.ndim != 2 or len(keys) == 0 or queries.shape[1:] != keys.shape[1:] or k < 1:
        raise PlanError(
            f"cannot find {k} neighbours of queries {tuple(queries.shape)} among keys "
            f"{tuple(keys.shape)}"
        )
    places, shares = [], []
    wide = keys.to(torch.float32)
    for start in range(0, len(queries), _QUERIES):
        part = queries[start : start + _QUERIES].to(torch.float32)
        squares = torch.cdist(part, wide, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = squares.topk(min(k, len(keys)), dim=1, largest=False, sorted=True)
        places.append(nearest.indices)
        shares.append((-nearest.values / (keys.shape[1] * scale)).softmax(dim=1))
    if not places:
        empty = keys.new_zeros(0, min(k, len(keys)))
        return empty.to(torch.int64), empty.to(torch.float32)
    return torch.cat(places), torch.cat(shares)


def mixed_log_probabilities(
    logits: Tensor,
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lam: float,
    k: int,
    scale: float,
) -> Tensor:
    """``log p`` of the mixture, which takes the place of the logits.

    Args:
        logits: (q, V) of the model.
        hidden: (q, d) of the same positions.
        keys: (n, d) of the store.
        values: (n,) int64, the token that followed each key.
        lam: weight of the store, in [0, 1).
        k: neighbours.
        scale: see :func:`neighbour_shares`.

    Returns:
        (q, V) float32.
    """
    places, shares = neighbour_shares(hidden, keys, k, scale)
    model = logits.float().softmax(dim=1) * (1 - lam)
    tokens = values.to(places.device)[places]
    return model.scatter_add_(1, tokens, shares * lam).log()


def choose_mixture(
    model: Tensor, stores: Mapping[int, Tensor], weights: Sequence[float]
) -> tuple[int, float, float]:
    """The k and lam with the largest mean log-probability of held-out tokens.

    Args:
        model: (q,) the model's probability of each token that really followed.
        stores: k -> (q,) the store's probability of it.
        weights: values of lam to try.

    Returns:
        k, lam and the mean log-probability. Ties go to the smaller lam, then the smaller k.

    Raises:
        PlanError: nothing to choose from.
    """
    best: tuple[float, float, int] | None = None
    for lam in sorted(weights):
        for k in sorted(stores):
            mixed = lam * stores[k].double() + (1 - lam) * model.double()
            mean = float(mixed.clamp_min(1e-30).log().mean()) if len(mixed) else -math.inf
            if best is None or mean > best[0]:
                best = (mean, lam, k)
    if best is None:
        raise PlanError("a mixture needs at least one weight and one number of neighbours")
    return best[2], best[1], best[0]
