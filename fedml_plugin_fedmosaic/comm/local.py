"""One process that owns every client: the reference all other communicators are compared with."""

from __future__ import annotations

import logging

from fedml_plugin_fedmosaic.comm.exchange import Parcels
from fedml_plugin_fedmosaic.comm.ranked import RankedCommunicator
from fedml_plugin_fedmosaic.core.errors import CommError

LOG = logging.getLogger(__name__)


class LocalCommunicator(RankedCommunicator):
    """All clients in this process; nothing is sent, bytes are counted as if it were."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=1)

    def _gather(self, payload: bytes) -> list[bytes]:
        return [payload]

    def _swap(self, sends: Parcels, receives: Parcels) -> None:
        if sends or receives:
            raise CommError(f"one process has nobody to exchange {len(sends)} tensors with")

    def barrier(self) -> None:
        """Returns at once: there is only this process."""

    def abort(self, code: int) -> None:
        """Notes the code and returns: the caller's exception ends this process."""
        LOG.error("aborting with exit code %d", code)
