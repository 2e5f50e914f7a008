"""Every strategy survives clients that do not deliver, in any pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_federation import ToyFederation

from fedml_plugin_fedmosaic.comm.codec import Layout
from fedml_plugin_fedmosaic.comm.exchange import split_channels
from fedml_plugin_fedmosaic.config.sections import FaultsConfig
from fedml_plugin_fedmosaic.core.events import Event
from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.core.types import MixingPlan, UpdateHeader
from fedml_plugin_fedmosaic.runtime.faults import FaultGuard

MIXED = ("S", "M", "S", "M", "S", "X")
ROUNDS = 5


@dataclass
class Unreliable(ToyFederation):
    """Plays rounds in which some clients are dropped, as the runtime does.

    Args:
        faults: quorum and staleness.
    """

    faults: FaultsConfig = field(default_factory=lambda: FaultsConfig(policy="drop"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.events: list[Event] = []
        self.guard = FaultGuard(self.faults, "toy", self.events.append)
        self.delivered: set[int] = set()

    def train(self, client: int) -> UpdateHeader:
        if client not in self.lost:
            return super().train(client)
        # It goes back to where it was; nothing of its work stays behind.
        kept = [dict(self.clients), dict(self.uploads), dict(self.sketches)]
        super().train(client)
        self.clients, self.uploads, self.sketches = kept
        raise _Lost

    def play_without(self, lost: frozenset[int]) -> MixingPlan | None:
        """One round; None if it had no quorum."""
        self.lost = lost
        cohort = self.strategy.select(
            self.state, self.rounds, self.per_round or len(self.manifests)
        )
        headers = []
        uploads = dict(self.uploads)
        for client in cohort:
            try:
                headers.append(self.train(client))
            except _Lost:
                continue
        plan = None
        if self.guard.has_quorum(self.rounds, cohort, headers):
            self.delivered |= {header.client_id for header in headers}
            self._aggregate(headers)
            plan = self.plan
        else:
            self.uploads = uploads
        self.rounds += 1
        return plan

    def _aggregate(self, headers: Sequence[UpdateHeader]) -> None:
        everyone = self.comm.exchange_headers(headers)
        relevance = self.relevance(everyone)
        self.state, plan = self.strategy.plan(self.state, everyone, relevance)
        self.plan = self.guard.limit_staleness(plan, self.rounds)
        self.downlinks.update(self.comm.execute(self.plan, self.uploads))


class _Lost(Exception):
    """The client does not deliver."""


PATTERNS = st.lists(st.frozensets(st.integers(0, len(MIXED) - 1)), min_size=ROUNDS, max_size=ROUNDS)
CONFIGS = st.builds(
    FaultsConfig,
    policy=st.just("drop"),
    quorum=st.none() | st.sampled_from([0.2, 0.5, 1.0]),
    staleness_limit=st.none() | st.integers(0, 2),
    max_failed_rounds=st.just(ROUNDS + 1),
)


def assert_well_formed(toy: Unreliable, plan: MixingPlan, round_idx: int) -> None:
    limit = toy.faults.staleness_limit
    for slot, rows in plan.rows.items():
        assert rows
        for row in rows:
            assert math.isclose(math.fsum(row.weights), 1.0, abs_tol=1e-12)
            assert all(weight > 0 for weight in row.weights)
            assert list(row.sources) == sorted(set(row.sources))
            assert set(row.sources) <= toy.delivered, "a source that never delivered"
            channel = plan.channel(slot)
            sent = [split_channels(toy.uploads[source])[channel] for source in row.sources]
            assert len({Layout.of(part).digest for part in sent}) == 1
            if limit is not None:
                ages = [round_idx - toy.guard.ledger.last_delivered[s] for s in row.sources]
                assert max(ages) <= limit
    if plan.weights is not None:
        sums = plan.weights.sum(1)
        known = ~torch.isnan(sums)
        assert torch.allclose(sums[known], torch.ones(int(known.sum())), atol=1e-6)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@settings(max_examples=25)
@given(pattern=PATTERNS, config=CONFIGS, per_round=st.sampled_from([None, 3]))
def test_any_pattern_of_dropouts(
    name: str, pattern: list[frozenset[int]], config: FaultsConfig, per_round: int | None
) -> None:
    strategy: Any = STRATEGIES[name](STRATEGIES[name].Options())
    toy = Unreliable(strategy, MIXED, per_round=per_round, faults=config)
    for round_idx, lost in enumerate(pattern):
        plan = toy.play_without(lost)
        if plan is not None:
            assert_well_formed(toy, plan, round_idx)
        for state in toy.clients.values():
            assert all(torch.isfinite(tensor).all() for tensor in state.adapter.values())


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_client_that_never_delivers_is_nobodys_source(name: str) -> None:
    toy = Unreliable(STRATEGIES[name](STRATEGIES[name].Options()), MIXED)
    for _ in range(3):
        plan = toy.play_without(frozenset({0, 3}))
        assert plan is not None
        sources = {s for rows in plan.rows.values() for row in rows for s in row.sources}
        assert not sources & {0, 3}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_weights_are_those_of_a_federation_without_the_lost_clients(name: str) -> None:
    """In the first round a dropped source leaves no trace in the others' weights."""
    options = STRATEGIES[name].Options()
    lost = Unreliable(STRATEGIES[name](options), MIXED)
    plan = lost.play_without(frozenset({4}))
    assert plan is not None
    without = Unreliable(STRATEGIES[name](options), MIXED[:4])
    expected = without.play_without(frozenset())
    assert expected is not None
    left = {
        (channel, row.target): dict(zip(row.sources, row.weights, strict=True))
        for channel, rows in plan.rows.items()
        for row in rows
        if row.target < 4
    }
    for channel, rows in expected.rows.items():
        for row in rows:
            found = left[channel, row.target]
            kept = {s: w for s, w in found.items() if s < 4}
            total = math.fsum(kept.values())
            for source, weight in zip(row.sources, row.weights, strict=True):
                assert math.isclose(kept[source] / total, weight, rel_tol=1e-6)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_round_in_which_nobody_delivers_leaves_the_server_as_it_was(name: str) -> None:
    toy = Unreliable(STRATEGIES[name](STRATEGIES[name].Options()), MIXED)
    toy.play_without(frozenset())
    state, downlinks = toy.state, dict(toy.downlinks)
    assert toy.play_without(frozenset(range(len(MIXED)))) is None
    assert toy.state is state
    assert toy.downlinks == downlinks
