"""Similarities that outlive a round, and rows made of weights: what FedMosaic's plan is made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import MixRow, UpdateHeader

_SMALLEST = 2.0**-149  # the smallest positive float32


def mix_rows(targets: Sequence[int], sources: Sequence[int], weights: Tensor) -> list[MixRow]:
    """Rows of a table of weights (targets, sources); targets without a source have none."""
    # Sums are float32: what is 0 there need not travel (low temperatures).
    kept = weights >= _SMALLEST
    return [
        MixRow(
            target=target,
            sources=tuple(itertools.compress(sources, keep)),
            weights=tuple(itertools.compress(row, keep)),
        )
        for target, row, keep in zip(targets, weights.tolist(), kept.tolist(), strict=True)
        if any(keep)
    ]


def sparse_row(target: int, sources: Sequence[int], weights: Sequence[float]) -> MixRow:
    """A row of the sources that are there and whose weight is not 0 in float32."""
    kept = [
        (source, weight)
        for source, weight in zip(sources, weights, strict=True)
        if source >= 0 and weight >= _SMALLEST
    ]
    return MixRow(
        target=target,
        sources=tuple(source for source, _ in kept),
        weights=tuple(weight for _, weight in kept),
    )


def overwrite(
    matrix: Tensor, clients: Sequence[int], others: Sequence[int], values: Tensor
) -> None:
    """Puts what ``values`` knows about the clients of ``matrix`` there, in place."""
    position = {client: index for index, client in enumerate(clients)}
    pairs = [(position[c], index) for index, c in enumerate(others) if c in position]
    if pairs:
        to, source = (torch.tensor(side) for side in zip(*pairs, strict=True))
        new = values[source[:, None], source[None, :]]
        old = matrix[to[:, None], to[None, :]]
        matrix[to[:, None], to[None, :]] = torch.where(new.isnan(), old, new)


def check_complete(similarity: Tensor, known: Sequence[int]) -> None:
    """Whether the similarity of all pairs of known clients is there.

    Raises:
        PlanError: one is missing or not finite.
    """
    missing = (~similarity.isfinite()).nonzero().tolist()
    if missing:
        first, second = (known[index] for index in missing[0])
        raise PlanError(
            f"the similarity of clients {first} and {second} is missing or not finite, one of "
            f"{len(missing)} such pairs; known are {list(known)}",
            hint="every client that ever took part must keep its last sketch",
        )


def checked_shape(header: UpdateHeader, expected: Sequence[int] | None) -> list[int]:
    """The shape of a header's sketch; the values are not here.

    Raises:
        PlanError: there is none, or it is not ``expected``.
    """
    sketch, where = header.sketch, f"client {header.client_id}, round {header.round_idx + 1}"
    if sketch is None or sketch.ndim != 2:
        found = "none" if sketch is None else f"shape {tuple(sketch.shape)}"
        raise PlanError(f"{where}: FedMosaic needs a sketch of shape (rows, columns), got {found}")
    shape = list(sketch.shape)
    if expected is not None and shape != list(expected):
        raise PlanError(
            f"{where}: sketches have different shapes: {tuple(shape)} here, {tuple(expected)} of "
            "the others",
            hint="all clients must use the same proxy model and the same sketch settings",
        )
    return shape
