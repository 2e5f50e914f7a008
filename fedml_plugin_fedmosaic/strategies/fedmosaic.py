"""FedMosaic: relevance-guided aggregation over heterogeneous clients (arXiv 2506.11024).

Every client i keeps two copies of its adapter: the local branch, which it trains and uploads, and
the global branch, which the server makes for it and which is frozen while the client trains; a
learned gate balances them. With sketches g_i (sanitised gradients of one frozen proxy model)::

    S_ij = (1/C) sum over columns c of cos(g_i[:, c], g_j[:, c])
    w_ij = exp(S_ij / tau) / sum over k in K_i of exp(S_ik / tau)      j in K_i, never j = i

* channel ``pq``: K_i = all other clients. P (r x r) and Q (r) of a block's last layer have the same
  shape in every architecture, so they are mixed block by block across architectures;
* channel ``conv``: K_i = the other clients with tensors of the same shapes. A and B of all other
  layers are mixed inside an architecture, with the same S and tau.

A client starts from global := own local, then overwrites what it receives; where it has no peer
(and in its first round) the copy of its own local branch stays, a self-distilled momentum copy.

Partial participation: a client that stays away keeps its last sketch, and the server remembers how
similar it was to the others; K_i runs over the clients that ever took part (optionally not staler
than ``max_staleness`` rounds), and the weights are normalised over K_i. Everyone receives a mix,
also clients outside the round's cohort; a client that never took part has no sketch, so all of K_i
is equally relevant to it.

With ``top_k`` only the k most relevant clients of K_i are mixed; in federations of more than
``matrix_clients`` clients they are searched for without the matrix of all pairs, for which sketches
must be short vectors (``sketch.floats``).

Differences to the released code: self is masked out exactly instead of by -1e9 and a division;
weights are normalised over the clients that are known, so partial participation is defined;
"same architecture" means equal tensor shapes, not equal model names; blocks are matched by their
index, not by parsing parameter names; sums are float32 in ascending client id, not bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedml_plugin_fedmosaic.core.cost import Cost
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import (
    CHANNEL_CONV,
    CHANNEL_PQ,
    AdapterState,
    Branch,
    ClientContext,
    ClientManifest,
    ClientState,
    ClientUpdate,
    MixingPlan,
    MixRow,
    NearestQuery,
    Relevance,
    SharedTensors,
    UpdateHeader,
    View,
)
from fedml_plugin_fedmosaic.core.work import LocalResult, Pass
from fedml_plugin_fedmosaic.equations.neighbours import neighbour_weights
from fedml_plugin_fedmosaic.equations.relevance import Similarity, peer_weights
from fedml_plugin_fedmosaic.strategies.base import ClientBase, ServerState, StrategyBase
from fedml_plugin_fedmosaic.strategies.common import (
    by_target,
    check_participants,
    copy_local_to_global,
    receive,
    shared_tensors,
    weight_matrix,
)
from fedml_plugin_fedmosaic.strategies.relevant import (
    check_complete,
    checked_shape,
    mix_rows,
    overwrite,
    sparse_row,
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FedMosaicOptions:
    """Options of FedMosaic."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    """Relevance temperature tau; small values follow the most relevant clients."""
    similarity: Similarity = "columns"
    """Mean of the columns' cosines (published), or one cosine of the flattened sketches."""
    relevance: Literal["sketch", "uniform"] = "sketch"
    """``uniform`` ignores the sketches: the ablation without relevance."""
    share_pq: bool = True
    """Mix P and Q across architectures."""
    share_conventional: bool = True
    """Mix A and B of the other layers inside an architecture."""
    global_branch: bool = True
    """False: no global branch, nothing is shared: the ablation without collaboration."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Mix only the k most relevant clients; all when omitted."""
    matrix_clients: Annotated[int, Field(ge=0)] = 4096
    """With ``top_k`` and more clients than this, the nearest are searched for without a matrix."""
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    """Rounds after which a client that stays away is no longer mixed; never when omitted."""

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that are uploaded and mixed."""
        wanted = ((CHANNEL_PQ, self.share_pq), (CHANNEL_CONV, self.share_conventional))
        return tuple(name for name, shared in wanted if shared and self.global_branch)


class FedMosaicClient(ClientBase):
    """Receives the global branch, trains the local branch and the gate.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: FedMosaicOptions) -> None:
        self._options = options

    def init_state(self, adapter: AdapterState, context: ClientContext) -> ClientState:
        """The freshly injected adapter with global := local.

        Raises:
            AdapterError: the adapter does not have two branches.
        """
        return ClientState(
            client_id=context.manifest.client_id, adapter=copy_local_to_global(adapter)
        )

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Pass, ...]]:
        """Makes the global branch: own local branch, overwritten by what was received.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        adapter = copy_local_to_global(state.adapter)
        adapter = receive(adapter, downlink, Branch.GLOBAL, state.client_id)
        if self._options.global_branch:
            view, train = View.GATED, frozenset({Branch.LOCAL, Branch.SHARED})
        else:
            view, train = View.LOCAL, frozenset({Branch.LOCAL})
        return replace(state, adapter=adapter), (
            Pass(name=str(view), view=view, train=train, num_steps=context.num_steps),
        )

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,  # noqa: ARG002 - the contract's signature
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Uploads the local branch of the shared channels."""
        adapter: Mapping[Any, Tensor] = dict(result.adapter)
        if not self._options.global_branch:
            # The reported view is the gated one; with equal branches it is the local model.
            adapter = copy_local_to_global(adapter)
        tensors = shared_tensors(result.adapter, self._options.channels)
        return ClientUpdate(header=header, tensors=tensors), replace(state, adapter=adapter)


class FedMosaic(StrategyBase):
    """A global branch of its own for every client."""

    name: ClassVar[str] = "fedmosaic"
    adapter: ClassVar[str] = "pq_lora"
    needs_sketch: ClassVar[bool] = True
    eval_view: ClassVar[str] = "gated"
    Options: ClassVar[type] = FedMosaicOptions

    def __init__(self, options: FedMosaicOptions) -> None:
        self.options = options
        self._client = FedMosaicClient(options)

    @property
    def cost(self) -> Cost:
        """A proxy gradient after every tenth step: one forward pass, and one back to the inputs.

        Weights are frozen but for the last linear, so that pass costs one more forward pass.
        """
        return Cost(sketch=0.2)

    @property
    def similarity(self) -> Similarity | None:
        """The option of the same name, unless the sketches are ignored."""
        return self.options.similarity if self.options.relevance == "sketch" else None

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers the clients and the seed; nobody is known yet.

        Raises:
            PlanError: no client, or an id twice.
        """
        return {
            **super().init(manifests, seed),
            "last_round": {},
            "sketch_shape": None,
            "known": [],
            "similarity": torch.zeros(0, 0, dtype=torch.float64),
        }

    def queries(
        self, state: ServerState, headers: Sequence[UpdateHeader]
    ) -> tuple[NearestQuery, ...] | None:
        """One query per group of clients that are mixed together; None if there is a matrix."""
        if not self._searches(state) or not headers:
            return None
        after = self._take_in(state, headers, None)
        return tuple(query for _, _, query in self._groups(after))

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,
    ) -> tuple[ServerState, MixingPlan]:
        """Takes the relevance in; every client gets a row per channel in which it has a peer.

        Raises:
            PlanError: a header of an unknown client, two of one client, a sketch that is missing
                or of another shape than the rest, or a similarity that is missing or not finite.
        """
        after = self._take_in(state, headers, relevance)
        if self._searches(state):
            # Matrices for the report would be as large as the one that is not made.
            return after, MixingPlan(rows=self._nearest_rows(after, headers, relevance))
        clients = [int(client) for client in after["layouts"]]
        similarity = self._similarity(after, clients)
        rows = {
            channel: self._rows(after, channel, clients, similarity)
            for channel in self.options.channels
        }
        widest = next((rows[name] for name in self.options.channels if rows[name]), ())
        plan = MixingPlan(
            rows={channel: made for channel, made in rows.items() if made},
            relevance=None if similarity is None else similarity.to(torch.float32),
            weights=weight_matrix(clients, widest),
        )
        return after, plan

    def _searches(self, state: ServerState) -> bool:
        """Whether the nearest clients are searched for, instead of taken from a matrix."""
        large = len(state["layouts"]) > self.options.matrix_clients
        return large and self.options.top_k is not None and self.similarity is not None

    def _groups(self, state: ServerState) -> list[tuple[str, tuple[int, ...], NearestQuery]]:
        """Channel, all receivers, and the query for those of them that have a sketch."""
        senders, known = self._sources(state), frozenset(state["known"])
        found: list[tuple[str, tuple[int, ...], NearestQuery]] = []
        for channel in self.options.channels:
            by_layout: dict[str, list[int]] = {}
            for client, layouts in state["layouts"].items():
                if channel in layouts:
                    by_layout.setdefault(layouts[channel], []).append(int(client))
            for members in by_layout.values():
                query = NearestQuery(
                    receivers=tuple(client for client in members if client in known),
                    sources=tuple(client for client in members if client in senders),
                    k=self.options.top_k or 1,
                )
                found.append((channel, tuple(members), query))
        return found

    def _nearest_rows(
        self, state: ServerState, headers: Sequence[UpdateHeader], relevance: Relevance | None
    ) -> dict[str, tuple[MixRow, ...]]:
        """Channel -> rows over the neighbours that were found."""
        if not headers:
            return {}
        groups = self._groups(state)
        answers = () if relevance is None else relevance.neighbours
        if [answer.receivers for answer in answers] != [query.receivers for *_, query in groups]:
            raise PlanError("FedMosaic needs the nearest clients that it asked for, got others")
        rows: dict[str, list[MixRow]] = {}
        for (channel, members, query), answer in zip(groups, answers, strict=True):
            ids, weights = neighbour_weights(
                answer.sources, answer.cosines, self.options.temperature
            )
            made = [
                sparse_row(target, sources, shares)
                for target, sources, shares in zip(
                    query.receivers, ids.tolist(), weights.tolist(), strict=True
                )
            ]
            # A receiver without a sketch has no evidence: the first k sources, equally.
            first = query.sources[: query.k]
            shares = [1 / max(len(first), 1)] * len(first)
            new = sorted(set(members) - set(query.receivers))
            made += [sparse_row(target, first, shares) for target in new]
            rows.setdefault(channel, []).extend(row for row in made if row.sources)
        return by_target(rows)

    def _take_in(
        self, state: ServerState, headers: Sequence[UpdateHeader], relevance: Relevance | None
    ) -> dict[str, Any]:
        """The state with the headers' rounds and the fresh clients' similarities."""
        check_participants(state["layouts"], [header.client_id for header in headers])
        seen = {str(header.client_id): header.round_idx for header in headers}
        after = {**state, "last_round": {**state["last_round"], **seen}}
        if self.similarity is None or not headers:
            return after
        shape = state["sketch_shape"]
        for header in headers:
            shape = checked_shape(header, shape)
        fresh = {header.client_id for header in headers}
        if self._searches(state):
            known = sorted({*state["known"], *fresh})
            return {**after, "sketch_shape": shape, "known": known}
        if relevance is None or not fresh <= {*relevance.clients}:
            found = "none" if relevance is None else f"that of clients {relevance.clients}"
            raise PlanError(
                f"FedMosaic needs the relevance of clients {sorted(fresh)}, got {found}"
            )
        known = sorted({*state["known"], *fresh})
        similarity = torch.full((len(known), len(known)), float("nan"), dtype=torch.float64)
        overwrite(similarity, known, state["known"], state["similarity"])
        overwrite(similarity, known, relevance.clients, relevance.values)
        check_complete(similarity, known)
        return {**after, "sketch_shape": shape, "known": known, "similarity": similarity}

    def _similarity(self, state: ServerState, clients: Sequence[int]) -> Tensor | None:
        """(clients, clients) float64 similarity, NaN where unknown; None if unused."""
        if self.similarity is None:
            return None
        full = torch.full((len(clients), len(clients)), float("nan"), dtype=torch.float64)
        overwrite(full, clients, state["known"], state["similarity"])
        return full

    def _rows(
        self,
        state: ServerState,
        channel: str,
        clients: Sequence[int],
        similarity: Tensor | None,
    ) -> tuple[MixRow, ...]:
        """The rows of one channel; receivers without a peer have none."""
        sources = self._sources(state)
        by_layout: dict[str, list[int]] = {}
        for index, client in enumerate(clients):
            layout = state["layouts"][str(client)].get(channel)
            if layout is not None:
                by_layout.setdefault(layout, []).append(index)
        rows: list[MixRow] = []
        for members in by_layout.values():
            senders = [index for index in members if clients[index] in sources]
            receiving, sending = torch.tensor(members), torch.tensor(senders, dtype=torch.int64)
            # A receiver without a sketch has no evidence: equal similarity, hence equal weights.
            scores = (
                torch.zeros(len(members), len(senders), dtype=torch.float64)
                if similarity is None
                else similarity[receiving[:, None], sending].nan_to_num(nan=0.0)
            )
            weights = peer_weights(
                scores,
                receiving[:, None] != sending,
                self.options.temperature,
                self.options.top_k,
            )
            ids = [clients[index] for index in senders]
            rows += mix_rows([clients[index] for index in members], ids, weights)
        return tuple(sorted(rows, key=lambda row: row.target))

    def _sources(self, state: ServerState) -> frozenset[int]:
        """Clients that took part, and not too long ago."""
        last_round: Mapping[str, int] = state["last_round"]
        limit = self.options.max_staleness
        now = max(last_round.values(), default=0)
        return frozenset(
            int(client)
            for client, seen in last_round.items()
            if limit is None or now - seen <= limit
        )
