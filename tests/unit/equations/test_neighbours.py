from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.equations.neighbours import nearest, top_k_weights
from fedml_plugin_fedmosaic.equations.relevance import flat_similarity, relevance_weights


def _vectors(count: int, width: int, clusters: int = 0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, width, generator=generator)
    if clusters:
        centres = torch.randn(clusters, width, generator=generator)
        vectors += centres[torch.randint(0, clusters, (count,), generator=generator)]
    # Lengths do not matter to cosines.
    return vectors * torch.rand(count, 1, generator=generator).add_(0.1)


def _exact(vectors: torch.Tensor) -> torch.Tensor:
    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (unit @ unit.T).fill_diagonal_(-torch.inf)


@pytest.mark.parametrize("clusters", [0, 30])
def test_nearly_all_nearest_are_found(clusters: int) -> None:
    vectors = _vectors(5000, 256, clusters)
    found, cosines = nearest(vectors, 16)
    exact, expected = _exact(vectors).topk(16, dim=1)
    recall = (found[:, :, None] == expected[:, None, :]).any(2).double().mean()
    assert float(recall) > 0.9999
    torch.testing.assert_close(cosines, exact, rtol=0, atol=1e-6)
    assert (cosines[:, :-1] >= cosines[:, 1:]).all()


@given(st.integers(2, 40), st.integers(1, 45), st.integers(1, 9), st.integers(0, 20))
def test_few_clients_are_ranked_exactly(count: int, k: int, width: int, seed: int) -> None:
    vectors = _vectors(count, width, seed=seed)
    found, cosines = nearest(vectors, k)
    assert found.shape == (count, min(k, count))
    known = min(k, count - 1)
    expected = _exact(vectors).topk(known, dim=1)
    torch.testing.assert_close(cosines[:, :known], expected.values, rtol=0, atol=1e-5)
    assert (found[:, known:] == -1).all()
    assert cosines[:, known:].isneginf().all()
    assert all(len({*row}) == len(row) for row in found.tolist())


def test_all_sources_give_the_weights_of_the_whole_matrix() -> None:
    vectors = _vectors(12, 30)
    indices, weights = top_k_weights(vectors, 12, 0.1)
    whole = relevance_weights(flat_similarity([v[None] for v in vectors]), 0.1)
    assert (indices[:, -1] == -1).all()
    assert not weights[:, -1].any()
    assert (indices[:, :-2] < indices[:, 1:-1]).all()
    torch.testing.assert_close(
        torch.zeros(12, 12).double().scatter(1, indices[:, :-1], weights[:, :-1]),
        whole,
        rtol=0,
        atol=1e-5,
    )


def test_only_sources_are_named() -> None:
    vectors = _vectors(700, 20)
    sources = [699, 5, 300, 17]
    indices, weights = top_k_weights(vectors, 3, 0.5, sources=sources)
    assert {*indices.flatten().tolist()} == {*sources}
    assert not (indices == torch.arange(700)[:, None]).any()
    torch.testing.assert_close(weights.sum(1), torch.ones(700).double())
    scores = _exact(vectors)[:, sorted(sources)]
    expected = torch.tensor(sorted(sources))[scores.topk(3, dim=1).indices]
    assert torch.equal(indices, expected.sort(dim=1).values)


def test_a_sole_source_has_no_neighbour_and_nobody_has_none_without_sources() -> None:
    indices, weights = top_k_weights(_vectors(3, 4), 2, 0.5, sources=[1])
    assert indices.tolist() == [[1], [-1], [1]]
    assert weights.tolist() == [[1.0], [0.0], [1.0]]
    indices, weights = top_k_weights(_vectors(3, 4), 2, 0.5, sources=[])
    assert indices.shape == weights.shape == (3, 0)


def test_equal_neighbours_are_taken_in_ascending_order() -> None:
    vectors = torch.ones(6, 3)
    assert nearest(vectors, 2)[0].tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]
    silent = torch.zeros(3, 4)
    assert nearest(silent, 1)[1].tolist() == [[0.0], [0.0], [0.0]]


def test_bits_do_not_depend_on_threads() -> None:
    vectors, threads, results = _vectors(1500, 64, 5), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(nearest(vectors, 8))
    finally:
        torch.set_num_threads(threads)
    for indices, cosines in results[1:]:
        assert torch.equal(indices, results[0][0])
        assert torch.equal(cosines, results[0][1])


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(PlanError, match="k >= 1"):
        nearest(torch.ones(3, 2), 0)
    with pytest.raises(PlanError, match="130000"):
        nearest(torch.ones(1, 130_001), 1)
    with pytest.raises(PlanError, match="among"):
        nearest(torch.ones(3, 2), 1, sources=[3])
    with pytest.raises(PlanError, match=r"number \[1\]"):
        nearest(torch.tensor([[1.0], [torch.nan]]), 1)
    with pytest.raises(PlanError, match="temperature"):
        top_k_weights(torch.ones(3, 2), 1, 0.0)
