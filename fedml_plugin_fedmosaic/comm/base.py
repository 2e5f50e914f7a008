"""Contract of a communicator: it moves bytes and never knows why.

Every communicator gives the same numbers as :class:`comm.local.LocalCommunicator`: float32
accumulation, sources in ascending client id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from fedml_plugin_fedmosaic.core.types import MixingPlan, SharedTensors, UpdateHeader


class Communicator(Protocol):
    """Rank groups that exchange headers and execute mixing plans.

    Attributes:
        rank: this process, 0-based.
        size: processes in the job.
        uplink_bytes: client id -> bytes it sent to the server in the last round: its header and
            its tensors, as if every client were remote. One entry per header of the last
            :meth:`exchange_headers`; the tensors are added by :meth:`execute`.
        downlink_bytes: client id -> bytes it received in the last :meth:`execute`, for clients
            that received any. Both are the same on every rank and for every communicator.
    """

    rank: int
    size: int
    uplink_bytes: dict[int, int]
    downlink_bytes: dict[int, int]

    def owned(self, client_ids: Sequence[int]) -> tuple[int, ...]:
        """The clients that this rank trains, a function of the ids and the world only."""
        ...

    def exchange_headers(self, headers: Sequence[UpdateHeader]) -> tuple[UpdateHeader, ...]:
        """All ranks' headers of this round, ascending by client id."""
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
