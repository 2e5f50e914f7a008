"""What a rank checks about relevance and mixing under mpirun, besides equality of small cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.codec import Layout
from fedml_plugin_fedmosaic.comm.exchange import catalogue_of
from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.comm.mixing import planned_bytes
from fedml_plugin_fedmosaic.comm.mpi import MPICommunicator
from fedml_plugin_fedmosaic.core.errors import CommError, PlanError
from fedml_plugin_fedmosaic.core.rng import torch_generator
from fedml_plugin_fedmosaic.core.types import MixingPlan, MixRow, NearestQuery
from fedml_plugin_fedmosaic.equations.mixing import TILE_COLUMNS

MANY = 36  # clients: more than a tile of the similarity, divisible by 1, 2, 3 and 4 ranks
SHAPE = (24, 840)  # of a sketch: several column segments, the last one narrower
FEW = 12
LENGTH = FEW * TILE_COLUMNS  # of a vector: whole tiles for every rank


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"failed: {what}")


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.numpy().tobytes() == second.numpy().tobytes()


def total(comm: MPICommunicator, stage: str) -> int:
    """Bytes of a stage over all ranks, really moved."""
    return sum(map(int, comm.share(str(comm.moved_bytes[stage]))))


def sketches_of(clients: range) -> dict[int, Tensor]:
    return {
        client: torch.randn(SHAPE, generator=torch_generator(3, "big sketch", client))
        for client in clients
    }


def relevance(comm: MPICommunicator) -> int:
    """Same bits as one process, by columns and by rows; returns how many values were compared."""
    everyone = range(MANY)
    sketches = sketches_of(everyone)
    sketches[5] = sketches[5] * 1e-9  # scales do not matter
    own = {client: sketches[client] for client in comm.owned(everyone)}
    ways: set[str] = set()
    compared = 0
    sketch_bytes = 4 * SHAPE[0] * SHAPE[1]
    for kind, cases in (("columns", (list(everyone), [0, 7, 33])), ("flat", (list(everyone), [3]))):
        for fresh in cases:
            comm.exchange_headers([])
            got = comm.relevance(kind, own, fresh)
            expected = LocalCommunicator().relevance(kind, sketches, fresh)
            check(got.clients == tuple(everyone), "clients of the relevance")
            check(same_bits(got.values, expected.values), f"bits of {kind}, fresh {fresh}")
            unknown = got.values.isnan()
            known = MANY**2 - int(unknown.sum())
            stale = MANY - len(fresh)
            check(known == MANY**2 - stale * (stale - 1), "pairs with a fresh client and diagonal")
            compared += known
            sums = 8 * (len(fresh) + 1) * MANY
            columns = sketch_bytes * MANY * (comm.size - 1) // comm.size + 2 * sums * (
                comm.size - 1
            )
            held = [
                sum(client % comm.size == rank for client in fresh) for rank in range(comm.size)
            ]
            rows = sketch_bytes * sum(len(fresh) - count for count in held)
            rows += sums * (comm.size - 1)
            ways.add("columns" if columns <= rows else "rows")
            moved = total(comm, "relevance")
            check(moved == min(columns, rows), f"bytes of {kind}, fresh {fresh}: {moved}")
    half = tuple(everyone)[::2]
    queries = [NearestQuery(receivers=tuple(everyone), sources=half, k=5)]
    (found,) = comm.nearest("columns", own, queries)
    (whole,) = LocalCommunicator().nearest("columns", sketches, queries)
    check(same_bits(found.sources, whole.sources), "the nearest clients")
    check(same_bits(found.cosines, whole.cosines), "bits of their cosines")
    compared += found.sources.numel()
    check(comm.size < 3 or ways == {"columns", "rows"}, f"both ways are taken: {ways}")
    _refuse_sketches(comm, own)
    return compared


def _refuse_sketches(comm: MPICommunicator, own: Mapping[int, Tensor]) -> None:
    """A mistake of the last rank is an error on every rank."""
    last = comm.size - 1
    client = MANY - comm.size + last  # owned by the last rank

    def raises(kind: type[Exception], given: Mapping[int, Tensor], fresh: list[int]) -> None:
        try:
            comm.relevance("columns", given, fresh)
        except kind:
            return
        raise SystemExit(f"failed: no {kind.__name__}")

    def changed(tensor: Tensor) -> Mapping[int, Tensor]:
        return {**own, client: tensor} if comm.rank == last else own

    raises(PlanError, changed(torch.full(SHAPE, float("nan"))), [client])
    raises(PlanError, changed(torch.zeros(2, 3)), [client])
    raises(PlanError, changed(torch.zeros(SHAPE, dtype=torch.float64)), [client])
    raises(PlanError, own, [MANY + 4])
    if comm.size > 1:
        raises(CommError, own, [comm.rank])
        stolen = {**own, 0: torch.zeros(SHAPE)} if comm.rank == last else own
        raises(CommError, stolen, [0])


def _uploads(length: int) -> dict[int, dict[str, Tensor]]:
    return {
        client: {"pq/0/m/P": torch.randn(length, generator=torch_generator(5, "upload", client))}
        for client in range(FEW)
    }


def _row(target: int, sources: list[int]) -> MixRow:
    weights = torch.rand(len(sources), generator=torch_generator(5, "weights", target))
    return MixRow(target=target, sources=tuple(sources), weights=tuple(weights.tolist()))


def _plans() -> dict[str, tuple[tuple[MixRow, ...], Callable[[int, int], int]]]:
    """Name -> rows, and the bytes they move as a function of ranks and bytes of one vector."""
    others = {t: [s for s in range(FEW) if s != t] for t in range(FEW)}
    equal = tuple(_row(0, list(range(FEW))).weights)

    def ring(size: int, vector: int) -> int:
        return vector * (0 if size == 1 else FEW)

    def half(size: int, vector: int) -> int:
        return vector * 2 * (size - 1)

    return {
        # Every row differs: FedMosaic.
        "dense": (
            tuple(_row(t, others[t]) for t in range(FEW)),
            lambda size, vector: 2 * FEW * vector * (size - 1) // size,
        ),
        # One average for all: FedAvg; an all-reduce.
        "average": (
            tuple(MixRow(target=t, sources=tuple(range(FEW)), weights=equal) for t in range(FEW)),
            lambda size, vector: FEW * vector * (size - 1) // size + vector * (size - 1),
        ),
        # Few sources for many receivers go directly.
        "cohort": (tuple(_row(t, [0, 1]) for t in range(FEW)), half),
        # One source each.
        "ring": (tuple(_row(t, [(t + 1) % FEW]) for t in range(FEW)), ring),
        # Many sources for one receiver: sent directly, or as slices with one answer.
        "one": ((_row(0, others[0]),), _one_receiver),
    }


def _one_receiver(size: int, vector: int) -> int:
    remote = FEW - FEW // size  # client 0 lives on rank 0 and is not among the sources
    slices = sum(
        (11 - (FEW // size - (rank == 0)) + (rank != 0)) * (vector // size) for rank in range(size)
    )
    return min(remote * vector, slices) if size > 1 else 0


def mixing(comm: MPICommunicator) -> int:
    """Same bits as one process and the bytes of the formula; returns how many were compared."""
    compared = 0
    for length in (LENGTH, TILE_COLUMNS + 77):
        uploads = _uploads(length)
        own = {client: uploads[client] for client in comm.owned(range(FEW))}
        catalogue: dict[int, dict[str, Layout]] = catalogue_of(uploads)
        for name, (rows, formula) in _plans().items():
            plan = MixingPlan(rows={"pq": rows})
            comm.exchange_headers([])
            got = comm.execute(plan, own)
            expected = LocalCommunicator().execute(plan, uploads)
            for client, tensors in got.items():
                check(list(tensors) == list(expected[client]), f"{name}: keys of {client}")
                for key, tensor in tensors.items():
                    check(same_bits(tensor, expected[client][key]), f"{name}: bits of {client}")
                    compared += tensor.numel()
            moved = total(comm, "mixing")
            routes = comm.routes(plan, "pq", catalogue)
            check(moved == planned_bytes(routes), f"{name}: {moved} bytes moved")
            if length == LENGTH:
                check(moved == formula(comm.size, 4 * length), f"{name}: {moved}, not the formula")
    return compared


def owners_do_not_matter(comm: MPICommunicator) -> None:
    """Any assignment of clients to ranks gives the same bits."""
    sketches = sketches_of(range(MANY))
    own = {client: sketches[client] for client in comm.owned(range(MANY))}
    for fresh in (list(range(MANY)), [1]):
        got = comm.relevance("columns", own, fresh)
        expected = LocalCommunicator().relevance("columns", sketches, fresh)
        check(same_bits(got.values, expected.values), "bits with other owners")
    uploads = _uploads(TILE_COLUMNS + 1)
    mine = {client: uploads[client] for client in comm.owned(range(FEW))}
    for name, (rows, _) in _plans().items():
        plan = MixingPlan(rows={"pq": rows})
        expected_links = LocalCommunicator().execute(plan, uploads)
        for client, tensors in comm.execute(plan, mine).items():
            for key, tensor in tensors.items():
                check(same_bits(tensor, expected_links[client][key]), f"{name}: other owners")
