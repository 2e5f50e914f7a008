"""What the strategies share: names of shared tensors, strict receiving, rows, report matrices.

Nothing here changes its arguments; tensors in a returned state are copies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError, PlanError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.core.types import (
    CHANNEL_CONV,
    AdapterKey,
    AdapterState,
    Branch,
    ClientContext,
    ClientManifest,
    MixRow,
    SharedTensors,
    View,
    channel_of,
)
from fedml_plugin_fedmosaic.core.work import Pass

_LISTED = 5
_LARGEST_MATRIX = 4096


def local_keys(adapter: AdapterState) -> dict[str, AdapterKey]:
    """Share key -> adapter key of every tensor of the local branch.

    Raises:
        AdapterError: two tensors have the same share key (two PQ layers in one block).
    """
    found: dict[str, AdapterKey] = {}
    for key in adapter:
        if key.branch is not Branch.LOCAL:
            continue
        other = found.setdefault(key.share_key, key)
        if other != key:
            raise AdapterError(
                f"{other} and {key} have the same share key {key.share_key!r}",
                hint="a block may hold only one layer with P and Q",
            )
    return found


def copy_local_to_global(adapter: AdapterState) -> dict[AdapterKey, Tensor]:
    """The adapter with every global tensor replaced by a copy of its local twin.

    Raises:
        AdapterError: a local tensor has no global twin, or a global tensor has no local one.
    """
    state = dict(adapter)
    twins = {replace(key, branch=Branch.GLOBAL) for key in local_keys(adapter).values()}
    present = {key for key in adapter if key.branch is Branch.GLOBAL}
    if twins != present:
        lonely = sorted(str(key) for key in twins ^ present)
        raise AdapterError(
            f"local and global branch differ in {len(lonely)} tensors: {_some(lonely)}",
            hint="this strategy needs an adapter with two branches, such as pq_lora",
        )
    for key in twins:
        state[key] = adapter[replace(key, branch=Branch.LOCAL)].clone()
    return state


def receive(
    adapter: AdapterState, downlink: SharedTensors, branch: Branch, client_id: int
) -> dict[AdapterKey, Tensor]:
    """The adapter with one branch overwritten by a downlink.

    A channel of the downlink is complete or absent.

    Args:
        adapter: all adapter tensors of the client.
        downlink: float32 tensors by share key.
        branch: LOCAL or GLOBAL: which branch the downlink replaces.
        client_id: for the error message.

    Raises:
        PlanError: an unknown key, a wrong shape, or a missing key of a received channel.
    """
    known = local_keys(adapter)
    unknown = sorted(set(downlink) - set(known))
    channels = {channel_of(name) for name in downlink}
    missing = sorted(
        name for name in known if channel_of(name) in channels and name not in downlink
    )
    problems = [f"unknown {name}" for name in unknown] + [f"missing {name}" for name in missing]
    for name in sorted(set(downlink) & set(known)):
        expected, got = tuple(adapter[known[name]].shape), tuple(downlink[name].shape)
        if expected != got:
            problems.append(f"{name} has shape {got}, expected {expected}")
    if problems:
        raise PlanError(
            f"downlink of client {client_id} does not fit its adapter: {_some(problems)}",
            hint="only clients with equal layouts may be mixed in a channel",
        )
    state = dict(adapter)
    for name, tensor in downlink.items():
        target = replace(known[name], branch=branch)
        if target not in adapter:
            raise PlanError(f"client {client_id} has no tensor {target} to receive {name!r}")
        state[target] = tensor.detach().to(dtype=torch.float32, device="cpu", copy=True)
    return state


def shared_tensors(adapter: AdapterState, channels: Collection[str]) -> dict[str, Tensor]:
    """Copies of the local branch's tensors of some channels, float32 by share key, sorted."""
    names = local_keys(adapter)
    return {
        name: adapter[names[name]].detach().to(dtype=torch.float32, device="cpu", copy=True)
        for name in sorted(names)
        if channel_of(name) in channels
    }


def branch_set(adapter: AdapterState, branch: Branch) -> dict[AdapterKey, Tensor]:
    """A set of one branch's tensors (copies)."""
    return {key: value.clone() for key, value in adapter.items() if key.branch is branch}


def branch_upload(tensors: AdapterState, branch: Branch, channel: str = "") -> dict[str, Tensor]:
    """Copies of one branch's tensors by share key, sorted; ``channel`` replaces the key's own."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.branch is branch:
            name = key.share_key
            if channel:
                name = f"{channel}/{name.partition('/')[2]}"
            found[name] = value.detach().to(dtype=torch.float32, device="cpu", copy=True)
    return dict(sorted(found.items()))


def only(downlink: SharedTensors, channel: str) -> dict[str, Tensor]:
    """The tensors of one channel of a downlink."""
    return {name: value for name, value in downlink.items() if channel_of(name) == channel}


def local_pass(context: ClientContext) -> Pass:
    """Plain training of the local branch, with all steps of the round."""
    return Pass(
        name="local",
        view=View.LOCAL,
        train=frozenset({Branch.LOCAL}),
        num_steps=context.num_steps,
    )


def layouts_by_client(manifests: Sequence[ClientManifest]) -> dict[str, dict[str, str]]:
    """Client id (as text) -> channel -> layout digest, ascending by id.

    Raises:
        PlanError: there is no client, or an id appears twice.
    """
    if not manifests:
        raise PlanError("a federation needs at least one client, got none")
    ids = [manifest.client_id for manifest in manifests]
    if len(set(ids)) != len(ids):
        raise PlanError(f"client ids appear twice: {sorted(i for i in ids if ids.count(i) > 1)}")
    ordered = sorted(manifests, key=lambda manifest: manifest.client_id)
    return {str(manifest.client_id): dict(manifest.layouts) for manifest in ordered}


def members_by_layout(
    layouts: Mapping[str, Mapping[str, str]], clients: Iterable[int]
) -> dict[str, list[int]]:
    """Layout digest of the channel ``conv`` -> clients of it, ascending."""
    found: dict[str, list[int]] = {}
    for client in sorted(clients):
        digest = layouts[str(client)].get(CHANNEL_CONV)
        if digest is not None:
            found.setdefault(digest, []).append(client)
    return found


def draw_cohort(
    client_ids: Iterable[int], seed: int, round_idx: int, clients_per_round: int
) -> tuple[int, ...]:
    """Clients of one round: drawn without replacement, ascending.

    A function of seed and round only, so that a resumed run draws the same cohorts.

    Raises:
        PlanError: more clients are asked for than there are, or fewer than one.
    """
    everyone = sorted(client_ids)
    if not 1 <= clients_per_round <= len(everyone):
        raise PlanError(
            f"cannot draw {clients_per_round} clients per round out of {len(everyone)}",
            hint="set train_args.client_num_per_round between 1 and the number of clients",
        )
    drawn = python_random(seed, "cohort", round_idx).sample(everyone, clients_per_round)
    return tuple(sorted(drawn))


def shares(counts: Collection[int]) -> tuple[float, ...]:
    """Weights in proportion to positive counts; they sum to 1."""
    total = sum(counts)
    return tuple(count / total for count in counts)


def mean_row(target: int, sources: Sequence[int]) -> MixRow:
    """The plain mean of some sources, which are in ascending order."""
    return MixRow(target=target, sources=tuple(sources), weights=shares([1] * len(sources)))


def equal_rows(
    receivers: Iterable[int], sources: Sequence[int], weights: Sequence[float]
) -> list[MixRow]:
    """One row per receiver, all of them the same sum."""
    return [
        MixRow(target=client, sources=tuple(sources), weights=tuple(weights))
        for client in receivers
    ]


def by_target(rows: Mapping[str, Sequence[MixRow]]) -> dict[str, tuple[MixRow, ...]]:
    """Slot -> its rows in ascending order of the receivers; slots without rows are left out."""
    return {
        slot: tuple(sorted(made, key=lambda row: row.target)) for slot, made in rows.items() if made
    }


class ClientMatrix:
    """A matrix for the report that is filled part by part, receivers as rows in ascending id.

    Args:
        client_ids: all clients of the federation.

    Attributes:
        values: (clients, clients) float32, NaN where nothing was put. None for more than 4,096
            clients.
    """

    def __init__(self, client_ids: Iterable[int]) -> None:
        self._position = {client: index for index, client in enumerate(sorted(client_ids))}
        size = len(self._position)
        self.values: Tensor | None = None
        if size <= _LARGEST_MATRIX:
            self.values = torch.full((size, size), float("nan"), dtype=torch.float32)

    def put(
        self,
        receivers: Iterable[int],
        sources: Iterable[int],
        values: Tensor,
        others: float | None = None,
    ) -> None:
        """Sets the entries of some receivers and sources.

        Args:
            receivers: client ids.
            sources: client ids.
            values: (receivers, sources), floating point.
            others: what the receivers' entries of all other sources become; they stay if None.
        """
        if self.values is None:
            return
        rows, columns = self._places(receivers), self._places(sources)
        if others is not None:
            self.values[rows] = others
        self.values[rows[:, None], columns] = values.to(torch.float32)

    def _places(self, client_ids: Iterable[int]) -> Tensor:
        return torch.tensor([self._position[client] for client in client_ids], dtype=torch.int64)


def weight_matrix(client_ids: Iterable[int], rows: Iterable[MixRow]) -> Tensor | None:
    """A channel's rows as a matrix for the report.

    Returns:
        (clients, clients) float32, receivers as rows in ascending id; NaN where a client
        receives nothing. None for more than 4,096 clients.
    """
    matrix = ClientMatrix(client_ids)
    for row in rows:
        matrix.put([row.target], row.sources, torch.tensor([row.weights]), others=0.0)
    return matrix.values


def check_participants(layouts: Mapping[str, Mapping[str, str]], client_ids: Sequence[int]) -> None:
    """Headers must come from known clients, each once.

    Raises:
        PlanError: a header's client is unknown or has two headers.
    """
    unknown = sorted(client for client in client_ids if str(client) not in layouts)
    if unknown:
        raise PlanError(f"headers of unknown clients: {unknown}")
    if len(set(client_ids)) != len(client_ids):
        raise PlanError(f"a client has two headers in one round: {sorted(client_ids)}")


def _some(items: Sequence[str]) -> str:
    rest = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
