"""Contract of a communicator: it moves bytes and never knows why.

Every communicator gives the same numbers as :class:`comm.local.LocalCommunicator`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from fedml_plugin_fedmosaic.core.types import (
    MixingPlan,
    NearestQuery,
    Neighbours,
    ProcessWorld,
    Relevance,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.equations.relevance import Similarity


class Communicator(Protocol):
    """Rank groups that exchange headers and execute mixing plans.

    Attributes:
        rank: this process, 0-based.
        size: processes in the job.
        group: the rank group of this process, 0-based; a client belongs to one group.
        num_groups: rank groups of the job.
        group_rank: this process inside its group, 0-based.
        group_size: ranks of the group; they train the group's clients together.
        is_leader: whether this rank speaks for its group: it computes sketches, writes the
            clients' checkpoints and emits events. Every rank of a group gets the same results.
        uplink_bytes: client id -> bytes it sent to the server in the last round: its header and
            its tensors, as if every client were remote. One entry per header of the last
            :meth:`exchange_headers`; the tensors are added by :meth:`execute`.
        downlink_bytes: client id -> bytes it received in the last :meth:`execute`, for clients
            that received any. Both are the same on every rank and for every communicator.
        moved_bytes: what this rank really sent to other ranks in the last round, by stage:
            ``headers``, ``relevance`` and ``mixing``.
    """

    rank: int
    size: int
    group: int
    num_groups: int
    group_rank: int
    group_size: int
    is_leader: bool
    uplink_bytes: dict[int, int]
    downlink_bytes: dict[int, int]
    moved_bytes: dict[str, int]

    def owned(self, client_ids: Sequence[int]) -> tuple[int, ...]:
        """The clients that this rank's group trains, ascending; the same on all its ranks."""
        ...

    def share(self, text: str) -> tuple[str, ...]:
        """Every rank's text, by rank; all ranks call it."""
        ...

    def agree(self, flag: bool) -> bool:
        """Whether any rank of this group says yes; all ranks of the group call it."""
        ...

    def process_world(self) -> ProcessWorld:
        """Where the ranks of this group meet to train a client; all ranks of the group call it.

        Every call names a port of its own.
        """
        ...

    def exchange_headers(self, headers: Sequence[UpdateHeader]) -> tuple[UpdateHeader, ...]:
        """All ranks' headers of this round, ascending by client id.

        A sketch comes back with its shape only; its values stay with its owner.
        """
        ...

    def relevance(
        self, kind: Similarity, sketches: Mapping[int, Tensor], fresh: Collection[int]
    ) -> Relevance:
        """How similar the clients' sketches are, with the same bits on any number of ranks.

        Args:
            kind: which similarity; the same on every rank, like ``fresh``.
            sketches: last sketches, float32 (rows, columns), of the clients this rank owns.
            fresh: clients whose sketch is new. Similarities between two others are not computed.

        Raises:
            PlanError: shapes differ, or a sketch is missing, not finite or not float32; the same
                error on every rank.
            CommError: the ranks ask for different things, or a rank holds another rank's client.
        """
        ...

    def nearest(
        self, kind: Similarity, sketches: Mapping[int, Tensor], queries: Sequence[NearestQuery]
    ) -> tuple[Neighbours, ...]:
        """The most similar clients, with the same bits on any number of ranks.

        Unlike :meth:`relevance` it makes no matrix of all pairs; every rank takes in everyone's
        sketch, so these should be short (``sketch.floats``).

        Args:
            kind: which similarity; the same on every rank, like ``queries``.
            sketches: last sketches, float32 (rows, columns), of the clients this rank owns.
            queries: who is looked for, and among whom.

        Returns:
            One answer per query.

        Raises:
            PlanError: shapes differ, or a sketch is missing, not finite, not float32 or has more
                than 130,000 entries; the same error on every rank.
            CommError: the ranks ask for different things, or a rank holds another rank's client.
        """
        ...

    def execute(
        self, plan: MixingPlan, uploads: Mapping[int, SharedTensors]
    ) -> dict[int, dict[str, Tensor]]:
        """Carries out a plan.

        Args:
            plan: rows per channel, the same on every rank.
            uploads: last known flat tensors of the clients this rank owns.

        Returns:
            Downlink (float32 tensors by share key) of each owned client that has an upload or a
            row; empty without a row. No two tensors overlap in memory.

        Raises:
            PlanError: a source has no upload, keys or shapes of a row's clients differ, or a row
                is malformed; the same error on every rank.
            CommError: the ranks hold different plans, or a rank holds another rank's client.
        """
        ...

    def barrier(self) -> None:
        """Waits for all ranks."""
        ...

    def abort(self, code: int) -> None:
        """Ends the whole job with an exit code; does not return on a multi-process backend.

        In a single process there is no one else to stop: it returns, and the caller's exception
        ends the process.
        """
        ...
