"""FedAvg inside each signature (FedIT when the model is a language model with LoRA).

Clients of equal layout l hold interchangeable LoRA tensors theta. With cohort C_l in a round::

    theta_l = sum over k in C_l of p_k theta_k      p_k = 1/|C_l|          (weighting: uniform)
                                                    p_k = n_k / sum n      (weighting: num_examples)

and every client of layout l, whether it trained in this round or not, starts its next training
from theta_l. A layout of which nobody trained in a round keeps the average of its last round; a
layout that never trained receives nothing.

Source: McMahan et al. 2017 (arXiv 1602.05629) as used for LoRA in FedIT (arXiv 2305.05644) and as
the baseline "FedAvg" of FedMosaic (arXiv 2506.11024), whose code weights uniformly.
Differences to the released code: clients are pooled by the shapes of their tensors, not by the
text of the model name; an architecture without a client in the cohort is not an error; sums are
accumulated in float32; no optimizer state survives a round, so the average really is where the
next training starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

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
    Relevance,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import LocalResult, Work
from fedml_plugin_fedmosaic.strategies.base import ClientBase, ClientHalf, ServerState, StrategyBase
from fedml_plugin_fedmosaic.strategies.common import (
    by_target,
    check_participants,
    equal_rows,
    local_pass,
    members_by_layout,
    receive,
    shared_tensors,
    shares,
    weight_matrix,
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FedAvgOptions:
    """Options of FedAvg."""

    weighting: Literal["uniform", "num_examples"] = "uniform"
    """Weights of the cohort's clients: equal, or by the samples used in the round."""


class FedAvgClient(ClientBase):
    """Starts from the average, trains, uploads everything."""

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Trains what :meth:`received` makes of the downlink.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        adapter = self.received(downlink, state)
        return replace(state, adapter=adapter), (local_pass(context),)

    def received(self, downlink: SharedTensors, state: ClientState) -> AdapterState:
        """The adapter with the local branch replaced by the downlink, if there is one.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        return receive(state.adapter, downlink, Branch.LOCAL, state.client_id)

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,  # noqa: ARG002 - the contract's signature
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Uploads the trained tensors."""
        after = replace(state, adapter=dict(result.adapter))
        tensors = shared_tensors(result.adapter, {CHANNEL_CONV})
        return ClientUpdate(header=header, tensors=tensors), after


class FedAvg(StrategyBase):
    """One average per layout."""

    name: ClassVar[str] = "fedavg"
    adapter: ClassVar[str] = "lora"
    Options: ClassVar[type] = FedAvgOptions

    def __init__(self, options: FedAvgOptions) -> None:
        self.options = options
        self._client: ClientHalf = FedAvgClient()

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers the clients and the seed; no layout has an average yet.

        Raises:
            PlanError: no client, or an id twice.
        """
        return {**super().init(manifests, seed), "averages": {}}

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """One row per client whose layout has ever been trained.

        Raises:
            PlanError: a header of an unknown client, or two of one client.
        """
        layouts: Mapping[str, Mapping[str, str]] = state["layouts"]
        check_participants(layouts, [header.client_id for header in headers])
        averages = {**state["averages"], **self._averages(layouts, headers)}
        rows: list[MixRow] = []
        for digest, members in members_by_layout(layouts, map(int, layouts)).items():
            if digest in averages:
                rows += equal_rows(members, **averages[digest])
        plan = MixingPlan(
            rows=by_target({CHANNEL_CONV: rows}),
            weights=weight_matrix(map(int, layouts), rows),
        )
        return {**state, "averages": averages}, plan

    def _averages(
        self, layouts: Mapping[str, Mapping[str, str]], headers: Sequence[UpdateHeader]
    ) -> dict[str, dict[str, Any]]:
        """Layout digest -> sources and weights, for the layouts trained in this round.

        Kept in the state because uploads outlive a round: a layout nobody trained is served the
        same average again, so a client that skips rounds does not miss it.
        """
        uniform = self.options.weighting == "uniform"
        counts = {h.client_id: 1 if uniform else h.num_examples for h in headers}
        sources = [client for client, count in counts.items() if count > 0]
        return {
            digest: {
                "sources": members,
                "weights": list(shares([counts[client] for client in members])),
            }
            for digest, members in members_by_layout(layouts, sources).items()
        }
