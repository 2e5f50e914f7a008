from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.matching import (
    coherence_floor,
    column_coherence,
    fit_a,
    matching_loss,
)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("zero_column", [False, True])
def test_penalty_equals_the_square_of_all_cosines(zero_column: bool) -> None:
    factor = _normal(3, 8, seed=0)
    if zero_column:
        factor[:, 2] = 0.0
    unit = torch.nn.functional.normalize(factor, dim=0)
    cosines = unit.T @ unit
    off = cosines - torch.diag(cosines.diagonal())
    assert float(column_coherence(factor)) == pytest.approx(float(off.square().sum() / 56))


def test_a_tight_frame_reaches_the_floor_and_has_orthogonal_rows() -> None:
    angles = torch.arange(6, dtype=torch.float64) * torch.pi / 6
    frame = torch.stack([angles.cos(), angles.sin()])
    assert float(column_coherence(frame)) == pytest.approx(coherence_floor(2, 6))
    assert float(column_coherence(_normal(2, 6, seed=1))) > coherence_floor(2, 6)
    assert float((frame @ frame.T)[0, 1]) == pytest.approx(0.0, abs=1e-12)
    assert float(column_coherence(frame[:, :1])) == coherence_floor(2, 1) == 0.0


def _world(batches: int) -> tuple[dict[str, Tensor], list[dict[str, tuple[Tensor, Tensor]]]]:
    """A model whose inputs are a turn of the anchor's, so that a perfect A exists."""
    turn = torch.linalg.qr(_normal(6, 6, seed=2)).Q
    anchor = torch.linalg.qr(_normal(6, 2, seed=3)).Q.T
    stream = []
    for index in range(batches):
        x = _normal(2, 8, 6, seed=10 + index)
        stream.append({"0/q_proj": (x @ turn, x @ anchor.T)})
    return {"0/q_proj": anchor @ turn}, stream


def test_fit_finds_the_anchor_s_coordinates_and_repeats_its_bits() -> None:
    wanted, stream = _world(200)
    start = {"0/q_proj": torch.linalg.qr(_normal(6, 2, seed=4)).Q.T}
    before = start["0/q_proj"].clone()
    fits = [fit_a(start, stream, num_updates=100, accumulate=2, learning_rate=0.05) for _ in "ab"]
    found = fits[0].factors["0/q_proj"]
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(found @ found.T, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, wanted["0/q_proj"], atol=0.1, rtol=0)
    assert fits[0].losses[-1] < 0.2 * fits[0].losses[0]
    assert torch.equal(found, fits[1].factors["0/q_proj"])
    assert fits[0].losses == fits[1].losses
    assert torch.equal(before, start["0/q_proj"])
    assert not start["0/q_proj"].requires_grad


def test_without_the_penalty_the_fit_is_exact() -> None:
    wanted, stream = _world(300)
    start = {"0/q_proj": torch.linalg.qr(_normal(6, 2, seed=4)).Q.T}
    fit = fit_a(start, stream, num_updates=300, accumulate=1, learning_rate=0.05, penalty=0.0)
    torch.testing.assert_close(fit.factors["0/q_proj"], wanted["0/q_proj"], atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    start, stream = _world(3)
    with pytest.raises(AdapterError, match="ended after 3 batches"):
        fit_a(start, stream, num_updates=2, accumulate=2)
    with pytest.raises(AdapterError, match="same matched linears: 1/k_proj"):
        fit_a({**start, "1/k_proj": start["0/q_proj"]}, [stream[0]], num_updates=1)
    broken = {"0/q_proj": (stream[0]["0/q_proj"][0] * float("nan"), stream[0]["0/q_proj"][1])}
    with pytest.raises(AdapterError, match="loss is nan"):
        fit_a(start, [broken], num_updates=1, accumulate=1)
    with pytest.raises(AdapterError, match="no matched linear"):
        matching_loss([], [], [])
    with pytest.raises(AdapterError, match="matched pair 0"):
        matching_loss([_normal(2, 6, seed=0)], [_normal(4, 5, seed=0)], [_normal(4, 2, seed=0)])
