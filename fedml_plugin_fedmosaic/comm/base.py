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
        bytes_sent: bytes this process has sent to other clients' processes (or would send, in a
            single process, if every client were remote): ``(uplink, downlink)``.
    """

    rank: int
    size: int

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
            Downlink (float32 tensors by share key) of each owned client; empty without a row.

        Raises:
            PlanError: a source has no upload, or keys or shapes of a row's clients differ.
        """
        ...

    def barrier(self) -> None:
        """Waits for all ranks."""
        ...

    def abort(self, code: int) -> None:
        """Ends the whole job with an exit code; does not return on a multi-process backend."""
        ...
