"""FeSEM: clients form clusters by their weights, and every cluster has an average of its own.

For each layout (clients with tensors of equal shapes) the server keeps J centres W_j. With the last
upload w_i of every client that ever took part::

    E:  j_i = argmin over j of |w_i - W_j|^2
    M:  W_j = sum over i with j_i = j of p_i w_i     p_i = 1 / members        (weighting: uniform)
                                                     p_i = n_i / sum of n     (num_examples)

E and M alternate until nothing changes, and client i starts its next training from W_{j_i}.

Source: multi-center federated learning (Xie et al., arXiv 2005.01026), a stochastic expectation
maximisation.
Differences to it: the server compares random projections of the adapters (``projection`` numbers
per client; distances keep in expectation, with an error of about one over the root of that number)
instead of the adapters, because those stay with their ranks and only the chosen sums travel; E and
M alternate several times per round, not once; the centres start far apart (farthest-first
traversal) instead of at random; clients that sit a round out stay in their cluster with their last
upload.
Across signatures: clusters are formed inside each layout; nothing is shared across layouts. A
client that has never trained has no cluster yet and starts from its own adapter.
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
    ClientContext,
    ClientManifest,
    ClientState,
    ClientUpdate,
    MixingPlan,
    MixRow,
    Relevance,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import LocalResult
from fedml_plugin_fedmosaic.equations.clusters import alternate, farthest_first
from fedml_plugin_fedmosaic.strategies.base import ServerState, StrategyBase
from fedml_plugin_fedmosaic.strategies.common import (
    check_participants,
    layouts_by_client,
    weight_matrix,
)
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvgClient
from fedml_plugin_fedmosaic.strategies.vectors import (
    members_by_layout,
    projection_note,
    vector_of,
)

NOTE = "projection"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FeSEMOptions:
    """Options of FeSEM."""

    clusters: Annotated[int, Field(ge=1)] = 2
    """Centres per layout (J)."""
    weighting: Literal["uniform", "num_examples"] = "uniform"
    """Weights inside a cluster: equal, or by the samples of each client's last round."""
    iterations: Annotated[int, Field(ge=1)] = 10
    """Largest number of E and M steps per round."""
    projection: Annotated[int, Field(ge=1)] = 512
    """Numbers of the random projection that a client sends for the comparison."""


class FeSEMClient(FedAvgClient):
    """As FedAvg's, with a projection of the weights in the header.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: FeSEMOptions) -> None:
        self._options = options

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Uploads the trained tensors and says where they are."""
        update, after = super().finish(result, state, context, header)
        note = projection_note(update.tensors, self._options.projection, context.seed)
        header = replace(header, notes={**header.notes, NOTE: note})
        return replace(update, header=header), after


class FeSEM(StrategyBase):
    """J averages per layout."""

    name: ClassVar[str] = "fesem"
    adapter: ClassVar[str] = "lora"
    Options: ClassVar[type] = FeSEMOptions

    def __init__(self, options: FeSEMOptions) -> None:
        self.options = options
        self._client = FeSEMClient(options)

    @property
    def client(self) -> FeSEMClient:
        """The client half."""
        return self._client

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers the clients and the seed; there are no clusters yet.

        Raises:
            PlanError: no client, or an id twice.
        """
        return {
            "seed": seed,
            "layouts": layouts_by_client(manifests),
            "vectors": {},
            "examples": {},
            "centres": {},
            "clusters": {},
        }

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """E and M steps, then one row per client with a cluster.

        Raises:
            PlanError: a header of an unknown client, two of one client, or without a projection.
        """
        check_participants(state["layouts"], [header.client_id for header in headers])
        width = self.options.projection
        after: dict[str, Any] = {
            **state,
            "vectors": {
                **state["vectors"],
                **{str(h.client_id): vector_of(h, NOTE, width) for h in headers},
            },
            "examples": {
                **state["examples"],
                **{str(h.client_id): max(h.num_examples, 1) for h in headers},
            },
            "centres": dict(state["centres"]),
            "clusters": dict(state["clusters"]),
        }
        rows: list[MixRow] = []
        known = [int(client) for client in after["vectors"]]
        for digest, members in members_by_layout(state["layouts"], known).items():
            weights = self._weights(after, members)
            belongs, centres = self._cluster(after, digest, members, weights)
            after["centres"][digest] = centres
            after["clusters"].update({str(c): j for c, j in zip(members, belongs, strict=True)})
            rows += _cluster_rows(members, belongs, weights)
        rows.sort(key=lambda row: row.target)
        plan = MixingPlan(
            rows={CHANNEL_CONV: tuple(rows)} if rows else {},
            weights=weight_matrix(map(int, state["layouts"]), rows),
        )
        return after, plan

    def _weights(self, state: Mapping[str, Any], members: Sequence[int]) -> list[int]:
        if self.options.weighting == "uniform":
            return [1] * len(members)
        return [state["examples"][str(client)] for client in members]

    def _cluster(
        self, state: Mapping[str, Any], digest: str, members: Sequence[int], weights: Sequence[int]
    ) -> tuple[list[int], Tensor]:
        """Which centre each member belongs to, and the centres."""
        points = torch.stack([state["vectors"][str(client)] for client in members])
        centres = state["centres"].get(digest)
        if centres is None or len(centres) < self.options.clusters:
            # So few clients so far that each could be a centre: start anew with those there are.
            centres = farthest_first(points, self.options.clusters)
        belongs, centres = alternate(
            points, centres, torch.tensor(weights), self.options.iterations
        )
        return belongs.tolist(), centres


def _cluster_rows(
    members: Sequence[int], belongs: Sequence[int], weights: Sequence[int]
) -> list[MixRow]:
    rows: list[MixRow] = []
    for cluster in sorted(set(belongs)):
        inside = [place for place, found in enumerate(belongs) if found == cluster]
        total = sum(weights[place] for place in inside)
        sources = tuple(members[place] for place in inside)
        shares = tuple(weights[place] / total for place in inside)
        rows += [MixRow(target=client, sources=sources, weights=shares) for client in sources]
    return rows
