"""Runs under mpirun: compares MPICommunicator with LocalCommunicator on every rank.

``mpi_program.py compare`` prints one line per rank when everything agrees; ``mpi_program.py abort``
lets the last rank abort the job with exit code 7 while the others wait.
"""

from __future__ import annotations

import sys

import exchange_checks
import torch
from toy_federation import random_plan, random_uploads, toy_sketch

from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.comm.mpi import MPICommunicator
from fedml_plugin_fedmosaic.core.errors import CommError, PlanError
from fedml_plugin_fedmosaic.core.types import MixingPlan, MixRow, UpdateHeader

NUM_CLIENTS = 7


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"failed: {what}")


def compare(comm: MPICommunicator, num_clients: int = 7) -> int:
    """Returns how many tensors were compared on this rank."""
    local = LocalCommunicator()
    everyone = range(num_clients)
    owned = comm.owned(everyone)
    check(owned == tuple(i for i in everyone if i % comm.size == comm.rank), "owned")
    headers = [
        UpdateHeader(client_id=i, round_idx=1, num_examples=i, sketch=toy_sketch(i, 1, 5 * i, 40))
        for i in everyone
        if i != 4
    ]
    got = comm.exchange_headers([h for h in reversed(headers) if h.client_id in owned])
    expected = local.exchange_headers(headers)
    for first, second in zip(got, expected, strict=True):
        check(first.client_id == second.client_id, "order of headers")
        check(first.num_examples == second.num_examples, "num_examples")
        check(first.sketch.shape == second.sketch.shape, "shape of the sketch")
    compared = 0
    for seed in range(3):
        plan, uploads = random_plan(num_clients, seed), random_uploads(num_clients, seed)
        reference = local.execute(plan, uploads)
        downlinks = comm.execute(plan, {client: uploads[client] for client in owned})
        check(tuple(downlinks) == owned, "owned downlinks")
        for client, tensors in downlinks.items():
            check(list(tensors) == list(reference[client]), f"keys of client {client}")
            for key, tensor in tensors.items():
                same = torch.equal(
                    tensor.view(torch.int32), reference[client][key].view(torch.int32)
                )
                check(same, f"bits of client {client}, {key}")
                compared += 1
        check(comm.uplink_bytes == local.uplink_bytes, "uplink bytes")
        check(comm.downlink_bytes == local.downlink_bytes, "downlink bytes")
    return compared


def refuse(comm: MPICommunicator) -> None:
    """Mistakes of one rank are errors on every rank; nobody waits for ever."""
    uploads = random_uploads(NUM_CLIENTS)
    mine = {client: uploads[client] for client in comm.owned(range(NUM_CLIENTS))}
    row = MixRow(target=0, sources=(0,), weights=(1.0,))
    good = MixingPlan(rows={"pq": (row,)})
    last = comm.rank == comm.size - 1

    def raises(kind: type[Exception], plan: MixingPlan, sent: dict[int, object]) -> None:
        try:
            comm.execute(plan, sent)  # type: ignore[arg-type]
        except kind:
            return
        raise SystemExit(f"failed: no {kind.__name__}")

    broken = {client: {k: t.double() for k, t in x.items()} for client, x in mine.items()}
    raises(PlanError, good, broken if last else mine)
    raises(
        PlanError, MixingPlan(rows={"pq": (MixRow(target=0, sources=(50,), weights=(1.0,)),)}), mine
    )
    if comm.size > 1:
        raises(CommError, MixingPlan() if last else good, mine)
        raises(CommError, good, uploads if last else mine)
    check(set(comm.execute(good, mine)) == set(mine), "works again after an error")


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "abort":
        comm = MPICommunicator()
        if comm.rank == comm.size - 1:
            comm.abort(7)
        comm.barrier()
        raise SystemExit("failed: barrier returned")
    # 36 bytes cut the tensors unevenly.
    counts = [compare(MPICommunicator()), compare(MPICommunicator(piece_bytes=36))]
    compare(MPICommunicator(), num_clients=1)  # the other ranks have no client
    refuse(MPICommunicator())
    # Results do not depend on the number of threads either, so every other rank uses two.
    reference = MPICommunicator()
    torch.set_num_threads(1 + reference.rank % 2)
    counts += [exchange_checks.relevance(reference), exchange_checks.mixing(reference)]
    # Client 0 moves to the last rank: who owns what changes nothing either.
    last = reference.size - 1
    owners = {client: last - client % reference.size for client in range(exchange_checks.MANY)}
    moved = MPICommunicator(owners=owners, piece_bytes=4 * 10_001)
    exchange_checks.owners_do_not_matter(moved)
    sys.stdout.write(f"agree rank={comm_rank()} compared={sum(counts)}\n")


def comm_rank() -> str:
    from mpi4py import MPI

    return f"{MPI.COMM_WORLD.Get_rank()}/{MPI.COMM_WORLD.Get_size()}"


if __name__ == "__main__":
    main()
