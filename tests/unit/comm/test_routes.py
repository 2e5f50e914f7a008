"""Which bytes go where: the rules that choose, without any rank."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.comm.codec import Layout
from fedml_plugin_fedmosaic.comm.mixing import Route, planned_bytes, row_groups, tile_shares
from fedml_plugin_fedmosaic.comm.relevance import SketchTable
from fedml_plugin_fedmosaic.core.types import MixRow
from fedml_plugin_fedmosaic.equations.mixing import TILE_COLUMNS

LAYOUT = Layout.of({"pq/0/m/P": torch.zeros(4 * TILE_COLUMNS)})


def row(target: int, *sources: int) -> MixRow:
    weights = tuple(1.0 / (target + place + 1) for place in range(len(sources)))
    return MixRow(target=target, sources=sources, weights=weights)


def routes(rows: list[MixRow], size: int) -> tuple[Route, ...]:
    clients = {client for made in rows for client in (made.target, *made.sources)}
    owners = {client: client % size for client in clients}
    groups = row_groups(rows, dict.fromkeys(clients, LAYOUT))
    return tuple(Route(group=group, owners=owners, size=size) for group in groups)


@given(length=st.integers(0, 10 * TILE_COLUMNS), size=st.integers(1, 9))
def test_shares_are_whole_tiles_and_cover_the_vector(length: int, size: int) -> None:
    shares = tile_shares(length, size)
    assert len(shares) == size
    assert shares[0].start == 0
    assert shares[-1].stop == length
    for share, following in pairwise(shares):
        assert share.stop == following.start
        assert share.stop % TILE_COLUMNS == 0 or share.stop == length
    widths = [share.stop - share.start for share in shares]
    assert max(widths) - min(widths) < 2 * TILE_COLUMNS


def test_dense_rows_make_one_group_with_zero_weights() -> None:
    rows = [row(t, *(s for s in range(4) if s != t)) for t in (3, 1, 0, 2)]
    (group,) = row_groups(rows, dict.fromkeys(range(4), LAYOUT))
    assert group.sources == (0, 1, 2, 3)
    assert group.targets == ((0,), (1,), (2,), (3,))
    assert [weights[index] for index, weights in enumerate(group.weights)] == [0.0] * 4
    assert all(sum(weight > 0 for weight in weights) == 3 for weights in group.weights)


def test_equal_rows_are_computed_once() -> None:
    same = [MixRow(target=t, sources=(0, 1), weights=(0.5, 0.5)) for t in range(5)]
    (group,) = row_groups(same, dict.fromkeys(range(5), LAYOUT))
    assert group.weights == ((0.5, 0.5),)
    assert group.targets == ((0, 1, 2, 3, 4),)


def test_sparse_rows_are_groups_of_their_sources() -> None:
    rows = [row(0, 1), row(1, 2), row(2, 3), row(3, 1)]
    groups = row_groups(rows, dict.fromkeys(range(4), LAYOUT))
    assert [(group.sources, group.targets) for group in groups] == [
        ((1,), ((0,), (3,))),
        ((2,), ((1,),)),
        ((3,), ((2,),)),
    ]


def test_layouts_are_never_mixed() -> None:
    other = Layout.of({"pq/0/m/P": torch.zeros(3)})
    rows = [row(0, 0, 2), row(1, 1, 3), row(2, 0, 2), row(3, 1, 3)]
    groups = row_groups(rows, {0: LAYOUT, 2: LAYOUT, 1: other, 3: other})
    assert {(group.sources, group.layout) for group in groups} == {
        ((0, 2), LAYOUT),
        ((1, 3), other),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_dense_rows_travel_in_slices(size: int) -> None:
    rows = [row(t, *(s for s in range(8) if s != t)) for t in range(8)]
    (route,) = routes(rows, size)
    assert route.in_slices
    assert planned_bytes([route]) == 16 * LAYOUT.num_bytes * (size - 1) // size
    assert route.direct_bytes == 8 * LAYOUT.num_bytes * (size - 1)


def test_few_sources_travel_directly_and_once_per_rank() -> None:
    rows = [row(t, 0, 1) for t in range(8)]
    (route,) = routes(rows, 4)
    assert not route.in_slices
    assert planned_bytes([route]) == 2 * 3 * LAYOUT.num_bytes
    # Two groups that read the same source on the same rank share the message.
    pair = routes([row(1, 0), row(5, 0, 2), row(9, 6), row(13, 10), row(17, 14)], 4)
    assert len(pair) == 5
    assert sum(r.direct_bytes for r in pair) == 6 * LAYOUT.num_bytes
    assert planned_bytes(pair) == 5 * LAYOUT.num_bytes


def test_one_rank_sends_nothing() -> None:
    for route in routes([row(0, 0, 1), row(1, 0)], 1):
        assert not route.in_slices
        assert planned_bytes([route]) == 0


@settings(deadline=None, max_examples=60)
@given(
    clients=st.integers(1, 40),
    size=st.integers(1, 6),
    fresh=st.sets(st.integers(0, 39)),
    shape=st.tuples(st.integers(1, 900), st.integers(1, 9000)),
)
def test_the_cheaper_way_is_taken(
    clients: int, size: int, fresh: set[int], shape: tuple[int, int]
) -> None:
    new = tuple(sorted(client for client in fresh if client < clients))
    table = SketchTable(
        kind="columns",
        shape=shape,
        clients=tuple(range(clients)),
        owners=tuple(client % size for client in range(clients)),
        fresh=new,
        size=size,
    )
    assert table.moved_bytes == (table.column_bytes if table.by_columns else table.row_bytes)
    assert table.moved_bytes <= min(table.column_bytes, table.row_bytes)
    assert (size > 1) or table.moved_bytes == 0
    joined = [segment for share in table.shares for segment in share]
    assert [part.start for part in joined] == [0, *(part.stop for part in joined[:-1])]
    assert joined[-1].stop == shape[1]
    sketch = 4 * math.prod(shape)
    if size > 1 and len(new) == clients >= size:  # everyone is fresh: never whole sketches to all
        assert table.column_bytes <= sketch * clients + 16 * size * clients * (clients + 1)
