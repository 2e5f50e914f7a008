"""Turning B of one model towards another's by canonical correlation, in the r coordinates of A.

Source: FedMosaic (arXiv 2506.11024), alignment of B. There, outputs ``X_1 = Z_1 B_S^T`` of the
anchor's adapter and ``X_3 = Z_3 B_G^T`` of the other model's (Z: outputs of A, ``(n, r)``) give a
map of the full widths, ``S_33^(1/2) U V^T S_11^(-1/2)``, from the singular vectors of
``S_33^(-1/2) S_31 S_11^(-1/2)``. Their moments have rank r only, so all that happens happens in r
coordinates: the same formula on the moments of Z is exact, and costs ``r^3`` instead of ``d^3``. It
also keeps digits that full-width single precision loses among directions that hold no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.moments import PairMoments

RIDGE = 1e-4
"""The paper's gamma: added to the diagonal of sums (not means) over tokens."""
_ROUND_OFF = 10 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class CanonicalMap:
    """A map of x's coordinates to y's.

    Attributes:
        matrix: ``(q, p)`` float64.
        correlations: falling canonical correlations, ``(min(p, q),)`` float64.
        rank: correlations above round-off; the map is zero on the other directions, as these have
            no definite partner.
        x_directions: ``(min(p, q), p)`` float64; row i takes x to the coordinate that has
            correlation i, of length 1 over the rows.
        y_directions: ``(min(p, q), q)``, likewise.
    """

    matrix: Tensor
    correlations: Tensor
    rank: int
    x_directions: Tensor
    y_directions: Tensor


def canonical_map(moments: PairMoments, ridge: float = RIDGE) -> CanonicalMap:
    """``S_yy^(1/2) U V^T S_xx^(-1/2)`` with ``U S V^T = S_yy^(-1/2) S_yx S_xx^(-1/2)``.

    Args:
        moments: of paired rows.
        ridge: added to the diagonals of ``S_xx`` and ``S_yy``, in units of sums over rows.

    Raises:
        AdapterError: fewer than two rows, or moments that are singular without a ridge.
    """
    if moments.count < 2:
        raise AdapterError(
            f"canonical correlations need at least 2 rows, got {moments.count}",
            hint="give more public samples",
        )
    _, x_inverse, x_condition = _roots(moments.xx, ridge)
    y_root, y_inverse, y_condition = _roots(moments.yy, ridge)
    left, correlations, right = torch.linalg.svd(
        y_inverse @ moments.xy.T @ x_inverse, full_matrices=False
    )
    # Whitening magnifies the round-off of the cross moment as far as both conditions allow.
    noise = _ROUND_OFF * max(moments.xy.shape) * (x_condition * y_condition) ** 0.5
    rank = int((correlations > noise).sum())
    turn = left[:, :rank] @ right[:rank]
    return CanonicalMap(
        y_root @ turn @ x_inverse, correlations, rank, right @ x_inverse, left.T @ y_inverse
    )


def correlations_along(found: CanonicalMap, moments: PairMoments) -> Tensor:
    """Correlations of other rows along directions that were found on the first ones.

    On the rows that the directions come from these are the canonical correlations; on new rows of
    the same kind they are lower, the more so the fewer rows the directions come from.

    Args:
        found: of the first rows.
        moments: of other rows, of the same widths.

    Returns:
        ``(min(p, q),)`` float64 in [-1, 1]; 0 along a direction in which a side does not vary.
    """
    along = moments.mapped(found.x_directions, found.y_directions)
    scale = (along.xx.diagonal() * along.yy.diagonal()).clamp_min(0.0).sqrt()
    shared = along.xy.diagonal()
    return torch.where(scale > 0, shared / scale, torch.zeros_like(shared)).clamp(-1.0, 1.0)


def _roots(moment: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
    """Square root, inverse square root and condition of ``moment + ridge I``."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0.0) + ridge
    smallest, largest = float(values[0]), float(values[-1])
    if smallest <= (_ROUND_OFF * largest if ridge <= 0 else 0.0):
        raise AdapterError(
            "activations do not span all their coordinates",
            hint="give more public samples, or a ridge above 0",
        )
    root = values.sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T, largest / smallest


def turned_outputs(
    anchor: Tensor, own: Tensor, moments: PairMoments, ridge: float = RIDGE
) -> tuple[Tensor, CanonicalMap]:
    """The aligned B of a model: the paper's map of outputs applied to the anchor's B.

    With orthonormal columns in ``anchor`` and ``own`` this is ``own R``, R from
    :func:`canonical_map`; the column space of B stays. Other B are reduced to that case by QR.

    Args:
        anchor: the anchor's B, ``(d_s, r)``.
        own: B of the model before, ``(d_g, r)``.
        moments: of the outputs of A: x the anchor's ``(n, r)``, y the model's ``(n, r)``.
        ridge: see :func:`canonical_map`.

    Returns:
        B ``(d_g, r)`` float64, and the map between the orthonormal coordinates of both outputs.

    Raises:
        AdapterError: shapes that do not fit, or see :func:`canonical_map`.
    """
    if (anchor.shape[1], own.shape[1]) != tuple(moments.xy.shape):
        raise AdapterError(
            f"B of ranks {anchor.shape[1]} and {own.shape[1]} do not fit moments of widths "
            f"{tuple(moments.xy.shape)}",
            hint="moments are those of the outputs of A: one coordinate per rank",
        )
    _, anchor_triangle = torch.linalg.qr(anchor.double())
    own_basis, own_triangle = torch.linalg.qr(own.double())
    found = canonical_map(moments.mapped(anchor_triangle, own_triangle), ridge)
    return own_basis @ found.matrix @ anchor_triangle, found
