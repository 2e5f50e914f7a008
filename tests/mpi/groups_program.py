"""Runs under mpirun: compares GroupCommunicator with LocalCommunicator on every rank.

The argument says how many ranks each group has, e.g. ``2,1,1``. Prints one JSON line per rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from toy_federation import random_plan, random_uploads, toy_sketch

from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.comm.mpi_groups import GroupCommunicator
from fedml_plugin_fedmosaic.core.errors import CommError, PlanError
from fedml_plugin_fedmosaic.core.types import (
    MixingPlan,
    MixRow,
    NearestQuery,
    Neighbours,
    UpdateHeader,
)

NUM_CLIENTS = 6
QUERIES = (
    NearestQuery(receivers=tuple(range(NUM_CLIENTS)), sources=tuple(range(NUM_CLIENTS)), k=3),
    NearestQuery(receivers=(2,), sources=(0, 2, 5), k=4),
)


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"failed: {what}")


def split(sizes: list[int]) -> list[range]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def same_neighbours(
    found: Sequence[Neighbours], local: LocalCommunicator, sketches: Mapping[int, Tensor]
) -> None:
    expected = local.nearest("columns", sketches, QUERIES)
    for got, whole in zip(found, expected, strict=True):
        check(got.receivers == whole.receivers, "receivers of the neighbours")
        check(torch.equal(got.sources, whole.sources), "neighbours")
        bits = whole.cosines.view(torch.int64)
        check(torch.equal(got.cosines.view(torch.int64), bits), "bits of the neighbours")


def compare(comm: GroupCommunicator, owned: tuple[int, ...]) -> int:
    """Returns how many tensors were compared on this rank."""
    local = LocalCommunicator()
    headers = [
        UpdateHeader(client_id=i, round_idx=1, num_examples=i, sketch=toy_sketch(i, 1, 5 * i, 40))
        for i in range(NUM_CLIENTS)
    ]
    # Only leaders have anything to send.
    mine = [h for h in headers if h.client_id in owned] if comm.is_leader else []
    got = comm.exchange_headers(mine)
    expected = local.exchange_headers(headers)
    check([h.client_id for h in got] == [h.client_id for h in expected], "headers")
    compared = 0
    sketches = {i: toy_sketch(i, 1, 6, 40) for i in range(NUM_CLIENTS)}
    held = {i: sketches[i] for i in owned} if comm.is_leader else {}
    for fresh in (list(range(NUM_CLIENTS)), [2]):
        relevance = comm.relevance("columns", held, fresh)
        whole = local.relevance("columns", sketches, fresh)
        check(relevance.clients == whole.clients, "clients of the relevance")
        bits = whole.values.view(torch.int64)
        check(torch.equal(relevance.values.view(torch.int64), bits), "bits of the relevance")
    check(comm.relevance("columns", {}, []).clients == (), "relevance of nobody")
    same_neighbours(comm.nearest("columns", held, QUERIES), local, sketches)
    for seed in range(4):
        plan, uploads = random_plan(NUM_CLIENTS, seed), random_uploads(NUM_CLIENTS, seed)
        reference = local.execute(plan, uploads)
        sent = {client: uploads[client] for client in owned} if comm.is_leader else {}
        downlinks = comm.execute(plan, sent)
        check(tuple(downlinks) == owned, f"downlinks of {tuple(downlinks)}, not {owned}")
        for client, tensors in downlinks.items():
            check(list(tensors) == list(reference[client]), f"keys of client {client}")
            for key, tensor in tensors.items():
                bits = reference[client][key].view(torch.int32)
                check(torch.equal(tensor.view(torch.int32), bits), f"bits of {client}, {key}")
                compared += 1
        check(comm.uplink_bytes == local.uplink_bytes, "uplink bytes")
        check(comm.downlink_bytes == local.downlink_bytes, "downlink bytes")
    return compared


def refuse(comm: GroupCommunicator, owned: tuple[int, ...]) -> None:
    """A plan that cannot be carried out is the same error on leaders and members."""
    uploads = random_uploads(NUM_CLIENTS)
    sent = {client: uploads[client] for client in owned} if comm.is_leader else {}
    plan = MixingPlan(rows={"pq": (MixRow(target=0, sources=(50,), weights=(1.0,)),)})
    try:
        comm.execute(plan, sent)
    except PlanError as error:
        check("clients [50] have not uploaded" in str(error), f"message {error}")
    else:
        raise SystemExit("failed: no PlanError")
    check(tuple(comm.execute(MixingPlan(), sent)) == owned, "works again after an error")


def main() -> None:
    torch.set_num_threads(1)
    groups = split([int(size) for size in sys.argv[1].split(",")])
    owners = {client: client % len(groups) for client in range(NUM_CLIENTS)}
    try:
        GroupCommunicator(groups[:-1], {})
    except CommError as error:
        check("are not the" in str(error), "groups that are not the world")
    # 36 bytes cut every broadcast into many uneven pieces.
    compared = 0
    for comm in (
        GroupCommunicator(groups, owners),
        GroupCommunicator(groups, owners, piece_bytes=36),
    ):
        owned = tuple(client for client in owners if owners[client] == comm.group)
        check(comm.owned(range(NUM_CLIENTS)) == owned, "owned")
        compared += compare(comm, owned)
        refuse(comm, owned)
    places = [comm.process_world() for _ in range(2)]
    for asked in range(comm.size):  # one rank of the group is enough, other groups do not count
        said = comm.agree(comm.rank == asked)
        check(said == (asked in groups[comm.group]), f"agreement about rank {asked}")
    shared = comm.share(f"I am {comm.rank}")
    check(shared == tuple(f"I am {rank}" for rank in range(comm.size)), "shared texts")
    record = {
        "rank": comm.rank,
        "size": comm.size,
        "group": [comm.group, comm.num_groups, comm.group_rank, comm.group_size],
        "leader": comm.is_leader,
        "places": [[p.rank, p.size, p.local_rank, p.address, p.port] for p in places],
        "compared": compared,
    }
    # One write per line, so that the lines of several ranks do not mix.
    sys.stdout.write(f"RANK{json.dumps(record)}\n")
    comm.barrier()


if __name__ == "__main__":
    main()
