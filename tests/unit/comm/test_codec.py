from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.comm.codec import (
    Layout,
    decode_headers,
    encode_headers,
    header_bytes,
)
from fedml_plugin_fedmosaic.core.errors import CommError, PlanError
from fedml_plugin_fedmosaic.core.types import UpdateHeader

SHAPES = st.dictionaries(
    st.text("abc/_0", min_size=1, max_size=6),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    max_size=5,
)


@settings(deadline=None, max_examples=50)
@given(SHAPES)
def test_pack_and_unpack_are_inverse(shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    layout = Layout.of(tensors)
    vector = layout.pack(tensors)
    assert vector.shape == (sum(tensor.numel() for tensor in tensors.values()),)
    assert layout.num_bytes == 4 * vector.numel()
    back = layout.unpack(vector)
    assert list(back) == sorted(tensors)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert Layout.from_json(layout.to_json()) == layout


def test_digest_sees_keys_and_shapes_but_not_order_or_values() -> None:
    first = Layout.of({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    assert first.digest == Layout.of({"b": torch.ones(4), "a": torch.ones(2, 3)}).digest
    assert first.digest != Layout.of({"a": torch.zeros(3, 2), "b": torch.zeros(4)}).digest
    assert first.digest != Layout.of({"a": torch.zeros(2, 3), "c": torch.zeros(4)}).digest


def test_pack_copies_and_reads_transposed_tensors_row_by_row() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).T
    layout = Layout.of({"a": tensor})
    vector = layout.pack({"a": tensor})
    assert vector.tolist() == [0, 3, 1, 4, 2, 5]
    vector.zero_()
    assert tensor.sum() == 15


def test_pack_refuses_other_layouts_and_dtypes() -> None:
    layout = Layout.of({"a": torch.zeros(2)})
    with pytest.raises(PlanError, match="do not have the layout"):
        layout.pack({"a": torch.zeros(3)})
    with pytest.raises(PlanError, match="float64"):
        layout.pack({"a": torch.zeros(2, dtype=torch.float64)})
    with pytest.raises(PlanError, match="length 2"):
        layout.unpack(torch.zeros(3))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**6),
            st.integers(0, 10**6),
            st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4)),
        ),
        max_size=4,
    )
)
def test_headers_survive_the_wire(
    records: list[tuple[int, int, tuple[int, int] | None]],
) -> None:
    headers = [
        UpdateHeader(
            client_id=client,
            round_idx=3,
            num_examples=count,
            sketch=None if shape is None else torch.randn(shape),
        )
        for client, count, shape in records
    ]
    back = decode_headers(encode_headers(headers))
    assert len(back) == len(headers)
    for header, copy in zip(headers, back, strict=True):
        assert (header.client_id, header.round_idx, header.num_examples) == (
            copy.client_id,
            copy.round_idx,
            copy.num_examples,
        )
        if header.sketch is None:
            assert copy.sketch is None
        else:
            assert copy.sketch is not None
            assert copy.sketch.is_meta  # a shape without values
            assert copy.sketch.shape == header.sketch.shape


def test_a_sketch_of_n_values_costs_4n_bytes_more() -> None:
    def header(columns: int) -> UpdateHeader:
        sketch = torch.zeros(10, columns)
        return UpdateHeader(client_id=0, round_idx=0, num_examples=1, sketch=sketch)

    assert header_bytes(header(30)) - header_bytes(header(20)) == 4 * 10 * 10
    assert header_bytes(header(30)) == len(encode_headers([header(30)])) + 4 * 10 * 30


@pytest.mark.parametrize("damage", ["short", "magic", "cut", "longer", "text", "shape"])
def test_damaged_headers_are_refused(damage: str) -> None:
    header = UpdateHeader(client_id=0, round_idx=0, num_examples=1, sketch=torch.ones(2, 2))
    payload = encode_headers([header])
    damaged = {
        "short": payload[:3],
        "magic": b"PICK" + payload[4:],
        "cut": payload[:-4],
        "longer": payload + b"\0\0\0\0",
        "text": payload[:12] + b"?" + payload[13:],
        "shape": payload.replace(b"[2,2]", b"[2,z]"),
    }[damage]
    with pytest.raises(CommError):
        decode_headers(damaged)
