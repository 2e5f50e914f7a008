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
Across signatures: clusters are formed inside each layout; nothing is shared across layouts. Where a
layout has no more than J clients, each of them is a cluster of its own, which is local training. A
client that has never trained has no cluster yet and starts from its own adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedml_plugin_fedmosaic.core.types import (
    CHANNEL_CONV,
    MixingPlan,
    MixRow,
    Relevance,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.equations.clusters import alternate, farthest_first
from fedml_plugin_fedmosaic.strategies.base import ServerState
from fedml_plugin_fedmosaic.strategies.clustered import (
    Clustered,
    ProjectingClient,
    group_names,
    sample_counts,
)
from fedml_plugin_fedmosaic.strategies.common import (
    by_target,
    equal_rows,
    members_by_layout,
    shares,
    weight_matrix,
)


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


class FeSEM(Clustered):
    """J averages per layout."""

    name: ClassVar[str] = "fesem"
    adapter: ClassVar[str] = "lora"
    Options: ClassVar[type] = FeSEMOptions

    def __init__(self, options: FeSEMOptions) -> None:
        self.options = options
        self._client = ProjectingClient(options.projection)

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
        after = self.taken_in(state, headers, self.options.projection)
        rows: list[MixRow] = []
        known = [int(client) for client in after["vectors"]]
        for digest, members in members_by_layout(state["layouts"], known).items():
            counts = sample_counts(after, members, self.options.weighting)
            belongs, centres = self._cluster(after, digest, counts)
            after["centres"][digest] = centres
            after["clusters"].update({str(c): cluster for c, cluster in belongs.items()})
            for cluster in sorted(set(belongs.values())):
                inside = [client for client in members if belongs[client] == cluster]
                rows += equal_rows(inside, inside, shares([counts[client] for client in inside]))
        plan = MixingPlan(
            rows=by_target({CHANNEL_CONV: rows}),
            weights=weight_matrix(map(int, state["layouts"]), rows),
            groups=group_names(state["layouts"], after["clusters"]),
        )
        return after, plan

    def _cluster(
        self, state: Mapping[str, Any], digest: str, counts: Mapping[int, int]
    ) -> tuple[dict[int, int], Tensor]:
        """Which centre each client belongs to, and the centres; weights go by ``counts``."""
        points = torch.stack([state["vectors"][str(client)] for client in counts])
        centres = state["centres"].get(digest)
        if centres is None or len(centres) < self.options.clusters:
            # So few clients so far that each could be a centre: start anew with those there are.
            centres = farthest_first(points, self.options.clusters)
        weights = torch.tensor(list(counts.values()))
        belongs, centres = alternate(points, centres, weights, self.options.iterations)
        return dict(zip(counts, belongs.tolist(), strict=True)), centres
