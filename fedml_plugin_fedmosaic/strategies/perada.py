"""PerAda: Ditto's clients, and a global adapter that learns from all clients' answers.

Clients train a global and a personal adapter as in Ditto::

    w_i <- step on CE(w_i; D_i)          v_i <- step on CE(v_i; D_i) + lambda ||v_i - w||^2

and send w_i and the logits of the model with w_i on public samples. Per layout of tensors the
server averages the w_i and trains the average on the public samples as FedDistill does, with the
mean of all clients' logits as the teacher. Evaluated: v_i.

Source: Xie et al. 2024 (arXiv 2302.06637), as the baseline "PerAda" of FedMosaic
(arXiv 2506.11024). Differences to the released code: the personal adapters are not averaged; those
of FedDistill. The published table gives PerAda the 50 local steps of Ditto: the server's
distillation is not counted.

Clients of different architectures: adapters are averaged inside each signature; logits teach
everyone, translated between vocabularies as in FedDistill (``vocabularies: own`` keeps them
inside).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedml_plugin_fedmosaic.core.cost import Cost
from fedml_plugin_fedmosaic.core.types import (
    AdapterState,
    Branch,
    ClientContext,
    ClientState,
    SharedTensors,
    View,
)
from fedml_plugin_fedmosaic.core.work import Work
from fedml_plugin_fedmosaic.strategies.ditto import TwoBranchClient, ditto_pass
from fedml_plugin_fedmosaic.strategies.feddistill import (
    FedDistill,
    FedDistillOptions,
    TaughtClient,
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PerAdaOptions(FedDistillOptions):
    """Options of PerAda."""

    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.001
    """Pull of the personal adapter to the received global one (lambda)."""


class PerAdaClient(TaughtClient):
    """Ditto's training, and the global model's logits.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: PerAdaOptions) -> None:
        super().__init__(
            options.temperature,
            options.epochs,
            Branch.GLOBAL,
            View.GLOBAL,
            top_tokens=options.top_tokens,
        )
        self._proximal = options.proximal
        self._two = TwoBranchClient()

    def init_state(self, adapter: AdapterState, context: ClientContext) -> ClientState:
        """The freshly injected adapter; it is also the first global one."""
        return self._two.init_state(adapter, context)

    def prepare_training(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Receives the global adapter, then one pass over both."""
        return self._two.receive(downlink, state), (ditto_pass(context, self._proximal),)


class PerAda(FedDistill):
    """Averages of the global adapters that learn from all clients' logits."""

    name: ClassVar[str] = "perada"
    adapter: ClassVar[str] = "dual_lora"
    Options: ClassVar[type] = PerAdaOptions

    def __init__(self, options: PerAdaOptions) -> None:
        self.options = options
        self._translation = options
        self._client = PerAdaClient(options)

    @property
    def cost(self) -> Cost:
        """Two forward and two backward passes, as the published table counts it."""
        return Cost(forwards=2, backwards=2)
