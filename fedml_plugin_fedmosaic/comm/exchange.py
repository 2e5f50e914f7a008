"""What every communicator does with a plan: check it, and count bytes."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.codec import Layout, header_bytes, new_floats
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import (
    MixingPlan,
    MixRow,
    SharedTensors,
    UpdateHeader,
    channel_of,
)

Catalogue = Mapping[int, Mapping[str, Layout]]
"""Client id -> channel -> layout of the client's upload."""

Parcels = Sequence[tuple[int, Tensor]]
"""(rank, contiguous CPU tensor); between two ranks both sides have them in the same order."""

Move = Callable[[Parcels, Parcels], None]
"""Sends the first and receives into the second."""

_KEPT_BYTES = 1 << 28


class Scratch:
    """Room for what is received, used and forgotten.

    New memory costs several times as much as the exchange that fills it, so up to 256 MiB are
    kept from one exchange to the next.
    """

    def __init__(self) -> None:
        self._kept = new_floats(0)

    def take(self, counts: Sequence[int]) -> list[Tensor]:
        """Uninitialised float32 vectors of these lengths; valid until the next call."""
        total = sum(counts)
        room = self._kept
        if room.numel() < total:
            room = new_floats(total)
            if room.nbytes <= _KEPT_BYTES:
                self._kept = room
        ends = list(accumulate(counts))
        return [room[end - count : end] for count, end in zip(counts, ends, strict=True)]


def split_channels(upload: SharedTensors) -> dict[str, dict[str, Tensor]]:
    """Channel -> the upload's tensors of that channel."""
    channels: dict[str, dict[str, Tensor]] = {}
    for key in sorted(upload):
        channels.setdefault(channel_of(key), {})[key] = upload[key]
    return channels


def catalogue_of(uploads: Mapping[int, SharedTensors]) -> dict[int, dict[str, Layout]]:
    """Layouts of uploads.

    Raises:
        PlanError: a tensor is not float32.
    """
    for client, upload in uploads.items():
        for key, tensor in upload.items():
            if tensor.dtype != torch.float32:
                raise PlanError(
                    f"client {client}: {key} is {tensor.dtype}; uploads must be torch.float32"
                )
    return {
        client: {name: Layout.of(part) for name, part in split_channels(upload).items()}
        for client, upload in sorted(uploads.items())
    }


def check_finite(plan: MixingPlan, uploads: Mapping[int, SharedTensors]) -> None:
    """Whether the tensors that a plan mixes are finite: a weight of 0 must hide its source.

    Raises:
        PlanError: a source holds NaN or infinity.
    """
    for slot, rows in plan.rows.items():
        channel = plan.channel(slot)
        for client in sorted({client for row in rows for client in row.sources} & {*uploads}):
            for key, tensor in uploads[client].items():
                # The sum is finite nearly always and much faster than looking at every value.
                if (
                    channel_of(key) == channel
                    and not bool(tensor.sum().isfinite())
                    and not bool(tensor.isfinite().all())
                ):
                    raise PlanError(
                        f"client {client}: {key} holds NaN or infinite values",
                        hint="lower the learning rate of this client",
                    )


def plan_digest(plan: MixingPlan) -> str:
    """Hash of a plan's rows, bit by bit; ranks compare it before they move tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for slot, rows in sorted(plan.rows.items()):
        digest.update(json.dumps([slot, plan.channel(slot), len(rows)]).encode())
        for row in rows:
            digest.update(array("q", (row.target, len(row.sources), len(row.weights))))
            digest.update(array("q", row.sources))
            digest.update(array("d", row.weights))
    return digest.hexdigest()


def check_plan(plan: MixingPlan, catalogue: Catalogue) -> None:
    """Whether a plan is well formed and its clients fit together.

    Raises:
        PlanError: a row is malformed, a slot has no rows or a name with a slash, a source has no
            upload in the channel, or keys or shapes of a row's clients differ.
    """
    idle = sorted(set(plan.slots) - set(plan.rows))
    if idle or any("/" in slot for slot in plan.rows):
        raise PlanError(f"slots {sorted(plan.rows)} have rows; slots without rows: {idle}")
    for slot, rows in plan.rows.items():
        targets = [row.target for row in rows]
        if len(set(targets)) != len(targets):
            raise PlanError(f"channel {slot!r}: a client has two rows: {sorted(targets)}")
        for row in rows:
            _check_row(plan.channel(slot), row, catalogue)


def _check_row(channel: str, row: MixRow, catalogue: Catalogue) -> None:
    where = f"channel {channel!r}, receiver {row.target}"
    if not row.sources or len(row.sources) != len(row.weights):
        raise PlanError(
            f"{where}: {len(row.sources)} sources and {len(row.weights)} weights; expected as "
            "many weights as sources, and at least one"
        )
    if any(first >= second for first, second in pairwise(row.sources)):
        raise PlanError(f"{where}: sources {row.sources} are not in ascending order")
    if not all(math.isfinite(weight) for weight in row.weights):
        raise PlanError(f"{where}: weights are not finite: {row.weights}")
    absent = [client for client in row.sources if channel not in catalogue.get(client, {})]
    if absent:
        raise PlanError(f"{where}: clients {absent} have not uploaded anything in this channel")
    expected = layout_of(channel, row, catalogue)
    for client in (*row.sources, row.target):
        found = catalogue.get(client, {}).get(channel)
        if found is not None and found != expected:
            differ = sorted({key for key, _ in set(found.entries) ^ set(expected.entries)})
            raise PlanError(
                f"{where}: tensors of clients {row.sources[0]} and {client} differ in "
                f"{len(differ)} keys or shapes, first {differ[0]!r}",
                hint="only clients with equal layouts may be mixed in a channel",
            )


def layout_of(channel: str, row: MixRow, catalogue: Catalogue) -> Layout:
    """The layout of what a row's receiver gets."""
    return catalogue[row.sources[0]][channel]


def upload_bytes(
    headers: Sequence[UpdateHeader], catalogue: Catalogue | None = None
) -> dict[int, int]:
    """Client id -> bytes of its header and, if a catalogue is given, of its tensors."""
    layouts = catalogue or {}
    return {
        header.client_id: header_bytes(header)
        + sum(layout.num_bytes for layout in layouts.get(header.client_id, {}).values())
        for header in headers
    }


def received_bytes(plan: MixingPlan, catalogue: Catalogue) -> dict[int, int]:
    """Client id -> bytes of the vectors it receives, for clients with a row.

    Slots that stay on the server do not count.
    """
    total: dict[int, int] = {}
    for slot, rows in sorted(plan.rows.items()):
        if slot in plan.internal:
            continue
        for row in rows:
            num_bytes = layout_of(plan.channel(slot), row, catalogue).num_bytes
            total[row.target] = total.get(row.target, 0) + num_bytes
    return dict(sorted(total.items()))


def delivered(tensors: dict[str, Tensor], channel: str, slot: str) -> dict[str, Tensor]:
    """A channel's tensors under the slot's name."""
    if slot == channel:
        return tensors
    return {slot + key.removeprefix(channel): value for key, value in tensors.items()}


def sorted_headers(headers: Iterable[UpdateHeader]) -> tuple[UpdateHeader, ...]:
    """Headers ascending by client id.

    Raises:
        PlanError: a client has two headers.
    """
    ordered = tuple(sorted(headers, key=lambda header: header.client_id))
    ids = [header.client_id for header in ordered]
    if len(set(ids)) != len(ids):
        raise PlanError(f"a client has two headers in one round: {ids}")
    return ordered


def empty_downlinks(clients: Collection[int]) -> dict[int, dict[str, Tensor]]:
    """One empty downlink per client, ascending."""
    return {client: {} for client in sorted(clients)}
