"""FedMKT: server models and clients teach each other on public samples; nothing is averaged.

The server keeps one adapter per layout of tensors, its *server model*. With l_k(x) the loss of
client k on public sample x and z_k(x) its logits on the supervised tokens, a round is:

1. every client trains on its own data and sends z_k and l_k;
2. each server model m takes, per sample, the client b with the smallest loss that shares its
   vocabulary, and trains for an epoch on the samples on which b is better than itself::

       sum over x with l_b(x) < l_m(x) of  CE(z_m(x), softmax(z_b(x)))

3. it sends its own new logits and losses to the clients of its layout, and each client trains for
   an epoch on the samples on which the server model is better, with the same loss.

Evaluated: the local model.

Source: Fan et al. 2024 (arXiv 2406.02224), as the baseline "FedMKT" of FedMosaic
(arXiv 2506.11024). Differences to the released code: what a client learned from the server is not
undone by the optimizer's old weights in its next round; logits of clients with another vocabulary
are left out (there, 128 probabilities of aligned tokens take their place).

Clients of different architectures: no adapter is exchanged; they teach each other inside a
vocabulary. Compute: clients and server together count 6 forward passes per public sample and
client, which makes the 60 steps of the published table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedml_plugin_fedmosaic.core.cost import Cost
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import (
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
    View,
)
from fedml_plugin_fedmosaic.core.work import (
    Distillation,
    LocalResult,
    Pass,
    ProbeResult,
    Result,
    Samples,
    Work,
)
from fedml_plugin_fedmosaic.strategies.base import (
    SERVER,
    TRAIN,
    ClientBase,
    ServerState,
    StrategyBase,
)
from fedml_plugin_fedmosaic.strategies.common import (
    branch_set,
    check_participants,
    layouts_by_client,
)
from fedml_plugin_fedmosaic.strategies.teaching import (
    MODEL,
    OWN,
    host_rows,
    own_logits,
    public_probe,
    public_state,
    sample_losses,
    seen,
    tensors_of,
    with_tensors,
)

TRANSFER = "transfer"
"""The stage in which clients learn from the server's models."""

TEACHER = "teacher"
_SAMPLE = "sample"
_LOGITS = "logits"
_LOSS = "loss"
_LOSSES = "public losses"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FedMKTOptions:
    """Options of FedMKT."""

    epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs over the chosen public samples, of servers and clients."""


def sample_channel(index: int) -> str:
    """The channel of one public sample, so that each has its own teacher."""
    return f"{_SAMPLE}{index}"


def _check_channels(downlink: SharedTensors, client_id: int) -> None:
    known = (f"{MODEL}/", _SAMPLE)
    unknown = sorted(name for name in downlink if not name.startswith(known))
    if unknown:
        raise PlanError(
            f"downlink of client {client_id}: {unknown[0]!r} is no answer to a public sample"
        )


def _answers(result: ProbeResult) -> dict[str, dict[str, Tensor]]:
    """Sample key -> logits (tokens, vocabulary) and loss (1,)."""
    losses = sample_losses(result)
    return {
        key: {_LOGITS: logits, _LOSS: torch.tensor([losses[key]])}
        for key, logits in own_logits(result).items()
    }


class FedMKTClient(ClientBase):
    """Trains, answers, and learns where others are better; a host also keeps a server model.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: FedMKTOptions) -> None:
        self._options = options

    def init_state(self, adapter: AdapterState, context: ClientContext) -> ClientState:
        """The freshly injected adapter; the server models begin with it, too."""
        return ClientState(
            client_id=context.manifest.client_id,
            adapter=dict(adapter),
            sets={MODEL: branch_set(adapter, Branch.LOCAL)},
        )

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Local training; or takes in the teachers' answers and looks at the own model.

        Raises:
            PlanError: the downlink holds something else than answers.
        """
        _check_channels(downlink, state.client_id)
        if context.stage == TRAIN:
            train = frozenset({Branch.LOCAL})
            work = Pass(name="local", view=View.LOCAL, train=train, num_steps=context.num_steps)
            return state, (work,)
        wanted = MODEL if context.stage == TRANSFER else _SAMPLE
        received = {
            name.partition("/")[2]: value
            for name, value in downlink.items()
            if name.startswith(wanted)
        }
        state = with_tensors(state, TEACHER, received)
        if context.stage == SERVER:
            return state, (public_probe(View.LOCAL, (MODEL,)),)
        return self._learn(state, state.extra.get(_LOSSES, {}), context)

    def _learn(
        self, state: ClientState, losses: Mapping[str, float], context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Keeps the samples on which the teacher is better; trains if there are any."""
        received = tensors_of(state, TEACHER)
        better = {
            key: received[f"{_LOGITS}/{key}"]
            for key, own in losses.items()
            if f"{_LOSS}/{key}" in received and float(received[f"{_LOSS}/{key}"]) < own
        }
        state = with_tensors(state, TEACHER, better)
        if not better:
            return state, ()
        on_server = context.stage == SERVER
        share = len(better) / max(len(losses), 1)
        work = Pass(
            name=context.stage,
            view=View.LOCAL,
            train=frozenset({Branch.LOCAL}),
            num_steps=max(1, round(context.public_steps * self._options.epochs * share)),
            task_weight=0.0,
            distil=(Distillation(weight=1.0, targets=TEACHER, kind="soft_ce"),),
            overlay=(MODEL,) if on_server else (),
            into=MODEL if on_server else "",
            samples=Samples.PUBLIC,
        )
        return state, (work,)

    def advance(
        self, results: Mapping[str, Result], state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """After training, looks at the public samples; a host learns, then looks again."""
        found = seen(results)
        if context.stage == TRANSFER:
            return state, ()
        if context.stage == TRAIN:
            if found is None:
                return state, (public_probe(View.LOCAL),)
            return self._answer(state, found), ()
        if found is None:
            return state, (public_probe(View.LOCAL, (MODEL,)),)
        state = self._answer(state, found)
        if not tensors_of(state, TEACHER):
            return state, ()
        state, work = self._learn(state, sample_losses(found), context)
        # Once is enough: what was received has been used.
        return state if work else with_tensors(state, TEACHER, {}), work

    def _answer(self, state: ClientState, found: ProbeResult) -> ClientState:
        """Keeps logits and losses of the public samples for the update."""
        flat = {
            f"{part}/{key}": value
            for key, parts in _answers(found).items()
            for part, value in parts.items()
        }
        return with_tensors(state, OWN, flat)

    def finish(
        self,
        result: LocalResult,  # noqa: ARG002 - the contract's signature
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Sends answers; keeps the own losses until the server's answers are there."""
        answers = tensors_of(state, OWN)
        clean = with_tensors(with_tensors(state, OWN, {}), TEACHER, {})
        if context.stage == TRANSFER:
            extra = {key: value for key, value in state.extra.items() if key != _LOSSES}
            return ClientUpdate(header=header, tensors={}), replace(clean, extra=extra)
        if context.stage == SERVER:
            tensors = {f"{MODEL}/{key}": value for key, value in sorted(answers.items())}
            return ClientUpdate(header=header, tensors=tensors), clean
        keys = sorted(key.partition("/")[2] for key in answers if key.startswith(f"{_LOSS}/"))
        losses = {key: float(answers[f"{_LOSS}/{key}"]) for key in keys}
        tensors = {
            f"{sample_channel(index)}/{part}/{key}": answers[f"{part}/{key}"]
            for index, key in enumerate(keys)
            for part in (_LOGITS, _LOSS)
        }
        header = replace(header, notes={"losses": [losses[key] for key in keys]})
        extra = {**state.extra, _LOSSES: losses}
        return ClientUpdate(header=header, tensors=tensors), replace(clean, extra=extra)


class FedMKT(StrategyBase):
    """One model per layout that learns from the best client per sample."""

    name: ClassVar[str] = "fedmkt"
    adapter: ClassVar[str] = "lora"
    needs_public: ClassVar[bool] = True
    Options: ClassVar[type] = FedMKTOptions

    def __init__(self, options: FedMKTOptions) -> None:
        self.options = options
        self._client = FedMKTClient(options)

    @property
    def cost(self) -> Cost:
        """A client's own logits, 3 for what it learns, and its part of the server's work."""
        return Cost(public=6.0)

    @property
    def stages(self) -> tuple[str, ...]:
        """Training, the server's learning, the clients' learning."""
        return (TRAIN, SERVER, TRANSFER)

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers clients, vocabularies and hosts.

        Raises:
            PlanError: no client, an id twice, or a client without a vocabulary.
        """
        layouts = layouts_by_client(manifests)
        return {"seed": seed, "layouts": layouts, **public_state(manifests), "losses": {}}

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """Per public sample, the best client's answer goes to every host of its vocabulary.

        Raises:
            PlanError: a header of an unknown client, or two of one client.
        """
        check_participants(state["layouts"], [header.client_id for header in headers])
        new = {str(header.client_id): list(header.notes.get("losses", ())) for header in headers}
        losses: dict[str, list[float]] = {**state["losses"], **new}
        rows: dict[str, list[MixRow]] = {}
        for host in sorted(set(state["hosts"].values())):
            vocabulary = state["vocabularies"][str(host)]
            known = [k for k in sorted(losses, key=int) if state["vocabularies"][k] == vocabulary]
            for index in range(max((len(losses[k]) for k in known), default=0)):
                _, best = min((_loss(losses[k], index), int(k)) for k in known)
                row = MixRow(target=host, sources=(best,), weights=(1.0,))
                rows.setdefault(sample_channel(index), []).append(row)
        made = {slot: tuple(found) for slot, found in rows.items()}
        return {**state, "losses": losses}, MixingPlan(rows=made, internal=frozenset(made))

    def select_stage(
        self, state: ServerState, stage: str, round_idx: int, cohort: Sequence[int]
    ) -> tuple[int, ...]:
        """The hosts, then the clients that trained."""
        del round_idx
        hosts: Mapping[str, Any] = state["hosts"]
        return tuple(sorted(hosts.values())) if stage == SERVER else tuple(cohort)

    def plan_stage(
        self, state: ServerState, stage: str, headers: Sequence[UpdateHeader]
    ) -> tuple[ServerState, MixingPlan]:
        """The server models' answers go to the clients of their layout."""
        if stage != SERVER:
            return state, MixingPlan()
        rows = host_rows(state, [header.client_id for header in headers])
        return state, MixingPlan(rows={MODEL: rows} if rows else {})


def _loss(losses: Sequence[float], index: int) -> float:
    return losses[index] if index < len(losses) else float("inf")
