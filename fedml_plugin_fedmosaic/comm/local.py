"""One process that owns every client: the reference all other communicators are compared with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedml_plugin_fedmosaic.comm.exchange import (
    catalogue_of,
    check_plan,
    empty_downlinks,
    layout_of,
    mix_rows,
    received_bytes,
    sorted_headers,
    split_channels,
    upload_bytes,
)
from fedml_plugin_fedmosaic.comm.rendezvous import LOOPBACK, free_port
from fedml_plugin_fedmosaic.core.types import (
    MixingPlan,
    ProcessWorld,
    SharedTensors,
    UpdateHeader,
)

LOG = logging.getLogger(__name__)


class LocalCommunicator:
    """All clients in this process; nothing is sent, bytes are counted as if it were."""

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self.group = 0
        self.num_groups = 1
        self.group_rank = 0
        self.group_size = 1
        self.is_leader = True
        self.uplink_bytes: dict[int, int] = {}
        self.downlink_bytes: dict[int, int] = {}
        self._headers: tuple[UpdateHeader, ...] = ()

    def owned(self, client_ids: Sequence[int]) -> tuple[int, ...]:
        """All clients, ascending."""
        return tuple(sorted(client_ids))

    def share(self, text: str) -> tuple[str, ...]:
        """The text itself."""
        return (text,)

    def process_world(self) -> ProcessWorld:
        """A world of this process alone."""
        return ProcessWorld(rank=0, size=1, local_rank=0, address=LOOPBACK, port=free_port())

    def exchange_headers(self, headers: Sequence[UpdateHeader]) -> tuple[UpdateHeader, ...]:
        """The same headers, ascending by client id.

        Raises:
            PlanError: a client has two headers.
        """
        self._headers = sorted_headers(headers)
        self.uplink_bytes = upload_bytes(self._headers)
        self.downlink_bytes = {}
        return self._headers

    def execute(
        self, plan: MixingPlan, uploads: Mapping[int, SharedTensors]
    ) -> dict[int, dict[str, Tensor]]:
        """Mixes the uploads row by row.

        Raises:
            PlanError: a source has no upload, keys, shapes or dtypes do not fit, or a row is
                malformed.
        """
        catalogue = catalogue_of(uploads)
        check_plan(plan, catalogue)
        self.uplink_bytes = upload_bytes(self._headers, catalogue)
        self.downlink_bytes = received_bytes(plan, catalogue)
        parts = {client: split_channels(upload) for client, upload in uploads.items()}
        downlinks = empty_downlinks({*uploads, *self.downlink_bytes})
        for channel, rows in sorted(plan.rows.items()):
            sources = sorted({client for row in rows for client in row.sources})
            vectors = {
                client: catalogue[client][channel].pack(parts[client][channel])
                for client in sources
            }
            mixed = mix_rows(rows, vectors)
            for row in rows:
                layout = layout_of(channel, row, catalogue)
                downlinks[row.target].update(layout.unpack(mixed[row.target]))
        return downlinks

    def barrier(self) -> None:
        """Returns at once: there is only this process."""

    def abort(self, code: int) -> None:
        """Notes the code and returns: the caller's exception ends this process."""
        LOG.error("aborting with exit code %d", code)
