"""Ditto: a global adapter by federated averaging, and a personal one that stays near it.

Client i with data D_i keeps a personal adapter v_i (never sent) and a copy w_i of the global one.
On every micro-batch of a round that begins with the received global adapter w::

    w_i <- step on CE(w_i; D_i)
    v_i <- step on CE(v_i; D_i) + lambda ||v_i - w||^2

and w becomes the average of the w_i inside each layout of tensors (uniform, or by samples).
Evaluated: v_i.

Source: Li et al. 2021 (arXiv 2012.04221), as the baseline "Ditto" of FedMosaic (arXiv 2506.11024),
which adds the squared norm over all tensors un-halved and trains both adapters on every
micro-batch, so a step costs two forward and two backward passes and a round has half the steps.
Differences to the released code: the personal adapters are not averaged (there the two branches
are averaged and overwritten in every round, so nothing is personal); the anchor w is what was
received, in the first round the common initial adapter.

Clients of different architectures: averages are made inside each signature; a client that is alone
in its signature has itself as the global adapter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedml_plugin_fedmosaic.core.cost import Cost
from fedml_plugin_fedmosaic.core.types import (
    AdapterState,
    Branch,
    ClientContext,
    ClientState,
    ClientUpdate,
    SharedTensors,
    UpdateHeader,
    View,
)
from fedml_plugin_fedmosaic.core.work import LocalResult, Objective, Pass, Proximal, Work
from fedml_plugin_fedmosaic.strategies.base import ClientBase
from fedml_plugin_fedmosaic.strategies.common import branch_set, branch_upload, receive
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvg, FedAvgOptions

ANCHOR = "received"
"""The set that holds the global adapter as it was received."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DittoOptions(FedAvgOptions):
    """Options of Ditto."""

    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.001
    """Pull of the personal adapter to the received global one (lambda)."""


class TwoBranchClient(ClientBase):
    """A personal local branch, and a global branch that is received, trained and sent."""

    def init_state(self, adapter: AdapterState, context: ClientContext) -> ClientState:
        """The freshly injected adapter; it is also the first global one."""
        return ClientState(
            client_id=context.manifest.client_id,
            adapter=dict(adapter),
            sets={ANCHOR: branch_set(adapter, Branch.GLOBAL)},
        )

    def receive(self, downlink: SharedTensors, state: ClientState) -> ClientState:
        """Overwrites the global branch by the downlink, if there is one, and notes it.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        adapter = receive(state.adapter, downlink, Branch.GLOBAL, state.client_id)
        sets = {**state.sets, ANCHOR: branch_set(adapter, Branch.GLOBAL)}
        return replace(state, adapter=adapter, sets=sets)

    def finish(
        self,
        result: LocalResult,  # noqa: ARG002 - the contract's signature
        state: ClientState,
        context: ClientContext,  # noqa: ARG002 - the contract's signature
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Sends the global branch."""
        tensors = branch_upload(state.adapter, Branch.GLOBAL)
        return ClientUpdate(header=header, tensors=tensors), state


def ditto_pass(context: ClientContext, proximal: float) -> Pass:
    """Both adapters on every micro-batch."""
    personal = Objective(
        view=View.LOCAL,
        train=frozenset({Branch.LOCAL}),
        proximal=(Proximal(weight=proximal, anchor=ANCHOR),),
    )
    return Pass(
        name="global and personal",
        view=View.GLOBAL,
        train=frozenset({Branch.GLOBAL}),
        num_steps=context.num_steps,
        also=(personal,),
    )


class DittoClient(TwoBranchClient):
    """Trains both adapters.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: DittoOptions) -> None:
        self._options = options

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Receives the global adapter, then one pass over both.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        return self.receive(downlink, state), (ditto_pass(context, self._options.proximal),)


class Ditto(FedAvg):
    """Averages of the global adapters."""

    name: ClassVar[str] = "ditto"
    adapter: ClassVar[str] = "dual_lora"
    Options: ClassVar[type] = DittoOptions

    def __init__(self, options: DittoOptions) -> None:
        self.options = options
        self._client = DittoClient(options)

    @property
    def cost(self) -> Cost:
        """Two forward and two backward passes."""
        return Cost(forwards=2, backwards=2)
