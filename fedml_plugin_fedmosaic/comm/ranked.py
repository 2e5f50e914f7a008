"""What every communicator does, made of two calls that each one has its own way of: gather, swap.

One process is the special case in which nothing has to be sent.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.codec import Layout, decode_headers, encode_headers
from fedml_plugin_fedmosaic.comm.exchange import (
    Parcels,
    Scratch,
    catalogue_of,
    check_finite,
    check_plan,
    delivered,
    empty_downlinks,
    plan_digest,
    received_bytes,
    sorted_headers,
    split_channels,
    upload_bytes,
)
from fedml_plugin_fedmosaic.comm.mixing import ChannelMixer, Route, row_groups
from fedml_plugin_fedmosaic.comm.nearest import (
    VectorTable,
    asked_about,
    find_nearest,
    queries_digest,
)
from fedml_plugin_fedmosaic.comm.relevance import (
    SketchTable,
    reduce_similarity,
    sketch_problem,
)
from fedml_plugin_fedmosaic.comm.rendezvous import LOOPBACK, free_port
from fedml_plugin_fedmosaic.core.errors import CommError, PlanError
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

LOG = logging.getLogger(__name__)

STAGES = ("headers", "relevance", "mixing")


class RankedCommunicator(ABC):
    """Ranks that own clients; :class:`comm.base.Communicator` says what each call does.

    Args:
        rank: this process.
        size: number of processes.
        owners: client id -> rank that owns it; ``client_id % size`` when omitted.
    """

    def __init__(self, rank: int, size: int, owners: Mapping[int, int] | None = None) -> None:
        self.rank = rank
        self.size = size
        # Each rank is a group of its own; comm.mpi_groups puts several together.
        self.group = rank
        self.num_groups = size
        self.group_rank = 0
        self.group_size = 1
        self.is_leader = True
        self.uplink_bytes: dict[int, int] = {}
        self.downlink_bytes: dict[int, int] = {}
        self.moved_bytes = dict.fromkeys(STAGES, 0)
        self._headers: tuple[UpdateHeader, ...] = ()
        self._owners = owners
        self._scratch = Scratch()
        self._packed = Scratch()

    @abstractmethod
    def _gather(self, payload: bytes) -> list[bytes]:
        """Every rank's message, in the order of ranks."""

    @abstractmethod
    def _swap(self, sends: Parcels, receives: Parcels) -> None:
        """Sends contiguous CPU tensors and fills others.

        Between two ranks, both sides list the same tensors in the same order.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Waits for all ranks."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """Ends the whole job with an exit code."""

    def _owner(self, client_id: int) -> int:
        return client_id % self.size if self._owners is None else self._owners[client_id]

    def owned(self, client_ids: Sequence[int]) -> tuple[int, ...]:
        """This rank's clients, ascending."""
        return tuple(client for client in sorted(client_ids) if self._owner(client) == self.rank)

    def share(self, text: str) -> tuple[str, ...]:
        """Every rank's text, by rank.

        Raises:
            CommError: the ranks could not be reached.
        """
        return tuple(message.decode() for message in self._gather(text.encode()))

    def agree(self, flag: bool) -> bool:
        """The flag itself: a group is one rank."""
        return flag

    def process_world(self) -> ProcessWorld:
        """A world of this process alone."""
        return ProcessWorld(rank=0, size=1, local_rank=0, address=LOOPBACK, port=free_port())

    def exchange_headers(self, headers: Sequence[UpdateHeader]) -> tuple[UpdateHeader, ...]:
        """All ranks' headers, ascending by client id, with the shapes of their sketches.

        Raises:
            PlanError: a client has two headers (on every rank).
            CommError: the ranks could not be reached, or a message is damaged.
        """
        payload = encode_headers(headers)
        messages = self._gather(payload)
        self.moved_bytes = dict.fromkeys(STAGES, 0)
        self.moved_bytes["headers"] = len(payload) * (self.size - 1)
        self._headers = sorted_headers(
            header for message in messages for header in decode_headers(message)
        )
        self.uplink_bytes = upload_bytes(self._headers)
        self.downlink_bytes = {}
        return self._headers

    def relevance(
        self, kind: Similarity, sketches: Mapping[int, Tensor], fresh: Collection[int]
    ) -> Relevance:
        """How similar the clients' sketches are.

        Raises:
            PlanError: shapes differ, or a sketch is missing, not finite or not float32; raised on
                every rank.
            CommError: ranks ask for different things, a rank holds another rank's sketch, or the
                ranks could not be reached.
        """
        table = self._agree_on_sketches(kind, sketches, fresh)
        if not table.clients:
            return Relevance(clients=(), values=torch.zeros(0, 0, dtype=torch.float64))
        move = partial(self._move, "relevance")
        values = reduce_similarity(table, self.rank, sketches, move, self._scratch)
        return Relevance(clients=table.clients, values=values)

    def nearest(
        self, kind: Similarity, sketches: Mapping[int, Tensor], queries: Sequence[NearestQuery]
    ) -> tuple[Neighbours, ...]:
        """The most similar clients.

        Raises:
            PlanError: a sketch that is asked for is missing, of another shape, not finite or too
                long; raised on every rank.
            CommError: ranks ask for different things, a rank holds another rank's sketch, or the
                ranks could not be reached.
        """
        wanted = asked_about(queries)
        problems = [sketch_problem(client, sketches[client]) for client in sorted(sketches)]
        message = {
            "same": queries_digest(kind, queries),
            "foreign": self._foreign(sketches),
            "problem": next((problem for problem in problems if problem), None),
            "shapes": {str(client): list(sketch.shape) for client, sketch in sketches.items()},
        }
        answers = self._agree(message, "asks for the nearest clients of others")
        shapes = _known_shapes(answers)
        missing = [client for client in wanted if client not in shapes]
        if missing:
            raise PlanError(f"nobody holds the sketches of clients {missing[:10]}")
        rows, columns = shapes[wanted[0]] if wanted else (1, 1)
        table = VectorTable(
            clients=wanted,
            owners=tuple(self._owner(client) for client in wanted),
            length=rows * columns,
            size=self.size,
        )
        move = partial(self._move, "relevance")
        return find_nearest(table, self.rank, kind, sketches, queries, move)

    def execute(
        self, plan: MixingPlan, uploads: Mapping[int, SharedTensors]
    ) -> dict[int, dict[str, Tensor]]:
        """Mixes the rows, slot by slot.

        Raises:
            PlanError: a source has no upload, keys, shapes or dtypes do not fit, a source is not
                finite, or a row is malformed; raised on every rank.
            CommError: ranks hold different plans, a rank holds another rank's client, or the ranks
                could not be reached; raised on every rank that can still be reached.
        """
        catalogue = self._agree_on_plan(plan, uploads)
        check_plan(plan, catalogue)
        self.uplink_bytes = upload_bytes(self._headers, catalogue)
        self.downlink_bytes = received_bytes(plan, catalogue)
        self.moved_bytes["mixing"] = 0
        parts = {client: split_channels(upload) for client, upload in uploads.items()}
        targets = {row.target for rows in plan.rows.values() for row in rows}
        downlinks = empty_downlinks({*uploads, *self.owned(sorted(targets))})
        for slot in sorted(plan.rows):
            channel = plan.channel(slot)
            routes = self.routes(plan, slot, catalogue)
            layouts = {c: route.group.layout for route in routes for c in route.group.sources}
            own = self.owned(list(layouts))
            room = self._packed.take([layouts[client].numel for client in own])
            vectors = {
                client: layouts[client].pack(parts[client][channel], into)
                for client, into in zip(own, room, strict=True)
            }
            move = partial(self._move, "mixing")
            mixer = ChannelMixer(routes, self.rank, vectors, move, self._scratch)
            for client, (layout, vector) in mixer.run().items():
                downlinks[client].update(delivered(layout.unpack(vector), channel, slot))
        return downlinks

    def routes(
        self, plan: MixingPlan, slot: str, catalogue: Mapping[int, Mapping[str, Layout]]
    ) -> tuple[Route, ...]:
        """How a slot's rows travel; a function of the plan, the owners and the layouts."""
        rows, channel = plan.rows[slot], plan.channel(slot)
        clients = {client for row in rows for client in (row.target, *row.sources)}
        owners = {client: self._owner(client) for client in clients}
        layouts = {client: catalogue[client][channel] for row in rows for client in row.sources}
        return tuple(
            Route(group=group, owners=owners, size=self.size) for group in row_groups(rows, layouts)
        )

    def _move(self, stage: str, sends: Parcels, receives: Parcels) -> None:
        self.moved_bytes[stage] += sum(tensor.nbytes for _, tensor in sends)
        self._swap(sends, receives)

    def _agree(self, message: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
        """All ranks' messages, after refusing what any rank may not say.

        A rank that finds a mistake still takes part and tells the others, so that nobody waits
        for a message that never comes.

        Args:
            message: JSON values; ``same`` must be equal on all ranks, ``foreign`` lists clients
                of others that this rank holds, ``problem`` is a mistake or None.
            what: what ``same`` describes.
        """
        answers = [json.loads(text) for text in self._gather(json.dumps(message).encode())]
        for rank, answer in enumerate(answers):
            if answer["same"] != answers[0]["same"]:
                raise CommError(f"rank {rank} {what} than rank 0")
            if answer["foreign"]:
                raise CommError(
                    f"rank {rank} of {self.size} holds clients {answer['foreign']}, which other "
                    "ranks own"
                )
            if answer["problem"] is not None:
                raise PlanError(answer["problem"])
        return answers

    def _foreign(self, clients: Collection[int]) -> list[int]:
        return [client for client in sorted(clients) if self._owner(client) != self.rank]

    def _agree_on_sketches(
        self, kind: Similarity, sketches: Mapping[int, Tensor], fresh: Collection[int]
    ) -> SketchTable:
        problems = [sketch_problem(client, sketches[client]) for client in sorted(sketches)]
        wanted = sorted(fresh)
        message = {
            "same": [kind, wanted],
            "foreign": self._foreign(sketches),
            "problem": next((problem for problem in problems if problem), None),
            "shapes": {str(client): list(sketch.shape) for client, sketch in sketches.items()},
        }
        answers = self._agree(message, "asks for the relevance of others")
        shapes = _known_shapes(answers)
        missing = [client for client in wanted if client not in shapes]
        if missing:
            raise PlanError(f"clients {missing} took part, but nobody holds their sketches")
        clients = tuple(sorted(shapes))
        position = {client: index for index, client in enumerate(clients)}
        return SketchTable(
            kind=kind,
            shape=next(iter(shapes.values()), (0, 0)),
            clients=clients,
            owners=tuple(self._owner(client) for client in clients),
            fresh=tuple(position[client] for client in wanted),
            size=self.size,
        )

    def _agree_on_plan(
        self, plan: MixingPlan, uploads: Mapping[int, SharedTensors]
    ) -> dict[int, dict[str, Layout]]:
        """The catalogue of all ranks' uploads."""
        problem = None
        try:
            local = catalogue_of(uploads)
            check_finite(plan, uploads)
        except PlanError as error:
            problem, local = str(error), {}
        layouts = {layout.digest: layout for entry in local.values() for layout in entry.values()}
        message = {
            "same": plan_digest(plan),
            "foreign": self._foreign(uploads),
            "problem": problem,
            "layouts": {digest: layout.to_json() for digest, layout in layouts.items()},
            "clients": {
                str(client): {channel: layout.digest for channel, layout in entry.items()}
                for client, entry in local.items()
            },
        }
        answers = self._agree(message, "made another mixing plan")
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


def _known_shapes(answers: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, int]]:
    """Shape of every client's sketch, which must be one."""
    shapes = {
        int(client): (rows, columns)
        for answer in answers
        for client, (rows, columns) in answer["shapes"].items()
    }
    if len(set(shapes.values())) > 1:
        raise PlanError(
            f"sketches have different shapes: {dict(sorted(shapes.items())[:10])}",
            hint="all clients must use the same proxy model and the same sketch settings",
        )
    return shapes
