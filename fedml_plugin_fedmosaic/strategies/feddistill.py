"""FedDistill: federated averaging whose averages then learn from all clients' answers.

Clients train and send their adapters and their logits z_k on public samples. Per layout of tensors
the server averages the adapters and trains the average for an epoch on the public samples to
minimise, on the supervised tokens and with T = 2::

    KL(softmax(zbar / T) || softmax(z / T))      zbar = mean over the clients k of z_k

zbar takes in the last logits of every client that ever took part, whatever its architecture. The
trained average is what the clients of the layout start from. Evaluated: the local model.

Source: ensemble distillation, Lin et al. 2020 (FedDF, arXiv 2006.07242), as the baseline
"FedDistill" of FedMosaic (arXiv 2506.11024), which leaves the factor T^2 out.
Differences to the released code: public samples come from ``data.public`` (a reserved share of the
clients' tasks by default); every architecture whose clients took part is distilled; logits of
clients with another vocabulary are left out (there, 128 probabilities of aligned tokens are mixed
with other teachers' logits).

Clients of different architectures: adapters are averaged inside each signature, logits inside each
vocabulary. Compute: the table of FedMosaic has no row for FedDistill; what server and clients do
with public samples is counted as 1.75 forward passes per public sample and client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

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
from fedml_plugin_fedmosaic.strategies.common import branch_set, branch_upload, only, receive
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvg, FedAvgClient, FedAvgOptions
from fedml_plugin_fedmosaic.strategies.teaching import (
    MODEL,
    OWN,
    host_rows,
    logit_channel,
    mean_row,
    named,
    own_logits,
    public_probe,
    public_state,
    seen,
    tensors_of,
    unnamed,
    with_tensors,
)

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FedDistillOptions(FedAvgOptions):
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
    """

    def __init__(
        self,
        temperature: float,
        epochs: int,
        branch: Branch = Branch.LOCAL,
        view: View = View.LOCAL,
    ) -> None:
        self._temperature = temperature
        self._epochs = epochs
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
        teacher = unnamed(downlink, logit_channel(context.manifest.vocabulary))
        term = Distillation(weight=1.0, temperature=self._temperature, targets=TEACHER)
        return with_tensors(state, TEACHER, teacher), (self.server_pass(MODEL, (term,), context),)

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
        self._client = TaughtClient(options.temperature, options.epochs)

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
                rows[slot] = (*rows.get(slot, ()), mean_row(host, sources))
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
        vocabulary = state["vocabularies"][str(host)]
        sources = [k for k in state["taught"] if state["vocabularies"][str(k)] == vocabulary]
        channel = logit_channel(vocabulary)
        return [(channel, channel, sources)] if sources else []

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


def _to(rows: Sequence[MixRow], targets: set[int]) -> tuple[MixRow, ...]:
    return tuple(row for row in rows if row.target in targets)
