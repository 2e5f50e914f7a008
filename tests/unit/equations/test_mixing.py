from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.equations import mixing
from fedml_plugin_fedmosaic.equations.mixing import TILE_COLUMNS, mix


def _sources(count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(count, length, generator=torch.Generator().manual_seed(seed)))


def _weights(targets: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(targets, count, generator=torch.Generator().manual_seed(seed)).double()


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.view(torch.int32), second.contiguous().view(torch.int32))


def test_mix_is_the_matrix_product() -> None:
    sources, weights = _sources(7, 3001), _weights(5, 7)
    expected = (weights @ torch.stack(sources).double()).float()
    torch.testing.assert_close(mix(sources, weights), expected, rtol=1e-5, atol=1e-6)


def test_every_entry_is_the_same_chain_of_rounded_operations() -> None:
    sources, weights = _sources(9, 50), _weights(3, 9)
    factors = weights.float()
    expected = torch.zeros(3, 50)
    for index, source in enumerate(sources):
        for target in range(3):
            expected[target] = expected[target] + source * factors[target, index]
    assert _same_bits(mix(sources, weights), expected)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("length", [1, 31, 1000, 70_001])
def test_bits_of_few_rows_do_not_depend_on_rows_entries_or_threads(length: int) -> None:
    sources, weights = _sources(9, length), _weights(3, 9)
    whole = mix(sources, weights)
    for rows in ([0], [2, 1], [1, 1, 0]):
        assert _same_bits(mix(sources, weights[rows]), whole[rows])
    middle = slice(length // 3, length // 3 + max(1, length // 2))
    assert _same_bits(mix([s[middle] for s in sources], weights), whole[:, middle])
    for count in (1, 2, 3):
        with _threads(count):
            assert _same_bits(mix(sources, weights), whole)


@pytest.mark.parametrize(("targets", "count"), [(4, 4), (7, 9), (33, 33), (100, 100), (5, 130)])
@pytest.mark.parametrize("ragged", [0, 1, 4099])
def test_bits_of_many_rows_do_not_depend_on_tiles_or_threads(
    targets: int, count: int, ragged: int
) -> None:
    tiles = 5
    sources, weights = _sources(count, tiles * TILE_COLUMNS + ragged), _weights(targets, count)
    whole = mix(sources, weights)
    expected = weights.float() @ torch.stack(sources)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    for share in ([0, 1, 6], [0, 2, 3, 6], [0, 1, 2, 3, 4, 6]):
        for first, last in pairwise(share):
            part = slice(first * TILE_COLUMNS, last * TILE_COLUMNS)
            # Copied, as ranks receive them: aligned otherwise than in the whole vectors.
            pieces = [torch.cat((torch.zeros(3), source[part]))[3:] for source in sources]
            with _threads(len(share) - 1):
                assert _same_bits(mix(pieces, weights), whole[:, part])


def test_a_zero_weight_adds_nothing_to_many_rows() -> None:
    sources, weights = _sources(6, 1000), _weights(5, 6)
    weights[:, 2] = 0
    whole = mix(sources, weights)
    sources[2] = sources[2] * 1e30
    assert torch.equal(mix(sources, weights), whole)


def test_bits_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, weights = _sources(5, 9001), _weights(3, 5)
    whole = mix(sources, weights)
    monkeypatch.setattr(mixing, "_BLOCK_ELEMENTS", 4 * 1500)
    assert _same_bits(mix(sources, weights), whole)


def test_a_zero_weight_is_an_absent_source() -> None:
    sources = [torch.tensor([-0.0, 1.0, -2.0]), torch.tensor([5.0, -5.0, 0.0])]
    weights = torch.tensor([[1.0, 0.0]])
    assert _same_bits(mix(sources, weights), mix(sources[:1], weights[:, :1]))


@given(st.floats(-4, 4), st.integers(1, 6), st.integers(0, 50))
def test_mix_is_linear(scale: float, count: int, seed: int) -> None:
    first, second = _sources(count, 20, seed), _sources(count, 20, seed + 1000)
    weights = _weights(3, count, seed)
    combined = mix([a + scale * b for a, b in zip(first, second, strict=True)], weights)
    expected = mix(first, weights) + scale * mix(second, weights)
    torch.testing.assert_close(combined, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_sources_are_summed_in_float32() -> None:
    sources = [torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 1e-3, dtype=torch.bfloat16)]
    got = mix(sources, torch.ones(1, 2))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0], 1 + sources[1].float())


def test_no_target_and_no_entry_are_empty_results() -> None:
    assert mix(_sources(2, 5), torch.empty(0, 2)).shape == (0, 5)
    assert mix([torch.empty(0)], torch.ones(2, 1)).shape == (2, 0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match="at least one source"):
        mix([], torch.empty(1, 0))
    with pytest.raises(PlanError, match="one shape"):
        mix([torch.ones(2), torch.ones(3)], torch.ones(1, 2))
    with pytest.raises(PlanError, match=r"weights \(T, 2\)"):
        mix(_sources(2, 5), torch.ones(1, 3))
