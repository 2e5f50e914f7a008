"""Updates that must not be mixed are refused, with the tensor key named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fedml_plugin_fedmosaic.comm.codec import decode_headers, encode_headers
from fedml_plugin_fedmosaic.core.errors import ClientFailure, CommError
from fedml_plugin_fedmosaic.core.types import ClientUpdate, UpdateHeader
from fedml_plugin_fedmosaic.runtime.validation import (
    NormLimits,
    UpdateShape,
    check_headers,
    check_update,
    update_norm,
)

P, Q = "pq/0/m/P", "pq/0/m/Q"


def header(client_id: int = 4, round_idx: int = 2, **changes: Any) -> UpdateHeader:
    return UpdateHeader(
        **{"client_id": client_id, "round_idx": round_idx, "num_examples": 8, **changes}
    )


def update(sketch: Tensor | None = None, **tensors: Tensor) -> ClientUpdate:
    named = {P: torch.eye(2), Q: torch.ones(2), **tensors}
    return ClientUpdate(header=header(sketch=sketch), tensors=named)


def changed(key: str, change: Callable[[Tensor], Any]) -> ClientUpdate:
    good = update()
    return replace(good, tensors={**good.tensors, key: change(good.tensors[key].clone())})


def without(key: str) -> ClientUpdate:
    good = update()
    return replace(good, tensors={name: t for name, t in good.tensors.items() if name != key})


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[1] = value
        return tensor

    return change


SHAPE = UpdateShape.of(update())


def test_what_the_client_half_made_passes() -> None:
    check_update(update(), SHAPE)
    check_update(update(torch.zeros(3, 5)), UpdateShape.of(update(torch.ones(3, 5))))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (changed(Q, with_value(float("nan"))), rf"{Q} holds 1 NaN or infinite values among 2"),
        (changed(P, with_value(float("-inf"))), rf"{P} holds 1 NaN or infinite values among 4"),
        (changed(P, lambda t: t[:1]), rf"{P} has shape \(1, 2\); expected \(2, 2\)"),
        (changed(P, lambda t: t.double()), rf"{P} is torch.float64; expected torch.float32"),
        (changed(P, lambda t: t.half()), rf"{P} is torch.float16"),
        (changed(P, lambda t: t.to_sparse()), rf"{P} is torch.sparse_coo on cpu"),
        (changed(P, lambda t: t.to("meta")), rf"{P} is torch.strided on meta"),
        (changed(P, lambda t: t.tolist()), rf"{P} is a list; expected a tensor"),
        (without(Q), rf"its keys differ: missing {Q}"),
        (update(**{"pq/9/m/P": torch.ones(1)}), "its keys differ: unknown pq/9/m/P"),
        (
            update(**{f"pq/{i}/m/P": torch.ones(1) for i in range(5, 10)}),
            "unknown pq/5/m/P, unknown pq/6/m/P, unknown pq/7/m/P and 2 more",
        ),
        (replace(update(), header=header(5)), "its header names client 5, round 3"),
        (replace(update(), header=header(round_idx=1)), "expected client 4, round 3"),
        (replace(update(), header=header(num_examples=-1)), "num_examples is -1"),
        (replace(update(), header=header(num_examples=1.5)), r"num_examples is 1\.5"),
    ],
)
def test_broken_updates_are_refused(broken: ClientUpdate, message: str) -> None:
    with pytest.raises(ClientFailure, match=message) as failure:
        check_update(broken, SHAPE)
    assert (failure.value.client_id, failure.value.round_idx) == (4, 2)
    assert failure.value.stage == "update"


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        (None, r"it carries no sketch; expected one of shape \(3, 5\)"),
        (torch.zeros(5, 3), r"the sketch has shape \(5, 3\); expected \(3, 5\)"),
        (torch.full((3, 5), float("nan")), "the sketch holds 15 NaN or infinite values"),
        (torch.zeros(3, 5).double(), "the sketch is torch.float64"),
    ],
)
def test_hostile_sketches_are_refused(sketch: Tensor | None, message: str) -> None:
    with pytest.raises(ClientFailure, match=message) as failure:
        check_update(update(sketch), UpdateShape.of(update(torch.zeros(3, 5))))
    assert failure.value.stage == "sketch"
    with pytest.raises(ClientFailure, match="it carries a sketch, but none was expected"):
        check_update(update(torch.zeros(3, 5)), SHAPE)


def test_the_norm_is_that_of_all_tensors_and_does_not_overflow() -> None:
    tensors = {P: torch.tensor([3.0]), Q: torch.tensor([4.0])}
    assert update_norm(tensors) == 5.0
    assert update_norm({}) == 0.0
    huge = {P: torch.full((4,), 3e38)}
    assert update_norm(huge) == pytest.approx(6e38, rel=1e-6)
    assert not update_norm({P: torch.tensor([float("nan")])}) < 1e300


def test_an_exploding_norm_is_refused() -> None:
    check_update(update(), SHAPE, NormLimits(absolute=2.0))
    with pytest.raises(ClientFailure, match=rf"its norm 2 \(largest tensor {P}\) is above"):
        check_update(update(), SHAPE, NormLimits(absolute=1.99))


def test_a_norm_may_be_compared_with_the_last_one() -> None:
    limits = NormLimits(growth=3.0)
    exploded = changed(Q, lambda tensor: tensor * 100)
    check_update(exploded, SHAPE, limits, last=None)  # nothing to compare with
    check_update(exploded, SHAPE, limits, last={P: torch.zeros(2)})
    check_update(update(), SHAPE, limits, last=update().tensors)
    with pytest.raises(ClientFailure, match=r"is 70\.7\d times that of the client's last update"):
        check_update(exploded, SHAPE, limits, last=update().tensors)


def test_headers_are_checked_on_receipt() -> None:
    good = [header(4, sketch=torch.zeros(3, 5)), header(6, sketch=torch.ones(3, 5))]
    check_headers(good, cohort=(4, 5, 6), round_idx=2)
    check_headers([], cohort=(4,), round_idx=0)
    for wrong, message in [
        (header(7), r"client 7, round 3: the client is not in the round's cohort \[4, 5, 6\]"),
        (header(5, round_idx=1), "client 5, round 3 belongs to round 2"),
        (header(5, num_examples=-3), "claims -3 examples"),
        (header(5, sketch=torch.zeros(3)), r"a sketch of shape \(3,\) is no matrix"),
        (header(5, sketch=torch.zeros(5, 3)), r"client 4 \(3, 5\), client 5 \(5, 3\)"),
    ]:
        with pytest.raises(CommError, match=message):
            check_headers([*good, wrong], cohort=(4, 5, 6), round_idx=2)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
RECORDS = st.lists(
    VALUES
    | st.fixed_dictionaries(
        dict.fromkeys(("client_id", "round_idx", "num_examples", "sketch"), VALUES)
    ),
    max_size=3,
)


@given(RECORDS | VALUES)
@example([{"client_id": 0, "round_idx": 0, "num_examples": float("inf"), "sketch": None}])
@example([{"client_id": 0, "round_idx": 0, "num_examples": 1, "sketch": [-2, -2]}])
@example([{"client_id": 0, "round_idx": 0, "num_examples": 1, "sketch": [2**40, 2**40]}])
def test_a_hostile_header_message_is_a_comm_error_and_nothing_else(records: Any) -> None:
    text = json.dumps(records).encode()
    magic = encode_headers([])[:4]
    try:
        headers = decode_headers(magic + struct.pack("<q", len(text)) + text)
        check_headers(headers, cohort=(0, 1), round_idx=0)
    except CommError:
        return
    assert all(header.client_id in (0, 1) for header in headers)
