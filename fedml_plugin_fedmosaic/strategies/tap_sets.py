"""TAP's adapter sets: what they are called, what travels under which name, how they are received.

A client holds one set per key and a shared one, each in several editions: ``f`` federated, ``p``
personal, and after the last round ``t`` the fine-tuned federated teacher, ``s`` the distilled
personal student. A set's name is ``<edition>.<key>`` or ``<edition>.shared``. The shared set is
made of the adapter's global tensors, a key's set of its local ones, so that one forward pass can
use both.

The tensors of a set travel in channels ``<group>:<key>``; the group is that of their share key:
``conv`` or ``pq``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from urllib.parse import quote

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError, PlanError
from fedml_plugin_fedmosaic.core.rng import torch_generator
from fedml_plugin_fedmosaic.core.types import (
    AdapterKey,
    AdapterState,
    Branch,
    ClientManifest,
    Part,
    SharedTensors,
)

SHARED = "shared"
"""Name of the shared adapter beside the keys' names, which all hold a colon."""

FEDERATED, PERSONAL, TEACHER, STUDENT = "f", "p", "t", "s"
"""Editions of the sets."""

_LISTED = 5


def key_name(modalities: str, task: str = "") -> str:
    """The name of a key: ``<modalities>:<task>``, without a slash and with one colon.

    Args:
        modalities: what the samples hold.
        task: name of the task; empty if a key is modalities alone.
    """
    return f"{quote(modalities, safe='+')}:{quote(task, safe='')}"


def keys_of(manifest: ClientManifest, *, by_task: bool) -> dict[str, str]:
    """Task -> name of its key, for a client's tasks in time order.

    Args:
        manifest: of the client.
        by_task: tasks have keys of their own; otherwise those of the same modalities share one.
    """
    return {
        task: key_name(manifest.modalities.get(task, ""), task if by_task else "")
        for task in manifest.tasks
    }


def set_name(edition: str, key: str) -> str:
    """Name of a set in ``ClientState.sets``."""
    return f"{edition}.{key}"


def channel_name(group: str, key: str) -> str:
    """Channel of a set's tensors of one group (``conv`` or ``pq``)."""
    return f"{group}:{key}"


def channel_key(channel: str) -> str:
    """The key, or ``shared``, of a channel."""
    return channel.partition(":")[2]


def upload_name(key: str, tensor: AdapterKey) -> str:
    """The share key under which a tensor of a key's set travels."""
    group, _, place = tensor.share_key.partition("/")
    return f"{channel_name(group, key)}/{place}"


def initial_sets(
    adapter: AdapterState, keys: Iterable[str], edition: str, seed: int
) -> dict[str, dict[AdapterKey, Tensor]]:
    """Fresh sets: every key's from the local branch, the shared one from the global branch.

    The factor A of the shared set is drawn anew, as PEFT draws it: with the keys' A both sets would
    get equal gradients and stay equal.

    Args:
        adapter: freshly injected adapter tensors with two branches.
        keys: names of the keys.
        edition: of the sets.
        seed: of A; equal for all clients.

    Raises:
        AdapterError: the adapter does not have two branches.
    """
    local = {key for key in adapter if key.branch is Branch.LOCAL}
    shared = {key for key in adapter if key.branch is Branch.GLOBAL}
    places = [{(key.layer, key.module, key.part) for key in side} for side in (local, shared)]
    if not local or places[0] != places[1]:
        raise AdapterError(
            f"TAP needs an adapter with two equal branches, got {len(local)} local and "
            f"{len(shared)} global tensors",
            hint="leave adapter.type at auto, or set it to dual_lora or pq_lora",
        )
    sets = {set_name(edition, key): copies(_only(adapter, local)) for key in keys}
    sets[set_name(edition, SHARED)] = {
        key: _drawn(key, tensor, seed) if key.part is Part.A else tensor.clone()
        for key, tensor in _only(adapter, shared).items()
    }
    return sets


def _only(tensors: AdapterState, keys: Collection[AdapterKey]) -> dict[AdapterKey, Tensor]:
    return {key: tensors[key] for key in sorted(keys)}


def _drawn(key: AdapterKey, like: Tensor, seed: int) -> Tensor:
    generator = torch_generator(seed, "tap shared", key.layer, key.module)
    draw = torch.rand(like.shape, generator=generator, dtype=torch.float32)
    return (draw * 2.0 - 1.0) / math.sqrt(like.shape[1])


def copies(tensors: AdapterState) -> dict[AdapterKey, Tensor]:
    """Float32 copies on the CPU."""
    return {
        key: tensor.detach().to(dtype=torch.float32, device="cpu", copy=True)
        for key, tensor in tensors.items()
    }


def edition_of(
    sets: Mapping[str, AdapterState], source: str, target: str
) -> dict[str, dict[AdapterKey, Tensor]]:
    """Copies of one edition's sets under another edition's names."""
    return {
        target + name.removeprefix(source): copies(tensors)
        for name, tensors in sets.items()
        if name.partition(".")[0] == source
    }


def without_routed(sets: Mapping[str, AdapterState], edition: str) -> dict[str, AdapterState]:
    """The sets with the shared one of an edition reduced to its own, global tensors.

    A pass that trains both branches writes the whole adapter's trained branches into the shared
    set; the local tensors among them belong to no key.
    """
    name = set_name(edition, SHARED)
    kept = {key: value for key, value in sets[name].items() if key.branch is Branch.GLOBAL}
    return {**sets, name: kept}


def uploads(
    sets: Mapping[str, AdapterState], edition: str, keys: Collection[str]
) -> dict[str, Tensor]:
    """Copies of an edition's sets by share key, sorted.

    Args:
        sets: of the client.
        edition: which ones.
        keys: names of keys, and maybe ``shared``.
    """
    found = {
        upload_name(key, tensor): value
        for key in keys
        for tensor, value in copies(sets[set_name(edition, key)]).items()
    }
    return {name: found[name] for name in sorted(found)}


def received(
    sets: Mapping[str, AdapterState],
    downlink: SharedTensors,
    edition: str,
    keys: Collection[str],
    client_id: int,
) -> dict[str, AdapterState]:
    """The sets with everything of a downlink in its place; nothing else is touched.

    Every tensor of the downlink must fit a tensor of the client, and a channel is complete or
    absent: a set that silently kept old tensors would make the client restart parts of its model.

    Args:
        sets: of the client.
        downlink: float32 tensors by share key.
        edition: which sets take the tensors.
        keys: names of the client's keys, and maybe ``shared``.
        client_id: for the error message.

    Raises:
        PlanError: an unknown key, a wrong shape, or a missing tensor of a received channel.
    """
    places = {
        upload_name(key, tensor): (set_name(edition, key), tensor)
        for key in keys
        for tensor in sets[set_name(edition, key)]
    }
    channels = {name.partition("/")[0] for name in downlink}
    problems = [f"unknown {name}" for name in sorted(set(downlink) - set(places))]
    problems += [
        f"missing {name}"
        for name in sorted(set(places) - set(downlink))
        if name.partition("/")[0] in channels
    ]
    changed: dict[str, dict[AdapterKey, Tensor]] = {}
    for name in sorted(set(downlink) & set(places)):
        target, tensor = places[name]
        expected, got = tuple(sets[target][tensor].shape), tuple(downlink[name].shape)
        if expected != got:
            problems.append(f"{name} has shape {got}, expected {expected}")
            continue
        value = downlink[name].detach().to(dtype=torch.float32, device="cpu", copy=True)
        changed.setdefault(target, dict(sets[target]))[tensor] = value
    if problems:
        raise PlanError(
            f"downlink of client {client_id} does not fit its adapter sets: {_some(problems)}",
            hint="only clients with equal layouts and the same key may be mixed in a channel",
        )
    return {**sets, **changed}


def _some(items: Sequence[str]) -> str:
    rest = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
