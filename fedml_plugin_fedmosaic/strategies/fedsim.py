"""FedSim: a shared and a personal adapter that answer together and are trained simultaneously.

With logits z_g of the model with the shared adapter w and z_l of the model with client i's own
adapter v_i, a step minimises over both::

    CE(z_g + z_l; D_i)

w becomes the average of the clients' w inside each layout of tensors; the v_i are never sent.
Evaluated: the ensemble, which adds both models' logits at every generated token.

Source: Pillutla et al. 2022 (arXiv 2204.03809), algorithm FedSim for partial model personalisation,
as the baseline "FedSim" of FedMosaic (arXiv 2506.11024), whose personal part is a second adapter.
Differences to the released code: the personal adapters are not averaged.
Its table gives FedSim 75 local steps for 100 of plain training, as if one of the two backward
passes were free. With ``accounting: counted`` both are counted, which makes 50.

Clients of different architectures: averages are made inside each signature.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fedml_plugin_fedmosaic.core.cost import Cost
from fedml_plugin_fedmosaic.core.types import (
    Branch,
    ClientContext,
    ClientState,
    SharedTensors,
    View,
)
from fedml_plugin_fedmosaic.core.work import Pass, Work
from fedml_plugin_fedmosaic.strategies.ditto import TwoBranchClient
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvg, FedAvgOptions


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FedSimOptions(FedAvgOptions):
    """Options of FedSim."""

    accounting: Literal["published", "counted"] = "published"
    """Local steps as in the published table (75 of 100), or with both backward passes (50)."""


class FedSimClient(TwoBranchClient):
    """Trains both adapters on the sum of their models' logits."""

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Receives the shared adapter, then one pass over the ensemble.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        one = Pass(
            name="ensemble",
            view=View.ENSEMBLE,
            train=frozenset({Branch.LOCAL, Branch.GLOBAL}),
            num_steps=context.num_steps,
        )
        return self.receive(downlink, state), (one,)


class FedSim(FedAvg):
    """Averages of the shared adapters."""

    name: ClassVar[str] = "fedsim"
    adapter: ClassVar[str] = "dual_lora"
    eval_view: ClassVar[str] = "ensemble"
    Options: ClassVar[type] = FedSimOptions

    def __init__(self, options: FedSimOptions) -> None:
        self.options = options
        self._accounting = options.accounting
        self._client = FedSimClient()

    @property
    def cost(self) -> Cost:
        """Two forward passes, and one or two backward passes (see ``accounting``)."""
        return Cost(forwards=2, backwards=1 if self._accounting == "published" else 2)
