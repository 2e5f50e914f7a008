"""Moments of paired rows, streamed over batches: data of any size in constant memory.

Means and centred second moments are merged pairwise (Chan, Golub and LeVeque, "Updating formulae
and a pairwise algorithm for computing sample variances", 1979), so that a large mean costs no
digits. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError


@dataclass(frozen=True)
class PairMoments:
    """Means and centred moments of rows ``x (n, p)`` and ``y (n, q)``, all float64.

    Attributes:
        count: number n of rows.
        x_mean: ``(p,)``.
        y_mean: ``(q,)``.
        xx: ``sum (x - x_mean)^T (x - x_mean)``, ``(p, p)``.
        yy: likewise, ``(q, q)``.
        xy: ``sum (x - x_mean)^T (y - y_mean)``, ``(p, q)``.
    """

    count: int
    x_mean: Tensor
    y_mean: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def empty(cls, x_width: int, y_width: int) -> PairMoments:
        """Moments of no rows, for rows of these widths."""
        zeros = torch.zeros
        return cls(
            0,
            zeros(x_width, dtype=torch.float64),
            zeros(y_width, dtype=torch.float64),
            zeros(x_width, x_width, dtype=torch.float64),
            zeros(y_width, y_width, dtype=torch.float64),
            zeros(x_width, y_width, dtype=torch.float64),
        )

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> PairMoments:
        """Moments of one batch.

        Args:
            x: ``(..., p)``; leading axes are rows.
            y: ``(..., q)`` with as many rows.

        Raises:
            AdapterError: different numbers of rows, or values that are not finite.
        """
        rows_x = x.detach().reshape(-1, x.shape[-1]).double()
        rows_y = y.detach().reshape(-1, y.shape[-1]).double()
        if len(rows_x) != len(rows_y):
            raise AdapterError(
                f"rows to compare must be pairs: {len(rows_x)} and {len(rows_y)} rows",
                hint="models with different tokenizers need their tokens aligned first",
            )
        if len(rows_x) == 0:
            return cls.empty(x.shape[-1], y.shape[-1])
        if not (torch.isfinite(rows_x).all() and torch.isfinite(rows_y).all()):
            raise AdapterError(
                "activations to compare hold NaN or infinite values",
                hint="run the observed models in float32 or bfloat16 instead of float16",
            )
        x_mean, y_mean = rows_x.mean(0), rows_y.mean(0)
        cx, cy = rows_x - x_mean, rows_y - y_mean
        return cls(len(rows_x), x_mean, y_mean, cx.T @ cx, cy.T @ cy, cx.T @ cy)

    def merged(self, other: PairMoments) -> PairMoments:
        """Moments of the rows of both.

        Raises:
            AdapterError: rows of different widths.
        """
        if self.xy.shape != other.xy.shape:
            raise AdapterError(
                f"moments of widths {tuple(self.xy.shape)} and {tuple(other.xy.shape)} do not merge"
            )
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        share = other.count / count
        dx, dy = other.x_mean - self.x_mean, other.y_mean - self.y_mean
        between = self.count * share
        return PairMoments(
            count,
            self.x_mean + share * dx,
            self.y_mean + share * dy,
            self.xx + other.xx + between * torch.outer(dx, dx),
            self.yy + other.yy + between * torch.outer(dy, dy),
            self.xy + other.xy + between * torch.outer(dx, dy),
        )

    def added(self, x: Tensor, y: Tensor) -> PairMoments:
        """Moments after one more batch (see :meth:`of`)."""
        return self.merged(PairMoments.of(x, y))

    def mapped(self, x_map: Tensor, y_map: Tensor) -> PairMoments:
        """Moments of ``x x_map^T`` and ``y y_map^T``.

        Args:
            x_map: ``(p', p)``.
            y_map: ``(q', q)``.
        """
        f, g = x_map.double(), y_map.double()
        return PairMoments(
            self.count,
            f @ self.x_mean,
            g @ self.y_mean,
            f @ self.xx @ f.T,
            g @ self.yy @ g.T,
            f @ self.xy @ g.T,
        )
