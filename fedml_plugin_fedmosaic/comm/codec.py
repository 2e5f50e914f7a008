"""How tensors and headers become bytes: flat float32 vectors, and JSON.

No pickle: a received message can only ever become numbers and text.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import CommError, PlanError
from fedml_plugin_fedmosaic.core.types import SharedTensors, UpdateHeader

FLOAT_BYTES = 4
_MAGIC = b"FMH1"
_LENGTH = struct.Struct("<q")


def new_floats(count: int) -> Tensor:
    """An uninitialised float32 vector on the CPU.

    NumPy asks for huge pages and torch does not: a new vector of many megabytes is filled twice as
    fast.
    """
    return torch.from_numpy(np.empty(count, dtype=np.float32))


@dataclass(frozen=True)
class Layout:
    """Which tensors a flat vector holds, and where.

    Attributes:
        entries: (share key, shape), ascending by key.
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: SharedTensors) -> Layout:
        """The layout of named tensors."""
        return cls(tuple((key, tuple(tensors[key].shape)) for key in sorted(tensors)))

    @classmethod
    def from_json(cls, entries: Sequence[Sequence[Any]]) -> Layout:
        """The inverse of :meth:`to_json`."""
        return cls(tuple((str(key), tuple(int(size) for size in shape)) for key, shape in entries))

    def to_json(self) -> list[list[Any]]:
        """JSON-ready form."""
        return [[key, list(shape)] for key, shape in self.entries]

    @cached_property
    def digest(self) -> str:
        """Short hash of keys and shapes; equal layouts have equal digests."""
        text = json.dumps(self.to_json(), separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each tensor in the vector, and the vector's length at the end."""
        ends = [0]
        for _, shape in self.entries:
            ends.append(ends[-1] + math.prod(shape))
        return tuple(ends)

    @property
    def numel(self) -> int:
        """Length D of the vector."""
        return self.offsets[-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the vector on the wire."""
        return self.numel * FLOAT_BYTES

    def pack(self, tensors: SharedTensors, into: Tensor | None = None) -> Tensor:
        """One contiguous float32 CPU vector of length D (a copy).

        Args:
            tensors: named tensors of this layout.
            into: room for the vector, float32 (D,); new memory when omitted.

        Raises:
            PlanError: keys, shapes or dtypes are not the layout's.
        """
        if Layout.of(tensors) != self:
            raise PlanError(f"tensors do not have the layout {self.digest}: {sorted(tensors)[:5]}")
        vector = new_floats(self.numel) if into is None else into
        for index, (key, _) in enumerate(self.entries):
            tensor = tensors[key]
            if tensor.dtype != torch.float32:
                raise PlanError(f"{key} is {tensor.dtype}; uploads must be torch.float32")
            vector[self.offsets[index] : self.offsets[index + 1]] = tensor.detach().reshape(-1)
        return vector

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Named tensors of a vector of length D; each is a view of it.

        Raises:
            PlanError: the vector is not a float32 vector of length D.
        """
        if vector.shape != (self.numel,) or vector.dtype != torch.float32:
            raise PlanError(
                f"expected a float32 vector of length {self.numel}, got {vector.dtype} "
                f"{tuple(vector.shape)}"
            )
        return {
            key: vector[self.offsets[index] : self.offsets[index + 1]].view(shape)
            for index, (key, shape) in enumerate(self.entries)
        }


def encode_headers(headers: Sequence[UpdateHeader]) -> bytes:
    """Headers as magic, length of the JSON part, and JSON with the shapes of the sketches."""
    records = [
        {
            "client_id": header.client_id,
            "round_idx": header.round_idx,
            "num_examples": header.num_examples,
            "sketch": None if header.sketch is None else list(header.sketch.shape),
            **({"notes": dict(header.notes)} if header.notes else {}),
        }
        for header in headers
    ]
    text = json.dumps(records, separators=(",", ":")).encode()
    return b"".join([_MAGIC, _LENGTH.pack(len(text)), text])


def decode_headers(payload: bytes) -> tuple[UpdateHeader, ...]:
    """The inverse of :func:`encode_headers`; sketches are on the ``meta`` device.

    Raises:
        CommError: the payload is not what :func:`encode_headers` makes.
    """
    start = len(_MAGIC) + _LENGTH.size
    if len(payload) < start or payload[: len(_MAGIC)] != _MAGIC:
        raise CommError(f"a header message of {len(payload)} bytes does not start with {_MAGIC!r}")
    (length,) = _LENGTH.unpack_from(payload, len(_MAGIC))
    if length != len(payload) - start:
        raise CommError(
            f"a header message has {len(payload)} bytes, its first part says {start + length}"
        )
    try:
        records: list[Mapping[str, Any]] = json.loads(payload[start:])
        return tuple(
            UpdateHeader(
                client_id=int(record["client_id"]),
                round_idx=int(record["round_idx"]),
                num_examples=int(record["num_examples"]),
                sketch=_shape_only(record["sketch"]),
                notes=dict(record.get("notes", {})),
            )
            for record in records
        )
    except (ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise CommError(f"a header message cannot be read: {error}") from error


def _shape_only(shape: Sequence[int] | None) -> Tensor | None:
    return None if shape is None else torch.empty([*map(int, shape)], device="meta")


def header_bytes(header: UpdateHeader) -> int:
    """Bytes of one client's header and sketch on the wire, were the client remote."""
    sketch_values = 0 if header.sketch is None else header.sketch.numel()
    return len(encode_headers([header])) + FLOAT_BYTES * sketch_values
