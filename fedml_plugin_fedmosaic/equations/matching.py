"""Training A of one model to give an anchor's A outputs, by gradient descent.

Source: FedMosaic (arXiv 2506.11024), alignment of A: the squared difference of the outputs of A at
matched block ends, plus a penalty that keeps the rows of A orthogonal; afterwards A is replaced by
the nearest matrix with orthonormal rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.alignment import nearest_row_orthonormal

PENALTY = 0.5
"""Weight of the orthogonality penalty in the paper."""

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""Matched linear -> its inputs ``(..., d)`` and the anchor's A outputs ``(..., r)``."""


def column_coherence(factor: Tensor) -> Tensor:
    """Mean squared cosine between two columns of A: the orthogonality penalty.

    The published form squares a ``(d, d)`` matrix of cosines. Its sum of squares is that of the
    ``(r, r)`` matrix ``U U^T`` of the unit columns U, so that the same value needs no ``(d, d)``
    matrix. It is smallest (:func:`coherence_floor`) when U is a tight frame, and then the rows of U
    are orthogonal.

    Args:
        factor: ``(r, d)``.

    Returns:
        A scalar in [0, 1]; 0 for a single column.
    """
    width = factor.shape[1]
    if width < 2:
        return factor.new_zeros(())
    unit = normalize(factor, dim=0)
    gram = unit @ unit.T
    # All-zero columns have a zero on the diagonal of the cosines instead of a one.
    diagonal = unit.square().sum(0).square().sum()
    return (gram.square().sum() - diagonal) / (width * (width - 1))


def coherence_floor(rank: int, width: int) -> float:
    """Smallest :func:`column_coherence` of any ``(rank, width)`` matrix: the Welch bound.

    Source: Welch, "Lower bounds on the maximum cross correlation of signals", 1974.
    """
    return max(0.0, (width - rank) / (rank * (width - 1))) if width > 1 else 0.0


def matching_loss(
    factors: Sequence[Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    penalty: float = PENALTY,
) -> Tensor:
    """Sum over pairs of the mean squared error, plus the weighted mean of the penalties.

    Args:
        factors: A of each matched linear, ``(r, d)``.
        inputs: inputs of each linear, ``(..., d)``.
        targets: the anchor's A outputs at the same tokens, ``(..., r)``.
        penalty: weight of the mean of :func:`column_coherence`.

    Returns:
        A scalar.

    Raises:
        AdapterError: no pairs, or shapes that do not fit.
    """
    if not factors:
        raise AdapterError("there is no matched linear to align")
    errors, penalties = [], []
    for index, (a, x, t) in enumerate(zip(factors, inputs, targets, strict=True)):
        if x.shape[:-1] != t.shape[:-1] or (t.shape[-1], x.shape[-1]) != tuple(a.shape):
            raise AdapterError(
                f"matched pair {index}: A {tuple(a.shape)} does not map inputs {tuple(x.shape)} "
                f"to targets {tuple(t.shape)}",
                hint="both models must see the same tokens, and have adapters of one rank",
            )
        errors.append(mse_loss(x @ a.T, t))
        penalties.append(column_coherence(a))
    return torch.stack(errors).sum() + penalty * torch.stack(penalties).mean()


@dataclass(frozen=True)
class FittedFactors:
    """What :func:`fit_a` returns.

    Attributes:
        factors: A with orthonormal rows per matched linear, ``(r, d)`` float64.
        losses: mean loss of each optimizer update, before that update.
    """

    factors: dict[str, Tensor]
    losses: tuple[float, ...]


def fit_a(
    initial: Mapping[str, Tensor],
    batches: Iterable[Pairs],
    *,
    num_updates: int,
    accumulate: int = 4,
    learning_rate: float = 5e-5,
    warmup: float = 0.1,
    penalty: float = PENALTY,
) -> FittedFactors:
    """Trains A of every matched linear with AdamW, then makes its rows orthonormal.

    Linear warm-up, then a cosine to zero, as published. Batches are taken one after the other, so
    that public data of any size passes in constant memory; the same batches give the same bits.

    Args:
        initial: A per matched linear, ``(r, d)``; left as they are.
        batches: at least ``num_updates * accumulate`` micro-batches with the keys of ``initial``.
        num_updates: optimizer updates.
        accumulate: micro-batches whose mean gradient makes one update.
        learning_rate: the largest learning rate.
        warmup: share of the updates with a rising learning rate.
        penalty: see :func:`matching_loss`.

    Raises:
        AdapterError: too few batches, a loss that is not finite, or see :func:`matching_loss`.
    """
    factors = {key: value.detach().float().clone() for key, value in initial.items()}
    trained = [value.requires_grad_() for value in factors.values()]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    stream = iter(batches)
    losses: list[float] = []
    for update in range(num_updates):
        share = _rate_share(update, num_updates, warmup)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share
        optimizer.zero_grad()
        total = 0.0
        for step in range(accumulate):
            pairs = next(stream, None)
            if pairs is None:
                raise AdapterError(
                    f"public data ended after {update * accumulate + step} batches; "
                    f"{num_updates} updates need {num_updates * accumulate}",
                    hint="give more public samples, or ask for fewer updates",
                )
            total += _backward(factors, pairs, accumulate, penalty)
        if not math.isfinite(total):
            raise AdapterError(
                f"the alignment loss is {total} at update {update}",
                hint="lower the learning rate, or run the models in float32",
            )
        losses.append(total)
        optimizer.step()
    rows = {key: nearest_row_orthonormal(value.detach()) for key, value in factors.items()}
    return FittedFactors(rows, tuple(losses))


def _backward(
    factors: Mapping[str, Tensor], pairs: Pairs, accumulate: int, penalty: float
) -> float:
    if set(pairs) != set(factors):
        odd = ", ".join(sorted(set(pairs) ^ set(factors)))
        raise AdapterError(f"batch and factors do not hold the same matched linears: {odd}")
    inputs = [pairs[key][0].detach().float() for key in factors]
    targets = [pairs[key][1].detach().float() for key in factors]
    loss = matching_loss(list(factors.values()), inputs, targets, penalty) / accumulate
    torch.autograd.backward(loss)
    return float(loss.detach())


def _rate_share(update: int, num_updates: int, warmup: float) -> float:
    """Share of the learning rate: linear rise from zero, then half a cosine down to zero."""
    rising = math.ceil(warmup * num_updates)
    if update < rising:
        return update / rising
    return 0.5 * (1.0 + math.cos(math.pi * (update - rising) / max(1, num_updates - rising)))
