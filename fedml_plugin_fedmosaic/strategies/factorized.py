"""Factorized-FL: one low-rank factor is shared among similar clients, the other one stays.

LoRA writes a layer's change as a product of two factors, dW_i = s B_i A_i. One factor F (option
``share``) is common knowledge and is averaged; the other one, V, is the client's own view of its
labels or tasks and says who is alike. With v_i = the V of the last decoder layer, flattened::

    s_ij = cos(v_i, v_j)
    K_i  = {j : s_ij >= tau}, and the n_min most similar ones anyway; i itself is among them
    F_i <- sum over j in K_i of a_ij F_j      a_ij = exp(a s_ij) / sum over k in K_i of exp(a s_ik)

A client that has not trained yet receives the plain mean of F over those that have.

Source: Factorized-FL (Jeong and Hwang, NeurIPS 2022, arXiv 2202.00270): every kernel is u v^T plus
a sparse residual, u travels, the cosine of v chooses the peers. With ``share: A`` this is
FedSA-LoRA (arXiv 2410.01463) with chosen peers. The defaults tau = 0 and a = 1 are the released
code's for clients with different labels; its tau = 0.95 and a = 20 for different domains are for
factors that all clients start from together. LoRA's B starts at 0, so that cosines between clients
stay small (about 0.2 between clients with one kind of task in the quickstart): with such a tau
nobody has a peer, and this is local training.
Differences to it: the factors are LoRA's, of rank r instead of 1, on top of a frozen base that
takes the place of the residual M; cosines are taken of random projections (``projection`` numbers,
error about one over the root of that) of the compared factor of the last layer, over all its
modules; sums run over the last uploads of all clients that ever took part.
Across signatures: peers are looked for inside a layout only, because the compared vectors must have
one length; nothing is shared across layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedml_plugin_fedmosaic.core.types import (
    CHANNEL_CONV,
    AdapterState,
    Branch,
    ClientContext,
    ClientManifest,
    ClientState,
    ClientUpdate,
    MixingPlan,
    MixRow,
    Part,
    Relevance,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import LocalResult
from fedml_plugin_fedmosaic.equations.peers import above_threshold, scaled_softmax
from fedml_plugin_fedmosaic.strategies.base import ServerState, StrategyBase
from fedml_plugin_fedmosaic.strategies.common import (
    ClientMatrix,
    by_target,
    check_participants,
    mean_row,
    members_by_layout,
    receive,
    shared_tensors,
    weight_matrix,
)
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvgClient
from fedml_plugin_fedmosaic.strategies.vectors import (
    layer_tensors,
    projection_note,
    unit_rows,
    vector_of,
    with_notes,
)

NOTE = "factor"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FactorizedOptions:
    """Options of Factorized-FL."""

    share: Literal["A", "B", "both"] = "A"
    """The factor that is averaged; ``both``: whole adapters, still among chosen peers only."""
    compare: Literal["A", "B"] = "B"
    """The factor whose cosine chooses the peers."""
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Smallest cosine of a peer (tau)."""
    least_peers: Annotated[int, Field(ge=1)] = 1
    """Peers that a client has at least, itself included (n_min)."""
    sharpness: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """How much more a similar peer counts (a); 0: all peers alike."""
    projection: Annotated[int, Field(ge=1)] = 512
    """Numbers of the random projection of the compared factor."""

    @property
    def parts(self) -> frozenset[Part]:
        """The factors that travel."""
        return frozenset({Part.A, Part.B} if self.share == "both" else {Part(self.share)})


class FactorizedClient(FedAvgClient):
    """Receives the shared factor, trains both, uploads the shared one.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: FactorizedOptions) -> None:
        self._options = options

    def received(self, downlink: SharedTensors, state: ClientState) -> AdapterState:
        """The adapter with the shared factor replaced; the other one stays.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        parts = self._options.parts
        shared = {key: tensor for key, tensor in state.adapter.items() if key.part in parts}
        return {**state.adapter, **receive(shared, downlink, Branch.LOCAL, state.client_id)}

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Uploads the shared factor, and in the header a projection of the compared one."""
        update, after = super().finish(result, state, context, header)
        compared = _factor(result.adapter, frozenset({Part(self._options.compare)}))
        last = layer_tensors(compared).popitem()[1]
        note = projection_note(last, self._options.projection, context.seed)
        update = replace(update, tensors=_factor(result.adapter, self._options.parts))
        return with_notes(update, **{NOTE: note}), after


class Factorized(StrategyBase):
    """One factor is averaged among clients whose other factor is similar."""

    name: ClassVar[str] = "factorized"
    adapter: ClassVar[str] = "lora"
    Options: ClassVar[type] = FactorizedOptions

    def __init__(self, options: FactorizedOptions) -> None:
        self.options = options
        self._client = FactorizedClient(options)

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers the clients and the seed; nobody has a factor yet.

        Raises:
            PlanError: no client, or an id twice.
        """
        return {**super().init(manifests, seed), "factors": {}}

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """One row per client of every layout in which somebody has trained.

        Raises:
            PlanError: a header of an unknown client, two of one client, or without a projection.
        """
        check_participants(state["layouts"], [header.client_id for header in headers])
        width = self.options.projection
        fresh = {str(header.client_id): vector_of(header, NOTE, width) for header in headers}
        after: dict[str, Any] = {**state, "factors": {**state["factors"], **fresh}}
        everyone = [int(client) for client in state["layouts"]]
        similarity = ClientMatrix(everyone)
        rows: list[MixRow] = []
        for receivers in members_by_layout(state["layouts"], everyone).values():
            members = [client for client in receivers if str(client) in after["factors"]]
            if not members:
                continue
            rows += [mean_row(client, members) for client in receivers if client not in members]
            cosines = self._cosines(after["factors"], members)
            similarity.put(members, members, cosines)
            for place, values in enumerate(cosines.tolist()):
                rows.append(self._row(place, members, values))
        plan = MixingPlan(
            rows=by_target({CHANNEL_CONV: rows}),
            relevance=similarity.values,
            weights=weight_matrix(everyone, rows),
        )
        return after, plan

    def _cosines(self, factors: Mapping[str, Tensor], members: Sequence[int]) -> Tensor:
        unit = unit_rows(torch.stack([factors[str(client)] for client in members]))
        # A client is always its own peer, also while its factor is still 0.
        return (unit @ unit.T).fill_diagonal_(1.0)

    def _row(self, place: int, members: Sequence[int], cosines: Sequence[float]) -> MixRow:
        options = self.options
        # Itself first: with equal cosines others must not crowd it out.
        order = [place, *(other for other in range(len(members)) if other != place)]
        peers = above_threshold(
            [cosines[other] for other in order], options.threshold, options.least_peers
        )
        chosen = sorted(order[peer] for peer in peers)
        weights = scaled_softmax([cosines[other] for other in chosen], options.sharpness)
        return MixRow(
            target=members[place],
            sources=tuple(members[other] for other in chosen),
            weights=weights,
        )


def _factor(adapter: AdapterState, parts: frozenset[Part]) -> SharedTensors:
    """The local branch's tensors of some factors."""
    kept = {key: tensor for key, tensor in adapter.items() if key.part in parts}
    return shared_tensors(kept, {CHANNEL_CONV})
