"""FedDistill: federated averaging whose averages then learn from all clients' answers.

Clients train and send their adapters and their logits z_k on public samples. Per layout of tensors
the server averages the adapters and trains the average for an epoch on the public samples to
minimise, on the supervised tokens and with T = 2::

    KL(softmax(zbar / T) || softmax(z / T))      zbar = mean over the clients k of z_k

zbar takes in the last logits of every client that ever took part, whatever its architecture. The
trained average is what the clients of the layout start from. Evaluated: the local model.

Clients whose tokenizer has the vocabulary v are averaged as above, and the average learns from all
these means::

    sum over v of n_v / n KL(softmax(tau(zbar_v) / T) || softmax(z / T))

n_v of the n clients have vocabulary v; tau puts the mean's most probable tokens into the student's
words ("Choose a strategy" says how). Up to a constant that is the divergence from the mean of these
distributions.

Source: ensemble distillation, Lin et al. 2020 (FedDF, arXiv 2006.07242), as the baseline
"FedDistill" of FedMosaic (arXiv 2506.11024), which leaves the factor T^2 out.
Differences to the released code: public samples come from ``data.public`` (a reserved share of the
clients' tasks by default); every architecture whose clients took part is distilled; between
vocabularies distributions are averaged (there, 128 probabilities of aligned tokens are mixed with
other teachers' logits).

Clients of different architectures: adapters are averaged inside each signature; logits teach
everyone, translated between vocabularies (``vocabularies: own`` keeps them inside). Compute: the
table of FedMosaic has no row for FedDistill; what server and clients do with public samples is
counted as 1.75 forward passes per public sample and client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedml_plugin_fedmosaic.core.cost import Cost
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
    View,
    channel_of,
)
from fedml_plugin_fedmosaic.core.work import (
    Distillation,
    LocalResult,
    Pass,
    Result,
    Samples,
    Work,
)
from fedml_plugin_fedmosaic.strategies.base import SERVER, TRAIN, ServerState
from fedml_plugin_fedmosaic.strategies.common import (
    branch_set,
    branch_upload,
    mean_row,
    only,
    receive,
)
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvg, FedAvgClient, FedAvgOptions
from fedml_plugin_fedmosaic.strategies.teaching import (
    MODEL,
    OWN,
    TranslationOptions,
    foreign_vocabulary,
    host_rows,
    logit_channel,
    named,
    own_logits,
    public_probe,
    public_state,
    seen,
    spoken_in,
    tensors_of,
    unnamed,
    voices,
    with_tensors,
)

TEACHER = "teacher"
_VOICES = "voices-"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FedDistillOptions(FedAvgOptions, TranslationOptions):
    """Options of FedDistill."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Temperature of the distillation (T)."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs over the public samples per round."""


class TaughtClient(FedAvgClient):
    """Sends logits, too; as a host it trains the server's model.

    Args:
        temperature: of the server's distillation.
        epochs: of the server's distillation.
        branch: which branch is shared.
        view: the view of the shared model.
        top_tokens: per position of logits in another vocabulary.
    """

    def __init__(
        self,
        temperature: float,
        epochs: int,
        branch: Branch = Branch.LOCAL,
        view: View = View.LOCAL,
        *,
        top_tokens: int,
    ) -> None:
        self._temperature = temperature
        self._epochs = epochs
        self._top_tokens = top_tokens
        self._branch = branch
        self._view = view

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Trains as usual; in the stage ``server`` the average, on the teachers' logits.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        if context.stage == TRAIN:
            return self.prepare_training(only(downlink, CHANNEL_CONV), state, context)
        average = self._average(downlink, state)
        state = replace(state, sets={**state.sets, MODEL: average})
        return self.prepare_server(downlink, state, context)

    def prepare_training(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """The local work of a round, from a downlink of adapter tensors."""
        return super().prepare(downlink, state, context)

    def prepare_server(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """The server's work, when the average is the set ``server``."""
        own = logit_channel(context.manifest.vocabulary)
        slots = sorted({channel_of(k) for k in downlink if k.startswith((f"{own}/", _VOICES))})
        terms = [
            replace(self.taught(slot, downlink, context), weight=_weight(slot)) for slot in slots
        ]
        state = with_tensors(state, TEACHER, self.answers(slots, downlink))
        return state, (self.server_pass(MODEL, tuple(terms), context),) if terms else ()

    def taught(self, slot: str, downlink: SharedTensors, context: ClientContext) -> Distillation:
        """What the server's model learns from the logits of a slot, with weight 1."""
        vocabulary = foreign_vocabulary(slot, context.manifest.vocabulary)
        return Distillation(
            weight=1.0,
            temperature=self._temperature,
            targets=f"{TEACHER}/{slot}",
            vocabularies=dict.fromkeys(unnamed(downlink, slot), vocabulary) if vocabulary else {},
            top_k=self._top_tokens,
        )

    @staticmethod
    def answers(slots: Sequence[str], downlink: SharedTensors) -> dict[str, Tensor]:
        """The logits of some slots by ``<slot>/<sample key>``."""
        return {
            f"{slot}/{key}": value
            for slot in slots
            for key, value in unnamed(downlink, slot).items()
        }

    def server_pass(
        self, into: str, terms: tuple[Distillation, ...], context: ClientContext
    ) -> Pass:
        """Trains a copy of the average on the public samples."""
        return Pass(
            name=into,
            view=self._view,
            train=frozenset({self._branch}),
            num_steps=max(1, context.public_steps * self._epochs),
            task_weight=0.0,
            distil=terms,
            overlay=(MODEL,),
            into=into,
            samples=Samples.PUBLIC,
        )

    def _average(self, downlink: SharedTensors, state: ClientState) -> AdapterState:
        received = receive(
            state.adapter, only(downlink, CHANNEL_CONV), self._branch, state.client_id
        )
        return branch_set(received, self._branch)

    def advance(
        self, results: Mapping[str, Result], state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """After training, asks for the shared model's logits on the public samples."""
        if context.stage != TRAIN:
            return state, ()
        found = seen(results)
        if found is None:
            return state, (public_probe(self._view),)
        return with_tensors(state, OWN, own_logits(found)), ()

    def finish(
        self,
        result: LocalResult,  # noqa: ARG002 - the contract's signature
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Sends adapter and logits; a host the trained average."""
        if context.stage == SERVER:
            tensors = branch_upload(self.server_model(state), self._branch, MODEL)
            sets = {
                name: value for name, value in state.sets.items() if name.partition(".")[0] != MODEL
            }
            clean = with_tensors(replace(state, sets=sets), TEACHER, {})
            return ClientUpdate(header=header, tensors=tensors), clean
        logits = named(logit_channel(context.manifest.vocabulary), tensors_of(state, OWN))
        tensors = {**branch_upload(state.adapter, self._branch), **logits}
        return ClientUpdate(header=header, tensors=tensors), with_tensors(state, OWN, {})

    def server_model(self, state: ClientState) -> AdapterState:
        """What a host sends."""
        return state.sets[MODEL]


class FedDistill(FedAvg):
    """Averages that learn from all clients' logits."""

    name: ClassVar[str] = "feddistill"
    needs_public: ClassVar[bool] = True
    Options: ClassVar[type] = FedDistillOptions

    def __init__(self, options: FedDistillOptions) -> None:
        self.options = options
        self._translation: TranslationOptions = options
        self._client = TaughtClient(
            options.temperature, options.epochs, top_tokens=options.top_tokens
        )

    @property
    def translates(self) -> bool:
        """As the option ``vocabularies`` says."""
        return self._translation.translates

    @property
    def cost(self) -> Cost:
        """Clients' logits, and their part of the server's work (10 clients of 2 to 3 models)."""
        return Cost(public=1.75)

    @property
    def stages(self) -> tuple[str, ...]:
        """Training, then the server's."""
        return (TRAIN, SERVER)

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers clients, vocabularies and hosts.

        Raises:
            PlanError: no client, an id twice, or a client without a vocabulary.
        """
        return {**super().init(manifests, seed), **public_state(manifests)}

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,
    ) -> tuple[ServerState, MixingPlan]:
        """The averages and the teachers' logits go to the hosts.

        Raises:
            PlanError: a header of an unknown client, or two of one client.
        """
        after, averages = super().plan(state, headers, relevance)
        taught = sorted({*state["taught"], *(header.client_id for header in headers)})
        after = {**after, "taught": taught}
        hosts = set(self.hosts(after))
        rows = {CHANNEL_CONV: _to(averages.rows.get(CHANNEL_CONV, ()), hosts)}
        slots: dict[str, str] = {}
        for host in sorted(hosts):
            for slot, channel, sources in self.teachers(after, host):
                rows[slot] = (*rows.get(slot, ()), mean_row(host, sorted(sources)))
                if slot != channel:
                    slots[slot] = channel
        rows = {slot: made for slot, made in rows.items() if made}
        plan = replace(averages, rows=rows, slots=slots, internal=frozenset(rows))
        return after, plan

    def hosts(self, state: ServerState) -> tuple[int, ...]:
        """Hosts of the layouts that have an average, ascending."""
        hosts: Mapping[str, int] = state["hosts"]
        return tuple(sorted(hosts[layout] for layout in state["averages"]))

    def teachers(self, state: Mapping[str, Any], host: int) -> list[tuple[str, str, Sequence[int]]]:
        """Slots that a host receives: name, channel, and whose logits are averaged."""
        own = state["vocabularies"][str(host)]
        found = voices(state, state["taught"], host, self._translation)
        if set(found) == {own}:
            return [(logit_channel(own), logit_channel(own), found[own])]
        total = sum(map(len, found.values()))
        return [
            (
                spoken_in(f"{_VOICES}{len(clients)}-of-{total}", vocabulary),
                logit_channel(vocabulary),
                clients,
            )
            for vocabulary, clients in found.items()
        ]

    def select_stage(
        self,
        state: ServerState,
        stage: str,
        round_idx: int,
        cohort: Sequence[int],
    ) -> tuple[int, ...]:
        """The hosts."""
        del stage, round_idx, cohort
        return self.hosts(state)

    def plan_stage(
        self, state: ServerState, stage: str, headers: Sequence[UpdateHeader]
    ) -> tuple[ServerState, MixingPlan]:
        """Every client receives its layout's trained average, in the place of the average."""
        del stage
        rows = host_rows(state, [header.client_id for header in headers])
        if not rows:
            return state, MixingPlan()
        return state, MixingPlan(rows={CHANNEL_CONV: rows}, slots={CHANNEL_CONV: MODEL})


def _weight(slot: str) -> float:
    """Share of the clients that a slot's mean is of."""
    if not slot.startswith(_VOICES):
        return 1.0
    count, _, total = slot.partition("@")[0].removeprefix(_VOICES).partition("-of-")
    return int(count) / int(total)


def _to(rows: Sequence[MixRow], targets: set[int]) -> tuple[MixRow, ...]:
    return tuple(row for row in rows if row.target in targets)
