from __future__ import annotations

import pytest
import torch

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.moments import PairMoments

FIELDS = ("x_mean", "y_mean", "xx", "yy", "xy")


def _rows(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def _assert_equal(found: PairMoments, expected: PairMoments) -> None:
    assert found.count == expected.count
    for field in FIELDS:
        torch.testing.assert_close(
            getattr(found, field), getattr(expected, field), rtol=1e-11, atol=1e-9
        )


def test_batches_and_merged_parts_equal_all_rows_at_once() -> None:
    x, y = _rows(50, 4, 0) + 1e3, _rows(50, 3, 1) - 1e3
    whole = PairMoments.of(x, y)
    torch.testing.assert_close(whole.xx, 49 * torch.cov(x.T), rtol=1e-10, atol=1e-8)
    streamed = PairMoments.empty(4, 3)
    for start in range(0, 50, 7):
        streamed = streamed.added(x[start : start + 7], y[start : start + 7])
    _assert_equal(streamed, whole)
    first, second = PairMoments.of(x[:13], y[:13]), PairMoments.of(x[13:], y[13:])
    _assert_equal(first.merged(second), whole)
    _assert_equal(second.merged(first), whole)


def test_a_large_mean_costs_no_digits() -> None:
    x, y = _rows(200, 2, 2), _rows(200, 2, 3)
    near, far = PairMoments.empty(2, 2), PairMoments.empty(2, 2)
    for start in range(0, 200, 20):
        part = slice(start, start + 20)
        near = near.added(x[part], y[part])
        far = far.added(x[part] + 1e6, y[part])
    torch.testing.assert_close(far.xx, near.xx, rtol=1e-7, atol=1e-7)


def test_leading_axes_are_rows_and_empty_batches_change_nothing() -> None:
    x, y = _rows(12, 3, 4), _rows(12, 2, 5)
    flat = PairMoments.of(x, y)
    _assert_equal(PairMoments.of(x.reshape(3, 4, 3), y.reshape(3, 4, 2)), flat)
    _assert_equal(flat.added(x[:0], y[:0]), flat)


def test_mapped_moments_are_those_of_mapped_rows() -> None:
    x, y, f, g = _rows(20, 3, 6), _rows(20, 2, 7), _rows(4, 3, 8), _rows(2, 2, 9)
    _assert_equal(PairMoments.of(x, y).mapped(f, g), PairMoments.of(x @ f.T, y @ g.T))


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AdapterError, match="5 and 4 rows"):
        PairMoments.of(_rows(5, 2, 0), _rows(4, 2, 0))
    with pytest.raises(AdapterError, match="NaN"):
        PairMoments.of(torch.tensor([[float("nan")]]), torch.ones(1, 1))
    with pytest.raises(AdapterError, match="do not merge"):
        PairMoments.empty(2, 2).merged(PairMoments.empty(2, 3))
