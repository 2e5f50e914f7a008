"""The vocabulary as frozen data: what clients, server, strategies and communicators exchange.

Adapter tensors have two names. :class:`AdapterKey` says where a tensor sits in one model.
A *share key* (a plain string) says what it means to other clients:

* ``pq/<block>/<module>/<part>``: block-wise, the same for every architecture;
* ``conv/<layer>/<module>/<part>``: layer-wise, only meaningful inside one signature.

The text before the first slash is the *channel*; a mixing plan has one table per channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError

CHANNEL_PQ = "pq"
CHANNEL_CONV = "conv"


class Branch(StrEnum):
    """Which copy of an adapter a tensor belongs to."""

    LOCAL = "local"  # trained and uploaded by the client
    GLOBAL = "global"  # received from the server, frozen while the client trains
    SHARED = "shared"  # used by both branches: frozen A, B of a PQ layer, and the gate


class Part(StrEnum):
    """Which factor of an adapter a tensor is."""

    A = "A"  # (rank, d_in)
    B = "B"  # (d_out, rank)
    P = "P"  # (rank, rank)
    Q = "Q"  # (rank,)
    GATE = "gate"  # () for the scalar gate, (d_in,) for the input gate


class View(StrEnum):
    """Which branches a forward pass uses."""

    LOCAL = "local"
    GLOBAL = "global"
    GATED = "gated"  # local and global balanced: by a gate, or half and half
    SUM = "sum"  # outputs of local and global added, in every layer
    ENSEMBLE = "ensemble"  # logits of the local and the global model added
    BASE = "base"  # adapters off


@dataclass(frozen=True, slots=True, order=True)
class AdapterKey:
    """Where an adapter tensor sits: typed, so that names are parsed in one place only.

    Attributes:
        block: 0-based block of the layer.
        layer: 0-based decoder layer.
        module: short name of the linear, e.g. ``q_proj``.
        branch: local, global or shared.
        part: A, B, P, Q or gate.
    """

    block: int
    layer: int
    module: str
    branch: Branch
    part: Part

    def __str__(self) -> str:
        return f"{self.block}/{self.layer}/{self.module}/{self.branch}/{self.part}"

    @classmethod
    def parse(cls, text: str) -> AdapterKey:
        """Reads ``str(key)`` back.

        Raises:
            AdapterError: the text is not an adapter key.
        """
        try:
            block, layer, module, branch, part = text.split("/")
            return cls(int(block), int(layer), module, Branch(branch), Part(part))
        except ValueError as error:
            raise AdapterError(
                f"{text!r} is not an adapter key; expected block/layer/module/branch/part"
            ) from error

    @property
    def share_key(self) -> str:
        """The name under which other clients know this tensor (see the module docstring)."""
        if self.part in (Part.P, Part.Q):
            return f"{CHANNEL_PQ}/{self.block}/{self.module}/{self.part}"
        return f"{CHANNEL_CONV}/{self.layer}/{self.module}/{self.part}"


def channel_of(share_key: str) -> str:
    """The channel of a share key: the text before its first slash."""
    return share_key.partition("/")[0]


AdapterState = Mapping[AdapterKey, Tensor]
SharedTensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """AdamW's memory of one trained tensor; never a copy of the weights themselves.

    Attributes:
        step: optimizer steps so far.
        first: running mean of the gradient, float32 on the CPU, in the tensor's shape.
        second: running mean of the squared gradient, likewise.
    """

    step: int
    first: Tensor
    second: Tensor


OptimizerState = Mapping[AdapterKey, Moments]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientManifest:
    """What the server knows of a client before the first round.

    Attributes:
        client_id: 0-based, equal to the position in the scenario.
        model: the model's name in the configuration.
        family: text-tower family, e.g. ``llama`` or ``qwen2``.
        signature: shape class; equal signatures have interchangeable adapter tensors.
        num_layers: decoder layers.
        num_blocks: blocks (N_B).
        num_examples: training samples over the whole run.
        tasks: names of the client's tasks, in time order.
        layouts: channel -> digest of its share keys and shapes. Clients can be mixed in a channel
            only if they have the same digest there.
        vocabulary: digest of the tokenizer's vocabulary; logits of clients with equal ones can be
            compared.
        task_examples: task -> training samples.
        modalities: task -> what its samples hold: ``text`` or ``image+text``.
    """

    client_id: int
    model: str
    family: str
    signature: str
    num_layers: int
    num_blocks: int
    num_examples: int
    tasks: tuple[str, ...]
    layouts: Mapping[str, str]
    vocabulary: str = ""
    task_examples: Mapping[str, int] = field(default_factory=dict)
    modalities: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateHeader:
    """The small part of an update; every rank sees all headers.

    The values of the sketch stay where the client was trained: in a header that a communicator
    returns, the sketch is a tensor on the ``meta`` device, which has a shape and no values.

    Attributes:
        client_id: who.
        round_idx: 0-based round of the training that made the update.
        num_examples: different samples used in that training; what clients are weighted by, if a
            strategy weights them by their data.
        sketch: sanitised proxy gradient, float32 ``(rows, columns)``, or None.
        notes: small JSON values of the strategy; every rank sees them. A mapping ``report`` among
            them goes into the run's metrics.
    """

    client_id: int
    round_idx: int
    num_examples: int
    sketch: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestQuery:
    """Asks for the most similar sources of each receiver; all of them have a sketch.

    Attributes:
        receivers: clients, ascending.
        sources: clients, ascending; may overlap with the receivers.
        k: sources wanted per receiver, itself excluded.
    """

    receivers: tuple[int, ...]
    sources: tuple[int, ...]
    k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The answer to a :class:`NearestQuery`.

    Attributes:
        receivers: as asked.
        sources: (receivers, k') int64 client ids in descending order of cosine, -1 where there are
            no more; k' = min(k, number of sources).
        cosines: (receivers, k') float64, -inf where there are no more.
    """

    receivers: tuple[int, ...]
    sources: Tensor
    cosines: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Relevance:
    """How similar the clients' sketches are; the result of a communicator's reduction.

    Attributes:
        clients: everyone with a sketch, ascending.
        values: (clients, clients) float64, exactly symmetric; NaN between two different clients
            that both took no part in the round.
        neighbours: instead of the values, if the strategy asked for the nearest clients only: one
            answer per query.
    """

    clients: tuple[int, ...]
    values: Tensor
    neighbours: tuple[Neighbours, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientUpdate:
    """Client to server: header and flat ``{share key: float32 CPU tensor}``."""

    header: UpdateHeader
    tensors: SharedTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class MixRow:
    """One receiver's weighted sum: ``downlink[target] = sum_k weights[k] * upload[sources[k]]``.

    ``sources`` are in ascending client id, which is the summation order.
    """

    target: int
    sources: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingPlan:
    """Who receives which weighted sum of whom, per slot.

    A slot is a channel of the uploads, unless ``slots`` says otherwise: ``slots[slot]`` is the
    channel whose tensors are mixed, and they arrive with the slot's name in the channel's place.
    So a client can receive several sums of one channel. A client without a row in a slot receives
    nothing there (the strategy's client half says what that means). ``internal`` names slots whose
    receivers act for the server; they are no client's traffic. ``relevance`` and ``weights``
    are for the report: ``(clients, clients)`` float32 with NaN where unknown; row i belongs to
    receiver i. So is ``groups``: client -> name of the group that it is trained with, for
    strategies that look for groups; names are compared over the rounds.
    """

    rows: Mapping[str, tuple[MixRow, ...]] = field(default_factory=dict)
    slots: Mapping[str, str] = field(default_factory=dict)
    relevance: Tensor | None = None
    weights: Tensor | None = None
    internal: frozenset[str] = frozenset()
    groups: Mapping[int, str] = field(default_factory=dict)

    def channel(self, slot: str) -> str:
        """The channel whose tensors a slot delivers."""
        return self.slots.get(slot, slot)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientState:
    """Everything of a client that survives a round; plain data.

    Attributes:
        client_id: who.
        participations: rounds the client took part in so far.
        adapter: all adapter tensors, float32 on the CPU.
        sketch: what others are compared with, float32 ``(rows, columns)``, or None before the
            first: the smoothed sketch (EMA), or its compressed form.
        sketch_average: the smoothed sketch if ``sketch`` is a compressed form of it.
        moments: of the tensors that were ever trained; empty unless ``optim.moments`` is "keep".
        extra: a strategy's own JSON-like values.
        sets: named sets of adapter tensors: parts of an adapter state.
        tensors: a strategy's own further tensors.
    """

    client_id: int
    participations: int = 0
    adapter: AdapterState = field(default_factory=dict)
    sketch: Tensor | None = None
    sketch_average: Tensor | None = None
    moments: OptimizerState = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    sets: Mapping[str, AdapterState] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientContext:
    """What a client half may know of the run.

    Attributes:
        manifest: the client's own manifest.
        round_idx: 0-based round.
        num_rounds: rounds of the whole run.
        num_steps: optimizer steps that this strategy may spend in this round.
        seed: root seed of the run.
        stage: stage of the round: ``train``, or one that the strategy declares.
        public_steps: optimizer steps of one pass over the public samples.
    """

    manifest: ClientManifest
    round_idx: int
    num_rounds: int
    num_steps: int
    seed: int
    stage: str = "train"
    public_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessWorld:
    """The ranks that train one client together, as an engine needs to know them.

    Attributes:
        rank: this process inside the rank group, 0-based.
        size: ranks of the group.
        local_rank: this process among the group's ranks on its node, 0-based.
        address: host name or address of the group's rank 0.
        port: free TCP port there, for the rendezvous.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
