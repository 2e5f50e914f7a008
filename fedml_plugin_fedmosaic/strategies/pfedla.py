"""pFedLA: every client has its own mix of the others, layer by layer, learnt on the server.

For client i a small hypernetwork (embedding v_i, weights psi_i; see ``equations.hypernetwork``)
gives mixing weights alpha_i in R^(L x S), rows on the simplex, over the S clients with tensors of
the same shapes::

    start_i^l = sum over j of alpha_i[l, j] theta_j^l                   layer l of the last uploads
    (client i trains from start_i and uploads theta_i)
    Delta_i^l = theta_i^l - start_i^l
    psi_i, v_i <- one step that raises sum over l, j of alpha_i[l, j] <theta_j^l, Delta_i^l>

so clients whose layers point where client i's training goes gain weight. With ``keep_local: n`` the
n layers with the largest own weight are not exchanged (HeurpFedLA); they stay as the client trained
them.

Source: layer-wised model aggregation for personalized federated learning (Ma et al., CVPR 2022,
arXiv 2205.03993).
Differences to it: what is mixed are LoRA's A and B of each decoder layer; the inner products are
taken of random projections of a layer (``projection`` numbers each; unbiased), because uploads stay
with their ranks; products are divided by the sizes of change and weights unless ``normalise`` is
off; the networks start alike, with ``self_weight`` for the own layer; nobody is mixed before its
first upload.
Across signatures: layers are mixed inside a layout only; nothing is shared across layouts. A client
alone with its layout mixes itself only, which is local training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedml_plugin_fedmosaic.core.types import (
    AdapterState,
    ClientContext,
    ClientManifest,
    ClientState,
    ClientUpdate,
    MixingPlan,
    MixRow,
    Relevance,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import LocalResult
from fedml_plugin_fedmosaic.equations.hypernetwork import (
    agreement,
    follow,
    layer_weights,
    new_network,
)
from fedml_plugin_fedmosaic.strategies.base import ServerState, StrategyBase
from fedml_plugin_fedmosaic.strategies.common import (
    ClientMatrix,
    by_target,
    check_participants,
    members_by_layout,
)
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvgClient
from fedml_plugin_fedmosaic.strategies.relevant import sparse_row
from fedml_plugin_fedmosaic.strategies.vectors import (
    in_channels,
    layer_tensors,
    matrix_of,
    projection_note,
    receive_layers,
    with_notes,
)

NOTE = "layers"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PFedLAOptions:
    """Options of pFedLA."""

    self_weight: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of a client's own layers at the start."""
    hyper_learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Step size of the hypernetworks."""
    normalise: bool = True
    """Make the steps independent of the size of the weights; off: as published."""
    embedding: Annotated[int, Field(ge=1)] = 16
    """Length of a client's embedding."""
    hidden: Annotated[int, Field(ge=1)] = 32
    """Width of a hypernetwork's hidden layer."""
    keep_local: Annotated[int, Field(ge=0)] = 0
    """Layers, those with the largest own weight, that are not exchanged."""
    projection: Annotated[int, Field(ge=1)] = 128
    """Numbers of the random projection of each layer."""


class PFedLAClient(FedAvgClient):
    """Receives a mix of its own, trains it, uploads each layer in a channel of its own.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: PFedLAOptions) -> None:
        self._options = options

    def received(self, downlink: SharedTensors, state: ClientState) -> AdapterState:
        """The adapter with the layers replaced that were received.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        return receive_layers(state.adapter, downlink, state.client_id)

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Uploads the trained layers, and in the header a projection of each."""
        update, after = super().finish(result, state, context, header)
        layers = layer_tensors(update.tensors)
        note = [
            projection_note(tensors, self._options.projection, context.seed)
            for tensors in layers.values()
        ]
        update = replace(update, tensors=in_channels(layers, channel_of_layer))
        return with_notes(update, **{NOTE: note}), after


class PFedLA(StrategyBase):
    """A hypernetwork per client."""

    name: ClassVar[str] = "pfedla"
    adapter: ClassVar[str] = "lora"
    Options: ClassVar[type] = PFedLAOptions

    def __init__(self, options: PFedLAOptions) -> None:
        self.options = options
        self._client = PFedLAClient(options)

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers the clients, their depths and the seed; there are no networks yet.

        Raises:
            PlanError: no client, or an id twice.
        """
        return {
            **super().init(manifests, seed),
            "depths": {str(m.client_id): m.num_layers for m in manifests},
            "vectors": {},
            "starts": {},
            "networks": {},
        }

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """The networks of the round's clients learn; then every client gets its mix.

        Raises:
            PlanError: a header of an unknown client, two of one client, or without projections.
        """
        check_participants(state["layouts"], [header.client_id for header in headers])
        fresh = {
            str(h.client_id): matrix_of(
                h, NOTE, state["depths"][str(h.client_id)], self.options.projection
            )
            for h in headers
        }
        networks = {**state["networks"]}
        vectors = {**state["vectors"], **fresh}
        starts = {**state["starts"]}
        everyone = [int(client) for client in state["layouts"]]
        report = ClientMatrix(everyone)
        rows: dict[str, list[MixRow]] = {}
        for members in members_by_layout(state["layouts"], everyone).values():
            for client in members:
                if str(client) in fresh and str(client) in starts:
                    networks[str(client)] = self._learn(state, members, client, fresh[str(client)])
            if not any(str(member) in vectors for member in members):
                continue
            values, known = _stack(vectors, members)
            for place, client in enumerate(members):
                network = networks.get(str(client))
                if network is None:
                    network = self._new(state, members, place)
                    networks[str(client)] = network
                alpha = layer_weights(network, known, place)
                kept = self._kept(alpha[:, place]) if bool(known[place]) else frozenset()
                start = torch.einsum("ls,sld->ld", alpha, values.double()).to(torch.float32)
                for layer in sorted(kept):
                    start[layer] = values[place, layer]
                starts[str(client)] = start
                report.put([client], members, alpha.mean(dim=0)[None], others=0.0)
                for layer, weights in enumerate(alpha.tolist()):
                    if layer not in kept:
                        row = sparse_row(client, members, weights)
                        rows.setdefault(channel_of_layer(layer), []).append(row)
        after = {**state, "networks": networks, "vectors": vectors, "starts": starts}
        return after, MixingPlan(rows=by_target(rows), weights=report.values)

    def _new(self, state: ServerState, members: Sequence[int], place: int) -> dict[str, Tensor]:
        options = self.options
        return new_network(
            layers=state["depths"][str(members[place])],
            sources=len(members),
            own=place,
            embedding=options.embedding,
            hidden=options.hidden,
            self_weight=options.self_weight,
            seed=state["seed"],
        )

    def _learn(
        self, state: ServerState, members: Sequence[int], client: int, trained: Tensor
    ) -> dict[str, Tensor]:
        """The client's network after what its training made of the last mix."""
        values, known = _stack(state["vectors"], members)
        scores = agreement(
            values, trained - state["starts"][str(client)], normalise=self.options.normalise
        )
        network: Mapping[str, Tensor] = state["networks"][str(client)]
        own = members.index(client)
        return follow(network, known, own, scores, self.options.hyper_learning_rate)

    def _kept(self, own: Tensor) -> frozenset[int]:
        """Layers that stay local; of equal weights the first."""
        order = own.argsort(descending=True, stable=True)
        return frozenset(order[: self.options.keep_local].tolist())


def channel_of_layer(layer: int) -> str:
    """Channel of the tensors of a decoder layer, counted from 0."""
    return f"layer{layer}"


def _stack(vectors: Mapping[str, Tensor], members: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(S, L, D) projections, 0 where there is none yet, and (S,) bool which there are."""
    like = next(vectors[str(member)] for member in members if str(member) in vectors)
    known = torch.tensor([str(member) in vectors for member in members])
    return torch.stack([vectors.get(str(m), torch.zeros_like(like)) for m in members]), known
