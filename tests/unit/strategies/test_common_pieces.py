"""Rows, report matrices and notes that several strategies are made of."""

from __future__ import annotations

import pytest
import torch
from toy_federation import toy_adapter

from fedml_plugin_fedmosaic.core.types import ClientUpdate, MixRow, UpdateHeader
from fedml_plugin_fedmosaic.strategies.common import (
    ClientMatrix,
    by_target,
    equal_rows,
    mean_row,
    shared_tensors,
    shares,
    weight_matrix,
)
from fedml_plugin_fedmosaic.strategies.vectors import (
    in_channels,
    layer_tensors,
    unit_rows,
    with_notes,
)


def test_weights_in_proportion_to_counts_sum_to_one() -> None:
    assert shares([1, 3]) == (0.25, 0.75)
    assert shares({7: 2, 8: 2}.values()) == (0.5, 0.5)
    assert sum(shares(range(1, 50))) == pytest.approx(1.0, abs=1e-15)
    assert mean_row(4, [0, 2]) == MixRow(target=4, sources=(0, 2), weights=(0.5, 0.5))


def test_rows_stand_in_the_order_of_their_receivers() -> None:
    rows = [*equal_rows([5, 3], [1, 2], [0.25, 0.75]), mean_row(4, [4])]
    ordered = by_target({"a": rows, "b": []})
    assert list(ordered) == ["a"]
    assert [row.target for row in ordered["a"]] == [3, 4, 5]
    assert ordered["a"][0] == MixRow(target=3, sources=(1, 2), weights=(0.25, 0.75))


def test_a_report_matrix_is_unknown_where_nothing_was_put() -> None:
    matrix = ClientMatrix([7, 3, 5])
    matrix.put([5, 7], [7, 5], torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    nan = float("nan")
    expected = torch.tensor([[nan, nan, nan], [nan, 2.0, 1.0], [nan, 4.0, 3.0]])
    torch.testing.assert_close(matrix.values, expected, equal_nan=True)
    matrix.put([3], [5], torch.tensor([[9.0]]), others=0.0)
    assert matrix.values is not None
    assert matrix.values[0].tolist() == [0.0, 9.0, 0.0]


def test_weights_of_a_receiver_are_zero_where_it_takes_nothing() -> None:
    found = weight_matrix([0, 1, 2], [MixRow(target=1, sources=(0, 2), weights=(0.25, 0.75))])
    assert found is not None
    assert found[1].tolist() == [0.25, 0.0, 0.75]
    assert bool(found[[0, 2]].isnan().all())
    assert weight_matrix(range(4097), []) is None
    large = ClientMatrix(range(4097))
    large.put([0], [1], torch.ones(1, 1))
    assert large.values is None


def test_unit_rows_leave_zeros_alone() -> None:
    unit = unit_rows(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]))
    assert unit.dtype == torch.float64
    assert unit[0].tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]


def test_layers_travel_in_channels_by_their_places() -> None:
    sent = shared_tensors(toy_adapter("S", "lora"), {"conv"})
    named = in_channels(layer_tensors(sent), lambda place: "head" if place >= 3 else "body")
    assert {name.split("/")[0] for name in named if "/3/" in name} == {"head"}
    assert {name.split("/")[0] for name in named if "/3/" not in name} == {"body"}
    assert len(named) == len(sent)
    assert named["body/1/q_proj/A"] is sent["conv/1/q_proj/A"]


def test_notes_are_added_and_the_update_stays() -> None:
    header = UpdateHeader(client_id=1, round_idx=0, num_examples=2, notes={"a": 1})
    update = ClientUpdate(header=header, tensors={})
    assert with_notes(update, b=2).header.notes == {"a": 1, "b": 2}
    assert update.header.notes == {"a": 1}
