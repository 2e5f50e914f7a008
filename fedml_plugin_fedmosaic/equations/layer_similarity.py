"""How well two models' activations correspond: quality of an alignment, and of the block matching.

Sources: linear CKA, Kornblith et al., "Similarity of neural network representations revisited"
(arXiv 1905.00414); its unbiased form averaged over batches, Nguyen et al. (arXiv 2010.15327), on
U-centred matrices, Szekely and Rizzo, "Partial distance correlation with methods for
dissimilarities" (2014). FedMosaic (arXiv 2506.11024) compares layers of models with CKA to justify
matching blocks by relative depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.canonical import RIDGE, canonical_map
from fedml_plugin_fedmosaic.equations.moments import PairMoments

_CONSTANT = 1e-13
"""Rows that differ by less than this share of their size are the same."""


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of paired rows: 1 for a turned and scaled copy, near 0 for unrelated rows.

    ``|Y^T X|^2 / (|X^T X| |Y^T Y|)`` with centred columns, from matrices of rows or of columns,
    whichever are smaller. With few rows of many columns it is too high; :class:`BlockSimilarity`
    has no such bias.

    Args:
        x: ``(n, p)``.
        y: ``(n, q)``.

    Raises:
        AdapterError: rows that are no pairs, or none, or rows that are all the same.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or not len(x):
        raise AdapterError(
            f"CKA compares paired rows, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    a, b = _centred(x), _centred(y)
    if len(a) < max(a.shape[1], b.shape[1]):
        k, m = a @ a.T, b @ b.T
        shared = (k * m).sum()
    else:
        k, m = a.T @ a, b.T @ b
        shared = (b.T @ a).square().sum()
    scale = k.norm() * m.norm()
    if not float(scale) > 0.0:
        raise AdapterError(
            "CKA needs rows that differ, in both models",
            hint="a layer gives the same output for all tokens: check the public samples",
        )
    return float(shared / scale)


@dataclass(frozen=True)
class BlockSimilarity:
    """Unbiased linear CKA between all layers of two models, streamed over batches.

    Attributes:
        cross: sum over batches of HSIC between layers, ``(p, q)`` float64.
        x_own: likewise of each layer of x with itself, ``(p,)``.
        y_own: ``(q,)``.
    """

    cross: Tensor
    x_own: Tensor
    y_own: Tensor

    @classmethod
    def of(cls, x: Sequence[Tensor], y: Sequence[Tensor]) -> BlockSimilarity:
        """From one batch.

        Memory grows with the square of the rows: a few hundred tokens make a good batch.

        Args:
            x: rows of each of p layers, ``(n, any width)``, n at least 4.
            y: rows of each of q layers at the same tokens.

        Raises:
            AdapterError: layers with different numbers of rows, or fewer than four.
        """
        counts = {len(rows) for rows in [*x, *y]}
        if len(counts) != 1 or min(counts) < 4:
            raise AdapterError(
                f"unbiased CKA needs at least 4 rows, as many from every layer; "
                f"got {sorted(counts)}"
            )
        n = counts.pop()
        left = torch.stack([_u_centred(rows) for rows in x]).flatten(1)
        right = torch.stack([_u_centred(rows) for rows in y]).flatten(1)
        scale = 1.0 / (n * (n - 3))
        return cls(
            scale * (left @ right.T),
            scale * left.square().sum(1),
            scale * right.square().sum(1),
        )

    def merged(self, other: BlockSimilarity) -> BlockSimilarity:
        """Of the batches of both."""
        return BlockSimilarity(
            self.cross + other.cross, self.x_own + other.x_own, self.y_own + other.y_own
        )

    def matrix(self) -> Tensor:
        """CKA ``(p, q)`` float64; about 0 for unrelated layers, where it can be below 0.

        Raises:
            AdapterError: a layer whose rows are all the same.
        """
        if not bool((self.x_own > 0).all() and (self.y_own > 0).all()):
            raise AdapterError(
                "CKA needs rows that differ, in both models",
                hint="a layer gives the same output for all tokens: check the public samples",
            )
        return self.cross / torch.outer(self.x_own, self.y_own).sqrt()


def _centred(rows: Tensor) -> Tensor:
    """Rows minus their mean; exactly zero where only round-off would be left."""
    values = rows.detach().double()
    centred = values - values.mean(0)
    if float(centred.norm()) <= _CONSTANT * float(values.norm()):
        return torch.zeros_like(centred)
    return centred


def _u_centred(rows: Tensor) -> Tensor:
    """Inner products of rows with zero diagonal and zero sums of rows and columns, ``(n, n)``."""
    n = len(rows)
    centred = _centred(rows)
    products = centred @ centred.T
    products.fill_diagonal_(0.0)
    sums = products.sum(1)
    products -= (sums[:, None] + sums[None, :]) / (n - 2)
    products += sums.sum() / ((n - 1) * (n - 2))
    return products.fill_diagonal_(0.0)


def unmatched_blocks(similarity: Tensor) -> tuple[tuple[int, int], ...]:
    """Blocks of x that resemble another block of y more than their own partner.

    Args:
        similarity: ``(N_B, N_B)`` between block ends, for example :meth:`BlockSimilarity.matrix`.

    Returns:
        Pairs of a block of x and the block of y that it resembles most.

    Raises:
        AdapterError: a matrix that is not square.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise AdapterError(f"matched blocks need a square matrix, got {tuple(similarity.shape)}")
    best = similarity.max(dim=1)
    behind = best.values > similarity.diagonal()
    return tuple((k, int(best.indices[k])) for k in behind.nonzero().flatten().tolist())


def canonical_correlations(moments: PairMoments, ridge: float = RIDGE) -> Tensor:
    """Correlations of the best paired directions of x and y, falling, ``(min(p, q),)`` float64.

    Args:
        moments: of paired rows.
        ridge: see :func:`~fedml_plugin_fedmosaic.equations.canonical.canonical_map`.
    """
    return canonical_map(moments, ridge).correlations


def explained_variance(moments: PairMoments, ridge: float = RIDGE) -> float:
    """Share of y's variance that the best linear map of x explains, between 0 and 1.

    Args:
        moments: of paired rows x, y.
        ridge: added to the diagonal of ``S_xx``, in units of sums over rows.

    Raises:
        AdapterError: y does not vary, or ``S_xx + ridge I`` is singular.
    """
    total = float(moments.yy.diagonal().sum())
    if not total > 0.0:
        raise AdapterError(
            "the explained share of a constant is not defined",
            hint="give more public samples",
        )
    factor, failed = torch.linalg.cholesky_ex(
        moments.xx + ridge * torch.eye(len(moments.xx), dtype=torch.float64)
    )
    if int(failed):
        raise AdapterError(
            "activations do not span all their coordinates",
            hint="give more public samples, or a ridge above 0",
        )
    # W = S_yx (S_xx + ridge I)^-1 leaves S_yy - 2 W S_xy + W S_xx W^T.
    weights = torch.cholesky_solve(moments.xy, factor)
    explained = 2.0 * (weights * moments.xy).sum() - (weights * (moments.xx @ weights)).sum()
    return float(explained) / total


def residual_share(moments: PairMoments) -> float:
    """Mean squared difference of paired rows, as a share of x's mean square; 0 is perfect.

    For the outputs of an anchor's A (x) and of an aligned A (y).

    Raises:
        AdapterError: x is zero everywhere, or rows have different widths.
    """
    if moments.xx.shape != moments.yy.shape:
        raise AdapterError(
            f"rows of widths {len(moments.xx)} and {len(moments.yy)} cannot be subtracted"
        )
    spread = (moments.xx + moments.yy - 2.0 * moments.xy).diagonal().sum()
    difference = float(spread + moments.count * (moments.x_mean - moments.y_mean).square().sum())
    power = float(moments.xx.diagonal().sum() + moments.count * moments.x_mean.square().sum())
    if not power > 0.0:
        raise AdapterError(
            "the residual of an anchor that is zero everywhere is not defined",
            hint="check the public samples and the anchor's A",
        )
    return difference / power


def coordinate_agreement(moments: PairMoments) -> float:
    """Mean squared correlation of coordinate i of x with coordinate i of y; 1 is perfect.

    Unlike :func:`residual_share` it does not depend on scales, and unlike canonical correlations
    it asks for the same coordinate and sign: correlations below 0 count as 0.

    Raises:
        AdapterError: rows of different widths.
    """
    if moments.xx.shape != moments.yy.shape:
        raise AdapterError(
            f"rows of widths {len(moments.xx)} and {len(moments.yy)} have no common coordinates"
        )
    spread = (moments.xx.diagonal() * moments.yy.diagonal()).sqrt()
    # A coordinate that does not vary agrees with nothing.
    safe = spread.clamp_min(torch.finfo(torch.float64).tiny)
    return float((moments.xy.diagonal() / safe).clamp(0.0, 1.0).square().mean())
