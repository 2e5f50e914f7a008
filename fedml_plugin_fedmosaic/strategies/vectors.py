"""What clients say about their weights in headers, and layers that travel one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import (
    CHANNEL_CONV,
    AdapterKey,
    AdapterState,
    Branch,
    ClientUpdate,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.equations.projection import project
from fedml_plugin_fedmosaic.strategies.common import receive

_NORM_FLOOR = 1e-12


def layer_tensors(tensors: SharedTensors) -> dict[int, dict[str, Tensor]]:
    """Decoder layer -> its tensors of the channel ``conv``, ascending."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        channel, _, rest = name.partition("/")
        if channel == CHANNEL_CONV:
            layers.setdefault(int(rest.partition("/")[0]), {})[name] = tensors[name]
    return dict(sorted(layers.items()))


def in_channels(
    layers: Mapping[int, SharedTensors], channel: Callable[[int], str]
) -> dict[str, Tensor]:
    """The tensors of :func:`layer_tensors` under other channels.

    Args:
        layers: decoder layer -> its tensors.
        channel: place of the layer among them, from 0 -> channel of its tensors.
    """
    return {
        channel(place) + name.removeprefix(CHANNEL_CONV): tensor
        for place, part in enumerate(layers.values())
        for name, tensor in part.items()
    }


def receive_layers(
    adapter: AdapterState, downlink: SharedTensors, client_id: int
) -> dict[AdapterKey, Tensor]:
    """The adapter with some layers of its local branch replaced.

    Args:
        adapter: all adapter tensors of the client.
        downlink: float32 tensors; what stands before the first slash of a name is ignored, the rest
            is that of the share key. A layer is complete or absent.
        client_id: for the error message.

    Raises:
        PlanError: an unknown key, a wrong shape, or a missing key of a received layer.
    """
    named = {CHANNEL_CONV + name[name.index("/") :]: value for name, value in downlink.items()}
    got = set(layer_tensors(named))
    part = {key: tensor for key, tensor in adapter.items() if key.layer in got or not downlink}
    return {**adapter, **receive(part, named, Branch.LOCAL, client_id)}


def with_notes(update: ClientUpdate, **notes: Any) -> ClientUpdate:
    """The update with further notes in its header."""
    header = replace(update.header, notes={**update.header.notes, **notes})
    return replace(update, header=header)


def projection_note(tensors: SharedTensors, width: int, seed: int) -> list[float]:
    """A random projection of the tensors as JSON numbers; see ``equations.projection``."""
    numbers: list[float] = project(tensors, width, seed).tolist()
    return numbers


def vector_of(header: UpdateHeader, note: str, width: int) -> Tensor:
    """A vector that a client put into its header's notes.

    Args:
        header: of the update.
        note: name of the note.
        width: numbers expected.

    Returns:
        (width,) float32.

    Raises:
        PlanError: the note is missing or not so many finite numbers.
    """
    wrapped = replace(header, notes={note: [header.notes.get(note)]})
    return matrix_of(wrapped, note, 1, width)[0]


def matrix_of(header: UpdateHeader, note: str, rows: int, columns: int) -> Tensor:
    """Rows of numbers that a client put into its header's notes.

    Returns:
        (rows, columns) float32.

    Raises:
        PlanError: the note is missing or not of this shape, or a value is not finite.
    """
    table: Any = header.notes.get(note)
    ok = (
        isinstance(table, list)
        and len(table) == rows
        and all(isinstance(row, list) and len(row) == columns for row in table)
    )
    matrix = torch.tensor(table, dtype=torch.float32) if ok else torch.full((1,), float("nan"))
    if not bool(matrix.isfinite().all()):
        found = "nothing" if table is None else "something else"
        raise PlanError(
            f"client {header.client_id}, round {header.round_idx + 1}: the header's note {note!r} "
            f"must be {rows} x {columns} finite numbers, got {found}",
            hint="clients and server must run the same strategy with the same options",
        )
    return matrix


def unit_rows(vectors: Tensor) -> Tensor:
    """Vectors (..., d) in float64, divided by their lengths; what is 0 stays 0."""
    wide = vectors.double()
    rows: Tensor = wide / wide.norm(dim=-1, keepdim=True).clamp_min(_NORM_FLOOR)
    return rows
