from __future__ import annotations

import pytest
import torch

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.pq import gated, input_gate, pq_delta, scalar_gate


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_identity_p_and_zero_q_are_conventional_lora() -> None:
    x, a, b = _random(2, 3, 8), _random(4, 8), _random(5, 4)
    conventional = pq_delta(x, a, b, None, None, 2.0)
    torch.testing.assert_close(pq_delta(x, a, b, torch.eye(4), torch.zeros(4), 2.0), conventional)
    torch.testing.assert_close(conventional, 2.0 * x @ a.T @ b.T)


def test_q_may_be_a_row_or_a_vector() -> None:
    x, a, b, p, q = _random(3, 8), _random(4, 8), _random(5, 4), _random(4, 4), _random(4)
    assert torch.equal(pq_delta(x, a, b, p, q, 1.0), pq_delta(x, a, b, p, q[None], 1.0))


def test_scalar_gate_starts_in_the_middle() -> None:
    gate = scalar_gate(torch.zeros(()))
    assert float(gate) == 0.5
    mixed = gated(torch.zeros(2), torch.ones(2), torch.full((2,), 3.0), gate)
    assert torch.equal(mixed, torch.full((2,), 2.0))


def test_masked_gate_does_not_see_padding() -> None:
    x, w_gate = _random(2, 6, 8), _random(8)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    alone = input_gate(x[:1, :4], w_gate)
    x[0, 4:] = torch.inf
    got = input_gate(x, w_gate, mask)
    assert got.shape == (2, 1, 1)
    torch.testing.assert_close(got[:1], alone)
    torch.testing.assert_close(got[1:], input_gate(x[1:], w_gate))


def test_gate_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(AdapterError, match="input gate"):
        input_gate(_random(8), _random(8))
    with pytest.raises(AdapterError, match="input gate"):
        input_gate(_random(2, 6, 8), _random(8), torch.ones(2, 5))
    with pytest.raises(AdapterError, match="input gate"):
        input_gate(_random(2, 8), _random(8), torch.ones(2, 8))
