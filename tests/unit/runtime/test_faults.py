"""What counts as a dropout, what it leaves behind, and which rounds count."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from fedml_plugin_fedmosaic.config.sections import FaultsConfig
from fedml_plugin_fedmosaic.core.errors import (
    CheckpointError,
    ClientFailure,
    CommError,
    ConfigError,
    DataError,
    FedMosaicError,
    IntegrationError,
    PlanError,
    QuorumError,
)
from fedml_plugin_fedmosaic.core.events import ClientDropped, Event, RoundSkipped
from fedml_plugin_fedmosaic.core.types import (
    ClientUpdate,
    MixingPlan,
    MixRow,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.runtime.faults import FaultGuard, RoundLedger
from fedml_plugin_fedmosaic.runtime.staleness import without_sources
from fedml_plugin_fedmosaic.runtime.validation import UpdateShape


class Client:
    """A client whose state is a number."""

    client_id = 3

    def __init__(self) -> None:
        self.state = 1

    def snapshot(self) -> Any:
        return self.state

    def restore(self, snapshot: Any) -> None:
        self.state = snapshot


def guard(events: list[Event] | None = None, clock: Any = None, **config: Any) -> FaultGuard:
    sink = (events if events is not None else []).append
    options: dict[str, Any] = {} if clock is None else {"clock": clock}
    return FaultGuard(FaultsConfig(**{"policy": "drop", **config}), "s", sink, **options)


def fail(by: FaultGuard, error: Exception, stage: str = "fit") -> Client:
    """A client that has changed its state when it fails."""
    client = Client()
    with by.attempt(client, 1) as attempt:
        client.state = 2
        attempt.stage = stage
        raise error
    return client


def headers(clients: Iterable[int], round_idx: int = 0) -> list[UpdateHeader]:
    return [UpdateHeader(client_id=i, round_idx=round_idx, num_examples=1) for i in clients]


def update(value: float = 1.0, client_id: int = 3) -> ClientUpdate:
    (header,) = headers([client_id], round_idx=1)
    return ClientUpdate(header=header, tensors={"pq/0/m/Q": torch.full((2,), value)})


OWN = [
    (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
    (MemoryError("none left"), "MemoryError: none left"),
    (RuntimeError("boom"), "RuntimeError: boom"),
    (ValueError("odd"), "ValueError: odd"),
    (OSError("unreadable"), "OSError: unreadable"),
    (DataError("sample 7 does not decode"), "sample 7 does not decode"),
    (ClientFailure(3, 1, "fit", "the loss is nan"), "the loss is nan"),
]
PROGRAM = [
    PlanError("plan"),
    ConfigError("config"),
    CheckpointError("disk full"),
    CommError("ranks"),
    AssertionError("never"),
    TypeError("wrong"),
    AttributeError("wrong"),
    NotImplementedError("later"),
    RecursionError("deep"),
    torch.AcceleratorError("the context is lost"),
]


@pytest.mark.parametrize(("error", "reason"), OWN, ids=lambda v: type(v).__name__)
def test_a_client_that_fails_is_dropped_and_goes_back(error: Exception, reason: str) -> None:
    events: list[Event] = []
    client = fail(guard(events), error)
    assert client.state == 1
    assert events == [
        ClientDropped(strategy="s", round_idx=1, client_id=3, stage="fit", reason=reason)
    ]


@pytest.mark.parametrize("error", PROGRAM, ids=lambda error: type(error).__name__)
def test_errors_of_the_program_are_no_dropouts(error: Exception) -> None:
    events: list[Event] = []
    with pytest.raises((type(error), ClientFailure)) as raised:
        fail(guard(events), error)
    assert raised.value is error or raised.value.__cause__ is error
    assert events == []


@pytest.mark.parametrize(("error", "reason"), OWN, ids=lambda v: type(v).__name__)
def test_with_policy_abort_the_failure_is_named_and_raised(error: Exception, reason: str) -> None:
    events: list[Event] = []
    with pytest.raises(FedMosaicError) as raised:
        fail(guard(events, policy="abort"), error, stage="sketch")
    text = str(raised.value) + " ".join(getattr(raised.value, "__notes__", ()))
    assert "client 3, round 2" in text
    assert reason in text
    assert events == []


def test_the_stage_is_where_it_happened() -> None:
    events: list[Event] = []
    for stage in ("prepare", "fit", "sketch", "finish", "update"):
        fail(guard(events), DataError("bad"), stage)
    found = [event.stage for event in events if isinstance(event, ClientDropped)]
    assert found == ["prepare", "fit", "sketch", "finish", "update"]


def test_one_of_several_ranks_is_not_dropped_alone() -> None:
    events: list[Event] = []
    by = FaultGuard(FaultsConfig(policy="drop"), "s", events.append, group_size=2)
    with pytest.raises(ClientFailure, match="client 3, round 2, fit: MemoryError: here only"):
        fail(by, MemoryError("here only"))
    assert fail(by, DataError("seen by all"), "prepare").state == 1
    assert len(events) == 1
    # Only the leader has the sketch.
    hostile = ClientFailure(3, 1, "sketch", "refused: the sketch holds NaN")
    with pytest.raises(ClientFailure, match="the sketch holds NaN"):
        fail(by, hostile, "update")


def test_what_a_failed_client_held_is_let_go() -> None:
    class Batch:
        """Stands for tensors on the accelerator."""

    kept: list[weakref.ref[Batch]] = []
    errors: list[BaseException] = []

    def train() -> None:
        batch = Batch()
        kept.append(weakref.ref(batch))
        try:
            raise torch.OutOfMemoryError("no room")
        except torch.OutOfMemoryError as error:
            errors.append(error)
            raise

    with guard().attempt(Client(), 0):
        train()
    assert errors
    assert kept[0]() is None


def test_the_deadline_drops_who_has_not_begun_and_who_is_not_done() -> None:
    now = [100.0]
    events: list[Event] = []
    by = guard(events, clock=lambda: now[0], round_deadline_s=5.0)
    by.begin_round({})
    now[0] = 104.9
    assert not by.is_late(3, 1)
    client = Client()
    with by.attempt(client, 1) as attempt:
        attempt.stage = "fit"
        client.state = 2
        by.check_time(3, 1, "it had done 1 of 3 steps")
        now[0] = 105.1
        by.check_time(3, 1, "it had done 2 of 3 steps")
        pytest.fail("the clock was not read")
    assert client.state == 1
    assert by.is_late(4, 1)
    dropped = [event for event in events if isinstance(event, ClientDropped)]
    assert [(e.client_id, e.stage, e.reason) for e in dropped] == [
        (3, "deadline", "it had done 2 of 3 steps when the round's 5 s were over"),
        (4, "deadline", "it had not begun when the round's 5 s were over"),
    ]
    by.begin_round({})
    assert not by.is_late(4, 2)


def test_with_policy_abort_a_missed_deadline_ends_the_run() -> None:
    now = [0.0]
    by = guard(clock=lambda: now[0], policy="abort", round_deadline_s=5.0)
    now[0] = 6.0
    with pytest.raises(ClientFailure, match=r"client 4, round 2, deadline: it had not begun"):
        by.is_late(4, 1)


def test_clients_of_several_ranks_have_no_deadline() -> None:
    config = FaultsConfig(policy="drop", round_deadline_s=5.0)
    with pytest.raises(ConfigError, match="2 ranks train together"):
        FaultGuard(config, "s", [].append, group_size=2)


@pytest.mark.parametrize(
    ("quorum", "cohort", "needed"),
    [(None, 4, 1), (0.5, 4, 2), (0.5, 5, 3), (1.0, 5, 5), (0.1, 30, 3), (0.01, 4, 1)],
)
def test_quorum(quorum: float | None, cohort: int, needed: int) -> None:
    events: list[Event] = []
    by = guard(events, quorum=quorum)
    asked = tuple(range(cohort))
    assert by.has_quorum(0, asked, headers(range(needed)))
    assert events == []
    assert not by.has_quorum(1, asked, headers(range(needed - 1)))
    assert events == [
        RoundSkipped(
            strategy="s", round_idx=1, delivered=needed - 1, needed=needed, cohort_size=cohort
        )
    ]


def test_failed_rounds_in_a_row_end_the_run() -> None:
    by = guard(quorum=1.0, max_failed_rounds=2)
    assert not by.has_quorum(0, (0, 1), headers([0]))
    assert by.has_quorum(1, (0, 1), headers([0, 1], 1))
    assert not by.has_quorum(2, (0, 1), headers([], 2))
    with pytest.raises(QuorumError, match=r"round 4: 1 of 2 .*, 2 were needed; missing: \[1\]"):
        by.has_quorum(3, (0, 1), headers([0], 3))
    # Only what was mixed counts as delivered.
    assert by.ledger.last_delivered == {0: 1, 1: 1}


def test_with_policy_abort_every_round_counts() -> None:
    assert guard(policy="abort").has_quorum(0, (0, 1), [])


def test_a_quorum_needs_the_policy() -> None:
    with pytest.raises(ValueError, match="quorum needs policy: drop"):
        FaultsConfig(quorum=0.5)


def test_the_ledger_survives_a_checkpoint() -> None:
    ledger = RoundLedger({10: 3, 2: 0}, failed_in_row=1)
    read = RoundLedger()
    read.restore(json.loads(json.dumps(ledger.state())))
    assert read == ledger


def test_a_broken_update_is_refused_and_the_last_one_is_the_measure() -> None:
    by = guard(max_norm_growth=2.0)
    by.begin_round({3: update(1.0).tensors})
    by.check(UpdateShape.of(update()), update(1.9))
    with pytest.raises(ClientFailure, match=r"2\.1 times"):
        by.check(UpdateShape.of(update()), update(2.1))
    with pytest.raises(ClientFailure, match="pq/0/m/Q holds 2 NaN"):
        by.check(UpdateShape.of(update()), update(float("nan")))


def test_what_the_hook_before_aggregation_breaks_is_refused() -> None:
    events: list[Event] = []
    shapes = {i: UpdateShape.of(update(client_id=i)) for i in (1, 2, 3)}
    returned = {3: update(2.0, 3), 1: update(float("inf"), 1)}  # client 2 is left out
    accepted = guard(events).admit(shapes, returned)
    assert list(accepted) == [3]
    assert accepted[3] is returned[3]
    (event,) = events
    assert isinstance(event, ClientDropped)
    assert (event.client_id, event.round_idx, event.stage) == (1, 1, "update")
    with pytest.raises(ClientFailure, match="client 1, round 2, update: refused: pq/0/m/Q"):
        guard(policy="abort").admit(shapes, returned)
    with pytest.raises(IntegrationError, match=r"updates of clients \[9\]"):
        guard().admit(shapes, {9: update(client_id=9)})


PLAN = MixingPlan(
    rows={
        "pq": (
            MixRow(target=0, sources=(1, 2), weights=(0.25, 0.75)),
            MixRow(target=1, sources=(0, 2), weights=(0.5, 0.5)),
        ),
        "conv": (MixRow(target=0, sources=(2,), weights=(1.0,)),),
    },
    weights=torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.0, 0.5], [float("nan")] * 3]),
)


def test_stale_sources_are_left_out_and_rows_keep_their_sum() -> None:
    plan = without_sources(PLAN, {2})
    assert plan.rows == {
        "pq": (
            MixRow(target=0, sources=(1,), weights=(1.0,)),
            MixRow(target=1, sources=(0,), weights=(1.0,)),
        )
    }
    assert plan.weights is not None
    expected = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [float("nan")] * 3])
    assert torch.equal(plan.weights.nan_to_num(-1), expected.nan_to_num(-1))
    assert without_sources(PLAN, {0, 1, 2}).rows == {}
    assert without_sources(PLAN, {7}) is PLAN
    signed = MixingPlan(rows={"pq": (MixRow(target=0, sources=(0, 1), weights=(2.0, 0.5)),)})
    assert without_sources(signed, {1}).rows["pq"][0].weights == (2.5,)


def test_the_limit_counts_rounds_since_the_last_delivery() -> None:
    by = guard(staleness_limit=1)
    by.has_quorum(0, (0, 1, 2), headers([0, 1, 2]))
    by.has_quorum(1, (0, 1), headers([0, 1], 1))
    assert by.limit_staleness(PLAN, 1) is PLAN
    by.has_quorum(2, (0, 1), headers([0, 1], 2))
    assert set(by.limit_staleness(PLAN, 2).rows) == {"pq"}
    assert guard().limit_staleness(PLAN, 99) is PLAN
