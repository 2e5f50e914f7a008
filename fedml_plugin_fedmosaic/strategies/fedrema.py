"""FedReMa: everybody shares the lower layers, and the upper ones with those who answer alike.

Each client answers the same public samples; p_i(x) is its distribution over the next token where
the answer to x begins. With "head" the upper ``head_share`` of the decoder layers and "body" the
rest, inside a layout::

    s_ij  = mean over x of cos(p_i(x), p_j(x))
    K_i   = the clients above the largest gap of the sorted s_ij, j != i
    body <- mean over the round's clients of their bodies
    head_i <- mean over {i} and K_i of their heads

The gap is wide while clients differ clearly, which is when choosing peers matters most. When its
mean over the round's clients falls below ``delta`` times the largest mean so far, this critical
period is over: from then on the weights of the heads are how often each client was chosen in it (a
client itself in every round).

Source: FedReMa (Liang et al., ECAI 2024), "maximum difference segmentation" and "client
co-operation in the critical period"; its rule for the end of the period is given in words above as
far as we know it.
Differences to it: heads of language models are no classifiers over local labels, so the upper
layers' adapters are personalised, and answers to public samples take the place of the head's output
on class prototypes; the distributions are compared by random projections of ``projection`` numbers
per sample; a client's own head always counts.
Cost: one forward pass over ``probe_samples`` of the 80 public samples of a round.
Across signatures: bodies, heads and answers stay inside a layout; nothing is shared across layouts.
Answers of different vocabularies cannot be compared, so heads are not shared across them either.
A client that has not trained yet receives the body only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedml_plugin_fedmosaic.core.cost import PUBLIC_SAMPLES, Cost
from fedml_plugin_fedmosaic.core.errors import PlanError
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
from fedml_plugin_fedmosaic.equations.peers import largest_gap
from fedml_plugin_fedmosaic.strategies.base import ServerState, StrategyBase
from fedml_plugin_fedmosaic.strategies.common import (
    ClientMatrix,
    by_target,
    check_participants,
    mean_row,
    members_by_layout,
    shares,
    weight_matrix,
)
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvgClient
from fedml_plugin_fedmosaic.strategies.vectors import (
    in_channels,
    layer_tensors,
    projection_note,
    receive_layers,
    unit_rows,
    with_notes,
)

NOTE = "answers"
BODY, HEAD = "body", "head"
_PROBE, _MODEL = "answers", "model"
_LASTING = ("bodies", "counts", "gaps", "over")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FedReMaOptions:
    """Options of FedReMa."""

    head_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the decoder layers, from the top, that is personalised; 1: all."""
    probe_samples: Annotated[int, Field(ge=1, le=PUBLIC_SAMPLES)] = 32
    """Public samples whose answers are compared."""
    projection: Annotated[int, Field(ge=1)] = 64
    """Numbers of the random projection of each answer's distribution."""
    delta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The critical period ends when the mean gap is below this share of its largest; 0: never."""


class FedReMaClient(FedAvgClient):
    """Trains, answers the public samples, uploads body and head.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: FedReMaOptions) -> None:
        self._options = options

    def received(self, downlink: SharedTensors, state: ClientState) -> AdapterState:
        """The adapter with body and head replaced, as far as they were received.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        return receive_layers(state.adapter, downlink, state.client_id)

    def advance(
        self, results: Mapping[str, Result], state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """After training, the answers; after these, nothing more."""
        seen = results.get(_PROBE)
        if isinstance(seen, ProbeResult):
            return replace(state, extra={**state.extra, NOTE: self._answers(seen, context)}), ()
        probe = Probe(
            name=_PROBE,
            models={_MODEL: ModelRef(view=View.LOCAL)},
            samples=Samples.PUBLIC,
            limit=self._options.probe_samples,
            what="logits",
        )
        return state, (probe,)

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Uploads body and head in channels of their own, and the answers in the header."""
        update, after = super().finish(result, state, context, header)
        layers = layer_tensors(update.tensors)
        first = len(layers) - math.ceil(self._options.head_share * len(layers))
        tensors = in_channels(layers, lambda place: HEAD if place >= first else BODY)
        update = with_notes(replace(update, tensors=tensors), **{NOTE: state.extra[NOTE]})
        return update, after

    def _answers(self, seen: ProbeResult, context: ClientContext) -> dict[str, list[float]]:
        """Public sample -> projected distribution of the first token of its answer."""
        return {
            name: projection_note(
                {"distribution": seen.tensors[f"{_MODEL}/{name}"][0].softmax(dim=0)},
                self._options.projection,
                context.seed,
            )
            for name in sorted(seen.labels)
        }


class FedReMa(StrategyBase):
    """One body per layout, and a head of its own for every client."""

    name: ClassVar[str] = "fedrema"
    adapter: ClassVar[str] = "lora"
    needs_public: ClassVar[bool] = True
    Options: ClassVar[type] = FedReMaOptions

    def __init__(self, options: FedReMaOptions) -> None:
        self.options = options
        self._client = FedReMaClient(options)

    @property
    def cost(self) -> Cost:
        """Plain training, and the answers to some public samples."""
        return Cost(public=self.options.probe_samples / PUBLIC_SAMPLES)

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers the clients, their vocabularies and the seed; nobody has answered yet.

        Raises:
            PlanError: no client, or an id twice.
        """
        empty: dict[str, Any] = {"answers": {}, **{name: {} for name in _LASTING}}
        vocabularies = {str(manifest.client_id): manifest.vocabulary for manifest in manifests}
        return {**super().init(manifests, seed), "vocabularies": vocabularies, **empty}

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """A body for everyone whose layout was trained, a head for everyone who has trained.

        Raises:
            PlanError: a header of an unknown client, two of one client, or without answers.
        """
        check_participants(state["layouts"], [header.client_id for header in headers])
        fresh = {str(header.client_id): self._taken(header) for header in headers}
        after: dict[str, Any] = {**state, **{name: dict(state[name]) for name in _LASTING}}
        after["answers"] = {**state["answers"], **fresh}
        everyone = [int(client) for client in state["layouts"]]
        bodies: list[MixRow] = []
        heads: list[MixRow] = []
        similarity = ClientMatrix(everyone)
        for digest, receivers in members_by_layout(state["layouts"], everyone).items():
            trained = [client for client in receivers if str(client) in fresh]
            if trained:
                after["bodies"][digest] = trained
            sources = after["bodies"].get(digest, [])
            if not sources:
                continue
            if self.options.head_share < 1:
                bodies += [mean_row(client, sources) for client in receivers]
            answered = [client for client in receivers if str(client) in after["answers"]]
            for vocabulary in sorted({state["vocabularies"][str(client)] for client in answered}):
                members = [c for c in answered if state["vocabularies"][str(c)] == vocabulary]
                likeness = _likeness([after["answers"][str(client)] for client in members])
                similarity.put(members, members, likeness)
                trained = [client for client in members if str(client) in fresh]
                heads += self._heads(after, f"{digest}/{vocabulary}", members, trained, likeness)
        plan = MixingPlan(
            rows=by_target({BODY: bodies, HEAD: heads}),
            relevance=similarity.values,
            weights=weight_matrix(everyone, heads),
        )
        return after, plan

    def _taken(self, header: UpdateHeader) -> Tensor:
        """(samples, projection) of a header's answers."""
        answers = header.notes.get(NOTE)
        rows = [answers[name] for name in sorted(answers)] if isinstance(answers, dict) else []
        width = self.options.projection
        table = torch.tensor(rows) if rows and {len(row) for row in rows} == {width} else None
        if table is None or not bool(table.isfinite().all()):
            raise PlanError(
                f"client {header.client_id}, round {header.round_idx + 1}: the header's note "
                f"{NOTE!r} must be {width} finite numbers per public sample",
                hint="clients and server must run the same strategy with the same options",
            )
        return table

    def _heads(
        self,
        after: dict[str, Any],
        kind: str,
        members: Sequence[int],
        trained: Sequence[int],
        likeness: Tensor,
    ) -> list[MixRow]:
        """Rows of the heads of one kind, that is layout and vocabulary.

        Counts peers and watches the gap as long as the period lasts.
        """
        chosen: dict[int, tuple[int, ...]] = {}
        widths: list[float] = []
        for place, client in enumerate(members):
            others = [other for other in range(len(members)) if other != place]
            peers, width = largest_gap([float(likeness[place, other]) for other in others])
            chosen[client] = tuple(members[others[peer]] for peer in peers)
            if client in trained and len(others) > 1:
                widths.append(width)
        gap = sum(widths) / len(widths) if widths else None
        largest = after["gaps"].get(kind, 0.0)
        if gap is not None:
            if gap < self.options.delta * largest:
                after["over"][kind] = True
            after["gaps"][kind] = max(gap, largest)
        if after["over"].get(kind, False):
            counts = {client: after["counts"].get(str(client)) for client in members}
            return [
                mean_row(client, sorted({client, *chosen[client]}))
                if counts[client] is None
                else _counted_row(client, counts[client], members)
                for client in members
            ]
        for client in trained:
            own = dict(after["counts"].get(str(client), {}))
            for peer in (client, *chosen[client]):
                own[str(peer)] = own.get(str(peer), 0) + 1
            after["counts"][str(client)] = own
        return [mean_row(client, sorted({client, *chosen[client]})) for client in members]


def _likeness(answers: Sequence[Tensor]) -> Tensor:
    """(clients, clients) float64: mean over the samples of the cosine of two answers.

    Raises:
        PlanError: the clients answered different numbers of samples.
    """
    sizes = {tuple(answer.shape) for answer in answers}
    if len(sizes) > 1:
        raise PlanError(
            f"clients of one layout answered different public samples: {sorted(sizes)}",
            hint="all clients need the same public data",
        )
    unit = unit_rows(torch.stack(list(answers)))
    likeness: Tensor = torch.einsum("isd,jsd->ij", unit, unit) / unit.shape[1]
    return likeness


def _counted_row(client: int, counts: Mapping[str, int], members: Sequence[int]) -> MixRow:
    sources = [member for member in members if counts.get(str(member), 0) > 0]
    weights = shares([counts[str(member)] for member in sources])
    return MixRow(target=client, sources=tuple(sources), weights=weights)
