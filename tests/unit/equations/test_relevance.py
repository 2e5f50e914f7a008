from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.equations.gradient import column_projection, compress
from fedml_plugin_fedmosaic.equations.relevance import (
    Similarity,
    column_segments,
    column_similarity,
    finish_similarity,
    flat_similarity,
    peer_weights,
    relevance_weights,
    segment_products,
    unit_columns,
)


def _sketches(
    count: int, rows: int = 6, columns: int = 9, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return list(
        torch.randn(count, rows, columns, generator=generator, dtype=torch.float64).to(dtype)
    )


def _symmetric(count: int, seed: int) -> torch.Tensor:
    values = torch.rand(count, count, generator=torch.Generator().manual_seed(seed)).double()
    return (values + values.T) / 2


@pytest.mark.parametrize("count", [1, 5, 33, 70])
def test_column_similarity_is_the_mean_cosine_of_columns(count: int) -> None:
    sketches = _sketches(count)
    got = column_similarity(sketches, 4)
    stacked = torch.stack(sketches)
    unit = stacked / stacked.norm(dim=1, keepdim=True)
    expected = torch.einsum("irc,jrc->ij", unit, unit) / 9
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert torch.equal(got, got.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    sketches = _sketches(4, dtype=dtype)
    exact = column_similarity([sketch.double() for sketch in sketches])
    got = column_similarity(sketches)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-6)


def test_long_sketches_do_not_lose_precision() -> None:
    sketches = _sketches(3, rows=700, columns=900, dtype=torch.float32)
    exact = column_similarity([sketch.double() for sketch in sketches])
    torch.testing.assert_close(column_similarity(sketches), exact, rtol=0, atol=1e-6)


def test_zero_columns_count_as_unrelated_even_to_themselves() -> None:
    sketches = _sketches(2)
    sketches[0][:, 3] = 0
    got = column_similarity(sketches)
    assert float(got[0, 0]) == pytest.approx(8 / 9, abs=1e-12)
    assert float(got[1, 1]) == pytest.approx(1, abs=1e-12)
    silent = [torch.zeros(3, 4), torch.ones(3, 4)]
    assert not column_similarity(silent)[0].any()
    assert not flat_similarity(silent)[0].any()


def test_scale_of_columns_matters_only_to_the_flat_similarity() -> None:
    sketches = _sketches(3)
    scaled = [sketch.clone() for sketch in sketches]
    for sketch in scaled:
        sketch[:, 0] *= 100
    torch.testing.assert_close(
        column_similarity(scaled), column_similarity(sketches), rtol=0, atol=1e-12
    )
    assert float((flat_similarity(scaled) - flat_similarity(sketches)).abs().max()) > 0.01


def test_inputs_are_not_changed() -> None:
    sketches = _sketches(3)
    before = [sketch.clone() for sketch in sketches]
    column_similarity(sketches, 2)
    assert all(torch.equal(a, b) for a, b in zip(sketches, before, strict=True))


def test_wrong_sketches_are_refused() -> None:
    with pytest.raises(PlanError, match="at least one"):
        column_similarity([])
    with pytest.raises(PlanError, match="one shape"):
        column_similarity([torch.ones(2, 3), torch.ones(2, 4)])
    bad = _sketches(3)
    bad[1][0, 0] = torch.nan
    with pytest.raises(PlanError, match=r"number \[1\]"):
        column_similarity(bad)
    with pytest.raises(PlanError, match=r"number \[1\]"):
        flat_similarity(bad)


@given(st.integers(1, 12), st.integers(0, 99), st.floats(1e-3, 100), st.sets(st.integers(0, 11)))
def test_rows_sum_to_one_over_the_other_participants(
    count: int, seed: int, temperature: float, chosen: set[int]
) -> None:
    members = {client for client in chosen if client < count}
    weights = relevance_weights(_symmetric(count, seed), temperature, members)
    assert not weights.diagonal().any()
    assert (weights >= 0).all()
    outside = torch.tensor([client not in members for client in range(count)])
    assert not weights[outside].any()
    assert not weights[:, outside].any()
    sums = weights.sum(1)[~outside]
    expected = torch.full_like(sums, 1.0 if len(members) > 1 else 0.0)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)


@given(st.integers(2, 9), st.integers(0, 99), st.randoms(use_true_random=False))
def test_weights_are_equivariant_under_permutation(count: int, seed: int, rng: object) -> None:
    order = list(range(count))
    rng.shuffle(order)  # type: ignore[attr-defined]
    similarity = _symmetric(count, seed)
    index = torch.tensor(order)
    moved = relevance_weights(similarity[index][:, index], 0.5)
    expected = relevance_weights(similarity, 0.5)[index][:, index]
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_similarity_is_equivariant_under_permutation(rng: object) -> None:
    order = list(range(7))
    rng.shuffle(order)  # type: ignore[attr-defined]
    sketches = _sketches(7)
    moved = column_similarity([sketches[client] for client in order])
    expected = column_similarity(sketches)[order][:, order]
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
def test_small_temperatures_pick_the_nearest_peer(temperature: float) -> None:
    similarity = torch.tensor([[1.0, 0.2, 0.7], [0.2, 1.0, 0.2], [0.7, 0.2, 1.0]])
    weights = relevance_weights(similarity, temperature)
    assert torch.equal(weights[0], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert torch.equal(weights[1], torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))


def test_large_temperatures_make_everybody_equal() -> None:
    weights = relevance_weights(_symmetric(4, 0), float("inf"))
    torch.testing.assert_close(weights[0, 1:], torch.full((3,), 1 / 3, dtype=torch.float64))


def test_unknown_relevance_of_absent_clients_does_not_matter() -> None:
    similarity = _symmetric(4, 1)
    expected = relevance_weights(similarity, 0.5, [0, 1, 3])
    similarity[2], similarity[:, 2] = torch.nan, torch.nan
    assert torch.equal(relevance_weights(similarity, 0.5, [3, 0, 1]), expected)
    with pytest.raises(PlanError, match="finite"):
        relevance_weights(similarity, 0.5)


def test_wrong_weights_inputs_are_refused() -> None:
    with pytest.raises(PlanError, match="square"):
        relevance_weights(torch.ones(2, 3), 0.5)
    with pytest.raises(PlanError, match="temperature"):
        relevance_weights(torch.ones(2, 2), 0.0)
    with pytest.raises(PlanError, match="participants"):
        relevance_weights(torch.ones(2, 2), 0.5, [0, 2])


@pytest.mark.parametrize("kind", ["columns", "flat"])
def test_segments_have_the_same_bits_on_any_number_of_threads(kind: Similarity) -> None:
    sketches = _sketches(37, rows=65, columns=1000, dtype=torch.float32)
    segments = column_segments(65, 1000)
    assert len(segments) == 16
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            # In another order, from pieces of other strides: as if other ranks had made them.
            parts = {
                segment.start: segment_products(
                    [sketch[:, segment].contiguous() for sketch in sketches], kind
                )
                for segment in (segments if count == 1 else segments[::-1])
            }
            total = torch.zeros(37, 37, dtype=torch.float64)
            for start in sorted(parts):
                total += parts[start]
            results.append(finish_similarity(total, kind, 1000))
    finally:
        torch.set_num_threads(threads)
    whole = column_similarity(sketches) if kind == "columns" else flat_similarity(sketches)
    assert all(torch.equal(result, whole) for result in results)


def test_fresh_rows_have_the_bits_of_the_whole_although_the_others_are_zero() -> None:
    sketches = _sketches(70, rows=4, columns=50, dtype=torch.float32)
    fresh, absent = [3, 40], [5, 69]
    pieces = [torch.zeros(4, 50) if i in absent else s for i, s in enumerate(sketches)]
    whole = finish_similarity(segment_products(sketches, "columns"), "columns", 50)
    part = finish_similarity(segment_products(pieces, "columns", fresh=fresh), "columns", 50)
    here = [client for client in range(70) if client not in absent]
    assert torch.equal(part[fresh][:, here], whole[fresh][:, here])


@given(st.integers(1, 2000), st.integers(1, 20_000))
def test_segments_cover_the_columns_once(rows: int, columns: int) -> None:
    segments = column_segments(rows, columns)
    assert segments[0].start == 0
    assert segments[-1].stop == columns
    assert [s.stop for s in segments[:-1]] == [s.start for s in segments[1:]]
    assert len(segments) <= 64
    assert all(s.start % 16 == 0 for s in segments)
    assert all((s.stop - s.start) * rows >= 4096 for s in segments[:-1])


def test_peers_may_differ_from_receiver_to_receiver() -> None:
    scores = torch.tensor([[0.9, torch.nan, 0.1], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]).double()
    peers = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
    weights = peer_weights(scores, peers, 0.4)
    assert weights[0].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 0, 1 / (1 + math.exp(2))])
    assert weights[1].tolist() == pytest.approx([1 / 3] * 3)
    assert not weights[2].any()
    # Of equally relevant peers the first are taken.
    best = peer_weights(scores, peers, 0.4, top_k=2)
    assert best[1].tolist() == [0.5, 0.5, 0.0]
    assert torch.equal(best[0], weights[0])
    with pytest.raises(PlanError, match="finite"):
        peer_weights(scores, torch.ones(3, 3, dtype=torch.bool), 0.4)
    assert peer_weights(torch.ones(2, 0).double(), torch.ones(2, 0).bool(), 0.4).shape == (2, 0)


def test_unit_columns_turn_the_column_similarity_into_inner_products() -> None:
    sketches = _sketches(4)
    sketches[1][:, 2] = 0
    flat = torch.cat([unit_columns(sketch) for sketch in sketches])
    torch.testing.assert_close(flat @ flat.T, column_similarity(sketches), rtol=0, atol=1e-12)
    assert unit_columns(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_projection_of_unit_columns_keeps_the_column_similarity() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 300, generator=generator)
    sketches = [base + 0.7 * torch.randn(40, 300, generator=generator) for _ in range(5)]
    projection = column_projection(12_000, 2000, seed=3)
    small = [compress(unit_columns(sketch), projection) for sketch in sketches]
    error = flat_similarity(small) - column_similarity(sketches)
    # One standard deviation is about 2000 ** -0.5 = 0.022.
    assert float(error.abs().max()) < 0.08
    assert float(error.abs().max()) > 0
