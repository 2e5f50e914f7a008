from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.launch.topology import (
    ClientLoad,
    Topology,
    plan_topology,
    smallest_world,
)


def load(client_id: int, cost: float, ranks: int = 1) -> ClientLoad:
    return ClientLoad(client_id=client_id, ranks=ranks, cost=cost)


@st.composite
def worlds(draw, max_clients: int = 8):
    entries = draw(
        st.lists(
            st.tuples(st.sampled_from([1, 1, 1, 2, 3]), st.integers(0, 40)),
            min_size=1,
            max_size=max_clients,
        )
    )
    loads = [load(i, float(cost), ranks) for i, (ranks, cost) in enumerate(entries)]
    return smallest_world(loads) + draw(st.integers(0, 6)), loads


@given(worlds())
def test_every_client_and_every_rank_has_one_place(world):
    size, loads = world
    topology = plan_topology(size, loads)
    ranks = [rank for group in topology.groups for rank in group.ranks]
    assert ranks == list(range(size))
    assert topology.size == size
    clients = [client for group in topology.groups for client in group.clients]
    assert sorted(clients) == [item.client_id for item in loads]
    for item in loads:
        assert item.client_id in topology.groups[topology.owner(item.client_id)].clients


@given(worlds())
def test_a_group_has_the_ranks_that_its_clients_need(world):
    size, loads = world
    needs = {item.client_id: item.ranks for item in loads}
    for group in plan_topology(size, loads).groups:
        assert {needs[client] for client in group.clients} <= {len(group.ranks)}


@given(worlds(), st.randoms(use_true_random=False))
def test_the_order_of_the_clients_does_not_matter(world, random):
    size, loads = world
    shuffled = list(loads)
    random.shuffle(shuffled)
    assert plan_topology(size, shuffled) == plan_topology(size, loads)


@given(worlds())
def test_groups_work_the_longest_client_first(world):
    size, loads = world
    cost = {item.client_id: item.cost for item in loads}
    for group in plan_topology(size, loads).groups:
        costs = [cost[client] for client in group.clients]
        assert costs == sorted(costs, reverse=True)
        assert group.cost == math.fsum(costs)


@given(worlds())
def test_a_rank_is_idle_only_if_no_further_group_can_be_made(world):
    size, loads = world
    topology = plan_topology(size, loads)
    for need in {item.ranks for item in loads}:
        clients = sum(item.ranks == need for item in loads)
        groups = sum(len(g.ranks) == need and bool(g.clients) for g in topology.groups)
        assert len(topology.idle) < need or groups == clients


def best_makespan(costs: list[float], groups: int) -> float:
    """By trying every split."""
    best = math.inf
    for places in itertools.product(range(groups), repeat=len(costs)):
        totals = [0.0] * groups
        for place, cost in zip(places, costs, strict=True):
            totals[place] += cost
        best = min(best, max(totals))
    return best


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3))
def test_the_longest_group_is_within_grahams_bound_of_the_best(costs, size):
    topology = plan_topology(size, [load(i, cost) for i, cost in enumerate(costs)])
    longest = max(group.cost for group in topology.groups)
    bound = 4 / 3 - 1 / (3 * size)
    assert longest <= bound * best_makespan([float(cost) for cost in costs], size) + 1e-9


@given(worlds(), st.integers(1, 4))
def test_more_ranks_never_make_the_longest_group_longer(world, more):
    size, loads = world

    def longest(topology: Topology) -> float:
        return max(group.cost for group in topology.groups)

    small, large = plan_topology(size, loads), plan_topology(size + more, loads)
    assert longest(large) <= longest(small)


def test_spare_ranks_go_where_the_work_is():
    # One client on 2 ranks costs 10; four plain clients cost 8 in all.
    loads = [load(0, 10, 2), load(1, 2), load(2, 2), load(3, 2), load(4, 2)]
    topology = plan_topology(4, loads)
    assert [(group.ranks, group.clients) for group in topology.groups] == [
        ((0, 1), (0,)),
        ((2,), (1, 3)),
        ((3,), (2, 4)),
    ]
    assert topology.idle == ()
    assert topology.group_of(3) == 2


def test_a_mixed_world_of_two_and_one_and_one():
    topology = plan_topology(4, [load(0, 1), load(1, 50, 2), load(2, 3)])
    assert topology.owners == {0: 2, 1: 0, 2: 1}
    assert topology.groups[0].ranks == (0, 1)


def test_ranks_beyond_the_clients_are_idle():
    topology = plan_topology(5, [load(0, 1), load(1, 1), load(2, 1, 2)])
    assert topology.idle == (4,)
    assert topology.groups[-1].clients == ()


def test_the_lines_say_who_is_where():
    topology = plan_topology(5, [load(0, 1), load(1, 3, 2), load(7, 0)])
    assert topology.describe() == [
        ("group 0", "ranks 0-1: client 1, 75% of the work"),
        ("group 1", "rank 2: client 0, 25% of the work"),
        ("group 2", "rank 3: client 7, 0% of the work"),
        ("idle", "rank 4: more ranks than the clients can use"),
    ]
    assert topology.to_json()["groups"][1] == {
        "index": 1,
        "ranks": [2],
        "clients": [0],
        "cost": 1.0,
    }


def test_long_lists_of_clients_are_cut():
    ((_, text),) = plan_topology(1, [load(i, 1) for i in range(20)]).describe()
    assert text == "rank 0: clients 0, 1, 2, 3, 4, 5, 6, 7 and 12 more, 100% of the work"


def test_a_small_world_names_the_smallest_that_works():
    loads = [load(0, 1), load(1, 9, 4), load(2, 5, 2)]
    with pytest.raises(ConfigError, match=r"client 1 needs 4 ranks, .*4 \+ 2 \+ 1 makes 7") as info:
        plan_topology(6, loads)
    assert info.value.hint == "start at least 7 ranks: --backend MPI -np 7"
    assert smallest_world(loads) == 7
    plan_topology(7, loads)


@pytest.mark.parametrize(
    ("loads", "text"),
    [
        ([load(0, 1), load(0, 2)], "client 0 occurs twice"),
        ([load(3, 1, 0)], "client 3 needs 0 ranks"),
        ([load(3, math.nan)], "client 3 has cost nan"),
        ([load(3, -1.0)], "client 3 has cost -1.0"),
    ],
)
def test_wrong_loads(loads, text):
    with pytest.raises(ConfigError, match=text):
        plan_topology(4, loads)


def test_unknown_rank_and_client():
    topology = plan_topology(1, [load(0, 1)])
    with pytest.raises(KeyError):
        topology.group_of(1)
    with pytest.raises(KeyError):
        topology.owner(5)
