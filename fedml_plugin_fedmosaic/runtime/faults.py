"""Clients that do not deliver: what counts as a dropout, and which rounds count.

A dropout is a client that fails in its own part of a round: out of memory, an infinite loss, data
that cannot be read, an update that must not be mixed, a missed deadline. It keeps the state that it
had before the round; what arrived for it waits for its next round. Errors of the program itself
(a plan, configuration, checkpoint or message that is wrong, a failed assertion) are never dropouts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fedml_plugin_fedmosaic.config.sections import FaultsConfig
from fedml_plugin_fedmosaic.core.errors import (
    ClientFailure,
    ConfigError,
    DataError,
    FedMosaicError,
    IntegrationError,
    QuorumError,
)
from fedml_plugin_fedmosaic.core.events import ClientDropped, EventSink, RoundSkipped
from fedml_plugin_fedmosaic.core.types import (
    ClientUpdate,
    MixingPlan,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.engine.memory import ran_out_of_memory
from fedml_plugin_fedmosaic.runtime.shortage import Needs, free_memory, let_go
from fedml_plugin_fedmosaic.runtime.staleness import without_sources
from fedml_plugin_fedmosaic.runtime.validation import NormLimits, UpdateShape, check_update

LOG = logging.getLogger(__name__)

DEADLINE = "deadline"
"""Stage of a client that was not done when the round's time was over."""

_FAILURES = (RuntimeError, MemoryError, ValueError, KeyError, IndexError, OSError)
"""Foreign errors that a client's data, model or machine can cause."""

_PROGRAM = (NotImplementedError, RecursionError, torch.AcceleratorError)
"""Runtime errors that are no client's fault, or after which the accelerator is of no use."""

_GROUP_STAGES = ("prepare", "finish", "update")
"""Stages in which all ranks of a rank group see the same error; elsewhere one rank may be alone."""


class Recoverable(Protocol):
    """A client that can go back to where it was."""

    @property
    def client_id(self) -> int:
        """Who."""
        ...

    def snapshot(self) -> Any:
        """What :meth:`restore` needs."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Puts state and arrivals back."""
        ...


@dataclass(slots=True)
class Attempt:
    """One client in one round, while it runs.

    Attributes:
        client_id: who.
        round_idx: 0-based round.
        stage: what it is doing: "prepare", "fit", "sketch", "finish", "update", "evaluate".
        needs: what is said if its memory runs out; None: the error's own words.
    """

    client_id: int
    round_idx: int
    stage: str = "prepare"
    needs: Needs | None = None

    def named(self, error: Exception) -> Exception:
        """The error with client, round and stage: itself with a note, or a ClientFailure."""
        if isinstance(error, _FAILURES):
            hint = None
            if self.needs is not None and ran_out_of_memory(error):
                hint = self.needs.hint(self.client_id, self.stage)
            return ClientFailure(
                self.client_id, self.round_idx, self.stage, self._words(error), hint=hint
            )
        if isinstance(error, FedMosaicError) and not isinstance(error, ClientFailure):
            error.add_note(f"client {self.client_id}, round {self.round_idx + 1}, {self.stage}")
        return error

    def dropout(self, error: Exception) -> tuple[str, str] | None:
        """Stage and reason if the error is the client's own; None if it is the program's."""
        if isinstance(error, ClientFailure):
            return _own_words(error)
        if isinstance(error, DataError):
            return self.stage, error.message
        if isinstance(error, _FAILURES) and not isinstance(error, _PROGRAM):
            return self.stage, self._words(error)
        return None

    def _words(self, error: Exception) -> str:
        if self.needs is not None and ran_out_of_memory(error):
            return self.needs.reason(self.client_id, self.stage, error)
        return f"{type(error).__name__}: {error}"


@contextmanager
def naming(attempt: Attempt) -> Iterator[None]:
    """Gives an error the client, round and stage of an attempt; it is never a dropout here.

    Raises:
        ClientFailure: an error that a client's data, model or machine can cause.
        FedMosaicError: an error of this package, with client, round and stage as a note.
    """
    try:
        yield
    except Exception as error:
        named = attempt.named(error)
        if named is error:
            raise
        raise named from error


@dataclass(slots=True)
class RoundLedger:
    """Who delivered when: the same on every rank, because it follows from the headers.

    Attributes:
        last_delivered: client id -> 0-based round of its last update that was taken in.
        failed_in_row: rounds without a quorum since the last one with.
    """

    last_delivered: dict[int, int] = field(default_factory=dict)
    failed_in_row: int = 0

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        delivered = {str(client): seen for client, seen in sorted(self.last_delivered.items())}
        return {"last_delivered": delivered, "failed_in_row": self.failed_in_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state`."""
        self.last_delivered = {int(key): int(seen) for key, seen in state["last_delivered"].items()}
        self.failed_in_row = int(state["failed_in_row"])


class FaultGuard:
    """Applies ``faults_args`` to the rounds of one strategy.

    Args:
        config: what to do with failures.
        strategy: name of the strategy, for the events.
        sink: takes :class:`ClientDropped` and :class:`RoundSkipped`.
        group_size: ranks that train one client together.
        needs: what the clients need memory for, to say so where it runs out.
        clock: seconds; replaced in tests.

    Attributes:
        ledger: who delivered when; part of the checkpoint.
        needs: as given.

    Raises:
        ConfigError: a deadline for clients that several ranks train together: their clocks differ,
            and a rank that stops alone leaves the others waiting.
    """

    def __init__(
        self,
        config: FaultsConfig,
        strategy: str,
        sink: EventSink,
        *,
        group_size: int = 1,
        needs: Needs | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if group_size > 1 and config.round_deadline_s is not None:
            raise ConfigError(
                f"faults.round_deadline_s cannot be kept by clients that {group_size} ranks train "
                "together: ranks that look at their own clocks do not stop at the same step",
                hint="leave it out, or give every client one rank",
            )
        self.config = config
        self.ledger = RoundLedger()
        self._limits = NormLimits(absolute=config.max_update_norm, growth=config.max_norm_growth)
        self._strategy = strategy
        self._sink = sink
        self._group_size = group_size
        self.needs = needs
        self._clock = clock
        self._began = clock()
        self._last: Mapping[int, SharedTensors] = {}

    def begin_round(self, uploads: Mapping[int, SharedTensors]) -> None:
        """Starts the round's clock.

        Args:
            uploads: last accepted tensors of the clients that this rank owns.
        """
        self._began = self._clock()
        self._last = uploads

    def is_late(self, client_id: int, round_idx: int) -> bool:
        """Whether the deadline is over before a client begins; it is dropped then.

        Raises:
            ClientFailure: it is, and the policy is "abort".
        """
        try:
            self.check_time(client_id, round_idx, "it had not begun")
        except ClientFailure as error:
            if self.config.policy == "abort":
                raise
            self._drop(client_id, round_idx, *_own_words(error))
            return True
        return False

    def check_time(self, client_id: int, round_idx: int, position: str) -> None:
        """Called before a client and after each of its optimizer steps.

        Args:
            client_id: who runs.
            round_idx: 0-based round.
            position: how far it has come, for the message.

        Raises:
            ClientFailure: stage "deadline": the round's time is over.
        """
        limit = self.config.round_deadline_s
        if limit is not None and self._clock() - self._began > limit:
            raise ClientFailure(
                client_id, round_idx, DEADLINE, f"{position} when the round's {limit:g} s were over"
            )

    @contextmanager
    def attempt(self, client: Recoverable, round_idx: int) -> Iterator[Attempt]:
        """Runs one client's part of a round; with policy "drop" its failure ends here.

        Raises:
            ClientFailure: the client failed and the policy is "abort", or several ranks train it
                and the others may not have noticed; the original error is the cause.
            FedMosaicError: an error of this package, with client, round and stage as a note.
        """
        drop = self.config.policy == "drop"
        before = client.snapshot() if drop else None
        attempt = Attempt(client.client_id, round_idx, needs=self.needs)
        try:
            yield attempt
        except Exception as error:
            found = attempt.dropout(error) if drop else None
            if found is None or not self._all_ranks_see(found[0]):
                named = attempt.named(error)
                if named is error:
                    raise
                raise named from error
            client.restore(before)
            self._drop(client.client_id, round_idx, *found)
            out_of_memory = let_go(error)
        else:
            return
        if out_of_memory:
            free_memory()

    def _all_ranks_see(self, stage: str) -> bool:
        """Whether no rank of the group waits for one that has failed in this stage."""
        return self._group_size == 1 or stage in _GROUP_STAGES

    def check(self, shape: UpdateShape, update: ClientUpdate) -> None:
        """Refuses an update that must not be mixed.

        Args:
            shape: what the client half made, noted before the host framework's hook saw it.
            update: what the hook made of it.

        Raises:
            ClientFailure: see :func:`runtime.validation.check_update`.
        """
        check_update(update, shape, self._limits, self._last.get(shape.client_id))

    def admit(
        self, shapes: Mapping[int, UpdateShape], updates: Mapping[int, ClientUpdate]
    ) -> dict[int, ClientUpdate]:
        """Checks what the host framework's hook before aggregation made of the updates.

        A client whose update is refused here keeps what it learned: its own part was right. A
        client that the hook leaves out does not deliver, which is the hook's good right.

        Args:
            shapes: by client id, of the updates that the hook was given.
            updates: what it returned.

        Returns:
            The updates to mix, ascending by client id.

        Raises:
            ClientFailure: an update is refused and the policy is "abort".
            IntegrationError: the hook returned an update of a client that it was not given.
        """
        foreign = sorted(set(updates) - set(shapes))
        if foreign:
            raise IntegrationError(
                f"the hook before aggregation returned updates of clients {foreign}; it was given "
                f"those of {sorted(shapes)}",
                hint="a hook may change or leave out updates, not add any",
            )
        accepted: dict[int, ClientUpdate] = {}
        for client_id in sorted(updates):
            try:
                self.check(shapes[client_id], updates[client_id])
            except ClientFailure as error:
                if self.config.policy == "abort" or not self._all_ranks_see(error.stage):
                    raise
                self._drop(client_id, error.round_idx, *_own_words(error))
            else:
                accepted[client_id] = updates[client_id]
        return accepted

    def has_quorum(
        self, round_idx: int, cohort: Sequence[int], headers: Sequence[UpdateHeader]
    ) -> bool:
        """Whether enough clients delivered; the same answer on every rank.

        Args:
            round_idx: 0-based round.
            cohort: clients that were asked.
            headers: all ranks' headers.

        Raises:
            QuorumError: too few delivered, in too many rounds in a row.
        """
        delivered = [header.client_id for header in headers]
        # Rounded, because 0.1 * 30 is a little more than 3.
        share = round((self.config.quorum or 0.0) * len(cohort), 9)
        needed = max(1, math.ceil(share))
        if self.config.policy == "abort" or len(delivered) >= needed:
            self.ledger.failed_in_row = 0
            self.ledger.last_delivered.update(dict.fromkeys(delivered, round_idx))
            return True
        self.ledger.failed_in_row += 1
        self._sink(
            RoundSkipped(
                strategy=self._strategy,
                round_idx=round_idx,
                delivered=len(delivered),
                needed=needed,
                cohort_size=len(cohort),
            )
        )
        if self.ledger.failed_in_row >= self.config.max_failed_rounds:
            missing = sorted(set(cohort) - set(delivered))
            raise QuorumError(
                f"round {round_idx + 1}: {len(delivered)} of {len(cohort)} clients delivered, "
                f"{needed} were needed; missing: {missing}; failed rounds in a row: "
                f"{self.ledger.failed_in_row}",
                hint="metrics.jsonl says why each client was dropped (ClientDropped)",
            )
        return False

    def limit_staleness(self, plan: MixingPlan, round_idx: int) -> MixingPlan:
        """The plan without sources whose last update is too old; see :func:`without_sources`."""
        limit = self.config.staleness_limit
        if limit is None:
            return plan
        seen = self.ledger.last_delivered.items()
        return without_sources(plan, {client for client, last in seen if round_idx - last > limit})

    def _drop(self, client_id: int, round_idx: int, stage: str, reason: str) -> None:
        LOG.info(
            "%s: client %d dropped from round %d, %s: %s",
            self._strategy, client_id, round_idx + 1, stage, reason,
        )  # fmt: skip
        self._sink(
            ClientDropped(
                strategy=self._strategy,
                round_idx=round_idx,
                client_id=client_id,
                stage=stage,
                reason=reason,
            )
        )


def _own_words(failure: ClientFailure) -> tuple[str, str]:
    """Stage and reason of a failure, without the client and round that its message begins with."""
    head = f"client {failure.client_id}, round {failure.round_idx + 1}, {failure.stage}: "
    return failure.stage, failure.message.removeprefix(head)
