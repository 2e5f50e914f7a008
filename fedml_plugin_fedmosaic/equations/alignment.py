"""Aligned A and B of PQ layers: closed forms for models whose tokens correspond one to one.

PQ-LoRA shares only P (r, r) and Q (r,) between architectures, so the r coordinates before P and
after it must mean the same in both models. Let x_s, x_g be the inputs and y_s, y_g the outputs of
a matched pair of linears (anchor s, other model g) on the same public tokens:

* anchor: A_s holds the r leading principal directions of x_s, B_s those of y_s (orthonormal);
* A_g minimises the mean of ``|A_g x_g - A_s x_s|^2`` (ridge regression) and is then replaced by the
  nearest matrix with orthonormal rows;
* B_g holds the images of B_s under the regression of y_g on y_s, made orthonormal likewise.

The paper (FedMosaic, arXiv 2506.11024) trains A_g by gradient descent on the same squared error
with an orthogonality penalty, and turns B_g by canonical correlation of the two adapters' outputs,
both from random orthonormal anchors. With a random B_g that turn cannot change which directions of
the residual stream an adapter writes to; regressing outputs on outputs does. See the documentation
page on the algorithm for the measured difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError


def nearest_row_orthonormal(matrix: Tensor) -> Tensor:
    """The row-orthonormal matrix closest in Frobenius norm: ``U V^T`` of the thin SVD.

    Args:
        matrix: ``(r, d)`` with r <= d and full row rank.

    Returns:
        ``(r, d)`` float64.

    Raises:
        AdapterError: r > d.
    """
    if matrix.shape[0] > matrix.shape[1]:
        raise AdapterError(
            f"{matrix.shape[0]} rows of length {matrix.shape[1]} cannot be orthonormal",
            hint="lower adapter.rank",
        )
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def leading_directions(second_moment: Tensor, rank: int) -> Tensor:
    """Orthonormal rows that span the leading eigenvectors of a second-moment matrix.

    Signs are fixed (largest entry of each row positive), so that the result is reproducible.

    Args:
        second_moment: ``(d, d)`` symmetric.
        rank: number of directions, at most d.

    Returns:
        ``(rank, d)`` float64, in order of falling eigenvalue.
    """
    if rank > second_moment.shape[0]:
        raise AdapterError(
            f"rank {rank} is larger than a layer's width {second_moment.shape[0]}",
            hint="lower adapter.rank",
        )
    _, vectors = torch.linalg.eigh(second_moment.double())
    rows = vectors.flip(1)[:, :rank].T
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    signed: Tensor = rows * torch.sign(largest)
    return signed


def ridge(second_moment: Tensor, cross_moment: Tensor, strength: float = 1e-3) -> Tensor:
    """Least-squares map from inputs to targets, from sums over tokens.

    Args:
        second_moment: ``sum x x^T``, ``(d, d)``.
        cross_moment: ``sum x t^T``, ``(d, k)``.
        strength: ridge weight relative to the mean diagonal of ``second_moment``.

    Returns:
        ``W (k, d)`` float64 with ``W x`` close to ``t``.
    """
    moment = second_moment.double()
    scale = moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(moment.shape[0], dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(moment + strength * scale * eye, cross_moment.double())
    return solution.T


def explained_fraction(
    weights: Tensor, second_moment: Tensor, cross_moment: Tensor, target_power: Tensor
) -> float:
    """Share of the targets' power that a linear map explains (1 is perfect, 0 is useless).

    Args:
        weights: ``(k, d)``.
        second_moment: ``sum x x^T``, ``(d, d)``.
        cross_moment: ``sum x t^T``, ``(d, k)``.
        target_power: ``sum |t|^2``, scalar.
    """
    w = weights.double()
    residual = (
        target_power.double()
        - 2.0 * (w * cross_moment.double().T).sum()
        + ((w @ second_moment.double()) * w).sum()
    )
    return float(1.0 - residual / target_power.double())
