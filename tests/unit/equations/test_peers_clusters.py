from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.equations.clusters import alternate, farthest_first, squared_distances
from fedml_plugin_fedmosaic.equations.peers import above_threshold, largest_gap, scaled_softmax
from fedml_plugin_fedmosaic.equations.projection import project


def test_the_largest_gap_cuts() -> None:
    assert largest_gap([0.1, 0.9, 0.2, 0.85]) == ((1, 3), pytest.approx(0.65))
    assert largest_gap([0.9, 0.1, 0.8, 0.05]) == ((0, 2), pytest.approx(0.7))
    assert largest_gap([0.5]) == ((0,), 0.0)
    assert largest_gap([0.5, 0.5, 0.5]) == ((0, 1, 2), 0.0)
    assert largest_gap([]) == ((), 0.0)
    # Equal gaps: the fewest peers.
    assert largest_gap([0.0, 0.5, 1.0]) == ((2,), 0.5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12), st.floats(-3, 3))
def test_the_cut_is_where_the_step_is_highest(values: list[float], shift: float) -> None:
    peers, width = largest_gap(values)
    assert peers
    rest = [value for place, value in enumerate(values) if place not in peers]
    if rest:
        assert min(values[place] for place in peers) - max(rest) == width
    ordered = sorted(values)
    assert width == max(b - a for a, b in pairwise(ordered))


def test_a_threshold_and_the_least_number_of_peers() -> None:
    values = [1.0, 0.2, 0.7, 0.5]
    assert above_threshold(values, 0.5, 1) == (0, 2, 3)
    assert above_threshold(values, 0.9, 1) == (0,)
    assert above_threshold(values, 0.9, 3) == (0, 2, 3)
    assert above_threshold(values, 2.0, 9) == (0, 1, 2, 3)
    assert above_threshold([0.3, 0.3, 0.3], 0.9, 2) == (0, 1)
    with pytest.raises(PlanError, match="finite"):
        above_threshold([math.nan], 0.5, 1)


def test_softmax_with_a_scale() -> None:
    first, second = scaled_softmax([1.0, 0.5], 4.0)
    assert first == pytest.approx(math.exp(4) / (math.exp(4) + math.exp(2)))
    assert first + second == pytest.approx(1.0)
    assert scaled_softmax([1000.0, 1000.0], 50.0) == (0.5, 0.5)


def test_centres_start_far_apart() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0], [2.0, 7.0]])
    # The mean is (3, 1.75); point 1 is nearest to it, then 2 is farthest, then 3.
    assert farthest_first(points, 3).tolist() == [[1.0, 0.0], [9.0, 0.0], [2.0, 7.0]]
    assert len(farthest_first(points, 9)) == 4
    with pytest.raises(PlanError, match="cannot choose 2 centres"):
        farthest_first(torch.zeros(0, 3), 2)


def test_e_and_m_steps_by_hand() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [14.0]])
    belongs, centres = alternate(points, torch.tensor([[1.0], [14.0]]), torch.ones(4), 10)
    assert belongs.tolist() == [0, 0, 1, 1]
    assert centres.tolist() == [[0.5], [12.0]]
    _, weighted = alternate(points, torch.tensor([[1.0], [14.0]]), torch.tensor([1.0, 3, 1, 1]), 9)
    assert weighted.tolist() == [[0.75], [12.0]]
    # A centre that nobody is near to stays.
    _, kept = alternate(points, torch.tensor([[5.0], [99.0]]), torch.ones(4), 9)
    assert kept.tolist() == [[6.25], [99.0]]


def test_what_fits_is_not_projected() -> None:
    tensors = {"b": torch.tensor([[3.0, 4.0]]), "a": torch.tensor([1.0, 2.0])}
    assert project(tensors, 6, seed=0).tolist() == [1, 2, 3, 4, 0, 0]


def test_projections_keep_inner_products_and_are_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (
        {"x": torch.randn(40, 30, generator=generator), "y": torch.randn(700, generator=generator)}
        for _ in range(2)
    )
    second = {name: value + first[name] for name, value in second.items()}
    exact = sum(float((first[name] * second[name]).sum()) for name in first)
    lengths = [math.sqrt(sum(float(v.square().sum()) for v in t.values())) for t in (first, second)]
    found = [float(project(first, 256, seed) @ project(second, 256, seed)) for seed in range(30)]
    spread = lengths[0] * lengths[1] / math.sqrt(256)
    assert abs(sum(found) / 30 - exact) < 3 * spread / math.sqrt(30)
    assert math.sqrt(sum((value - exact) ** 2 for value in found) / 30) < 2 * spread
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    torch.testing.assert_close(
        project(mean, 256, 0), (project(first, 256, 0) + project(second, 256, 0)) / 2
    )
    assert not torch.equal(project(first, 256, 0), project(first, 256, 1))


def test_broken_weights_are_not_compared() -> None:
    with pytest.raises(PlanError, match="NaN"):
        project({"a": torch.tensor([1.0, math.inf, 3.0])}, 2, 0)


def test_distances() -> None:
    got = squared_distances(torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert got.tolist() == [[25.0, 9.0]]
