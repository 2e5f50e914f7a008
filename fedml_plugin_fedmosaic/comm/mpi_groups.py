"""Rank groups: several ranks that train their clients together and all see the same results.

The world is split into groups. The first rank of each group, its leader, talks to the other
leaders through the communicator of the shelf; what comes out is then broadcast inside the group.
So every rank of the job sees the same headers, and every rank of a group the same downlinks, while
each byte crosses between groups only once. Text and raw float32 buffers travel, never pickles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.base import Communicator
from fedml_plugin_fedmosaic.comm.codec import Layout, decode_headers, encode_headers
from fedml_plugin_fedmosaic.comm.mpi import MPICommunicator
from fedml_plugin_fedmosaic.comm.ranked import STAGES
from fedml_plugin_fedmosaic.comm.rendezvous import free_port, reachable_address
from fedml_plugin_fedmosaic.core.errors import CommError, FedMosaicError, PlanError
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

_PIECE_BYTES = 1 << 30
_KINDS = {kind.__name__: kind for kind in (CommError, PlanError)}

Between = Callable[[Any, Mapping[int, int]], Communicator]
"""Makes the leaders' communicator from their MPI communicator and ``{client id: leader}``."""

Message = tuple[dict[str, Any], list[Tensor]]
"""JSON values and flat float32 vectors."""


def _between_by_mpi(leaders: Any, owners: Mapping[int, int]) -> Communicator:
    return MPICommunicator(leaders, owners=owners)


class GroupCommunicator:
    """A communicator of rank groups; :class:`comm.base.Communicator` says what each call does.

    Args:
        groups: ranks of each group: all ranks of ``world`` in order, each group a run of ranks.
            The same on every rank.
        owners: client id -> index of its group.
        world: an mpi4py intracommunicator; ``MPI.COMM_WORLD`` when omitted. It is duplicated.
        between: makes the leaders' communicator; the one for plain MPI when omitted.
        piece_bytes: upper bound of one message, a multiple of 4.

    Attributes:
        local_size: ranks of the job on this node.

    Raises:
        CommError: the groups are not a split of the world, or MPI cannot be loaded.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        owners: Mapping[int, int],
        *,
        world: Any = None,
        between: Between = _between_by_mpi,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        self._everyone = MPICommunicator(world)
        self.rank = self._everyone.rank
        self.size = self._everyone.size
        _check_groups(groups, owners, self.size)
        self.num_groups = len(groups)
        self.group = next(i for i, ranks in enumerate(groups) if self.rank in ranks)
        self.group_rank = list(groups[self.group]).index(self.rank)
        self.group_size = len(groups[self.group])
        self.is_leader = self.group_rank == 0
        self.uplink_bytes: dict[int, int] = {}
        self.downlink_bytes: dict[int, int] = {}
        self.moved_bytes = dict.fromkeys(STAGES, 0)
        self._owners = dict(owners)
        self._piece_bytes = piece_bytes
        self._split(world, between)

    def _split(self, world: Any, between: Between) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        origin = MPI.COMM_WORLD if world is None else world
        self._inside = origin.Split(self.group, self.rank)
        leaders = origin.Split(0 if self.is_leader else MPI.UNDEFINED, self.rank)
        on_node = origin.Split_type(MPI.COMM_TYPE_SHARED, self.rank)
        self.local_size: int = on_node.Get_size()
        on_node.Free()
        beside = self._inside.Split_type(MPI.COMM_TYPE_SHARED, self.group_rank)
        self._local_rank: int = beside.Get_rank()
        self._one_node = bool(beside.Get_size() == self.group_size)
        beside.Free()
        # Leaders are in the order of ranks, and so are the groups: leader i leads group i.
        self._between = between(leaders, self._owners) if self.is_leader else None

    def owned(self, client_ids: Sequence[int]) -> tuple[int, ...]:
        """This group's clients, ascending."""
        return tuple(i for i in sorted(client_ids) if self._owners[i] == self.group)

    def share(self, text: str) -> tuple[str, ...]:
        """Every rank's text, by rank."""
        return self._everyone.share(text)

    def agree(self, flag: bool) -> bool:
        """Whether any rank of this group says yes; all ranks of the group call it.

        Raises:
            CommError: the ranks could not be reached.
        """
        if self.group_size == 1:
            return flag
        answer = np.array([flag], dtype=np.int32)
        try:
            self._inside.Allreduce(self._mpi.IN_PLACE, answer, op=self._mpi.MAX)
        except self._mpi.Exception as error:
            raise CommError(f"MPI failed to agree inside group {self.group}: {error}") from error
        return bool(answer[0])

    def process_world(self) -> ProcessWorld:
        """Where the ranks of this group meet; the leader's node and a free port there."""

        def choose() -> Message:
            address = reachable_address(one_node=self._one_node)
            return {"address": address, "port": free_port(address)}, []

        place, _ = self._from_leader(choose)
        return ProcessWorld(
            rank=self.group_rank,
            size=self.group_size,
            local_rank=self._local_rank,
            address=place["address"],
            port=place["port"],
        )

    def exchange_headers(self, headers: Sequence[UpdateHeader]) -> tuple[UpdateHeader, ...]:
        """All groups' headers, ascending by client id; only the leader's ``headers`` count."""

        def exchange(between: Communicator) -> tuple[UpdateHeader, ...]:
            everyone = between.exchange_headers(headers)
            self._count(between)
            return everyone

        if self.group_size == 1:
            return exchange(self._leaders)

        def relayed() -> Message:
            payload = encode_headers(exchange(self._leaders))
            return self._counters() | {"headers": len(payload)}, [_as_vector(payload)]

        values, vectors = self._from_leader(relayed)
        self._take_counters(values)
        return decode_headers(vectors[0].numpy().tobytes()[: values["headers"]])

    def relevance(
        self, kind: Similarity, sketches: Mapping[int, Tensor], fresh: Collection[int]
    ) -> Relevance:
        """How similar the clients' sketches are; only the leader's ``sketches`` count.

        Raises:
            PlanError, CommError: as the leaders' communicator says; raised on every rank.
        """

        def reduce(between: Communicator) -> Relevance:
            result = between.relevance(kind, sketches, fresh)
            self._count(between)
            return result

        if self.group_size == 1:
            return reduce(self._leaders)

        def relayed() -> Message:
            result = reduce(self._leaders)
            # A float64 travels as the bits of two float32 values.
            return {"clients": list(result.clients)}, [result.values.flatten().view(torch.float32)]

        values, vectors = self._from_leader(relayed)
        clients = tuple(int(client) for client in values["clients"])
        matrix = vectors[0].view(torch.float64).reshape(len(clients), len(clients))
        return Relevance(clients=clients, values=matrix)

    def nearest(
        self, kind: Similarity, sketches: Mapping[int, Tensor], queries: Sequence[NearestQuery]
    ) -> tuple[Neighbours, ...]:
        """The most similar clients; only the leader's ``sketches`` count.

        Raises:
            PlanError, CommError: as the leaders' communicator says; raised on every rank.
        """

        def search(between: Communicator) -> tuple[Neighbours, ...]:
            found = between.nearest(kind, sketches, queries)
            self._count(between)
            return found

        if self.group_size == 1:
            return search(self._leaders)

        def relayed() -> Message:
            found = search(self._leaders)
            # 64-bit numbers travel as the bits of two float32 values.
            parts = [part for one in found for part in (one.sources, one.cosines)]
            return {}, [part.flatten().view(torch.float32) for part in parts]

        _, vectors = self._from_leader(relayed)
        answers = []
        for query, ids, cosines in zip(queries, vectors[::2], vectors[1::2], strict=True):
            width = ids.numel() // 2 // max(len(query.receivers), 1)
            answers.append(
                Neighbours(
                    receivers=query.receivers,
                    sources=ids.view(torch.int64).reshape(len(query.receivers), width),
                    cosines=cosines.view(torch.float64).reshape(len(query.receivers), width),
                )
            )
        return tuple(answers)

    def execute(
        self, plan: MixingPlan, uploads: Mapping[int, SharedTensors]
    ) -> dict[int, dict[str, Tensor]]:
        """Carries out a plan; only the leader's ``uploads`` count, every rank gets the downlinks.

        Raises:
            PlanError, CommError: as the leaders' communicator says; raised on every rank.
        """

        def exchange(between: Communicator) -> dict[int, dict[str, Tensor]]:
            downlinks = between.execute(plan, uploads)
            self._count(between)
            return downlinks

        if self.group_size == 1:
            return exchange(self._leaders)

        def relayed() -> Message:
            downlinks = exchange(self._leaders)
            layouts = {client: Layout.of(tensors) for client, tensors in downlinks.items()}
            values = {str(client): layout.to_json() for client, layout in layouts.items()}
            packed = [layouts[client].pack(tensors) for client, tensors in downlinks.items()]
            return self._counters() | {"downlinks": values}, packed

        values, vectors = self._from_leader(relayed)
        self._take_counters(values)
        layouts = {int(i): Layout.from_json(entries) for i, entries in values["downlinks"].items()}
        return {
            client: layout.unpack(vector)
            for (client, layout), vector in zip(layouts.items(), vectors, strict=True)
        }

    def barrier(self) -> None:
        """Waits for all ranks."""
        self._everyone.barrier()

    def abort(self, code: int) -> None:
        """Ends every process of the job with this exit code; does not return."""
        self._everyone.abort(code)

    @property
    def _leaders(self) -> Communicator:
        if self._between is None:
            raise CommError(f"rank {self.rank} does not lead group {self.group}")
        return self._between

    def _count(self, between: Communicator) -> None:
        self.uplink_bytes = dict(between.uplink_bytes)
        self.downlink_bytes = dict(between.downlink_bytes)
        self.moved_bytes = dict(between.moved_bytes)

    def _counters(self) -> dict[str, Any]:
        return {
            "uplink": list(self.uplink_bytes.items()),
            "downlink": list(self.downlink_bytes.items()),
        }

    def _take_counters(self, values: Mapping[str, Any]) -> None:
        self.uplink_bytes = {int(client): int(count) for client, count in values["uplink"]}
        self.downlink_bytes = {int(client): int(count) for client, count in values["downlink"]}

    def _from_leader(self, work: Callable[[], Message]) -> Message:
        """What ``work`` gives on the leader, on every rank of the group.

        An error of this package on the leader is raised on the others as well, because they would
        wait for its result for ever.
        """
        values: dict[str, Any] = {}
        vectors: list[Tensor] = []
        failure: FedMosaicError | None = None
        if self.is_leader:
            try:
                values, vectors = work()
                values = values | {"lengths": [vector.numel() for vector in vectors]}
            except FedMosaicError as error:
                failure = error
                values = {"error": type(error).__name__, "message": str(error)}
        text = json.dumps(values).encode() if self.is_leader else b""
        length = np.array([len(text)], dtype=np.int64)
        try:
            self._inside.Bcast(length, root=0)
            buffer = np.frombuffer(bytearray(text or bytes(int(length[0]))), dtype=np.uint8)
            self._bcast(buffer)
            values = json.loads(buffer.tobytes())
            if "error" not in values:
                if not self.is_leader:
                    vectors = [torch.empty(n, dtype=torch.float32) for n in values["lengths"]]
                for vector in vectors:
                    self._bcast(vector.numpy().view(np.uint8))
        except self._mpi.Exception as error:
            raise CommError(f"MPI failed in a broadcast of group {self.group}: {error}") from error
        if failure is not None:
            raise failure
        if "error" in values:
            raise _KINDS.get(values["error"], CommError)(values["message"])
        return values, vectors

    def _bcast(self, raw: np.ndarray[Any, Any]) -> None:
        for start in range(0, raw.size, self._piece_bytes):
            self._inside.Bcast([raw[start : start + self._piece_bytes], self._mpi.BYTE], root=0)


def _as_vector(payload: bytes) -> Tensor:
    """Bytes as a float32 vector, padded to whole numbers; a view of bits, never computed with."""
    padded = bytearray(payload) + bytes(-len(payload) % 4)
    return torch.frombuffer(padded, dtype=torch.float32)


def _check_groups(
    groups: Sequence[Sequence[int]], owners: Mapping[int, int], world_size: int
) -> None:
    ranks = [rank for group in groups for rank in group]
    if ranks != list(range(world_size)) or not all(groups):
        raise CommError(
            f"rank groups {[list(group) for group in groups]} are not the {world_size} ranks of "
            "the job in order"
        )
    lost = [client for client, group in sorted(owners.items()) if not 0 <= group < len(groups)]
    if lost:
        raise CommError(f"clients {lost[:5]} belong to groups that do not exist")


__all__ = ["Between", "GroupCommunicator"]
