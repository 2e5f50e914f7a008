"""IFCA: several models per signature; every client picks the one that fits its data best.

For each layout (clients with tensors of equal shapes) there are J models W_j. In a round client i::

    j_i = argmin over j of the mean loss of W_j on some of the round's samples
    trains from W_{j_i} and uploads theta_i together with j_i

    W_j = sum over i with j_i = j of p_i theta_i     p_i = 1 / members        (weighting: uniform)
                                                     p_i = n_i / sum of n     (num_examples)

Source: IFCA, the iterative federated clustering algorithm (Ghosh et al., NeurIPS 2020, arXiv
2006.04088), with model averaging.
Differences to it: the J models start from what the clients made of their own adapters in their
first round, clustered by k-means from a farthest-first start (on random projections of
``projection`` numbers), because J equal or random models of a layout would be a poor start for
adapters; the sum runs over all clients whose last choice was j, with their last uploads, so a model
survives rounds in which its clients sit out; a model that was nobody's last choice is not sent any
more, and clients go on comparing the copy that they have.
Cost: J forward passes over ``probe_samples`` samples per round, counted as a share of the 400
samples of plain local training; J downloads instead of one.
Across signatures: choosing is per layout; nothing is shared across layouts. Where a layout has no
more than J clients, each of them begins with a model of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedml_plugin_fedmosaic.core.cost import PLAIN_SAMPLES, Cost
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import (
    CHANNEL_CONV,
    Branch,
    ClientContext,
    ClientState,
    ClientUpdate,
    MixingPlan,
    MixRow,
    Relevance,
    SharedTensors,
    UpdateHeader,
    View,
)
from fedml_plugin_fedmosaic.core.work import (
    LocalResult,
    ModelRef,
    Probe,
    ProbeResult,
    Result,
    Samples,
    Work,
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
    local_keys,
    local_pass,
    members_by_layout,
    receive,
    shares,
    weight_matrix,
)
from fedml_plugin_fedmosaic.strategies.vectors import with_notes

CHOICE = "cluster"
_PROBE = "choose"
_PREFIX = "model"
_START_ITERATIONS = 10


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class IFCAOptions:
    """Options of IFCA."""

    clusters: Annotated[int, Field(ge=1)] = 2
    """Models per layout (J)."""
    probe_samples: Annotated[int, Field(ge=1)] = 16
    """Samples on which a client compares the models."""
    weighting: Literal["uniform", "num_examples"] = "uniform"
    """Weights inside a cluster: equal, or by the samples of each client's last round."""
    projection: Annotated[int, Field(ge=1)] = 512
    """Numbers of the random projection by which the first clusters are made."""


class IFCAClient(ProjectingClient):
    """Compares the models, trains the best one.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: IFCAOptions) -> None:
        super().__init__(options.projection)
        self._options = options

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Keeps the models and looks at them; trains the own adapter while there are none.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        sets = dict(state.sets)
        by_model: dict[str, dict[str, Any]] = {}
        for name, tensor in downlink.items():
            slot, _, rest = name.partition("/")
            by_model.setdefault(slot, {})[f"{CHANNEL_CONV}/{rest}"] = tensor
        keys = local_keys(state.adapter).values()
        for slot, tensors in sorted(by_model.items()):
            if not slot.startswith(_PREFIX):
                raise PlanError(f"client {state.client_id} received {slot!r}, which is no model")
            adapter = receive(state.adapter, tensors, Branch.LOCAL, state.client_id)
            sets[slot] = {key: adapter[key] for key in keys}
        state = replace(state, sets=sets, extra={**state.extra, CHOICE: None})
        if not sets:
            return state, (local_pass(context),)
        probe = Probe(
            name=_PROBE,
            models={name: ModelRef(overlay=(name,), view=View.LOCAL) for name in sorted(sets)},
            samples=Samples.ROUND,
            limit=self._options.probe_samples,
        )
        return state, (probe,)

    def advance(
        self, results: Mapping[str, Result], state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Trains the model with the smallest loss; of equal ones the first.

        Raises:
            PlanError: no loss of any model is finite.
        """
        seen = results.get(_PROBE)
        if not isinstance(seen, ProbeResult):
            return state, ()
        losses = {name: _mean_loss(seen, name) for name in sorted(state.sets)}
        best = min(losses, key=lambda name: losses[name])
        if not math.isfinite(losses[best]):
            raise PlanError(
                f"client {state.client_id}: no model has a finite loss: {losses}",
                hint="lower the learning rate",
            )
        adapter = {**state.adapter, **{k: v.clone() for k, v in state.sets[best].items()}}
        extra = {**state.extra, CHOICE: int(best.removeprefix(_PREFIX))}
        return replace(state, adapter=adapter, extra=extra), (local_pass(context),)

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Uploads the trained tensors, the choice and a projection."""
        update, after = super().finish(result, state, context, header)
        return with_notes(update, **{CHOICE: state.extra.get(CHOICE)}), after


class IFCA(Clustered):
    """J models per layout, chosen by loss."""

    name: ClassVar[str] = "ifca"
    adapter: ClassVar[str] = "lora"
    Options: ClassVar[type] = IFCAOptions

    def __init__(self, options: IFCAOptions) -> None:
        self.options = options
        self._client = IFCAClient(options)

    @property
    def cost(self) -> Cost:
        """Plain training, and the comparison."""
        return Cost(comparisons=self.options.clusters * self.options.probe_samples / PLAIN_SAMPLES)

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """Every client gets the models of its layout, each in a slot of its own.

        Raises:
            PlanError: a header of an unknown client, two of one client, without a projection, or
                with a choice that is no model.
        """
        after = self.taken_in(state, headers, self.options.projection)
        choices = {str(header.client_id): self._choice(header) for header in headers}
        after["clusters"].update({c: made for c, made in choices.items() if made is not None})
        rows: dict[str, list[MixRow]] = {}
        chosen: list[MixRow] = []
        everyone = [int(client) for client in state["layouts"]]
        for digest, receivers in members_by_layout(state["layouts"], everyone).items():
            members = [client for client in receivers if str(client) in after["vectors"]]
            if not members:
                continue
            points = {client: after["vectors"][str(client)] for client in members}
            wanted = min(self.options.clusters, len(receivers))
            centres, belongs = self._place(
                after["centres"].get(digest), points, after["clusters"], wanted
            )
            after["centres"][digest] = centres
            after["clusters"].update({str(c): cluster for c, cluster in belongs.items()})
            for cluster in sorted(set(belongs.values())):
                inside = [client for client in members if belongs[client] == cluster]
                weights = shares(sample_counts(after, inside, self.options.weighting).values())
                made = equal_rows(receivers, inside, weights)
                rows.setdefault(f"{_PREFIX}{cluster}", []).extend(made)
                chosen += [row for row in made if belongs.get(row.target) == cluster]
        ordered = by_target(rows)
        plan = MixingPlan(
            rows=ordered,
            slots=dict.fromkeys(ordered, CHANNEL_CONV),
            weights=weight_matrix(everyone, chosen),
            groups=group_names(state["layouts"], after["clusters"]),
        )
        return after, plan

    def _choice(self, header: UpdateHeader) -> int | None:
        choice = header.notes.get(CHOICE)
        if choice is None or (type(choice) is int and 0 <= choice < self.options.clusters):
            return choice
        raise PlanError(
            f"client {header.client_id}, round {header.round_idx + 1}: chose model {choice!r}; "
            f"expected one of 0..{self.options.clusters - 1} or none"
        )

    def _place(
        self,
        centres: torch.Tensor | None,
        points: Mapping[int, torch.Tensor],
        clusters: Mapping[str, int],
        wanted: int,
    ) -> tuple[torch.Tensor, dict[int, int]]:
        """Centres of the first clustering, and the cluster of every client that has uploaded.

        Clients that have chosen are where they chose; others go to the nearest centre. As long as
        there are fewer models than ``wanted``, all clients are placed anew.
        """
        stacked = torch.stack(list(points.values()))
        ones = torch.ones(len(stacked))
        if centres is None or len(centres) < wanted:
            start = farthest_first(stacked, wanted)
            belongs, made = alternate(stacked, start, ones, _START_ITERATIONS)
            return made, dict(zip(points, belongs.tolist(), strict=True))
        belongs, _ = alternate(stacked, centres, ones, 1)
        nearest = dict(zip(points, belongs.tolist(), strict=True))
        return centres, {client: clusters.get(str(client), nearest[client]) for client in points}


def _mean_loss(seen: ProbeResult, model: str) -> float:
    """Mean over all samples of the probe; infinite if it is not a number."""
    losses = seen.losses[model]
    total = sum(losses[task] * seen.counts[task] for task in losses)
    mean = total / max(sum(seen.counts[task] for task in losses), 1)
    return mean if math.isfinite(mean) else math.inf
