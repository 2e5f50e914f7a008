"""FedMKT: server models and clients teach each other on public samples; nothing is averaged.

The server keeps one adapter per layout of tensors, its *server model*. With l_k(x) the loss of
client k on public sample x and z_k(x) its logits on the supervised tokens, a round is:

1. every client trains on its own data and sends z_k and l_k;
2. each server model m takes, per sample, the client b with the smallest loss, and trains for an
   epoch on the samples on which b is better than itself::

       sum over x with l_b(x) < l_m(x) of  CE(z_m(x), softmax(tau(z_b(x))))

3. it sends its own new logits and losses to the clients of its layout, and each client trains for
   an epoch on the samples on which the server model is better, with the same loss.

tau is the token alignment: where the teacher has another vocabulary than the student, its most
probable tokens are put into the student's words ("Choose a strategy" says how). Then losses are
compared as sums over the tokens of the answer, because tokenizers cut an answer into more or fewer
tokens; inside a vocabulary means and sums have the same order. Evaluated: the local model.

Source: Fan et al. 2024 (arXiv 2406.02224), as the baseline "FedMKT" of FedMosaic
(arXiv 2506.11024). Differences to the released code: what a client learned from the server is not
undone by the optimizer's old weights in its next round; probabilities of tokens that become one are
added (there, the larger one is kept); the means of losses are not compared across vocabularies.

Clients of different architectures: no adapter is exchanged; they teach each other through the
server models, translated between vocabularies (``vocabularies: own`` keeps them inside). Compute:
clients and server together count 6 forward passes per public sample and client, which makes the 60
steps of the published table.
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
    LOGITS,
    LOSS,
    MODEL,
    OWN,
    TranslationOptions,
    answers_in,
    foreign_vocabulary,
    host_rows,
    named,
    own_logits,
    public_probe,
    public_state,
    sample_losses,
    seen,
    spoken_in,
    tensors_of,
    voices,
    with_tensors,
)

TRANSFER = "transfer"
"""The stage in which clients learn from the server's models."""

TEACHER = "teacher"
_SAMPLE = "sample"
_LOSSES = "public losses"
_TOKENS = "public tokens"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FedMKTOptions(TranslationOptions):
    """Options of FedMKT."""

    epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs over the chosen public samples, of servers and clients."""


def sample_channel(index: int, vocabulary: str) -> str:
    """The channel of one public sample, so that each has its own teacher."""
    return spoken_in(f"{_SAMPLE}{index}", vocabulary)


def _check_channels(downlink: SharedTensors, client_id: int) -> None:
    known = (spoken_in(MODEL, ""), _SAMPLE)
    unknown = sorted(name for name in downlink if not name.startswith(known))
    if unknown:
        raise PlanError(
            f"downlink of client {client_id}: {unknown[0]!r} is no answer to a public sample"
        )


def _answers(result: ProbeResult) -> dict[str, dict[str, Tensor]]:
    """Sample key -> logits (tokens, vocabulary) and loss (1,)."""
    losses = sample_losses(result)
    return {
        key: {LOGITS: logits, LOSS: torch.tensor([losses[key]])}
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
        received = answers_in(downlink, wanted, context.manifest.vocabulary)
        state = with_tensors(state, TEACHER, received)
        if context.stage == SERVER:
            return state, (public_probe(View.LOCAL, (MODEL,)),)
        extra = state.extra
        return self._learn(state, extra.get(_LOSSES, {}), extra.get(_TOKENS, {}), context)

    def _learn(
        self,
        state: ClientState,
        losses: Mapping[str, float],
        tokens: Mapping[str, int],
        context: ClientContext,
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Keeps the samples on which the teacher is better; trains if there are any."""
        better: dict[str, Tensor] = {}
        vocabularies: dict[str, str] = {}
        received = tensors_of(state, TEACHER)
        for name, logits in received.items():
            part, _, key = name.partition("/")
            if part == LOSS or key not in losses:
                continue
            own, other = losses[key], float(received[f"{LOSS}/{key}"])
            vocabulary = foreign_vocabulary(part, "")
            if vocabulary:
                own, other = own * tokens[key], other * len(logits)
            if other < own:
                better[key] = logits
                if vocabulary:
                    vocabularies[key] = vocabulary
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
            distil=(
                Distillation(
                    weight=1.0,
                    targets=TEACHER,
                    vocabularies=vocabularies,
                    top_k=self._options.top_tokens,
                    kind="soft_ce",
                ),
            ),
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
        tokens = {key: len(labels) for key, labels in found.labels.items()}
        state, work = self._learn(state, sample_losses(found), tokens, context)
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
            known = (_LOSSES, _TOKENS)
            extra = {key: value for key, value in state.extra.items() if key not in known}
            return ClientUpdate(header=header, tensors={}), replace(clean, extra=extra)
        if context.stage == SERVER:
            channel = spoken_in(MODEL, context.manifest.vocabulary)
            return ClientUpdate(header=header, tensors=named(channel, answers)), clean
        vocabulary = context.manifest.vocabulary
        keys = sorted(key.partition("/")[2] for key in answers if key.startswith(f"{LOSS}/"))
        losses = {key: float(answers[f"{LOSS}/{key}"]) for key in keys}
        tensors = {
            f"{sample_channel(index, vocabulary)}/{part}/{key}": answers[f"{part}/{key}"]
            for index, key in enumerate(keys)
            for part in (LOGITS, LOSS)
        }
        tokens = {key: len(answers[f"{LOGITS}/{key}"]) for key in keys}
        notes = {
            "losses": [losses[key] for key in keys],
            "tokens": [tokens[key] for key in keys],
        }
        header = replace(header, notes=notes)
        extra = {**state.extra, _LOSSES: losses, _TOKENS: tokens}
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
    def translates(self) -> bool:
        """As the option ``vocabularies`` says."""
        return self.options.translates

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
        public = public_state(manifests)
        return {"seed": seed, "layouts": layouts, **public, "losses": {}, "tokens": {}}

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """Per public sample, the best client's answer goes to every host.

        Raises:
            PlanError: a header of an unknown client, or two of one client.
        """
        check_participants(state["layouts"], [header.client_id for header in headers])
        after = {**state, **{part: _noted(state, headers, part) for part in ("losses", "tokens")}}
        rows: dict[str, list[MixRow]] = {}
        for host in sorted(set(state["hosts"].values())):
            for index, best in enumerate(self._best(after, host)):
                channel = sample_channel(index, state["vocabularies"][str(best)])
                row = MixRow(target=host, sources=(best,), weights=(1.0,))
                rows.setdefault(channel, []).append(row)
        made = {channel: tuple(found) for channel, found in rows.items()}
        return after, MixingPlan(rows=made, internal=frozenset(made))

    def _best(self, state: Mapping[str, Any], host: int) -> list[int]:
        """Per public sample the client with the smallest loss; of several the smallest id."""
        losses: Mapping[str, Sequence[float]] = state["losses"]
        found = voices(state, sorted(map(int, losses)), host, self.options)
        known = sorted(client for clients in found.values() for client in clients)
        count = max((len(losses[str(client)]) for client in known), default=0)
        # Sums over the answer's tokens say the same in every vocabulary; means do not.
        tokens: Mapping[str, Sequence[int]] = state["tokens"] if len(found) > 1 else {}
        return [
            min((_loss(losses[str(k)], tokens.get(str(k), ()), index), k) for k in known)[1]
            for index in range(count)
        ]

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
        vocabularies: Mapping[str, str] = state["vocabularies"]
        rows: dict[str, list[MixRow]] = {}
        for row in host_rows(state, [header.client_id for header in headers]):
            source, target = vocabularies[str(row.sources[0])], vocabularies[str(row.target)]
            if source == target or self.translates:
                rows.setdefault(spoken_in(MODEL, source), []).append(row)
        return state, MixingPlan(rows={slot: tuple(found) for slot, found in rows.items()})


def _noted(
    state: Mapping[str, Any], headers: Sequence[UpdateHeader], part: str
) -> dict[str, list[Any]]:
    """Client -> a part of its notes, the last one that it sent."""
    new = {str(header.client_id): list(header.notes.get(part, ())) for header in headers}
    return {**state.get(part, {}), **new}


def _loss(losses: Sequence[float], tokens: Sequence[int], index: int) -> float:
    # A comparison with NaN is false: a model that diverged could be the best of all.
    if index >= len(losses) or not math.isfinite(losses[index]):
        return math.inf
    return losses[index] * (tokens[index] if tokens else 1)
