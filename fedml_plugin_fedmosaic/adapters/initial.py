"""Initial values of adapter tensors; each has its own seed stream, named by what it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.rng import torch_generator


def orthonormal_rows(rows: int, columns: int, seed: int, *path: str | int) -> Tensor:
    """A uniformly distributed matrix with orthonormal rows.

    Thin QR of a normal draw in float64, with the signs of R's diagonal moved into Q so that the
    distribution is uniform and the result does not depend on the LAPACK in use. The released code
    draws A of PQ layers without orthogonalising it unless an alignment file is loaded.

    Args:
        rows: number of rows, at most ``columns``.
        columns: length of a row.
        seed: root seed.
        path: what the matrix is for.

    Returns:
        ``(rows, columns)`` float64.

    Raises:
        AdapterError: more rows than columns.
    """
    if rows > columns:
        raise AdapterError(
            f"{rows} rows of length {columns} cannot be orthonormal", hint="lower adapter.rank"
        )
    generator = torch_generator(seed, "orthonormal", *path)
    draw = torch.randn(columns, rows, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(draw)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(torch.float64)
    rows_: Tensor = (basis * signs).T
    return rows_.contiguous()


def kaiming_rows(rows: int, columns: int, seed: int, *path: str | int) -> Tensor:
    """Kaiming uniform with a = sqrt(5), as PEFT initialises A: uniform in +-1/sqrt(columns).

    Args:
        rows: rank.
        columns: input width.
        seed: root seed.
        path: what the matrix is for.

    Returns:
        ``(rows, columns)`` float32.
    """
    generator = torch_generator(seed, "kaiming", *path)
    bound = 1.0 / math.sqrt(columns)
    return (torch.rand(rows, columns, generator=generator) * 2.0 - 1.0) * bound
