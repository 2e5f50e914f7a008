from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.layer_similarity import (
    BlockSimilarity,
    canonical_correlations,
    coordinate_agreement,
    explained_variance,
    linear_cka,
    residual_share,
    unmatched_blocks,
)
from fedml_plugin_fedmosaic.equations.moments import PairMoments


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows", [8, 60])
def test_cka_is_one_for_a_turned_copy_and_equals_its_definition(rows: int) -> None:
    x, y = _normal(rows, 10, seed=0), _normal(rows, 12, seed=1)
    turn = torch.linalg.qr(_normal(10, 10, seed=2)).Q
    assert linear_cka(x, 3.0 * x @ turn + 5.0) == pytest.approx(1.0)
    centre = torch.eye(rows, dtype=torch.float64) - 1.0 / rows
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = float((k * m).sum() / (k.norm() * m.norm()))
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-10)
    assert linear_cka(y, x) == pytest.approx(expected, rel=1e-10)


def _hsic(x: Tensor, y: Tensor) -> float:
    """Unbiased HSIC by the formula of Song et al. (2012), term by term."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
    ones = torch.ones(n, dtype=torch.float64)
    value = (
        (k @ m).trace()
        + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        - 2.0 / (n - 2) * (ones @ k @ m @ ones)
    )
    return float(value / (n * (n - 3)))


def test_streamed_cka_equals_the_unbiased_formula_over_batches() -> None:
    batches = [(_normal(9 + b, 5, seed=b), _normal(9 + b, 7, seed=50 + b)) for b in range(3)]
    batches = [(x, y + x @ torch.ones(5, 7, dtype=torch.float64)) for x, y in batches]
    parts = [BlockSimilarity.of([x, 2.0 * x], [y]) for x, y in batches]
    found = parts[0].merged(parts[1]).merged(parts[2]).matrix()
    cross, own_x, own_y = (
        sum(_hsic(*pair(x, y)) for x, y in batches)
        for pair in (lambda x, y: (x, y), lambda x, _: (x, x), lambda _, y: (y, y))
    )
    assert float(found[0, 0]) == pytest.approx(cross / (own_x * own_y) ** 0.5, rel=1e-9)
    assert float(found[1, 0]) == pytest.approx(float(found[0, 0]), rel=1e-9)
    assert found.shape == (2, 1)


def test_few_rows_of_many_columns_do_not_look_alike() -> None:
    x, y = [_normal(32, 400, seed=s) for s in (3, 4)]
    assert linear_cka(x, y) > 0.8
    parts = [
        BlockSimilarity.of([_normal(32, 400, seed=100 + s)], [_normal(32, 400, seed=200 + s)])
        for s in range(20)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    assert abs(float(total.matrix())) < 0.1


def test_blocks_that_resemble_another_block_are_named() -> None:
    assert unmatched_blocks(torch.tensor([[0.9, 0.1], [0.2, 0.8]])) == ()
    crossed = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.8], [0.1, 0.7, 0.6]])
    assert unmatched_blocks(crossed) == ((1, 2), (2, 1))
    with pytest.raises(AdapterError, match="square"):
        unmatched_blocks(torch.zeros(2, 3))


def test_canonical_correlations_are_those_of_the_signal() -> None:
    signal, noise = _normal(20000, 2, seed=5), _normal(20000, 2, seed=6)
    y = signal * torch.tensor([0.6, 0.0]) + noise * torch.tensor([0.8, 1.0])
    first = canonical_correlations(PairMoments.of(signal, y))
    assert first.tolist() == pytest.approx([0.6, 0.0], abs=0.02)
    turn = torch.linalg.qr(_normal(2, 2, seed=7)).Q
    second = canonical_correlations(PairMoments.of(signal @ turn + 1.0, 2.0 * y))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_explained_variance_is_that_of_least_squares() -> None:
    x, noise = _normal(500, 4, seed=8), _normal(500, 3, seed=9)
    y = x @ _normal(4, 3, seed=10) + noise + 2.0
    found = explained_variance(PairMoments.of(x, y))
    cx, cy = x - x.mean(0), y - y.mean(0)
    rest = cy - cx @ torch.linalg.lstsq(cx, cy).solution
    expected = 1.0 - float(rest.square().sum() / cy.square().sum())
    assert found == pytest.approx(expected, abs=1e-6)
    assert explained_variance(PairMoments.of(x, noise)) < 0.05
    assert explained_variance(PairMoments.of(x, x[:, :2])) == pytest.approx(1.0, abs=1e-6)


def test_residual_is_the_share_of_squared_differences() -> None:
    x, y = _normal(40, 3, seed=11) + 1.0, _normal(40, 3, seed=12)
    expected = float((x - y).square().sum() / x.square().sum())
    assert residual_share(PairMoments.of(x, y)) == pytest.approx(expected)
    assert residual_share(PairMoments.of(x, x)) == pytest.approx(0.0, abs=1e-12)


def test_what_cannot_be_compared_is_refused() -> None:
    x, constant = _normal(10, 3, seed=13), torch.full((10, 3), 0.1)
    with pytest.raises(AdapterError, match="paired rows"):
        linear_cka(x, x[:5])
    with pytest.raises(AdapterError, match="rows that differ"):
        linear_cka(x, constant)
    with pytest.raises(AdapterError, match="at least 4 rows"):
        BlockSimilarity.of([x[:3]], [x[:3]])
    with pytest.raises(AdapterError, match="rows that differ"):
        BlockSimilarity.of([x], [constant]).matrix()
    with pytest.raises(AdapterError, match="constant"):
        explained_variance(PairMoments.of(x, constant))
    with pytest.raises(AdapterError, match="span"):
        explained_variance(PairMoments.of(torch.zeros(10, 2), x), ridge=0.0)
    with pytest.raises(AdapterError, match="zero everywhere"):
        residual_share(PairMoments.of(0.0 * x, x))
    with pytest.raises(AdapterError, match="widths 3 and 2"):
        residual_share(PairMoments.of(x, x[:, :2]))


def test_agreement_asks_for_the_same_coordinates_at_any_scale() -> None:
    x, noise = _normal(4000, 3, seed=5), _normal(4000, 3, seed=6)
    assert coordinate_agreement(PairMoments.of(x, 7.0 * x - 2.0)) == pytest.approx(1.0)
    assert coordinate_agreement(PairMoments.of(x, -x)) == 0.0
    assert coordinate_agreement(PairMoments.of(x, x.roll(1, 1))) < 0.01
    halves = coordinate_agreement(PairMoments.of(x, x + noise))
    assert halves == pytest.approx(0.5, abs=0.03)
    still = torch.cat([x[:, :2], torch.zeros(4000, 1, dtype=torch.float64)], dim=1)
    assert coordinate_agreement(PairMoments.of(x, still)) == pytest.approx(2 / 3)
    with pytest.raises(AdapterError, match="no common coordinates"):
        coordinate_agreement(PairMoments.of(x, x[:, :2]))
