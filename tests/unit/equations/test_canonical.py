from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.canonical import (
    canonical_map,
    correlations_along,
    turned_outputs,
)
from fedml_plugin_fedmosaic.equations.moments import PairMoments


def _normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_rank_coordinates_give_the_full_width_map(orthonormal: bool) -> None:
    z_s, turn = _normal(300, 4, seed=0), _normal(4, 4, seed=1)
    z_g = z_s @ turn + 0.5 * _normal(300, 4, seed=2)
    b_s, b_g = _normal(9, 4, seed=3), _normal(12, 4, seed=4)
    if orthonormal:
        b_s, b_g = torch.linalg.qr(b_s).Q, torch.linalg.qr(b_g).Q
    turned, found = turned_outputs(b_s, b_g, PairMoments.of(z_s, z_g))
    full = canonical_map(PairMoments.of(z_s @ b_s.T, z_g @ b_g.T))
    assert (full.rank, found.rank) == (4, 4)
    torch.testing.assert_close(full.matrix @ b_s, turned, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(full.correlations[:4], found.correlations, rtol=1e-8, atol=1e-8)


def test_turned_outputs_agree_with_the_anchor_after_an_exact_turn() -> None:
    z = _normal(400, 3, seed=5)
    turn = torch.linalg.qr(_normal(3, 3, seed=6)).Q
    b_s, b_g = torch.linalg.qr(_normal(7, 3, seed=7)).Q, torch.linalg.qr(_normal(7, 3, seed=8)).Q
    turned, found = turned_outputs(b_s, b_g, PairMoments.of(z, z @ turn))
    torch.testing.assert_close(turned, b_g @ turn.T, atol=1e-5, rtol=0)
    assert float(found.correlations.min()) == pytest.approx(1.0, abs=1e-5)


def test_directions_without_a_partner_are_left_out_and_reported() -> None:
    z = _normal(100, 4, seed=9)
    other = z.clone()
    other[:, 2:] = 0.0
    found = canonical_map(PairMoments.of(z, other))
    assert found.rank == 2
    assert int(torch.linalg.matrix_rank(found.matrix)) == 2
    nothing = canonical_map(PairMoments.of(z, torch.zeros(100, 4)))
    assert nothing.rank == 0
    assert float(nothing.matrix.abs().max()) == 0.0


def test_too_few_rows_wrong_ranks_and_singular_moments_are_refused() -> None:
    z = _normal(30, 3, seed=10)
    with pytest.raises(AdapterError, match="at least 2 rows"):
        canonical_map(PairMoments.of(z[:1], z[:1]))
    with pytest.raises(AdapterError, match="ranks 2 and 3"):
        turned_outputs(_normal(5, 2, seed=11), _normal(5, 3, seed=12), PairMoments.of(z, z))
    with pytest.raises(AdapterError, match="span"):
        canonical_map(PairMoments.of(z[:3], z[:3]), ridge=0.0)


def test_correlations_of_the_rows_themselves_are_the_canonical_ones() -> None:
    x, y = _normal(60, 5, seed=0), _normal(60, 3, seed=1)
    moments = PairMoments.of(x, y + 0.5 * x[:, :3])
    found = canonical_map(moments, ridge=0.0)
    torch.testing.assert_close(correlations_along(found, moments), found.correlations)
    torch.testing.assert_close(  # coordinates of length 1, along which nothing else correlates
        found.x_directions @ moments.xx @ found.x_directions.T, torch.eye(3).double()
    )
    scaled = moments.mapped(3.0 * torch.eye(5), torch.eye(3))
    torch.testing.assert_close(correlations_along(found, scaled), found.correlations)


def test_correlations_of_few_rows_do_not_hold_on_new_ones() -> None:
    few = canonical_map(PairMoments.of(_normal(8, 5, seed=0), _normal(8, 5, seed=1)))
    assert float(few.correlations.mean()) > 0.6  # of rows that have nothing to do with each other
    new = PairMoments.of(_normal(4000, 5, seed=2), _normal(4000, 5, seed=3))
    assert float(correlations_along(few, new).abs().max()) < 0.06
    assert (
        float(
            correlations_along(few, PairMoments.of(torch.ones(9, 5), _normal(9, 5, seed=4)))
            .abs()
            .max()
        )
        == 0.0
    )
