"""What every communicator on the shelf must do; ``mpi`` runs here as a job of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_federation import random_plan, random_uploads, toy_sketch

from fedml_plugin_fedmosaic.comm.codec import header_bytes
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.registry import COMMUNICATORS
from fedml_plugin_fedmosaic.core.types import MixingPlan, MixRow, UpdateHeader
from fedml_plugin_fedmosaic.equations.relevance import column_similarity, flat_similarity

NUM_CLIENTS = 7


@pytest.fixture(params=sorted(COMMUNICATORS))
def comm(request: pytest.FixtureRequest) -> Any:
    if request.param == "mpi":
        try:
            from mpi4py import MPI  # noqa: F401 - importing it loads the library
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"no MPI library outside mpirun; tests/mpi runs it there: {error}")
    return COMMUNICATORS[request.param]()


def header(client: int) -> UpdateHeader:
    return UpdateHeader(client_id=client, round_idx=2, num_examples=3, sketch=toy_sketch(client, 0))


def one_row(channel: str, *sources: int, target: int = 0) -> MixingPlan:
    share = 1 / max(len(sources), 1)
    row = MixRow(target=target, sources=sources, weights=(share,) * len(sources))
    return MixingPlan(rows={channel: (row,)})


def test_one_process_owns_everyone(comm: Any) -> None:
    assert (comm.rank, comm.size) == (0, 1)
    assert comm.owned([4, 0, 2]) == (0, 2, 4)
    comm.barrier()


def test_headers_come_back_in_ascending_order(comm: Any) -> None:
    headers = comm.exchange_headers([header(5), header(1)])
    assert [item.client_id for item in headers] == [1, 5]
    for item in headers:
        assert (item.round_idx, item.num_examples) == (2, 3)
        assert item.sketch.is_meta  # its values stay with the owner
        assert item.sketch.shape == toy_sketch(item.client_id, 0).shape
    assert comm.exchange_headers([]) == ()


def test_two_headers_of_a_client_are_refused(comm: Any) -> None:
    with pytest.raises(PlanError, match="two headers"):
        comm.exchange_headers([header(1), header(1)])


@pytest.mark.parametrize("seed", range(3))
def test_downlinks_are_the_weighted_sums(comm: Any, seed: int) -> None:
    plan, uploads = random_plan(NUM_CLIENTS, seed), random_uploads(NUM_CLIENTS, seed)
    downlinks = comm.execute(plan, uploads)
    assert list(downlinks) == list(range(NUM_CLIENTS))
    assert downlinks[2] == {}
    seen: set[tuple[int, str]] = set()
    for channel, rows in plan.rows.items():
        for row in rows:
            for key in uploads[row.target]:
                if not key.startswith(f"{channel}/"):
                    continue
                seen.add((row.target, key))
                terms = [
                    weight * uploads[source][key].double()
                    for source, weight in zip(row.sources, row.weights, strict=True)
                ]
                exact = torch.stack(terms).sum(0)
                scale = torch.stack(terms).abs().sum(0)
                got = downlinks[row.target][key]
                assert got.dtype == torch.float32
                assert got.shape == uploads[row.target][key].shape
                # Accumulating n float32 terms loses at most n half-units of the absolute sum.
                assert bool(((got.double() - exact).abs() <= 8 * 2**-24 * scale + 1e-30).all())
    assert seen == {(client, key) for client, got in downlinks.items() for key in got}


def test_few_rows_of_the_same_sources_do_not_depend_on_each_other(comm: Any) -> None:
    plan, uploads = random_plan(NUM_CLIENTS), random_uploads(NUM_CLIENTS)
    whole = comm.execute(plan, uploads)
    for channel, rows in plan.rows.items():
        for row in rows:
            alone = comm.execute(MixingPlan(rows={channel: (row,)}), uploads)[row.target]
            assert alone
            assert all(torch.equal(alone[key], whole[row.target][key]) for key in alone)


def test_rows_that_are_mixed_together_are_what_they_are_alone_up_to_rounding(comm: Any) -> None:
    uploads = random_uploads(NUM_CLIENTS)
    rows = tuple(
        MixRow(
            target=target,
            sources=tuple(client for client in range(NUM_CLIENTS) if client != target),
            weights=tuple(0.1 + 0.01 * (target + place) for place in range(NUM_CLIENTS - 1)),
        )
        for target in range(NUM_CLIENTS)
    )
    whole = comm.execute(MixingPlan(rows={"pq": rows}), uploads)
    again = comm.execute(MixingPlan(rows={"pq": rows[::-1]}), uploads)
    for row in rows:
        alone = comm.execute(MixingPlan(rows={"pq": (row,)}), uploads)[row.target]
        assert set(alone) == {key for key in uploads[0] if key.startswith("pq/")}
        for key, tensor in alone.items():
            size = sum(uploads[client][key].abs() for client in row.sources)
            error = (whole[row.target][key] - tensor).abs()
            assert bool((error <= NUM_CLIENTS * 2**-24 * size).all())
            assert torch.equal(whole[row.target][key], again[row.target][key])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sources_must_be_finite(comm: Any, value: float) -> None:
    uploads = random_uploads(4)
    uploads[2]["pq/0/m/Q"][3] = value
    with pytest.raises(PlanError, match="client 2: pq/0/m/Q holds NaN or infinite"):
        comm.execute(one_row("pq", 1, 2), uploads)
    assert comm.execute(one_row("pq", 1, 3), uploads)[0]
    assert comm.execute(one_row("conv", 2), uploads)[0]


def test_large_values_whose_sum_overflows_are_finite(comm: Any) -> None:
    uploads = {0: {"pq/0/m/P": torch.full((8,), 3e38)}}
    got = comm.execute(one_row("pq", 0), uploads)[0]["pq/0/m/P"]
    assert torch.equal(got, uploads[0]["pq/0/m/P"])


@pytest.mark.parametrize(
    ("kind", "measure"), [("columns", column_similarity), ("flat", flat_similarity)]
)
def test_relevance_is_the_similarity_of_the_sketches(comm: Any, kind: Any, measure: Any) -> None:
    sketches = {client: toy_sketch(client, 0, 12, 900) for client in (5, 2, 9)}
    got = comm.relevance(kind, sketches, [9, 2, 5])
    assert got.clients == (2, 5, 9)
    assert got.values.dtype == torch.float64
    assert torch.equal(got.values, measure([sketches[client] for client in got.clients]))
    assert torch.equal(got.values, got.values.T)


@pytest.mark.parametrize("kind", ["columns", "flat"])
def test_pairs_without_a_fresh_client_are_unknown(comm: Any, kind: Any) -> None:
    sketches = {client: toy_sketch(client, 0, 12, 900) for client in range(40)}
    full = comm.relevance(kind, sketches, range(40)).values
    part = comm.relevance(kind, sketches, [3, 38]).values
    known = torch.zeros(40, 40, dtype=torch.bool)
    known[[3, 38]] = True
    known[:, [3, 38]] = True
    known.fill_diagonal_(True)
    assert torch.equal(part.isnan(), ~known)
    assert torch.equal(part[known], full[known])
    assert torch.equal(part.nan_to_num(), part.nan_to_num().T)


def test_relevance_of_nobody(comm: Any) -> None:
    assert comm.relevance("columns", {}, []).clients == ()
    got = comm.relevance("columns", {4: toy_sketch(4, 0)}, [4])
    assert got.values.shape == (1, 1)
    assert got.values.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("sketches", "fresh", "message"),
    [
        ({1: torch.full((4, 6), float("nan"))}, [1], "client 1: the sketch holds NaN"),
        ({1: torch.zeros(5)}, [1], r"client 1: the sketch has shape \(5,\)"),
        ({1: torch.zeros(0, 3)}, [1], r"client 1: the sketch has shape \(0, 3\)"),
        ({1: torch.zeros(4, 6).double()}, [1], "client 1: the sketch is torch.float64"),
        ({1: torch.ones(4, 6), 2: torch.ones(4, 7)}, [1, 2], "different shapes"),
        ({1: torch.ones(4, 6)}, [1, 3], r"clients \[3\] took part, but nobody holds"),
    ],
)
def test_bad_sketches_are_refused(comm: Any, sketches: Any, fresh: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        comm.relevance("columns", sketches, fresh)


def test_one_process_moves_nothing(comm: Any) -> None:
    comm.exchange_headers([header(0), header(1)])
    comm.relevance("columns", {0: toy_sketch(0, 0), 1: toy_sketch(1, 0)}, [0, 1])
    comm.execute(random_plan(4), random_uploads(4))
    assert comm.moved_bytes == {"headers": 0, "relevance": 0, "mixing": 0}


def test_equal_rows_do_not_share_memory(comm: Any) -> None:
    rows = tuple(MixRow(target=t, sources=(0, 2), weights=(0.5, 0.5)) for t in (0, 2, 4))
    downlinks = comm.execute(MixingPlan(rows={"conv": rows}), random_uploads(5))
    key = "conv/0/m/A"
    expected = downlinks[4][key].clone()
    assert torch.equal(downlinks[0][key], expected)
    downlinks[0][key].zero_()
    downlinks[2][key].zero_()
    assert torch.equal(downlinks[4][key], expected)


def test_uploads_stay_as_they_are(comm: Any) -> None:
    uploads, before = random_uploads(NUM_CLIENTS), random_uploads(NUM_CLIENTS)
    for tensors in comm.execute(one_row("pq", 3, target=0), uploads).values():
        for tensor in tensors.values():
            tensor.zero_()
    assert all(
        torch.equal(uploads[client][key], before[client][key])
        for client in before
        for key in before[client]
    )


def test_a_receiver_without_upload_gets_its_row(comm: Any) -> None:
    uploads = random_uploads(3)
    downlinks = comm.execute(one_row("pq", 0, 1, target=9), uploads)
    assert set(downlinks[9]) == {key for key in uploads[0] if key.startswith("pq/")}


def test_bytes_are_counted_per_client(comm: Any) -> None:
    uploads = random_uploads(4)
    headers = comm.exchange_headers([header(0), header(3)])
    assert comm.uplink_bytes == {item.client_id: header_bytes(item) for item in headers}
    rows = {
        "pq": (MixRow(target=1, sources=(0, 3), weights=(0.5, 0.5)),),
        "conv": (
            MixRow(target=1, sources=(3,), weights=(1.0,)),
            MixRow(target=2, sources=(0,), weights=(1.0,)),
        ),
    }
    comm.execute(MixingPlan(rows=rows), uploads)
    size = {c: 4 * sum(t.numel() for t in tensors.values()) for c, tensors in uploads.items()}
    assert comm.uplink_bytes == {
        client: header_bytes(header(client)) + size[client] for client in (0, 3)
    }
    conv = 4 * sum(t.numel() for key, t in uploads[2].items() if key.startswith("conv/"))
    assert comm.downlink_bytes == {1: size[1], 2: conv}
    comm.exchange_headers([])
    assert (comm.uplink_bytes, comm.downlink_bytes) == ({}, {})


def test_an_empty_plan_gives_empty_downlinks(comm: Any) -> None:
    assert comm.execute(MixingPlan(), random_uploads(3)) == {0: {}, 1: {}, 2: {}}
    assert comm.execute(MixingPlan(), {}) == {}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (one_row("pq", 8), r"clients \[8\] have not uploaded"),
        (one_row("adapter", 0), r"clients \[0\] have not uploaded"),
        (one_row("conv", 0, 1), "clients 0 and 1 differ in 3 keys or shapes"),
        (one_row("conv", 1, target=2), "clients 1 and 2 differ"),
        (one_row("pq", 1, 0), "ascending"),
        (one_row("pq", 1, 1), "ascending"),
        (one_row("pq"), "at least one"),
        (
            MixingPlan(rows={"pq": (MixRow(target=0, sources=(0,), weights=(0.5, 0.5)),)}),
            "1 sources and 2 weights",
        ),
        (
            MixingPlan(rows={"pq": (MixRow(target=0, sources=(0,), weights=(float("nan"),)),)}),
            "not finite",
        ),
        (
            MixingPlan(rows={"pq": (MixRow(target=0, sources=(0,), weights=(1.0,)),) * 2}),
            "two rows",
        ),
    ],
)
def test_impossible_plans_are_refused(comm: Any, plan: MixingPlan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        comm.execute(plan, random_uploads(4))


def test_other_dtypes_are_refused(comm: Any) -> None:
    uploads = {0: {"pq/0/m/P": torch.zeros(2, 2, dtype=torch.bfloat16)}}
    with pytest.raises(PlanError, match="bfloat16"):
        comm.execute(one_row("pq", 0), uploads)


def test_several_sums_of_one_channel_arrive_in_slots_of_their_own(comm: Any) -> None:
    uploads = random_uploads(5)
    rows = {
        "a": (MixRow(target=1, sources=(0, 2), weights=(0.25, 0.75)),),
        "b": (MixRow(target=1, sources=(4,), weights=(1.0,)),),
        "pq": (MixRow(target=1, sources=(0, 4), weights=(0.5, 0.5)),),
    }
    plan = MixingPlan(rows=rows, slots={"a": "conv", "b": "conv"}, internal=frozenset({"b"}))
    # Client 1 has another layout in this channel, so the sums are for a client without uploads.
    del uploads[1]
    received = comm.execute(plan, uploads)[1]
    for slot in ("a", "b"):
        alone = comm.execute(
            MixingPlan(rows={"conv": rows[slot]}), {c: uploads[c] for c in (0, 2, 4)}
        )[1]
        found = {k: v for k, v in received.items() if k.startswith(f"{slot}/")}
        assert found.keys() == {slot + key.removeprefix("conv") for key in alone}
        assert all(torch.equal(found[slot + key.removeprefix("conv")], alone[key]) for key in alone)
    assert any(key.startswith("pq/") for key in received)
    comm.execute(plan, uploads)
    counted = comm.downlink_bytes[1]
    comm.execute(MixingPlan(rows={k: rows[k] for k in ("a", "pq")}, slots={"a": "conv"}), uploads)
    assert comm.downlink_bytes[1] == counted, "what stays on the server is no traffic"


def test_slots_without_rows_and_with_a_slash_are_refused(comm: Any) -> None:
    row = MixRow(target=0, sources=(0,), weights=(1.0,))
    with pytest.raises(PlanError, match="slots without rows"):
        comm.execute(MixingPlan(rows={"pq": (row,)}, slots={"a": "pq"}), random_uploads(2))
    with pytest.raises(PlanError, match="slots"):
        comm.execute(MixingPlan(rows={"a/b": (row,)}, slots={"a/b": "pq"}), random_uploads(2))


def test_notes_of_headers_arrive_everywhere(comm: Any) -> None:
    notes = {"losses": [0.5, 1.5], "cluster": 2}
    plain = UpdateHeader(client_id=0, round_idx=0, num_examples=1)
    noted = UpdateHeader(client_id=1, round_idx=0, num_examples=1, notes=notes)
    found = comm.exchange_headers([plain, noted])
    assert [dict(item.notes) for item in found] == [{}, notes]
    assert header_bytes(noted) > header_bytes(plain)
