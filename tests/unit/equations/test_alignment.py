"""Closed forms of the alignment against reference values and against models we can undo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.alignment import (
    explained_fraction,
    leading_directions,
    nearest_row_orthonormal,
    ridge,
)

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("case", ["small", "wide", "near"])
def test_nearest_row_orthonormal_matches_reference(case: str) -> None:
    with np.load(GOLDEN / "polar.npz", allow_pickle=False) as arrays:
        matrix = torch.from_numpy(arrays[f"{case}/A"])
        expected = torch.from_numpy(arrays[f"{case}/A_ortho"])
    found = nearest_row_orthonormal(matrix)
    torch.testing.assert_close(found, expected.double(), atol=2e-6, rtol=0)
    eye = torch.eye(found.shape[0], dtype=torch.float64)
    torch.testing.assert_close(found @ found.T, eye, atol=1e-12, rtol=0)


def test_more_rows_than_columns_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"rank"):
        nearest_row_orthonormal(torch.randn(5, 3))
    with pytest.raises(AdapterError, match=r"rank 4"):
        leading_directions(torch.eye(3), 4)


def test_a_rotated_model_is_aligned_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    other = x @ turn
    anchor = leading_directions(x.T @ x, 4)
    rows = ridge(other.T @ other, other.T @ (x @ anchor.T), strength=1e-12)
    torch.testing.assert_close(nearest_row_orthonormal(rows), anchor @ turn, atol=1e-8, rtol=0)
    z = x @ anchor.T
    quality = explained_fraction(rows, other.T @ other, other.T @ z, (z**2).sum())
    assert quality == pytest.approx(1.0, abs=1e-9)


def test_unrelated_inputs_explain_almost_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 6, generator=generator)
    t = torch.randn(4000, 3, generator=generator)
    w = ridge(x.T @ x, x.T @ t)
    assert explained_fraction(w, x.T @ x, x.T @ t, (t**2).sum()) < 0.02


def test_leading_directions_are_ordered_and_reproducible() -> None:
    spectrum = torch.diag(torch.tensor([1.0, 9.0, 4.0]))
    rows = leading_directions(spectrum, 2)
    expected = torch.tensor([[0.0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(rows, expected)
